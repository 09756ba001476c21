"""Can this tokenizer be this model's? Its size may tell that it can't.

A model has a row of its embedding for each token, and often more, for rows are rounded
up: GPT-2's 50,257 tokens to 50,304, Pythia's 50,277 to 50,688, Qwen's 151,669 to
151,936 or 152,064, World's 65,530 to 65,536, Phi-2's 50,295 to 51,200, DeepSeek's
100,015 to 102,400. The rule: at most the next multiple of 128, and 2.5 % beyond it.

With a tokenizer that has fewer tokens a model speaks, and what it says is noise. A few
more than rows are tokens that somebody has added; a text that has them is refused.
"""

import contextlib
import sys
from pathlib import Path

from data.foreign import read_json

BY_NAME = {"bytes": 257, "gpt2": 50257, "world": 65530}   # tokens of those that can be advised


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def too_small(n_tokens: int, rows: int) -> bool:
    return rows > round_up(n_tokens, 128) + n_tokens // 40


def too_large(n_tokens: int, rows: int) -> bool:
    return n_tokens > rows + rows // 40 + 256


def require_pair(name: str, n_tokens: int, rows: int) -> None:
    """Raises ValueError, with advice, where a tokenizer can't be that of a model."""
    if too_small(n_tokens, rows) or too_large(n_tokens, rows):
        raise ValueError(f"the tokenizer {name} has {n_tokens:,} tokens, the model {rows:,} rows, and "
                         f"rounding up does not explain it: it was trained with another; {advice(rows)}")


def advice(rows: int) -> str:
    """Which tokenizer to give for a model of so many rows: none that can't be right."""
    fits = [name for name, n in BY_NAME.items() if rows in (n, round_up(n, 64), round_up(n, 128))]
    if fits == ["world"]:
        return f"{rows:,} rows are those of RWKV's World models, --tokenizer world"
    own = "--tokenizer and the folder of a model with the same tokenizer, of byte-level BPE"
    if fits:
        return f"by its {rows:,} rows it may be --tokenizer {fits[0]}; else give {own}"
    return (f"of those with a name, {', '.join(BY_NAME)}, none fits {rows:,} rows; give {own} "
            "(SentencePiece is not supported)")


def instead(error: ValueError, rows: int) -> str:
    """What to do where a checkpoint's own tokenizer is refused."""
    if "only byte-level BPE" in str(error) and "rwkv" not in str(error):
        return ("No other can be this model's: take a model with byte-level BPE, or RWKV's World "
                "vocabulary")
    return f"If another file has the same tokenizer in another form: {advice(rows)}"


def rows_of(folder: str | Path) -> int | None:
    """The rows of the model in a folder, ours or Hugging Face's, by its config.json."""
    with contextlib.suppress(ValueError):
        rows = read_json(Path(folder) / "config.json").get("vocab_size")
        return rows if type(rows) is int else None
    return None


def check_folder(folder: str | Path, name: str, n_tokens: int) -> None:
    """Raises ValueError where the tokenizer in a model's folder can't be the model's.

    One that came with the model is believed, with a line on stderr.
    """
    rows = rows_of(folder)
    if rows is None:
        return
    try:
        require_pair(name, n_tokens, rows)
    except ValueError as error:
        if not name.startswith("bpe-"):
            raise ValueError(f"{folder}: {error}; import it again with that") from None
        print(f"{folder}: {error}", file=sys.stderr)
