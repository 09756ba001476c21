"""Our tokenizers as the files of a Hugging Face folder: tokenizer.json with its config.

    tokenizer.json          vocabulary, merges, split patterns, added tokens
    tokenizer_config.json   what opens, ends and pads a text; the chat template in Jinja

What it is not: for the World vocabulary, whose own file goes along instead.
"""

import tiktoken

from data.bpe import BYTE, ByteLevelBPE
from data.foreign import GPT2, LLAMA3
from tools.tokenizer_parts import jinja, merges_of

# Of tiktoken's own, as other libraries spell them: those read some signs otherwise
SPLITS = {"bytes": [], "cl100k_base": [LLAMA3]}
SPLITS |= dict.fromkeys(("gpt2", "r50k_base", "p50k_base", "p50k_edit"), [GPT2])
WORLD = "rwkv_vocab_v20230424.txt"
LETTER = {byte: letter for letter, byte in BYTE.items()}


def spec_of(enc: tiktoken.Encoding) -> dict:
    """What a `ByteLevelBPE` is made of, also of the bytes and of tiktoken's own.

    Raises ValueError for a split pattern that has no spelling elsewhere.
    """
    if isinstance(enc, ByteLevelBPE):
        return enc.spec
    if enc.name not in SPLITS:
        raise ValueError(f"the tokenizer {enc.name} can't be written as a tokenizer.json: "
                         f"only bytes, a model's own, and {', '.join(sorted(SPLITS.keys() - {'bytes'}))} can")
    tokens: list[str | None] = [None] * enc.n_vocab
    for piece, i in enc._mergeable_ranks.items():
        tokens[i] = "".join(LETTER[byte] for byte in piece)
    return {"tokens": tokens, "split": SPLITS[enc.name], "normalizer": None, "unknown": None,
            "special": dict(enc._special_tokens), "added": {}, "start": None, "end": enc.eot_token,
            "stop": [enc.eot_token], "chat": None}


# ------------------------------------------------------------------------------------------
# tokenizer.json

def tokenizer_json(spec: dict) -> dict:
    """The file's content. Raises ValueError for tokens that can't be told apart."""
    vocab = {token: i for i, token in enumerate(spec["tokens"]) if token is not None}
    merges, whole = merges_of(vocab)
    special, unknown = spec["special"] | spec["added"], None
    for name, i in special.items():
        if vocab.setdefault(name, i) != i:
            raise ValueError(f"the tokenizer's added token {name!r} is spelt as token {vocab[name]} is: "
                             "a tokenizer.json can't tell them apart")
    if spec["unknown"] is not None:
        names = {i: name for name, i in vocab.items()}
        unknown = names.get(spec["unknown"], "<unk>")
        vocab[unknown] = spec["unknown"]
    late = {*spec.get("late", ())}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags, "normalized": name in late,
                          "special": name in spec["special"]}
                         for name, i in sorted(special.items(), key=lambda item: item[1])],
        "normalizer": spec["normalizer"] and {"type": spec["normalizer"]},
        "pre_tokenizer": pre_tokenizer(spec["split"]),
        "post_processor": opening(spec),
        "decoder": byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": bool(whole),
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": merges,
        },
    }


def pre_tokenizer(patterns: list[str]) -> dict:
    """Each pattern cuts what the ones before it left; then bytes become letters."""
    cuts = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in patterns]
    return {"type": "Sequence", "pretokenizers": [*cuts, byte_level()]} if cuts else byte_level()


def byte_level() -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def opening(spec: dict) -> dict:
    """What puts the start token before a text, where there is one."""
    if spec["start"] is None:
        return byte_level()
    name = name_of(spec, spec["start"])
    start = {"SpecialToken": {"id": name, "type_id": 0}}
    text, second = ({"Sequence": {"id": letter, "type_id": i}} for i, letter in enumerate("AB"))
    return {"type": "TemplateProcessing", "single": [start, text], "pair": [start, text, second],
            "special_tokens": {name: {"id": name, "ids": [spec["start"]], "tokens": [name]}}}


def name_of(spec: dict, i: int) -> str:
    """The spelling of token i. Raises ValueError for one that is no added token."""
    names = {number: name for name, number in (spec["special"] | spec["added"]).items()}
    if i not in names:
        raise ValueError(f"the tokenizer's token {i} opens or ends a text, but is no added token: "
                         "a tokenizer_config.json can't name it")
    return names[i]


# ------------------------------------------------------------------------------------------
# tokenizer_config.json

def tokenizer_config(spec: dict) -> dict:
    """The file's content. Raises ValueError for ends that are no added tokens."""
    end = name_of(spec, spec["end"])
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end if spec["start"] is None else name_of(spec, spec["start"]),
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,  # there is no limit
    }
    return values | chat_template(spec["chat"])


def chat_template(chat: dict | None) -> dict:
    return {"chat_template": jinja(chat)} if chat else {}
