"""A model's own byte-level BPE as a `tiktoken.Encoding`, read from a Hugging Face tokenizer.json or from a GGUF.

    text -> NFC, where asked for -> pieces by each split pattern in turn -> bytes -> merges -> ids

Hugging Face merges a *listed pair*, first listed first. tiktoken merges any pair whose bytes are a token, lowest id first.
Two tokens l, r become neighbours in some text only if the bytes l + r alone pass through the state [l, r], for up to there
nothing outside them had a say. So one pair per token matters, the last merge of that token's own bytes, and the two rules
give the same ids in every text if (1) every token that tiktoken is given merges to itself, and (2) the ranks of these last
merges rise with the ids. `_mergeable` tries every token: those that fail (1) no text ever gives, so they are left out;
a tokenizer that fails (2) is refused.

What it is not: SentencePiece, WordPiece, or a BPE of characters. These are refused by name, and so is whatever would give
other ids than the files' own readers: other splits, normalizers, orders of ids.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from unicodedata import normalize

import regex  # re with \p{...}; tiktoken's own dependency
import tiktoken

from data.chat import read_template

ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # what stood between documents in pretraining, where a model is tuned to end turns otherwise

# How text is split into pieces, as the families publish it. No merge crosses a piece's border.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
GGUF_SPLITS = {  # by tokenizer.ggml.pre
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],  # what llama.cpp does where the file doesn't say
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), [GPT2]),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), [r"\p{N}", GPT2]),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), [LLAMA3]),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), [QWEN2]),
}
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
# Files write each byte as one visible character: itself where it has one, else from U+0100 on ("Ġ" is the space).
BYTE = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}


class ByteLevelBPE(tiktoken.Encoding):
    """A model's own tokenizer. `spec`, what our tokenizer.json holds:

    tokens      every token that text can give, at its id, in visible characters (`BYTE`); null for other ids
    split       patterns: each cuts the pieces that the ones before it left
    normalizer  "NFC" or null
    unknown     id that stands for a byte that is no token; null: such a byte is left out
    special     {spelling: id} of control tokens: only a chat template gives them, never a user's text
    added       {spelling: id} of tokens that are read wherever text spells them out, before all else
    start, end  ids: what opens a document (null: the end of the one before), what ends it
    stop        ids that end a generated text
    chat        the chat template's frames (`chat.py`), or null
    """

    def __init__(self, spec: dict):
        ranks = {bytes(BYTE[c] for c in token): i for i, token in enumerate(spec["tokens"]) if token}
        special = spec["special"] | spec["added"]
        self.spec, self.chat = spec, spec["chat"]
        *early, last = spec["split"] or [r"(?s:.)+"]
        self._early, self._last = [regex.compile(pattern) for pattern in early], last
        self._special, self._added = _finder(spec["special"]), _finder(spec["added"])
        n = 1 + max([*ranks.values(), *special.values()])
        self._absent = bytes(b for b in range(256) if bytes([b]) not in ranks)
        ranks |= {bytes([b]): n + i for i, b in enumerate(self._absent)}  # tiktoken wants a number for every byte
        # tiktoken drops what no match covers; here, as in a split elsewhere, it is a piece too.
        super().__init__(fingerprint(spec), pat_str=rf"{last}|(?>(?:(?!{last})(?s:.))+)", mergeable_ranks=ranks, special_tokens=special)
        self.max_token_value = n - 1

    @property
    def eot_token(self) -> int:
        return self.spec["end"]

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a user's text: no special token, whatever it spells."""
        if not self.spec["added"]:
            return self._pieces(text)
        parts = self._added.split(text)  # text, token, text, ...
        return [i for n, part in enumerate(parts) for i in ((self.spec["added"][part],) if n % 2 else self._pieces(part))]

    def encode(self, text: str, *, allowed_special: str | Collection[str] = ()) -> list[int]:
        """Ids of `text` where it may spell the special tokens `allowed_special` ("all", or these); the others are text."""
        return self.encode_parts([(text, True)], self._special if allowed_special == "all" else _finder(allowed_special))

    def encode_parts(self, parts: list[tuple[str, bool]], special: re.Pattern | None = None) -> list[int]:
        """Ids of all texts as one; `special` tokens (all, if None) are read where a text that bears True spells them."""
        ids, held = [], ""
        for text, spells in parts:
            for n, part in enumerate((special or self._special).split(text) if spells else [text]):
                if n % 2:
                    ids += [*self.encode_ordinary(held), self.spec["special"][part]]
                held = "" if n % 2 else held + part
        return ids + self.encode_ordinary(held)

    def _pieces(self, text: str) -> list[int]:
        if self.spec["normalizer"]:
            text = normalize(self.spec["normalizer"], text)
        pieces = [text]
        for pattern in self._early:
            pieces = [part for piece in pieces for part in _cut(pattern, piece)]
        ids = super().encode_ordinary(text) if not self._early else [i for piece in pieces for i in super(ByteLevelBPE, self).encode_ordinary(piece)]
        if self._absent and max(ids, default=0) > self.max_token_value:
            if self.spec["unknown"] is not None:
                return [i if i <= self.max_token_value else self.spec["unknown"] for i in ids]
            # left out as Hugging Face does it: what stood beside the byte can merge
            pieces = [part for piece in pieces for part in _cut(regex.compile(self._last), piece)]
            kept = filter(None, (piece.encode("utf-8", "replace").translate(None, self._absent) for piece in pieces))
            ids = [i for piece in kept for i in self._encode_single_piece(piece)]
        return ids


def _finder(tokens: Collection[str]) -> re.Pattern:
    """Finds any of these, at each place the longest; of none, nothing."""
    return re.compile("(" + ("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)") + ")")


def _cut(pattern: regex.Pattern, text: str) -> Iterator[str]:
    """The matches, and what lies between them."""
    at = 0
    for match in pattern.finditer(text):
        yield from filter(None, (text[at : match.start()], match.group()))
        at = match.end()
    if at < len(text):
        yield text[at:]


def fingerprint(spec: dict) -> str:
    """The tokenizer's name: a hash of what decides which ids a text gets."""
    decisive = {key: spec[key] for key in ("tokens", "split", "normalizer", "unknown", "special", "added")}
    return "bpe-" + hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


# --- from strangers' files ------------------------------------------------------------------------


def read_tokenizer_json(path: str | Path) -> dict:
    """The `spec` of a Hugging Face tokenizer.json, or of the folder that holds it.

    Files beside it, where they are, tell the chat template and which tokens end a text. Raises ValueError, in one line that
    names it, for what is malformed and for whatever would give other ids than there.
    """
    path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    whole = read_json(path)
    beside = {name: read_json(path.with_name(name)) if path.with_name(name).exists() else {}
              for name in ("tokenizer_config.json", "generation_config.json", "config.json")}
    try:
        model, config = whole["model"], beside["tokenizer_config.json"]
        kind = model.get("type", "BPE")
        if kind != "BPE" or model.get("byte_fallback") or "ByteLevel" not in _types(whole.get("pre_tokenizer")):
            sentencepiece = kind == "Unigram" or model.get("byte_fallback") or "▁" in str([whole.get("pre_tokenizer"), whole.get("normalizer")])
            what = "SentencePiece" if sentencepiece else "character-level BPE" if kind == "BPE" else kind
            raise ValueError(f"{path} is a {what} tokenizer: only byte-level BPE is supported (GPT-2, Llama 3, Qwen2, SmolLM2, ...)")
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "fuse_unk"):
            if model.get(key) and not (key == "fuse_unk" and model.get("unk_token") is None):
                raise ValueError(f"{path} has {key} = {model[key]!r}, which is not supported")
        added = {token["content"]: token for token in whole.get("added_tokens") or []}
        for token in added.values():
            if not token["special"] and (token["lstrip"] or token["rstrip"] or token["single_word"]):
                raise ValueError(f"{path}: the added token {token['content']!r} looks at what stands around it, which is not supported")
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        names = {key: token["content"] if isinstance(token := config.get(key), dict) else token for key in ("bos_token", "eos_token")}
        ids = {name: token["id"] for name, token in added.items()}
        ends = [i for name in ("generation_config.json", "config.json") for i in _listed(beside[name].get("eos_token_id"))]
        template = path.with_name("chat_template.jinja")
        return _spec(
            str(path), vocab=model["vocab"], merges=merges, ignore_merges=bool(model.get("ignore_merges")),
            special={name: i for name, i in ids.items() if added[name]["special"]}, added={name: i for name, i in ids.items() if not added[name]["special"]},
            split=_splits(whole["pre_tokenizer"], str(path)), normalizer=_normalizer(whole.get("normalizer"), str(path)),
            unknown=model["vocab"].get(model.get("unk_token")), start=_opening(whole.get("post_processor"), ids),
            stop=[*_listed(ids.get(names["eos_token"])), *ends],
            template=template.read_text(encoding="utf-8") if template.exists() else config.get("chat_template"), names=names,
        )
    except (KeyError, IndexError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no tokenizer that can be read ({type(error).__name__}: {error}): fetch it again") from None


def read_gguf_tokenizer(fields: dict) -> dict:
    """The `spec` of the tokenizer in a GGUF: `fields` of a gguf.GGUFReader. Raises ValueError as `read_tokenizer_json` does."""
    def get(key: str):
        return fields[f"tokenizer.{key}"].contents() if f"tokenizer.{key}" in fields else None

    if get("ggml.model") != "gpt2":
        what = {"llama": "SentencePiece", "t5": "SentencePiece", "bert": "WordPiece"}.get(get("ggml.model"), repr(get("ggml.model")))
        raise ValueError(f"the GGUF has a {what} tokenizer: only byte-level BPE is supported (tokenizer.ggml.model = gpt2)")
    pre = get("ggml.pre") or "default"
    if pre not in GGUF_SPLITS:
        raise ValueError(f"the GGUF's tokenizer.ggml.pre is {pre!r}, which is not supported: known are {', '.join(GGUF_SPLITS)}")
    tokens, types, merges = get("ggml.tokens"), get("ggml.token_type"), get("ggml.merges")
    whole = all(isinstance(x, list) and x and isinstance(x[0], t) for x, t in ((tokens, str), (types, int), (merges, str)))
    if not whole or len(types) != len(tokens):
        raise ValueError("the GGUF's tokenizer is damaged (tokens, token_type and merges don't fit): fetch it again")
    normal, control, user_defined = ({token: i for i, (token, t) in enumerate(zip(tokens, types)) if t == kind} for kind in (1, 3, 4))
    bos, eos = get("ggml.bos_token_id"), get("ggml.eos_token_id")
    names = {f"{name}_token": tokens[i] if i is not None and i < len(tokens) else None for name, i in (("bos", bos), ("eos", eos))}
    starts = get("ggml.add_bos_token") if get("ggml.add_bos_token") is not None else pre in ("llama-bpe", "llama3", "llama-v3")
    return _spec(
        "the GGUF", vocab=normal, merges=[tuple(merge.split(" ")) for merge in merges], ignore_merges=pre in ("llama-bpe", "llama3", "llama-v3"),
        special=control, added=user_defined, split=GGUF_SPLITS[pre], normalizer="NFC" if "qwen" in pre else None, unknown=None,
        start=control.get(names["bos_token"]) if starts else None, stop=[i for key in ("eos", "eot", "eom") for i in _listed(get(f"ggml.{key}_token_id"))],
        template=get("chat_template"), names=names,
    )


def _spec(where: str, *, vocab: dict, merges: list, ignore_merges: bool, special: dict, added: dict, split: list, normalizer: str | None,
          unknown: int | None, start: int | None, stop: list, template: str | list | None, names: dict) -> dict:
    every = list((vocab | special | added).items())
    for name, i in (special | added).items():
        if vocab.get(name, i) != i:
            raise ValueError(f"{where}: the added token {name!r} has the id {i}, but {vocab[name]} in the vocabulary")
    if not all(isinstance(i, int) and 0 <= i < 2**24 for _, i in every) or len({i for _, i in every}) < len(every):
        raise ValueError(f"{where} is damaged (the ids of its tokens are not different numbers in 0 ... 2^24): fetch it again")
    stop = [i for i in stop if i in special.values()]  # a config.json may name an id that only its class's default tokenizer ends with
    end = next((special[name] for name in ENDS if name in special), stop[0] if stop else None)
    if end is None:
        raise ValueError(f"{where} has no token that ends a text: one of {', '.join(ENDS)}, or an eos_token, is needed")
    tokens: list[str | None] = [None] * (1 + max(i for _, i in every))
    for token in _mergeable(where, vocab, merges, ignore_merges, {*special, *added}):
        tokens[vocab[token]] = token
    chat = read_template(template, names, special)
    if chat:
        stop = [*stop, next(i for name, i in special.items() if chat["assistant"][1].endswith(name))]
    spec = {"tokens": tokens, "split": split, "normalizer": normalizer, "unknown": unknown, "special": special, "added": added,
            "start": start, "end": end, "stop": sorted({end, *stop}), "chat": chat}
    try:
        if any(regex.match(pattern, "") for pattern in split):
            raise ValueError("it matches nothing, too")
        ByteLevelBPE(spec)
    except (ValueError, regex.error) as error:
        raise ValueError(f"{where}: a split pattern of {split} can't be used ({error})") from None
    return spec


def _mergeable(where: str, vocab: dict[str, int], merges: list[tuple[str, str]], ignore_merges: bool, added: set[str]) -> Iterator[str]:
    """The tokens that text can give, by id; the module's docstring has the argument.

    `ignore_merges`: a piece that is a token becomes it, merges or not. tiktoken always does that, so then also tokens that
    merge to three parts or more are right; two parts l, r it would merge inside longer pieces too.
    """
    ranks = {pair: i for i, pair in reversed(list(enumerate(merges)))}  # a pair that comes twice has its first rank
    before, before_rank = "", -1
    for token, _ in sorted(vocab.items(), key=lambda item: item[1]):
        if not all(c in BYTE for c in token):
            continue  # an added token's plain spelling
        parts, rank = list(token), -1
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get((parts[i], parts[i + 1]), len(merges)))
            step = ranks.get((parts[best], parts[best + 1]))
            if step is None:
                break
            rank, parts[best : best + 2] = step, [parts[best] + parts[best + 1]]
        if len(parts) > 1:
            if ignore_merges and len(parts) > 2 and token not in added:
                yield token
            elif ignore_merges and len(parts) == 2:
                raise ValueError(f"{where}: the token {token!r} stands for whole pieces only, which is not supported")
            continue
        if len(token) > 1:
            if rank < before_rank:
                raise ValueError(f"{where}: the token {token!r} is merged before {before!r}, but has a larger id, which is not supported")
            before, before_rank = token, rank
        yield token


def _types(part: dict | None) -> list[str]:
    return [t for p in part.get("pretokenizers", []) for t in _types(p)] + [part["type"]] if part else []


def _splits(part: dict, where: str) -> list[str]:
    """The split patterns of a pre_tokenizer."""
    kind = part["type"]
    if kind == "Sequence" and "ByteLevel" not in [p["type"] for p in part["pretokenizers"][:-1]]:  # what comes after it sees no text
        return [pattern for p in part["pretokenizers"] for pattern in _splits(p, where)]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return [GPT2] if part.get("use_regex", True) else []
    if kind == "Digits":
        return [r"\p{N}" if part["individual_digits"] else r"\p{N}+"]
    if kind == "Split" and part["behavior"] == "Isolated":
        return [part["pattern"]["Regex"] if "Regex" in part["pattern"] else re.escape(part["pattern"]["String"])]
    raise ValueError(f"{where}: the pre_tokenizer {json.dumps(part)[:200]} is not supported")


def _normalizer(part: dict | None, where: str) -> str | None:
    if part is None or part["type"] == "NFC":
        return part and "NFC"
    if part["type"] == "Sequence" and len(part["normalizers"]) < 2:
        return _normalizer(next(iter(part["normalizers"]), None), where)
    raise ValueError(f"{where}: the normalizer {part['type']} is not supported, only NFC")


def _opening(part: dict | None, ids: dict[str, int]) -> int | None:
    """The special token that the post_processor puts before a text."""
    parts = part.get("processors", [part]) if part else []
    first = next((p["single"][0] for p in parts if p["type"] == "TemplateProcessing"), {})
    return ids[first["SpecialToken"]["id"]] if "SpecialToken" in first else None


def _listed(x: object) -> list:
    return [] if x is None else x if isinstance(x, list) else [x]


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}): check the path") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (not a JSON object): fetch it again")
    return found
