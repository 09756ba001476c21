"""Text to tokens (`prepare.py`, from `sources.py` by `tokenizer.py`) and tokens to batches (`loader.py`)."""
