"""Text to tokens (`prepare.py`, from `sources.py` by `tokenizer.py`, `bpe.py` and `chat.py`) and tokens to batches (`loader.py`)."""
