"""Tokenizers and templates that are not supported, or are damaged."""

import json
from pathlib import Path

import pytest

from common import one_line
from common_bpe import CHATML, gguf_fields, train
from data.foreign import read_gguf_tokenizer, read_template, read_tokenizer_json
from data.prepare import main


def test_ids_in_another_order_than_the_merges_are_refused(tmp_path):
    file = json.loads(train().to_str())
    vocab = file["model"]["vocab"]
    a, b = [token for token in vocab if len(token) == 2][:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match=f"'{a}' is merged before '{b}', but has a larger id"):
        read_tokenizer_json(tmp_path)


def edited(tmp_path: Path, **changes) -> Path:
    """A tokenizer.json with other keys; those of the model begin with model_."""
    file = json.loads(train().to_str())
    for key, value in changes.items():
        part, key = (file["model"], key[6:]) if key.startswith("model_") else (file, key)
        part[key] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    return tmp_path


def sequence(*parts: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": [*parts]}


def split_of(pattern: dict, behavior: str) -> dict:
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}


BYTE_LEVEL = {"type": "ByteLevel"}
DIGITS = {"type": "Digits", "individual_digits": True}
LSTRIP = {"id": 0, "content": "x", "special": False, "lstrip": True, "rstrip": False, "single_word": False}


def regex_split(pattern: str) -> dict:
    return sequence(split_of({"Regex": pattern}, "Isolated"), BYTE_LEVEL | {"use_regex": False})


@pytest.mark.parametrize("changes, word", [
    ({"model_type": "Unigram"}, "SentencePiece"),
    ({"model_type": "WordPiece"}, "WordPiece"),
    ({"model_byte_fallback": True}, "SentencePiece"),
    ({"model_end_of_word_suffix": "</w>"}, "end_of_word_suffix"),
    ({"model_dropout": 0.1}, "dropout"),
    ({"model_vocab": {"a": 0, "b": 0}}, "not different"),
    ({"model_vocab": {"a": 10**12}}, "not different"),
    ({"model_vocab": None}, "no tokenizer"),
    ({"model_merges": [1]}, "no tokenizer"),
    ({"model_merges": ["a b c"]}, "a merge is no pair"),
    ({"model_merges": ["q x"]}, "the merge 'q x' is not of tokens"),
    ({"model_merges": ["qqq x"]}, "the merge 'qqq x' is not of tokens"),
    ({"model_vocab": {"a" * 20_000: 0}}, "characters squared of all tokens"),
    ({"added_tokens": [LSTRIP | {"id": i, "content": f"<{i}>", "special": True} for i in range(66_000)]},
     "66,000 added tokens"),
    ({"added_tokens": [LSTRIP | {"id": 2**22, "content": "</s>", "special": True}]}, "2\\^22"),
    ({"pre_tokenizer": regex_split("(?:a|b)" * 2000)}, "characters of split patterns"),
    ({"model_vocab": {"a": float("nan")}}, "not different"),
    ({"pre_tokenizer": {"type": "Metaspace", "replacement": "▁"}}, "SentencePiece"),
    ({"pre_tokenizer": None}, "character-level"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
    ({"pre_tokenizer": sequence({"type": "Punctuation"}, BYTE_LEVEL)}, "Punctuation"),
    ({"pre_tokenizer": sequence(BYTE_LEVEL, DIGITS)}, "Digits"),
    ({"pre_tokenizer": sequence(split_of({"String": " "}, "MergedWithNext"), BYTE_LEVEL)}, "MergedWithNext"),
    ({"pre_tokenizer": regex_split("(")}, "pattern"),
    ({"pre_tokenizer": regex_split("a*")}, "pattern"),
    ({"pre_tokenizer": regex_split("(((a{100}){0,100}){100,}){100}")}, "100,000,000 repeats"),
    ({"pre_tokenizer": regex_split("a{" + "9" * 5000 + "}")}, "999,999,999 repeats"),
    ({"pre_tokenizer": regex_split(r"\p{Nonsense}")}, "pattern"),
    ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
    ({"added_tokens": []}, "ends a text"),
    ({"added_tokens": [{}]}, "no tokenizer"),
    ({"added_tokens": [LSTRIP]}, "stands around it"),
])
def test_other_tokenizers_are_refused_by_name(tmp_path, changes, word):
    with pytest.raises(ValueError, match=word) as e:
        read_tokenizer_json(edited(tmp_path, **changes))
    assert "tokenizer.json" in one_line(e.value)


def test_a_file_larger_than_any_tokenizer_is_not_read(tmp_path):
    """Ten million tokens have 180 MB; here they are a hole in a file."""
    for name in ("tokenizer.json", "vocab.json"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(180_000_000)
        with pytest.raises(ValueError, match=f"{name} has more than 67,108,864 bytes"):
            read_tokenizer_json(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"merges.txt can't be read \(No such file"):
        read_tokenizer_json(tmp_path)


def test_a_damaged_file_beside_the_vocabulary_is_named(tmp_path):
    """Elsewhere what is damaged would be fetched again, and nothing be won."""
    model = json.loads(train().to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(" ".join(pair) + "\n" for pair in model["merges"]).encode()
    (tmp_path / "merges.txt").write_bytes(merges)
    read_tokenizer_json(tmp_path)
    space = merges.index(b" ", 2000)
    for content, words in ((b"\xff" + merges, "merges.txt is damaged .no UTF-8, byte 0.: fetch it again"),
                           (merges[:space], "with merges.txt is damaged .a merge is no pair"),
                           (merges + b"q x", "with merges.txt is damaged .the merge '.*' is not of")):
        (tmp_path / "merges.txt").write_bytes(content)
        with pytest.raises(ValueError, match=words) as e:
            read_tokenizer_json(tmp_path)
        one_line(e.value)
    (tmp_path / "merges.txt").write_bytes(merges)
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ \xff }}")
    with pytest.raises(ValueError, match="chat_template.jinja is damaged .no UTF-8, byte 3.: fetch it again"):
        read_tokenizer_json(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b"\xff", b'{"model": 3}',
                                     b'{"model": {"type": "BPE"}}', b"[" * 100_000])
def test_a_malformed_file_is_one_clear_line(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json") as e:
        read_tokenizer_json(tmp_path)
    one_line(e.value)
    with pytest.raises(ValueError, match="tokenizer.json|meta.json") as e:
        main(["pydoc", "--tokenizer", str(tmp_path), "--out", str(tmp_path / "out")])
    one_line(e.value)


@pytest.mark.parametrize("changes, word", [
    ({"ggml.model": "llama"}, "SentencePiece"),
    ({"ggml.model": "bert"}, "WordPiece"),
    ({"ggml.model": None}, "None"),
    ({"ggml.pre": "tekken"}, "'tekken'"),
    ({"ggml.tokens": []}, "damaged"),
    ({"ggml.token_type": [1]}, "damaged"),
    ({"ggml.merges": None}, "damaged"),
    ({"ggml.tokens": "x"}, "damaged"),
    ({"ggml.eos_token_id": "x"}, "damaged"),
    ({"ggml.pre": ["x"]}, "damaged"),
    ({"ggml.pre": "x" * 10_000}, "not supported"),
])
def test_other_ggufs_are_refused_by_name(changes, word):
    with pytest.raises(ValueError, match=word) as e:
        read_gguf_tokenizer(gguf_fields(train(), **changes))
    one_line(e.value)


@pytest.mark.parametrize("template", [
    None,
    "",
    "{",
    7,
    [],
    [{"name": "tool_use", "template": CHATML}],
    "{{ messages[0]['content'] }}",
    "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}",
    CHATML.replace("<|im_end|>", "."),
    CHATML.replace("m['content']", "m['content'][::-1]"),
    CHATML.replace("m['role'] + '\n'", "loop.index | string + '\n'"),
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + CHATML,
    "{{ lipsum(1000000) }}" + CHATML,
    "{{ 'x' * 10**11 }}" + CHATML,
    "{% set x = namespace(s='xx') %}{% for i in range(60) %}{% set x.s = x.s + x.s %}{% endfor %}" + CHATML,
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + CHATML,
    "{{ '%1000000000d' % 1 }}" + CHATML,
])
def test_a_template_that_is_more_than_frames_is_none(template):
    names = {"bos_token": None, "eos_token": None}
    assert read_template(template, names, {"<|im_start|>": 1, "<|im_end|>": 2}) is None
