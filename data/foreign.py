"""Strangers' tokenizers: a Hugging Face tokenizer.json, or vocab.json and merges.txt,
the tokenizer in a GGUF, Jinja templates.

What is read becomes the `spec` of a `bpe.ByteLevelBPE`, once, when a model is imported.

Hugging Face merges a *listed pair*, first listed first. tiktoken merges any pair whose
bytes are a token, lowest id first. Two tokens l, r become neighbours in some text only
if the bytes l + r alone pass through the state [l, r], for up to there nothing outside
them had a say. So one pair per token matters, the last merge of that token's own bytes,
and the two rules give the same ids in every text if (1) every token that tiktoken is
given merges to itself, and (2) the ranks of these last merges rise with the ids.
`_mergeable` tries every token: those that fail (1) no text ever gives, so they are left
out; a tokenizer that fails (2) is refused.

Other tokenizers are refused by name, and so is whatever would give other ids than the
files' own readers: other splits, normalizers, orders of ids.
"""

import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import regex

from data.bpe import BYTE, ByteLevelBPE
from data.chat import Turns, frame
from data.template import render

# What stood between documents in pretraining, where tuning ends turns otherwise.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")

# How text is split into pieces, as the families publish it. No merge crosses a border.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
GGUF_SPLITS = {  # by tokenizer.ggml.pre
    # what llama.cpp does where the file doesn't say
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), [GPT2]),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), [r"\p{N}", GPT2]),
    **dict.fromkeys(LLAMA3_NAMES, [LLAMA3]),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), [QWEN2]),
}
# by tokenizer.ggml.model, what is not supported
GGUF_MODELS = {"llama": "SentencePiece", "t5": "SentencePiece", "bert": "WordPiece"}


# ------------------------------------------------------------------------------------------
# Files

LARGEST = 2**26  # bytes: twice a tokenizer.json of 262,000 tokens


def read_json(path: str | Path, remedy: str = "fetch it again") -> dict:
    """A JSON object. Raises ValueError, with the remedy, for what is none."""
    try:
        values = json.loads(read_whole(path))
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path} is damaged ({brief(error)}): {remedy}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged (not a JSON object): {remedy}")
    return values


def read_whole(path: str | Path) -> bytes:
    """What a file of settings or tokens holds. Raises ValueError for one too large."""
    if require_file(path) > LARGEST:
        raise ValueError(f"{path} has more than {LARGEST:,} bytes, which no such file has")
    return Path(path).read_bytes()


def read_utf8(path: str | Path) -> str:
    """As `read_whole`. Raises ValueError for what is no UTF-8, too."""
    try:
        return read_whole(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged (no UTF-8, byte {error.start}): fetch it again") from None


def require_file(path: str | Path) -> int:
    """The bytes in a file. Raises OSError where it can't be read, or is a folder, a
    pipe or a device.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_size


def unreadable(path: str | Path, error: OSError) -> ValueError:
    """What to raise where the system gives no file: what it said, and the remedy."""
    return ValueError(f"{path} can't be read ({error.strerror or error}): check the path, "
                      "and that you may read it")


def brief(x: object) -> str:
    """A value or an error in one line of at most 200 characters."""
    name = type(x).__name__ if isinstance(x, BaseException) else ""
    return " ".join(str(x)[:200].split()) or name


# ------------------------------------------------------------------------------------------
# Hugging Face's tokenizer.json

DAMAGE = (KeyError, IndexError, TypeError, AttributeError, OverflowError, UnicodeDecodeError, RecursionError)


def read_tokenizer_json(path: str | Path) -> dict:
    """The `spec` of a Hugging Face tokenizer.json, or of the folder that holds it, or
    vocab.json and merges.txt.

    Files beside it, where they are, tell the chat template and which tokens end a text.
    Raises ValueError, in one line that names it, for what is malformed and for whatever
    would give other ids than there.
    """
    path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    beside = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                 "generation_config.json", "config.json"):
        file = path.with_name(name)
        beside[name] = read_json(file) if file.exists() else {}
    try:
        if not path.exists() and path.with_name("vocab.json").exists():
            path = path.with_name("vocab.json")
            return _spec_of_json(path, _as_tokenizer_json(path, beside), beside, f"{path} with merges.txt")
        return _spec_of_json(path, read_json(path), beside, str(path))
    except OSError as error:
        raise unreadable(error.filename or path, error) from None
    except DAMAGE as error:
        raise ValueError(f"{path} is no tokenizer that can be read ({type(error).__name__}: {brief(error)}): "
                         "fetch it again") from None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has what `read_tokenizer_json` reads."""
    older = ("vocab.json", "merges.txt")
    return (folder / "tokenizer.json").exists() or all((folder / name).exists() for name in older)


def _as_tokenizer_json(path: Path, beside: dict[str, dict]) -> dict:
    """What a tokenizer.json would say where there are vocab.json (`path`), merges.txt
    and, perhaps, tokenizer_config.json, special_tokens_map.json and added_tokens.json.
    """
    config = beside["special_tokens_map.json"] | beside["tokenizer_config.json"]
    vocab, merges = read_json(path), path.with_name("merges.txt")
    family = config.get("tokenizer_class") or "GPT2Tokenizer"
    if family.removesuffix("Fast") not in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        raise ValueError(f"{path}: {brief(family)} without a tokenizer.json is not supported: "
                         "GPT2Tokenizer and Qwen2Tokenizer are")
    lines = read_utf8(merges).split("\n")
    pairs = [line.rstrip("\r") for line in lines[lines[0].startswith("#version"):] if line.strip()]
    flags = dict.fromkeys(("special", "lstrip", "rstrip", "single_word"), False) | {"normalized": True}
    names = {"<|endoftext|>", *_named_special(config)} & vocab.keys()
    added = [flags | {"content": name, "id": vocab[name], "special": True} for name in sorted(names)]
    for i, token in config.get("added_tokens_decoder", {}).items():
        added.append(flags | token | {"id": int(i) if i.isdecimal() else i})
    known = {token["content"] for token in added}
    older = beside["added_tokens.json"]
    added += [flags | {"content": name, "id": older[name]} for name in older if name not in known]
    byte_level = {"type": "ByteLevel", "add_prefix_space": bool(config.get("add_prefix_space"))}
    split = byte_level
    if family.startswith("Qwen2"):
        parts = [{"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated"},
                 byte_level | {"use_regex": False}]
        split = {"type": "Sequence", "pretokenizers": parts}
    whole = {"model": {"type": "BPE", "vocab": vocab, "merges": pairs}, "added_tokens": added,
             "pre_tokenizer": split, "normalizer": {"type": "NFC"} if split is not byte_level else None}
    if config.get("add_bos_token"):
        opening = {"SpecialToken": {"id": _content(config["bos_token"])}}
        whole["post_processor"] = {"type": "TemplateProcessing", "single": [opening]}
    return whole


def _spec_of_json(path: Path, whole: dict, beside: dict[str, dict], where: str) -> dict:
    """Of the file's content and of the files beside it; `where` names the file."""
    model = whole["model"]
    config = beside["special_tokens_map.json"] | beside["tokenizer_config.json"]
    _require_byte_level(where, whole)
    added = {token["content"]: token for token in whole.get("added_tokens") or []}
    named = _named_special(config)
    special = {name for name, token in added.items() if token["special"] or name in named}
    looking = {name for name, token in added.items()
               if token["lstrip"] or token["rstrip"] or token["single_word"]}
    if wrong := sorted(looking - special):
        raise ValueError(f"{where}: the added token {brief(repr(wrong[0]))} looks at what stands around it, "
                         "which is not supported")
    ordinary = [name for name in added if name not in special]
    late = [name for name in ordinary if added[name].get("normalized")]
    normalizer = _normalizer(whole.get("normalizer"), where)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    names = {key: _content(config.get(key)) for key in ("bos_token", "eos_token")}
    ids = {name: token["id"] for name, token in added.items()}
    ends = [beside[name].get("eos_token_id") for name in ("generation_config.json", "config.json")]
    template = path.with_name("chat_template.jinja")
    return _spec(
        where,
        vocab=model["vocab"],
        merges=list(map(tuple, merges)),
        makes_tokens=True,
        ignore_merges=bool(model.get("ignore_merges")),
        special={name: i for name, i in ids.items() if name in special},
        added={name: ids[name] for name in ordinary},
        # the order makes a difference to these alone
        late=late if normalizer or len(late) < len(ordinary) else [],
        split=_splits(whole["pre_tokenizer"], where),
        normalizer=normalizer,
        unknown=model["vocab"].get(model.get("unk_token")),
        start=_opening(whole.get("post_processor"), ids),
        stop=[i for end in (ids.get(names["eos_token"]), *ends) for i in _listed(end)],
        template=read_utf8(template) if template.exists() else config.get("chat_template"),
        names=names,
        looking=looking,
    )


def _require_byte_level(where: str, whole: dict) -> None:
    """Raises ValueError for other tokenizers and for options that give other ids."""
    model, pre_tokenizer = whole["model"], whole.get("pre_tokenizer")
    kind, fallback = model.get("type", "BPE"), model.get("byte_fallback")
    if kind != "BPE" or fallback or "ByteLevel" not in _types(pre_tokenizer):
        if kind == "Unigram" or fallback or "▁" in str([pre_tokenizer, whole.get("normalizer")]):
            kind = "SentencePiece"
        elif kind == "BPE":
            kind = "character-level BPE"
        raise ValueError(f"{where} is a {brief(kind)} tokenizer: only byte-level BPE is supported "
                         "(GPT-2, Llama 3, Qwen2, SmolLM2, ...)")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "fuse_unk"):
        harmless = key == "fuse_unk" and model.get("unk_token") is None
        if model.get(key) and not harmless:
            raise ValueError(f"{where} has {key} = {brief(repr(model[key]))}, which is not supported")


def _named_special(config: dict) -> set[str]:
    """The tokens that are special whatever their own flag says, as in transformers."""
    values = [config.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "pad")]
    values += _listed(config.get("additional_special_tokens"))
    return set(filter(None, map(_content, values)))


def _content(token: dict | str | None) -> str | None:
    """A tokenizer_config.json writes a token as a string, or a dict that holds it."""
    return token["content"] if isinstance(token, dict) else token


def _types(part: dict | None) -> list[str]:
    """The types of a pre_tokenizer and of all its parts."""
    return [t for p in part.get("pretokenizers", []) for t in _types(p)] + [part["type"]] if part else []


def _splits(part: dict, where: str) -> list[str]:
    """The split patterns of a pre_tokenizer."""
    kind = part["type"]
    # what comes after ByteLevel sees no text
    if kind == "Sequence" and "ByteLevel" not in [p["type"] for p in part["pretokenizers"][:-1]]:
        return [pattern for p in part["pretokenizers"] for pattern in _splits(p, where)]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return [GPT2] if part.get("use_regex", True) else []
    if kind == "Digits":
        return [r"\p{N}" if part["individual_digits"] else r"\p{N}+"]
    if kind == "Split" and part["behavior"] == "Isolated":
        pattern = part["pattern"]
        return [pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])]
    raise ValueError(f"{where}: the pre_tokenizer {json.dumps(part)[:200]} is not supported")


def _normalizer(part: dict | None, where: str) -> str | None:
    if part is None or part["type"] == "NFC":
        return part and "NFC"
    if part["type"] == "Sequence" and len(part["normalizers"]) < 2:
        return _normalizer(next(iter(part["normalizers"]), None), where)
    raise ValueError(f"{where}: the normalizer {brief(part['type'])} is not supported, only NFC")


def _opening(part: dict | None, ids: dict[str, int]) -> int | None:
    """The special token that the post_processor puts before a text."""
    parts = part.get("processors", [part]) if part else []
    first = next((p["single"][0] for p in parts if p["type"] == "TemplateProcessing"), {})
    return ids[first["SpecialToken"]["id"]] if "SpecialToken" in first else None


def _listed(x: object) -> list:
    """None, one value or several, as a list."""
    if x is None:
        return []
    return x if isinstance(x, list) else [x]


# ------------------------------------------------------------------------------------------
# GGUF

def read_gguf_tokenizer(fields: dict) -> dict:
    """The `spec` of the tokenizer in a GGUF: `fields` of a gguf.GGUFReader.

    Raises ValueError as `read_tokenizer_json` does.
    """
    try:
        return _spec_of_gguf(fields)
    except DAMAGE as error:
        raise ValueError(f"the GGUF's tokenizer is damaged ({type(error).__name__}: {brief(error)}): "
                         "fetch it again") from None


def _spec_of_gguf(fields: dict) -> dict:
    def get(key: str):
        return fields[f"tokenizer.{key}"].contents() if f"tokenizer.{key}" in fields else None

    if get("ggml.model") != "gpt2":
        kind = GGUF_MODELS.get(get("ggml.model"), brief(repr(get("ggml.model"))))
        raise ValueError(f"the GGUF has a {kind} tokenizer: only byte-level BPE is supported "
                         "(tokenizer.ggml.model = gpt2)")
    pre = get("ggml.pre") or "default"
    if pre not in GGUF_SPLITS:
        raise ValueError(f"the GGUF's tokenizer.ggml.pre is {brief(repr(pre))}, which is not supported: "
                         f"known are {', '.join(GGUF_SPLITS)}")
    tokens, types, merges = get("ggml.tokens"), get("ggml.token_type"), get("ggml.merges")
    expected = ((tokens, str), (types, int), (merges, str))
    whole = all(isinstance(x, list) and x and isinstance(x[0], kind) for x, kind in expected)
    if not whole or len(types) != len(tokens):
        raise ValueError("the GGUF's tokenizer is damaged (tokens, token_type and merges don't fit): "
                         "fetch it again")

    def of_type(kind: int) -> dict[str, int]:
        return {token: i for i, (token, t) in enumerate(zip(tokens, types)) if t == kind}

    normal, control, user_defined = of_type(1), of_type(3), of_type(4)
    names = {}
    for name in ("bos", "eos"):
        i = get(f"ggml.{name}_token_id")
        names[f"{name}_token"] = tokens[i] if i is not None and 0 <= i < len(tokens) else None
    llama3, starts = pre in LLAMA3_NAMES, get("ggml.add_bos_token")
    if starts is None:
        starts = llama3
    return _spec(
        "the GGUF",
        vocab=normal,
        merges=[tuple(merge.split(" ")) for merge in merges],
        ignore_merges=llama3,
        special=control,
        added=user_defined,
        split=GGUF_SPLITS[pre],
        normalizer="NFC" if "qwen" in pre else None,
        unknown=None,
        start=control.get(names["bos_token"]) if starts else None,
        stop=[i for key in ("eos", "eot", "eom") for i in _listed(get(f"ggml.{key}_token_id"))],
        template=get("chat_template"),
        names=names,
    )


# ------------------------------------------------------------------------------------------
# What both say, as a ByteLevelBPE's spec

def _spec(where: str, *, vocab: dict, merges: list, ignore_merges: bool, special: dict, added: dict,
          split: list, normalizer: str | None, unknown: int | None, start: int | None, stop: list,
          template: str | list | None, names: dict, looking: Collection[str] = (),
          late: Collection[str] = (), makes_tokens: bool = False) -> dict:
    """The spec of a tokenizer that stands in the file `where`.

    A chat template with tokens that are `looking` at what stands around them, and take
    the space there away, is left out, as are those that are more than frames.
    `makes_tokens`: each merge must be of two tokens and make one, as in transformers.
    Raises ValueError for one that no ByteLevelBPE can be.
    """
    _require_bounds(where, vocab, special, added, split)
    if any(len(pair) != 2 for pair in merges):
        raise ValueError(f"{where} is damaged (a merge is no pair of tokens): fetch it again")
    size = _count(where, vocab, special, added)
    if makes_tokens:
        _require_tokens(where, vocab, merges)
    # a config.json may name an id that only its class's default tokenizer ends with
    stop = [i for i in stop if i in special.values()]
    end = next((special[name] for name in ENDS if name in special), stop[0] if stop else None)
    if end is None:
        raise ValueError(f"{where} has no token that ends a text: one of {', '.join(ENDS)}, "
                         "or an eos_token, is needed")
    tokens: list[str | None] = [None] * size
    for token in _mergeable(where, vocab, merges, ignore_merges, {*special, *added}):
        tokens[vocab[token]] = token
    chat = read_template(template, names, special)
    if any(name in json.dumps(chat, ensure_ascii=False) for name in looking):
        chat = None
    if chat:
        stop.append(next(i for name, i in special.items() if chat["assistant"][1].endswith(name)))
    spec = {"tokens": tokens, "split": split, "normalizer": normalizer, "unknown": unknown,
            "special": special, "added": added,
            "start": start, "end": end, "stop": sorted({end, *stop}), "chat": chat}
    spec |= {"late": sorted(late)} if late else {}
    try:
        if any(regex.match(pattern, "") for pattern in split):
            raise ValueError("it matches nothing, too")
        ByteLevelBPE(spec)
    except (ValueError, regex.error) as error:
        raise ValueError(f"{where}: a split pattern of {brief(split)} can't be used "
                         f"({brief(error)})") from None
    return spec


MOST_ADDED = 2**16       # added tokens: they become one pattern
LONGEST_SPLIT = 2**13    # characters of all split patterns
MOST_REPEATS = 2**16     # of a part of a pattern, which is compiled as often
LONGEST_TOKENS = 2**28   # sum of the squares of their lengths, which is the work of merging each


def _require_bounds(where: str, vocab: dict, special: dict, added: dict, split: list) -> None:
    """Raises ValueError for what would take hours or gigabytes to look through."""
    sizes = ((len(special | added), MOST_ADDED, "added tokens"),
             (sum(map(len, split)), LONGEST_SPLIT, "characters of split patterns"),
             (max(map(_repeats, split), default=1), MOST_REPEATS, "repeats in a split pattern"),
             (sum(len(token) ** 2 for token in vocab), LONGEST_TOKENS, "characters squared of all tokens"))
    for size, limit, what in sizes:
        if size > limit:
            raise ValueError(f"{where} has {size:,} {what}, more than {limit:,}: such a tokenizer "
                             "is not supported")


def _repeats(pattern: str) -> int:
    """How often a part stands in a pattern with all its {n} and {n,m} written out."""
    counts = re.findall(r"(?<!\\[xu])\{(\d*),?(\d*)\}", pattern)
    return math.prod(max(1, *(int(n[:9] or 0) for n in pair)) for pair in counts)


def _count(where: str, vocab: dict, special: dict, added: dict) -> int:
    """One more than the largest id.

    Raises ValueError where ids are no ids, or come twice.
    """
    for name, i in (special | added).items():
        if vocab.get(name, i) != i:
            raise ValueError(f"{where}: the added token {brief(repr(name))} has the id {brief(i)}, but "
                             f"{brief(vocab[name])} in the vocabulary")
    ids = list((vocab | special | added).values())
    if not all(type(i) is int and 0 <= i < 2**22 for i in ids) or len(set(ids)) < len(ids):
        raise ValueError(f"{where} is damaged (the ids of its tokens are not different numbers in "
                         "0 ... 2^22): fetch it again")
    return 1 + max(ids)


def _require_tokens(where: str, vocab: dict, merges: list[tuple]) -> None:
    """Raises ValueError for a merge of what is no token, or into what is none: often it
    is the last one of a merges.txt that is cut off.
    """
    for pair in merges:
        if not {*pair, "".join(pair)} <= vocab.keys():
            merge = brief(repr(" ".join(pair)))
            raise ValueError(f"{where} is damaged (the merge {merge} is not of tokens): fetch it again")


def _mergeable(where: str, vocab: dict[str, int], merges: list[tuple[str, str]], ignore_merges: bool,
               added: set[str]) -> Iterator[str]:
    """The tokens that text can give, by id; the module's docstring has the argument.

    `ignore_merges`: a piece that is a token becomes it, merges or not. tiktoken always
    does that, so then also tokens that merge to three parts or more are right; two
    parts l, r it would merge inside longer pieces too.
    """
    # a pair that comes twice has its first rank
    ranks = {pair: i for i, pair in reversed(list(enumerate(merges)))}
    before, before_rank = "", -1
    for token, _ in sorted(vocab.items(), key=lambda item: item[1]):
        if not all(c in BYTE for c in token):
            continue  # an added token's plain spelling
        parts, rank = _merge(token, ranks)
        if len(parts) > 1:
            if ignore_merges and len(parts) > 2 and token not in added:
                yield token
            elif ignore_merges and len(parts) == 2:
                raise ValueError(f"{where}: the token {brief(repr(token))} stands for whole pieces only, "
                                 "which is not supported")
            continue
        if len(token) > 1:
            if rank < before_rank:
                raise ValueError(f"{where}: the token {brief(repr(token))} is merged before "
                                 f"{brief(repr(before))}, but has a larger id, which is not supported")
            before, before_rank = token, rank
        yield token


def _merge(token: str, ranks: dict[tuple[str, str], int]) -> tuple[list[str], int]:
    """What a token's characters merge to, and the last merge's rank; -1 without any."""
    parts, last = list(token), -1
    while len(parts) > 1:
        pair_ranks = [ranks.get(pair, math.inf) for pair in zip(parts, parts[1:])]
        if min(pair_ranks) == math.inf:
            break
        last = min(pair_ranks)
        at = pair_ranks.index(last)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts, last


# ------------------------------------------------------------------------------------------
# Chat templates

# rare text: a system message, a question, an answer, a question
S, U, A, V = (f"\ue000{c}bC" for c in "suav")
SYSTEM, ASK, ANSWER, AGAIN = ("system", S), ("user", U), ("assistant", A), ("user", V)


def read_template(template: str | list | None, names: dict, special: dict[str, int]) -> dict | None:
    """The frames (`chat.py`) of a Jinja `template`, or of the one called default.

    Hugging Face and GGUF keep a template as a Jinja program. It is run once, with
    limits (`template.py`), on messages of a rare text; what stands between them is the
    frames. None where there is no template, or more than frames in it. `names` are the
    other variables it may use: bos_token, eos_token. `special`: the tokenizer's tokens.
    """
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}.get("default")
    if not isinstance(template, str):
        return None
    rendered = _rendered(template, names)
    try:
        chat, before = _frames(rendered, special)
        if frame(chat, [ASK, ANSWER, AGAIN]) != rendered([ASK, ANSWER, AGAIN], reply=True):
            return None
    except (ValueError, IndexError):
        return None  # it failed; or no such splits, no token that stops
    try:
        opening, before_question, _ = re.split(f"{S}|{U}", rendered([SYSTEM, ASK]))
        with_system = chat | {"system": [opening, before_question.removesuffix(before)]}
        talk = [SYSTEM, ASK, ANSWER, AGAIN]
        if frame(with_system, talk) == rendered(talk, reply=True):
            return with_system
    except ValueError:
        pass
    return chat


def _frames(rendered: Callable[..., str], special: dict[str, int]) -> tuple[dict, str]:
    """The frames of what `rendered` gives, and what stands before a question.

    Those of a system message are still left open.
    """
    opening, _, before_again, reply = re.split(f"{U}|{A}|{V}", rendered([ASK, ANSWER, AGAIN], reply=True))
    after_question = rendered([ASK]).partition(U)[2]
    after_answer = rendered([ASK, ANSWER]).partition(A)[2]
    before = before_again.removeprefix(after_answer)
    if not opening.endswith(before):    # space that stands between messages, but not after the last
        before = before.lstrip()
        after_answer = before_again.removesuffix(before)
    trim = rendered([("user", f"\n {U} \n")]) == rendered([ASK])
    stop = min((token for token in special if token in after_answer), key=after_answer.index)
    end = after_answer.index(stop) + len(stop)
    chat = {
        "default": opening.removesuffix(before),
        "system": None,
        "user": [before, after_question],
        "assistant": [reply.removeprefix(after_question), after_answer[:end], after_answer[end:]],
        "trim": trim,
    }
    return chat, before


def _rendered(template: str, names: dict) -> Callable[..., str]:
    """A function of turns, and whether a reply is to follow, that gives what the
    template makes of them: of those that are looked at here.

    It raises ValueError where the template fails.
    """
    talks = [([ASK], False), ([ASK, ANSWER], False), ([SYSTEM, ASK], False),
             ([("user", f"\n {U} \n")], False),
             ([ASK, ANSWER, AGAIN], True), ([SYSTEM, ASK, ANSWER, AGAIN], True)]
    variables = [{"messages": [{"role": role, "content": text} for role, text in turns],
                  "add_generation_prompt": reply} for turns, reply in talks]
    texts = render(template, names, variables)

    def of(turns: Turns, reply: bool = False) -> str:
        text = texts[talks.index((turns, reply))]
        if text is None:
            raise ValueError("the template gives no text")
        return text

    return of
