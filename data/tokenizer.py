"""Tokenizers: one interface, `tiktoken.Encoding`, and where a folder says which one it was made with.

`bytes` needs no download: 256 tokens, id = byte value, and `<|endoftext|>` = 256. Every other name is one of
tiktoken's (`gpt2`, `cl100k_base`, ...), fetched once and cached. A data or model folder's `meta.json` holds the name
under "tokenizer".

Text is always encoded with `encode_ordinary`: a user's text that happens to spell a special token is just text.
"""

import json
from pathlib import Path

import tiktoken

END = "<|endoftext|>"


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The encoding called `name`. Raises ValueError for an unknown name, or when its files can't be downloaded."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        # The pattern cuts the text into single characters; with no merges among the ranks each becomes its UTF-8 bytes.
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={END: 256})
    if name not in tiktoken.list_encoding_names():
        choices = ", ".join(["bytes", *tiktoken.list_encoding_names()])
        raise ValueError(f"unknown tokenizer {name!r}: choose one of {choices}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # requests' errors, a hash mismatch, a full disk: the remedy is the same
        raise ValueError(
            f"tokenizer {name!r} could not be downloaded ({type(error).__name__}): set TIKTOKEN_CACHE_DIR to a folder "
            "that has its files, each named by the SHA-1 of its URL, or use --tokenizer bytes"
        ) from error


def save_tokenizer(enc: tiktoken.Encoding, folder: str | Path) -> None:
    """Write `enc`'s name into `folder/meta.json`, beside whatever else that file already says."""
    path = Path(folder) / "meta.json"
    meta = read_meta(folder) if path.exists() else {}
    path.write_text(json.dumps({**meta, "tokenizer": enc.name}, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: str | Path) -> tiktoken.Encoding:
    """The tokenizer that a data or model folder was made with. Raises ValueError if its `meta.json` doesn't say."""
    name = read_meta(folder).get("tokenizer")
    if not isinstance(name, str):
        raise ValueError(f'{Path(folder) / "meta.json"} has no "tokenizer": add its name, for example "bytes"')
    return get_tokenizer(name)


def read_meta(folder: str | Path) -> dict:
    """`folder/meta.json` as a dict. Raises ValueError if it is missing or is not a JSON object."""
    path = Path(folder) / "meta.json"
    remedy = f"make the folder again (data: python -m data.prepare SOURCE --out {folder} --overwrite)"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} does not exist: {remedy}") from None
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from None
    if not isinstance(meta, dict):
        raise ValueError(f"{path} is damaged (not a JSON object): {remedy}")
    return meta
