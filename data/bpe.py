"""A model's own byte-level BPE as a `tiktoken.Encoding`.

    text -> NFC, where asked for -> pieces by each split pattern in turn -> bytes
         -> merges -> ids

Where it comes from is `foreign.py`, which also says why tiktoken's merges give the same
ids as those of the model's own library.

What it is not: SentencePiece, WordPiece, or a BPE of characters.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator
from unicodedata import normalize

import regex  # re with \p{...}; tiktoken's own dependency
import tiktoken

PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
# Files write each byte as one visible character: itself where it has one, else from
# U+0100 on ("Ġ" is the space).
HIDDEN = [b for b in range(256) if b not in PRINTABLE]
BYTE = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(HIDDEN)}


LARGEST = 2**24  # ids are smaller
END = "<|endoftext|>"


class Encoding(tiktoken.Encoding):
    """tiktoken's, where a text that its engine gives up on is one ValueError."""

    def encode_ordinary(self, text: str) -> list[int]:
        with engine_errors(self.name, text):
            return super().encode_ordinary(text)


class Specified:
    """What the encodings with a `spec` share: reading text that spells special tokens.
    """

    @property
    def eot_token(self) -> int:
        return self.spec["end"]

    def encode(self, text: str, *, allowed_special: str | Collection[str] = ()) -> list[int]:
        """Ids of `text`, which may spell the tokens `allowed_special` ("all" or these).

        Other special tokens are text.
        """
        special = self._special if allowed_special == "all" else finder(allowed_special)
        return self.encode_parts([(text, True)], special)

    def encode_parts(self, parts: list[tuple[str, bool]], special: re.Pattern | None = None) -> list[int]:
        """Ids of all texts as one.

        `special` tokens (all, if None) are read where a text bearing True spells them.
        """
        ids, pending = [], ""
        for text, spells in parts:
            for n, part in enumerate((special or self._special).split(text) if spells else [text]):
                if n % 2:
                    ids += [*self.encode_ordinary(pending), self.spec["special"][part]]
                    pending = ""
                else:
                    pending += part
        return ids + self.encode_ordinary(pending)


class ByteLevelBPE(Specified, tiktoken.Encoding):
    """A model's own tokenizer. `spec`, what our tokenizer.json holds:

    tokens      every token that text can give, at its id, in visible characters
                (`BYTE`); null for other ids
    split       patterns: each cuts the pieces that the ones before it left
    normalizer  "NFC" or null
    unknown     id that stands for a byte that is no token; null: the byte is left out
    special     {spelling: id} of control tokens: only a chat template gives them, never
                a user's text
    added       {spelling: id} of tokens that are read wherever text spells them out,
                before all else
    late        where there are any: those of `added` that are looked for after the
                others, in the normalized text
    start, end  ids: what opens a document (null: the end of the one before), and what
                ends it
    stop        ids that end a generated text
    chat        the chat template's frames (`chat.py`), or null
    """

    def __init__(self, spec: dict):
        check_spec(spec)
        ranks = {bytes(BYTE[c] for c in token): i for i, token in enumerate(spec["tokens"]) if token}
        special = spec["special"] | spec["added"]
        self.spec, self.chat = spec, spec["chat"]
        *early, last = spec["split"] or [r"(?s:.)+"]
        self._early, self._last = [regex.compile(pattern) for pattern in early], last
        late = spec.get("late", [])
        self._special, self._added = finder(spec["special"]), finder(spec["added"].keys() - {*late})
        self._late_ids = {self._normal(name): spec["added"][name] for name in late}
        self._late = finder(self._late_ids)
        n = 1 + max([*ranks.values(), *special.values()])
        self._absent = bytes(b for b in range(256) if bytes([b]) not in ranks)
        # tiktoken wants a number for every byte
        ranks |= {bytes([b]): n + i for i, b in enumerate(self._absent)}
        # tiktoken drops what no match covers: here it's a piece, as in splits elsewhere
        super().__init__(fingerprint(spec), pat_str=rf"{last}|(?>(?:(?!{last})(?s:.))+)",
                         mergeable_ranks=ranks, special_tokens=special)
        self.max_token_value = n - 1

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a user's text: no special token, whatever it spells."""
        with engine_errors(self.name, text):
            return self._ordinary(text)

    def _ordinary(self, text: str) -> list[int]:
        if not self.spec["added"]:
            return self._pieces(self._normal(text))
        ids = []
        for n, part in enumerate(self._added.split(text)):  # text, token, text, ...
            if n % 2:
                ids.append(self.spec["added"][part])
                continue
            for m, rest in enumerate(self._late.split(self._normal(part))):
                ids += [self._late_ids[rest]] if m % 2 else self._pieces(rest)
        return ids

    def _normal(self, text: str) -> str:
        return normalize(self.spec["normalizer"], text) if self.spec["normalizer"] else text

    def _pieces(self, text: str) -> list[int]:
        """Ids of a normalized text without added tokens."""
        pieces = [text]
        for pattern in self._early:
            pieces = [part for piece in pieces for part in _cut(pattern, piece)]
        ids = [i for piece in pieces for i in super(ByteLevelBPE, self).encode_ordinary(piece)]
        if not self._absent or max(ids, default=0) <= self.max_token_value:
            return ids
        if self.spec["unknown"] is not None:
            return [i if i <= self.max_token_value else self.spec["unknown"] for i in ids]
        # left out as Hugging Face does it: what stood beside the byte can merge
        last = regex.compile(self._last)
        pieces = [part for piece in pieces for part in _cut(last, piece)]
        rest = (piece.encode("utf-8", "replace").translate(None, self._absent) for piece in pieces)
        return [i for piece in rest if piece for i in self._encode_single_piece(piece)]


def finder(tokens: Collection[str]) -> re.Pattern:
    """Finds any of these, at each place the longest; of none, nothing."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + ("|".join(re.escape(token) for token in longest_first) or "(?!)") + ")")


def _cut(pattern: regex.Pattern, text: str) -> Iterator[str]:
    """The matches, and what lies between them.

    Raises TimeoutError for a pattern that takes far more than one step a character.
    """
    at = 0
    for match in pattern.finditer(text, timeout=2 + len(text) / 1e5):
        yield from filter(None, (text[at : match.start()], match.group()))
        at = match.end()
    if at < len(text):
        yield text[at:]


# ------------------------------------------------------------------------------------------
# What strangers wrote: patterns that never end, and files that are no tokenizer

@contextlib.contextmanager
def engine_errors(name: str, text: str) -> Iterator[None]:
    """Makes one ValueError of what tiktoken's engine raises, and silences what it
    writes to stderr.

    It is Rust, and panics where a split pattern takes too many steps.
    """
    try:
        with _without_stderr():
            yield
    except BaseException as error:
        if type(error).__name__ != "PanicException" and not isinstance(error, TimeoutError):
            raise
        raise ValueError(f"the tokenizer {name} gives up on a text of {len(text):,} characters that begins "
                         f"with {text[:20]!r}: its split pattern takes too many steps; is there "
                         "a run of a million spaces or letters? Break it into lines") from None


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """For all of the process, not only for Python."""
    try:
        saved = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def check_spec(spec: dict) -> None:
    """Raises ValueError for what is no `spec`: other types, ids that are no ids, split
    patterns that never end.
    """
    tokens, special = spec["tokens"], {**spec["special"], **spec["added"]}
    optional = [i for key in ("unknown", "start") if (i := spec[key]) is not None]
    ids = [*special.values(), *optional, spec["end"], *spec["stop"]]
    texts = isinstance(tokens, list) and all(token is None or isinstance(token, str) for token in tokens)
    if not texts or len(tokens) > LARGEST:
        raise ValueError("tokens must be texts")
    if not {*spec.get("late", ())} <= spec["added"].keys():
        raise ValueError("late must be some of the added tokens")
    if not all(type(i) is int and 0 <= i < LARGEST for i in ids):
        raise ValueError(f"ids must be numbers from 0 to {LARGEST - 1}")
    last = max([len(tokens) - 1, *special.values()])
    if max(ids[len(special) :]) > last:
        raise ValueError(f"unknown, start, end or stop is an id above the last, {last}")
    if spec["normalizer"] not in (None, "NFC", "NFD", "NFKC", "NFKD"):
        raise ValueError(f"the normalizer is {spec['normalizer']!r}")
    for pattern in spec["split"]:
        check_pattern(pattern)
    if spec["chat"] is not None:
        _check_frames(spec["chat"])


def _check_frames(chat: dict) -> None:
    """Of `chat.py`."""
    sizes = {"user": 2, "assistant": 3} | ({"system": 2} if chat["system"] is not None else {})
    texts = [chat["default"], *(text for role in sizes for text in chat[role])]
    fits = all(isinstance(chat[role], list) and len(chat[role]) == size for role, size in sizes.items())
    if not fits or not all(isinstance(text, str) for text in texts) or type(chat["trim"]) is not bool:
        raise ValueError("chat must have the frames of system, user and assistant")


@functools.lru_cache(maxsize=64)
def check_pattern(pattern: str) -> None:
    """Raises ValueError for a split pattern that takes a power of the text's length.

    It is tried on runs of its own letters and of others.
    """
    try:
        compiled = regex.compile(pattern)
        units = {*" a1\n!é漢", *pattern, *re.findall(r"\w{2,}", pattern)}
        end = "\x00" + "".join(sorted({*pattern}))  # a match that looks possible to the last
        for unit in sorted(units)[:200]:
            for _ in compiled.finditer(unit * (1000 // len(unit)) + end, timeout=1):
                pass
    except regex.error as error:
        raise ValueError(f"the split pattern {pattern[:200]!r} can't be used: {error}") from None
    except (TimeoutError, RecursionError, MemoryError):
        raise ValueError(f"the split pattern {pattern[:200]!r} takes too many steps") from None


def fingerprint(spec: dict) -> str:
    """The tokenizer's name: a hash of what decides which ids a text gets."""
    keys = ("tokens", "split", "normalizer", "unknown", "special", "added", "late")
    decisive = {key: spec[key] for key in keys if key in spec}
    return "bpe-" + hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
