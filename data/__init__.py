"""Text to tokens (`prepare`, `sources`, `records`, `tokenizer`), their folder (`folder`),
and tokens to batches (`loader`).

The room's law: it knows of texts, tokenizers and files, and of no model.
"""
