"""Text to tokens (`prepare`, `sources`, `tokenizer`), and tokens to batches (`loader`).

The room's law: it knows of texts, tokenizers and files, and of no model.
"""
