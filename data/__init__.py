"""Text to tokens (`prepare`, from `sources` by `tokenizer`) and tokens to batches
(`loader`).

The room's law: it knows of texts, tokenizers and files, and of no model.
"""
