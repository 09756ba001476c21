"""Tokenizers in a GGUF: ours as llama.cpp reads them, and back.

    bytes        kind gpt2, a token for each byte. Only there is a text that spells
                 <|endoftext|> a text
    our own BPE  kind gpt2, with merges; how text is split has only a name there
    gpt2, ...    tiktoken's, the same
    world        kind rwkv, the longest match; tokens as Python writes bytes

A file has a token for each row of the embedding: rows without one are called [PADn].
"""

from dataclasses import dataclass

import tiktoken

from data.bpe import BYTE, ByteLevelBPE
from data.foreign import GGUF_SPLITS, LLAMA3_NAMES, brief, read_gguf_tokenizer
from data.tokenizer import END, get_tokenizer, opening, stops

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens
PRINTED = {byte: character for character, byte in BYTE.items()}
TIKTOKEN = {"gpt2": "gpt-2", "r50k_base": "gpt-2", "p50k_base": "gpt-2", "cl100k_base": "llama-bpe"}
NO_MERGES = ["Ā Ā"]  # the key must be there, and not empty: a pair whose sum is no token
WORLD_END = "<s>"


@dataclass
class Vocabulary:
    """What a file says of the tokens: by id their texts and types, and how they merge.

    `pre` names the split pattern.
    """

    kind: str
    tokens: list[str]
    types: list[int]
    pre: str | None = None
    merges: list[str] | None = None


# ------------------------------------------------------------------------------------------
# Ours, as a file says it

def tokenizer_settings(enc: tiktoken.Encoding, rows: int) -> dict[str, object]:
    """Keys and values of a file whose model has so many rows.

    Raises ValueError for a tokenizer that no file can say.
    """
    v = vocabulary(enc)
    if len(v.tokens) > rows:
        raise ValueError(f"the tokenizer {enc.name} has {len(v.tokens)} tokens, the model {rows} rows: "
                         "a GGUF has a row for each; export the model with its own tokenizer")
    pad(v, rows)
    ends = [enc.eot_token, *sorted({*stops(enc), *end_of_answer(enc)} - {enc.eot_token})]
    if len(ends) > 3:
        raise ValueError(f"the tokenizer {enc.name} has {len(ends)} tokens that end a text: a GGUF has a "
                         "place for three (eos, eot, eom)")
    values = {"model": v.kind, "pre": v.pre, "tokens": v.tokens, "token_type": v.types, "merges": v.merges,
              "bos_token_id": opening(enc)[0]}
    values |= dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), ends))
    if v.kind == "gpt2":
        values["add_bos_token"] = adds_bos(enc)
    settings = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
    chat = getattr(enc, "chat", None)
    return settings | ({"tokenizer.chat_template": jinja(chat)} if chat else {})


def adds_bos(enc: tiktoken.Encoding) -> bool:
    """Whether a prompt gets a token in front, as sample.py's does.

    In a chat the template has it.
    """
    if isinstance(enc, ByteLevelBPE) and enc.chat:
        return enc.spec["start"] is not None
    return True


def end_of_answer(enc: tiktoken.Encoding) -> list[int]:
    """The token that ends an answer in the chat template, if it is one token."""
    chat = getattr(enc, "chat", None)
    if not chat:
        return []
    return [i for i in [enc.encode(chat["assistant"][1], allowed_special="all")] if len(i) == 1 for i in i]


def pad(v: Vocabulary, rows: int) -> None:
    """Give each row a token: those without one names that no other token has."""
    taken = set(v.tokens)
    for i in range(rows):
        if i == len(v.tokens):
            v.tokens.append("")
            v.types.append(UNUSED)
        if v.types[i] == UNUSED:
            name = f"[PAD{i}]"
            while name in taken:
                name = f"[{name}]"
            v.tokens[i] = name


def vocabulary(enc: tiktoken.Encoding) -> Vocabulary:
    """Raises ValueError for a tokenizer whose split or normalizer has no name there."""
    if enc.name == "bytes":
        tokens = [PRINTED[byte] for byte in range(256)] + [END]
        return Vocabulary("gpt2", tokens, [NORMAL] * 256 + [CONTROL], "gpt-2", NO_MERGES)
    if enc.name.startswith("world"):
        return world_vocabulary(enc)
    if isinstance(enc, ByteLevelBPE):
        spec = enc.spec
        pieces = {token: i for i, token in enumerate(spec["tokens"]) if token}
        kinds = {NORMAL: pieces, USER_DEFINED: spec["added"], CONTROL: spec["special"]}
        return bpe_vocabulary(kinds, named_split(spec, enc.name))
    if enc.name in TIKTOKEN:
        ranks = enc._mergeable_ranks
        pieces = {"".join(PRINTED[byte] for byte in token): i for token, i in ranks.items()}
        return bpe_vocabulary({NORMAL: pieces, CONTROL: enc._special_tokens}, TIKTOKEN[enc.name])
    raise ValueError(f"a GGUF has no name for how the tokenizer {enc.name} splits text: it has one for "
                     f"bytes, world, {', '.join(TIKTOKEN)} and imported models")


def named_split(spec: dict, name: str) -> str:
    """What a file calls the split patterns and the normalizer of a spec."""
    for pre, split in GGUF_SPLITS.items():
        normalizer = "NFC" if "qwen" in pre else None     # as foreign.py reads it
        if split == spec["split"] and normalizer == spec["normalizer"]:
            break
    else:
        raise ValueError(f"a GGUF has no name for how the tokenizer {name} splits and normalizes text "
                         f"({' '.join(spec['split'])[:60]} ..., {spec['normalizer']})")
    if spec["unknown"] is not None and len([t for t in spec["tokens"] if t and len(t) == 1]) < 256:
        raise ValueError(f"the tokenizer {name} has a token for unknown bytes, for which a GGUF has no place")
    return pre


def bpe_vocabulary(kinds: dict[int, dict[str, int]], pre: str) -> Vocabulary:
    """Of {type: {text: id}}, where a later type prevails."""
    size = 1 + max(i for ids in kinds.values() for i in ids.values())
    tokens, types = [""] * size, [UNUSED] * size
    for kind, ids in kinds.items():
        for token, i in ids.items():
            tokens[i], types[i] = token, kind
    return Vocabulary("gpt2", tokens, types, pre, find_merges(kinds[NORMAL], pre) or NO_MERGES)


def find_merges(ranks: dict[str, int], pre: str) -> list[str]:
    """The last merge of each token's characters, lowest id first.

    Raises ValueError for a token that more than two parts make, unless `pre` takes a
    piece that is a token as it is.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = list(token)
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            if min(pairs) >= rank:
                break
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(" ".join(parts))
        elif len(parts) > 2 and pre not in LLAMA3_NAMES:
            raise ValueError(f"the token {token!r} is not made by merging two, as a GGUF has it")
    return merges


def world_vocabulary(enc: tiktoken.Encoding) -> Vocabulary:
    """Tokens as Python writes bytes: \\n, \\x00, and else as they are."""
    tokens, types = [], []
    for i in range(enc.n_vocab):
        try:
            piece = enc.decode_single_token_bytes(i) if i != enc.eot_token else None
            tokens.append(WORLD_END if piece is None else repr(piece)[2:-1])
            types.append(CONTROL if piece is None else NORMAL)
        except KeyError:
            tokens.append("")
            types.append(UNUSED)
    return Vocabulary("rwkv", tokens, types)


# ------------------------------------------------------------------------------------------
# Chat templates: the frames of data/chat.py as programs

def jinja(chat: dict) -> str:
    """The Jinja template that makes what `chat.frame` does, in one line."""
    content = "message['content']"
    if chat.get("dense"):                              # without its empty lines
        content = f"{content}.replace('\\r\\n', '\\n').split('\\n') | select('ne', '') | join('\\n')"
    if chat["trim"]:
        content += " | trim"

    def framed(role: str) -> str:
        before, *after = chat[role]
        before += chat.get("lead", "") * (role == "assistant")
        return f"{{{{ {quoted(before)} + ({content}) + {quoted(''.join(after))} }}}}"

    roles = [("message['role'] == 'user'", framed("user")),
             ("message['role'] == 'assistant'", framed("assistant"))]
    if chat["system"]:
        roles.append(("message['role'] == 'system' and loop.first", framed("system")))
    cases = "{% el".join(f"if {test} %}}{text}" for test, text in roles)
    return ("{% if messages[0]['role'] != 'system' %}{{ " + quoted(chat["default"]) + " }}{% endif %}"
            "{% for message in messages %}{% " + cases
            + "{% else %}{{ raise_exception('no frame for this role here') }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ " + quoted(chat["assistant"][0]) + " }}{% endif %}")


def quoted(text: str) -> str:
    """A Jinja string, with the escapes that every reader of Jinja knows."""
    for character, escape in {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}.items():
        text = text.replace(character, escape)
    return f"'{text}'"


# ------------------------------------------------------------------------------------------
# Back

def read_tokenizer(fields: dict) -> tiktoken.Encoding | dict:
    """The tokenizer in a file: `fields` of a gguf.GGUFReader.

    Raises ValueError for one that is not supported, or damaged.
    """
    kind, tokens, types = (contents(fields, key) for key in ("model", "tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(types, list):
        return read_gguf_tokenizer(fields)
    read = [token for token, type_ in zip(tokens, types) if type_ != UNUSED]
    if kind == "gpt2" and read == vocabulary(get_tokenizer("bytes")).tokens:
        return get_tokenizer("bytes")
    if kind == "rwkv":
        world = world_vocabulary(get_tokenizer("world"))
        if read != [token for token, type_ in zip(world.tokens, world.types) if type_ != UNUSED]:
            raise ValueError("the GGUF's tokenizer of kind rwkv is not the World vocabulary "
                             "(rwkv_vocab_v20230424)")
        return get_tokenizer("world")
    return read_gguf_tokenizer(fields)


def contents(fields: dict, key: str) -> object:
    """tokenizer.ggml.`key` of a file, or None."""
    field = fields.get(f"tokenizer.ggml.{key}")
    try:
        return field.contents() if field else None
    except (LookupError, ValueError, TypeError) as e:  # no text, or no list of texts
        raise ValueError(f"tokenizer.ggml.{key} is damaged ({brief(e)}): fetch it again") from None
