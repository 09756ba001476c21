"""RWKV's World vocabulary as a `tiktoken.Encoding`: at each byte the longest token that
fits.

    text -> bytes -> a trie of all tokens, walked as far as it goes -> ids

rwkv_vocab_v20230424.txt has a token per line, "id repr length", with the ids 1 to
65529; 0 ends a text. The file comes with the package `rwkv`, and lies beside many
models. It is read without `eval`, and a folder keeps what was read as its
tokenizer.json. Other vocabularies of that kind work too, under names of their own.

Where the package `pyrwkv_tokenizer` is installed, and gives the same ids, it encodes
long texts, ten times faster.
"""

import ast
import functools
import hashlib
import importlib.util
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import tiktoken

from data.bpe import BYTE, END, LARGEST, Specified, finder
from data.chat import WORLD
from data.foreign import brief, read_whole, unreadable

FILE = "rwkv_vocab_v20230424.txt"
REMEDY = f"take {FILE} from the package rwkv (pip install rwkv), or from beside the model"
LINE = re.compile(r"""(\d{1,8}) (b?(?:'.*'|".*")) (\d{1,4})""")   # id, repr, length in bytes
LONGEST_LINE = 2**12
# SHA-256 of the official tokens, and of the first half of them (`digest`)
OFFICIAL = "107bf229d24c0e5a85d883f5d2c308dc6717efa9d251475e9892492537f99362"
HALF, OFFICIAL_HALF = 2**15, "cb74e5f75e7eb12166aaef1e1b32ecc0f18b351ac01e43f42bed3acb2594413a"
PAYS = 2**20   # characters after which the faster package is worth its start
LETTER = {b: letter for letter, b in BYTE.items()}


class World(Specified, tiktoken.Encoding):
    """The encoding of `tokens`: of each id its bytes, but of 0, which ends a text."""

    def __init__(self, tokens: list[bytes]):
        self.tokens, self.name, self.chat = tokens, name_of(tokens), WORLD
        self.max_token_value = len(tokens) - 1
        self._special_tokens, self._special, self._characters = {END: 0}, finder([END]), 0
        self._encode = self.walk

    @functools.cached_property
    def spec(self) -> dict:
        """What tokenizer.json holds: as a ByteLevelBPE's, but for merges and splits."""
        letters = ["".join(map(LETTER.__getitem__, token)) for token in self.tokens[1:]]
        return {"kind": "world", "tokens": [None, *letters], "special": {END: 0}, "added": {},
                "start": None, "end": 0, "stop": [0], "chat": WORLD}

    @functools.cached_property
    def trie(self) -> dict:
        """Of each node the next ones by their byte and, under -1, a token's id."""
        root = {}
        for i, token in enumerate(self.tokens[1:], 1):
            node = root
            for byte in token:
                node = node.setdefault(byte, {})
            node[-1] = i
        return root

    def walk(self, text: str | bytes) -> list[int]:
        """Ids by the trie."""
        data = text.encode() if isinstance(text, str) else text
        root, ids, at, end = self.trie, [], 0, len(data)
        while at < end:
            node, i = root, at
            while node := node.get(data[i]):
                i += 1
                if -1 in node:
                    longest, at = node[-1], i
                if i == end:
                    break
            ids.append(longest)
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a user's text: no special token, whatever it spells."""
        self._characters += len(text)
        if self._characters > PAYS and self._encode == self.walk and self.name == "world":
            self._encode, self._characters = faster(self) or self.walk, -(2**62)   # asked once
        try:
            return self._encode(text)
        except UnicodeEncodeError:   # half a surrogate pair becomes U+FFFD, as in tiktoken
            return self._encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def _encode_bytes(self, data: bytes) -> list[int]:
        return self.walk(data)

    def decode_bytes(self, tokens) -> bytes:
        return b"".join(map(self.decode_single_token_bytes, tokens))

    def decode(self, tokens, errors: str = "replace") -> str:
        return self.decode_bytes(tokens).decode("utf-8", errors)

    def decode_single_token_bytes(self, token: int) -> bytes:
        """Raises KeyError for what is no token."""
        if not 0 <= token < len(self.tokens):
            raise KeyError(token)
        return self.tokens[token] if token else END.encode()

    def token_byte_values(self) -> list[bytes]:
        return self.tokens[1:]


def digest(tokens: list[bytes]) -> str:
    """SHA-256 of tokens, of each its length and its bytes."""
    return hashlib.sha256(b"".join(len(token).to_bytes(2, "big") + token for token in tokens)).hexdigest()


def name_of(tokens: list[bytes]) -> str:
    """`world` for the official vocabulary; others are named after their tokens."""
    fingerprint = digest(tokens)
    return "world" if fingerprint == OFFICIAL else f"world-{fingerprint[:12]}"


def faster(enc: World) -> Callable[[str], list[int]] | None:
    """The package's `encode`; None where there is none, or its ids are others.

    It has a vocabulary of its own. It must give every token's id, and those of all
    tokens one behind the other.
    """
    try:
        from pyrwkv_tokenizer import RWKVTokenizer

        encode = RWKVTokenizer().encode
        texts = [token.decode("utf-8", "ignore") for token in enc.tokens[1:]]
        whole = [(i, text) for i, text in enumerate(texts, 1) if text.encode() == enc.tokens[i]]
        joined = "".join(text for _, text in whole)
        same = all(encode(text) == [i] for i, text in whole) and encode(joined) == enc.walk(joined)
    except Exception:  # whatever a package of another version does
        return None
    return encode if same else None


# ------------------------------------------------------------------------------------------
# Its file

def find_vocabulary(*places: str | Path) -> Path:
    """The official vocabulary's file: in one of the folders, or in a package.

    Raises ValueError where there is none.
    """
    folders = [Path(place) for place in places]
    for package in ("rwkv", "pyrwkv_tokenizer"):
        found = importlib.util.find_spec(package)                 # without running it
        folders += map(Path, (found and found.submodule_search_locations) or ())
    for folder in folders:
        if (folder / FILE).is_file():
            return folder / FILE
    raise ValueError(f"the World vocabulary is not here: pip install rwkv, which brings {FILE}, put that "
                     "file beside the model, or give its path as --tokenizer")


def read_vocabulary(path: str | Path) -> World:
    """The encoding of a vocabulary's file.

    Raises ValueError, with the line, for one that is damaged.
    """
    try:
        lines = read_whole(path).decode("utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no World vocabulary (no UTF-8, byte {error.start}): {REMEDY}") from None
    tokens = [b""]
    try:
        with warnings.catch_warnings(action="error"):             # of escapes that are none
            for line in lines:
                tokens.append(token_of(line.rstrip("\r"), len(tokens)))
        lines = []
        check_tokens(tokens)
    except (ValueError, SyntaxError, MemoryError, RecursionError, Warning) as error:
        place = f"line {len(tokens)}: " if lines else ""
        raise ValueError(f"{path} is no World vocabulary, or damaged ({place}{brief(error)}): "
                         f"{REMEDY}") from None
    return World(tokens)


def token_of(line: str, expected: int) -> bytes:
    """The token in a line, whose id must be the expected one."""
    match = LINE.fullmatch(line) if len(line) <= LONGEST_LINE else None
    if not match:
        raise ValueError(f'{line[:40]!r} is not "id repr length"')
    i, literal, size = int(match[1]), match[2], int(match[3])
    if i != expected:
        raise ValueError(f"the id is {i}, where {expected} is next")
    token = ast.literal_eval(literal)
    token = token.encode() if isinstance(token, str) else token
    if len(token) != size:
        raise ValueError(f"the token has {len(token)} bytes, not {size}")
    return token


def check_tokens(tokens: list[bytes]) -> None:
    """Raises ValueError for tokens that are no vocabulary, or a part of World's."""
    if not all(tokens[1:]):
        raise ValueError(f"token {tokens.index(b'', 1)} is empty")
    if max(map(len, tokens)) > LONGEST_LINE or len(tokens) > LARGEST:
        raise ValueError(f"a token has more than {LONGEST_LINE} bytes, or there are more than {LARGEST}")
    if len(set(tokens)) < len(tokens):
        seen = set()
        i = next(i for i, token in enumerate(tokens) if token in seen or seen.add(token))
        raise ValueError(f"token {i} is that of another id, too")
    absent = {bytes([byte]) for byte in range(256)} - set(tokens)
    if absent:
        raise ValueError(f"the byte {min(absent)[0]} is no token, so not every text can be read")
    if len(tokens) > HALF and digest(tokens[:HALF]) == OFFICIAL_HALF and name_of(tokens) != "world":
        raise ValueError(f"it begins as {FILE} does, and then has other tokens")


def from_spec(spec: dict) -> World:
    """The encoding that `World.spec` describes.

    Raises KeyError, TypeError or ValueError for what is none.
    """
    tokens = [bytes(BYTE[letter] for letter in token) for token in spec["tokens"][1:]]
    check_tokens([b"", *tokens])
    return World([b"", *tokens])
