"""Text to tokens (`prepare`, `sources`, `packed`, `records`, `tokenizer`, `encode`,
`spool`), the folder that keeps them (`folder`), and tokens to batches (`loader`; of
several, `mixture` and `shares`).

The room's law: it knows of texts, tokenizers and files, and of no model.
"""
