"""Tokenizers by name: one interface, `tiktoken.Encoding`, and where folders name one.

`bytes` needs no download: 256 tokens, id = byte value, and `<|endoftext|>` = 256.
`gpt2`, `cl100k_base`, ... are tiktoken's, fetched once and cached. `bpe-...` is a
model's own (`bpe.py`), kept as a `tokenizer.json` beside the weights and the data; the
name is a fingerprint of all that decides ids. So is `world` (`world.py`), the
vocabulary of RWKV's models, which needs its file once. A data or model folder's
`meta.json` holds the name under "tokenizer": equal names are equal tokens.

Text is always encoded with `encode_ordinary`: a user's text that happens to spell a
special token is just text.
"""

import codecs
import json
import shutil
import zlib
from collections.abc import Collection
from pathlib import Path

import tiktoken

from config import read_text
from data.bpe import END, ByteLevelBPE, Encoding, Specified, fingerprint
from data.folder import read_meta, require_whole
from data.foreign import has_tokenizer, read_json, read_tokenizer_json
from data.pairing import advice, check_folder, rows_of
from data.world import FILE, World, find_vocabulary, from_spec, read_vocabulary


# ------------------------------------------------------------------------------------------
# By name

def get_tokenizer(name: str, beside: str | Path = ".") -> tiktoken.Encoding:
    """The encoding called `name`, or that of the file or folder `name`: one of ours, a
    Hugging Face model's, or a World vocabulary.

    The file that `world` needs may also stand in the folder `beside`. Raises ValueError
    for an unknown name, or when its files can't be had.
    """
    if not name.strip():
        raise ValueError("--tokenizer is empty: give bytes, one of tiktoken's names, world, or a model's "
                         "folder")
    path = Path(name)
    if name == "world":
        return _official(beside)
    if name == "bytes" or name in tiktoken.list_encoding_names() or not path.exists():
        return _named(name)
    if not path.is_dir() and path.suffix.lower() == ".json":
        raise ValueError(f"--tokenizer {name} is one file of a tokenizer: give the folder that holds it, "
                         f"{path.parent}")
    if not path.is_dir():
        return read_vocabulary(path)
    if (path / "meta.json").exists():
        return load_tokenizer(path)
    if not (has_tokenizer(path) or (path / FILE).exists()):
        raise ValueError(f"{name} has no tokenizer: give the folder of a model that has one (meta.json, "
                         f"tokenizer.json, vocab.json with merges.txt, or {FILE}; SentencePiece's "
                         "tokenizer.model is not supported)")
    enc = ByteLevelBPE(read_tokenizer_json(path)) if has_tokenizer(path) else read_vocabulary(path / FILE)
    check_folder(path, enc.name, enc.n_vocab)
    return enc


def _official(folder: str | Path) -> World:
    """World's, whose file may stand in the folder."""
    path = find_vocabulary(folder)
    enc = read_vocabulary(path)
    if enc.name != "world":
        raise ValueError(f"{path} is another vocabulary than World's, with {enc.n_vocab:,} tokens: to use it "
                         "give its path as --tokenizer")
    return enc


def _named(name: str) -> tiktoken.Encoding:
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        # The pattern cuts the text into single characters; with no merges among the
        # ranks each becomes its UTF-8 bytes.
        return Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={END: 256})
    if name not in tiktoken.list_encoding_names():
        choices = ", ".join(["bytes", *tiktoken.list_encoding_names(), "world"])
        raise ValueError(f"unknown tokenizer {name!r}: choose one of {choices}, or a model's folder")
    try:
        original = tiktoken.get_encoding(name)
    except Exception as error:  # requests' errors, a hash mismatch, a full disk: the remedy is the same
        raise ValueError(f"tokenizer {name!r} could not be downloaded ({type(error).__name__}): "
                         "set TIKTOKEN_CACHE_DIR to a folder that has its files, each named by the "
                         "SHA-1 of its URL; for a model of your own there is --tokenizer bytes") from error
    enc = Encoding.__new__(Encoding)  # the same, without building it a second time
    enc.__dict__ |= original.__dict__
    return enc


def opening(enc: tiktoken.Encoding) -> list[int]:
    """What stands before a document or a prompt.

    A token of its own, or the end of the document before.
    """
    start = enc.spec["start"] if isinstance(enc, Specified) else None
    return [enc.eot_token if start is None else start]


def stops(enc: tiktoken.Encoding) -> tuple[int, ...]:
    """The tokens that end a generated text."""
    return tuple(enc.spec["stop"]) if isinstance(enc, Specified) else (enc.eot_token,)


def frames_of(enc: tiktoken.Encoding) -> str:
    """A checksum of what stands around texts in rows, which the name says nothing of: a
    model and its tuned sister share the tokens, but not the chat template.
    """
    decisive = [getattr(enc, "chat", None), opening(enc), enc.eot_token]
    return f"{zlib.crc32(json.dumps(decisive, sort_keys=True).encode()):08x}"


# ------------------------------------------------------------------------------------------
# In a folder

def write_tokenizer(spec: dict, folder: str | Path) -> str:
    """Write `spec` as `folder/tokenizer.json`, and its name into `folder/meta.json`.

    Returns the name.
    """
    text = json.dumps(spec, ensure_ascii=False) + "\n"
    (Path(folder) / "tokenizer.json").write_text(text, encoding="utf-8")
    name = from_spec(spec).name if spec.get("kind") == "world" else fingerprint(spec)
    _name(name, folder)
    return name


def save_tokenizer(enc: tiktoken.Encoding, folder: str | Path) -> None:
    """Make `folder` one of `enc`'s.

    Its name goes into `meta.json`, beside whatever else is there, with its files.
    """
    if isinstance(enc, Specified):
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
    rows = rows_of(folder)
    if not isinstance(name, str):
        remedy = f"import the model again ({advice(rows)})" if rows else "prepare the data again"
        raise ValueError(f'{Path(folder) / "meta.json"} has no "tokenizer": {remedy}')
    path = Path(folder) / "tokenizer.json"
    if name == "world" and not path.exists():
        enc = _official(folder)
    elif name.startswith(("bpe-", "world")):
        enc = _read_own(path, name, meta)
    else:
        enc = _named(name)
    check_folder(folder, name, enc.n_vocab)
    return enc


def _read_own(path: Path, name: str, meta: dict) -> ByteLevelBPE | World:
    """The encoding of a tokenizer.json, which `meta` calls `name`."""
    spec = read_json(path)
    require_whole(path, meta)
    try:
        enc = from_spec(spec) if spec.get("kind") == "world" else ByteLevelBPE(spec)
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

    A character's bytes may come in several tokens; what is no UTF-8 becomes U+FFFD. The
    text ends at a token of `ends`, or where it comes to one of the `stop` texts: it is
    whole up to there, and of the stop nothing is shown. What may be the beginning of
    one is held back.
    """

    def __init__(self, enc: tiktoken.Encoding, ends: Collection[int] = (), stop: Collection[str] = ()):
        self.enc, self.ends, self.stop = enc, ends, sorted(stop, key=len, reverse=True)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held, self.ended = "", False
        self.by, self.cut = None, None  # the text that it stopped at, and the part of a token up to there
        self.open = 0                   # how many of the last tokens a character that isn't whole has

    def __call__(self, token: int | None) -> str:
        """The characters that `token` completes; None ends the text."""
        if token is None:
            rest, self.held = self.held + self.decoder.decode(b"", final=True), ""
            return rest
        if self.ended or token in self.ends:
            self.ended, self.open = True, 0
            return ""
        data = self._bytes(token)
        text = "".join(self._add(data, i) for i in range(len(data)) if not self.ended)
        self.open = self.open + 1 if self.decoder.getstate()[0] else 0
        return text

    def follow(self, tokens: Collection[int]) -> None:
        """Go on behind tokens that were shown, but for a character cut at their end."""
        self.decoder.decode(b"".join(map(self._bytes, tokens)))
        self.open = len(tokens) if self.decoder.getstate()[0] else 0

    def _bytes(self, token: int) -> bytes:
        try:
            return self.enc.decode_single_token_bytes(token)
        except KeyError:  # the model's vocabulary is larger than the tokenizer's
            return "\ufffd".encode()

    def _add(self, data: bytes, i: int) -> str:
        """What byte i of a token completes."""
        text = self.held + self.decoder.decode(data[i : i + 1])
        for stop in self.stop:
            if text.endswith(stop):
                self.by, self.cut = stop, data[: i + 1] if data[i + 1 :] else None
                self.held, self.ended = "", True
                return text.removesuffix(stop)
        # the longest end of the text that a stop begins with
        n = max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        text, self.held = text[: len(text) - n], text[len(text) - n :]
        return text

    def unread(self, token: int) -> list[int]:
        """What of the last `token` belongs to the text: nothing of an end, and of a
        token that goes on behind a stop what leads up to the stop's end.
        """
        if self.cut is None:
            return [] if token in self.ends else [token]
        ids = self.enc._encode_bytes(self.cut)  # tiktoken's: these may be no UTF-8
        return [i for i in ids if i < self.enc.n_vocab]


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
