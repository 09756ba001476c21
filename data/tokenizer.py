"""Tokenizers by name: one interface, `tiktoken.Encoding`, and where folders name one.

`bytes` needs no download: 256 tokens, id = byte value, and `<|endoftext|>` = 256.
`gpt2`, `cl100k_base`, ... are tiktoken's, fetched once and cached. `bpe-...` is a
model's own (`bpe.py`), kept as a `tokenizer.json` beside the weights and the data; the
name is a fingerprint of all that decides ids. A data or model folder's `meta.json`
holds the name under "tokenizer": equal names are equal tokens.

Text is always encoded with `encode_ordinary`: a user's text that happens to spell a
special token is just text.
"""

import codecs
import json
import shutil
from pathlib import Path

import tiktoken

from config import read_text
from data.bpe import ByteLevelBPE, Encoding, fingerprint
from data.folder import read_meta, require_whole
from data.foreign import has_tokenizer, read_json, read_tokenizer_json

END = "<|endoftext|>"


# ------------------------------------------------------------------------------------------
# By name

def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The encoding called `name`, or that of the folder `name`: one of ours, or a
    Hugging Face model's.

    Raises ValueError for an unknown name, or when its files can't be downloaded.
    """
    if not name.strip():
        raise ValueError("--tokenizer is empty: give bytes, one of tiktoken's names, or a model's folder")
    if name == "bytes" or name in tiktoken.list_encoding_names() or not Path(name).is_dir():
        return _named(name)
    is_ours = (Path(name) / "meta.json").exists() or not has_tokenizer(Path(name))
    return load_tokenizer(name) if is_ours else ByteLevelBPE(read_tokenizer_json(name))


def _named(name: str) -> tiktoken.Encoding:
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        # The pattern cuts the text into single characters; with no merges among the
        # ranks each becomes its UTF-8 bytes.
        return Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={END: 256})
    if name not in tiktoken.list_encoding_names():
        choices = ", ".join(["bytes", *tiktoken.list_encoding_names()])
        raise ValueError(f"unknown tokenizer {name!r}: choose one of {choices}, or a model's folder")
    try:
        original = tiktoken.get_encoding(name)
    except Exception as error:  # requests' errors, a hash mismatch, a full disk: the remedy is the same
        raise ValueError(f"tokenizer {name!r} could not be downloaded ({type(error).__name__}): "
                         "set TIKTOKEN_CACHE_DIR to a folder that has its files, each named by the "
                         "SHA-1 of its URL, or use --tokenizer bytes") from error
    enc = Encoding.__new__(Encoding)  # the same, without building it a second time
    enc.__dict__ |= original.__dict__
    return enc


def opening(enc: tiktoken.Encoding) -> list[int]:
    """What stands before a document or a prompt.

    A token of its own, or the end of the document before.
    """
    start = enc.spec["start"] if isinstance(enc, ByteLevelBPE) else None
    return [enc.eot_token if start is None else start]


def stops(enc: tiktoken.Encoding) -> tuple[int, ...]:
    """The tokens that end a generated text."""
    return tuple(enc.spec["stop"]) if isinstance(enc, ByteLevelBPE) else (enc.eot_token,)


# ------------------------------------------------------------------------------------------
# In a folder

def write_tokenizer(spec: dict, folder: str | Path) -> str:
    """Write `spec` as `folder/tokenizer.json`, and its name into `folder/meta.json`.

    Returns the name.
    """
    text = json.dumps(spec, ensure_ascii=False) + "\n"
    (Path(folder) / "tokenizer.json").write_text(text, encoding="utf-8")
    _name(fingerprint(spec), folder)
    return fingerprint(spec)


def save_tokenizer(enc: tiktoken.Encoding, folder: str | Path) -> None:
    """Make `folder` one of `enc`'s.

    Its name goes into `meta.json`, beside whatever else is there, with its files.
    """
    if isinstance(enc, ByteLevelBPE):
        write_tokenizer(enc.spec, folder)
    else:
        _name(enc.name, folder)


def copy_tokenizer(source: str | Path, folder: str | Path) -> None:
    """The file of the tokenizer in `source`, if it needs one, into `folder`.

    `meta.json` is the caller's.
    """
    path = Path(source) / "tokenizer.json"
    if path.exists():
        require_whole(path, read_meta(source))
        shutil.copyfile(path, Path(folder) / "tokenizer.json")


def load_tokenizer(folder: str | Path) -> tiktoken.Encoding:
    """The tokenizer that a data or model folder was made with.

    Raises ValueError if its `meta.json` doesn't say.
    """
    meta = read_meta(folder)
    name = meta.get("tokenizer")
    if not isinstance(name, str):
        raise ValueError(f'{Path(folder) / "meta.json"} has no "tokenizer": add its name, '
                         'for example "bytes"')
    if not name.startswith("bpe-"):
        return _named(name)
    path = Path(folder) / "tokenizer.json"
    spec = read_json(path)
    require_whole(path, meta)
    try:
        enc = ByteLevelBPE(spec)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): "
                         "copy it from where the folder comes from") from None
    if enc.name != name:
        raise ValueError(f"{path} holds the tokenizer {enc.name}, but meta.json beside it names {name}: "
                         "copy it from where the folder comes from")
    return enc


def _name(name: str, folder: str | Path) -> None:
    path = Path(folder) / "meta.json"
    meta = read_meta(folder) if path.exists() else {}
    path.write_text(json.dumps({**meta, "tokenizer": name}, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------
# At the terminal

class TextStream:
    """Tokens in, text out as it becomes whole.

    A character's bytes may come in several tokens; what is no UTF-8 becomes U+FFFD.
    """

    def __init__(self, enc: tiktoken.Encoding):
        self.enc, self.decoder = enc, codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, token: int | None) -> str:
        """The characters that `token` completes; None ends the text."""
        if token is None:
            return self.decoder.decode(b"", final=True)
        try:
            return self.decoder.decode(self.enc.decode_single_token_bytes(token))
        except KeyError:  # the model's vocabulary is larger than the tokenizer's
            return self.decoder.decode("\ufffd".encode())


def read_prompt(prompt: str) -> str:
    """The prompt itself, or for FILE:path what that file holds.

    Raises ValueError if it is missing, not UTF-8, or endless.
    """
    if not prompt.startswith("FILE:"):
        return prompt
    path = prompt[5:]
    try:
        return read_text(path, "prompt file")
    except OSError as e:
        raise ValueError(f"prompt file {path!r} can't be read ({e.strerror}): check the path") from None
