"""Our tokenizers as the files of a Hugging Face folder: tokenizer.json with its config.

    tokenizer.json          vocabulary, merges, split patterns, added tokens
    tokenizer_config.json   what opens, ends and pads a text; the chat template in Jinja

tiktoken merges any pair whose bytes are a token, Hugging Face those that are listed.
The pairs to list are the last merges of each token's own bytes (`data/foreign.py` has
the argument), and they are listed in the order of the tokens.

What it is not: for the World vocabulary, whose own file goes along instead.
"""

import math

import tiktoken

from data.bpe import BYTE, ByteLevelBPE
from data.foreign import GPT2, LLAMA3

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
    merges, unlisted = merges_of(vocab)
    special, unknown = spec["special"] | spec["added"], None
    for name, i in special.items():
        if vocab.setdefault(name, i) != i:
            raise ValueError(f"the tokenizer's added token {name!r} is spelt as token {vocab[name]} is: "
                             "a tokenizer.json can't tell them apart")
    if spec["unknown"] is not None:
        names = {i: name for name, i in vocab.items()}
        unknown = names.get(spec["unknown"], "<unk>")
        vocab[unknown] = spec["unknown"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags, "special": name in spec["special"]}
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
            "ignore_merges": unlisted,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": merges,
        },
    }


def merges_of(vocab: dict[str, int]) -> tuple[list[str], bool]:
    """The last merge of each token's own bytes, "l r", and whether some have none.

    Those stand for whole pieces of text alone.
    """
    merges, unlisted = [], False
    for token, i in vocab.items():
        parts = list(token)
        while len(parts) > 2:
            ids = [vocab.get(left + right, math.inf) for left, right in zip(parts, parts[1:])]
            at = ids.index(min(ids))
            if ids[at] >= i:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2 and vocab.keys() >= {*parts}:
            merges.append(" ".join(parts))
        elif len(parts) > 1:
            unlisted = True
    return merges, unlisted


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


def jinja(chat: dict) -> str:
    """The frames (`data/chat.py`) as a Jinja template."""
    content = "message['content']"
    if chat.get("dense"):  # without its empty lines
        content = f"({content} | replace('\\r\\n', '\\n')).split('\\n') | select | join('\\n')"
    content += " | trim" if chat["trim"] else ""
    roles = ["system"] * (chat["system"] is not None) + ["user", "assistant"]
    lines = ["{%- for message in messages %}"]
    if chat["default"]:
        lines.append(f"{{%- if loop.first and message['role'] != 'system' %}}{text(chat['default'])}"
                     "{%- endif %}")
    for n, role in enumerate(roles):
        before, *after = chat[role]
        before += chat.get("lead", "") if role == "assistant" else ""
        first = " and loop.first" if role == "system" else ""
        lines.append(f"{{%- {'elif' if n else 'if'} message['role'] == '{role}'{first} %}}"
                     f"{text(before)}{{{{- {content} }}}}{text(''.join(after))}")
    lines += ["{%- else %}{{- raise_exception('the template has no frame for this message: '"
              " ~ message['role']) }}{%- endif %}", "{%- endfor %}",
              f"{{%- if add_generation_prompt %}}{text(chat['assistant'][0])}{{%- endif %}}"]
    return "\n".join(lines)


def text(literal: str) -> str:
    """A piece of the template that gives these characters, whatever they are."""
    return f"{{{{- {ascii(literal)} }}}}"
