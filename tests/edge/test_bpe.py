"""Texts that the tokenizers' engine gives up on, endless split patterns, bad specs."""

import copy
import os

import pytest
import tiktoken

from common import one_line
from common_bpe import CHATML, MANUAL, imported, model_folder, train  # noqa: F401
from data import bpe
from data.bpe import ByteLevelBPE, check_pattern
from data.foreign import GGUF_SPLITS, GPT2, LLAMA3, QWEN2
from data.tokenizer import END, get_tokenizer

BACKTRACKING = r"(?:(?=a)a|a)*c|(?s:.)"     # 2^n ways to read n letters


def panicking(monkeypatch, pattern: str) -> tiktoken.Encoding:
    """One of tiktoken's own names, whose split pattern is this."""
    ranks = {bytes([i]): i for i in range(256)}
    original = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: 256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: original)
    return get_tokenizer("gpt2")


def test_a_panic_of_the_engine_is_one_error_and_it_says_nothing_itself(monkeypatch, capfd):
    enc = panicking(monkeypatch, BACKTRACKING)
    assert enc.encode_ordinary("abc") == list(b"abc") and enc.decode([97, 256]) == "a" + END
    with pytest.raises(ValueError, match="gpt2 gives up on a text of 90 characters.*'aaaaaaaa") as e:
        enc.encode_ordinary("a" * 90)
    one_line(e.value)
    os.write(2, b"heard")       # stderr is there again
    assert capfd.readouterr().err == "heard"


def test_with_a_closed_stderr_it_is_the_same(monkeypatch):
    enc = panicking(monkeypatch, BACKTRACKING)
    saved = os.dup(2)
    try:
        os.close(2)
        assert enc.encode_ordinary("abc") == list(b"abc")
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3, QWEN2, *(p for ps in GGUF_SPLITS.values() for p in ps)])
def test_the_patterns_of_the_world_are_fine(pattern):
    check_pattern(pattern)


@pytest.mark.parametrize("pattern", [BACKTRACKING, r"(?:(?:foo)+)+\d"])
def test_patterns_without_end_are_refused(pattern):
    with pytest.raises(ValueError, match="takes too many steps") as e:
        check_pattern(pattern)
    one_line(e.value)


def test_an_early_pattern_that_runs_out_of_time_is_the_same_error(model_folder, monkeypatch):
    enc = get_tokenizer(str(model_folder))

    def late(pattern, text):
        raise TimeoutError("regex timed out")

    monkeypatch.setattr(bpe, "_cut", late)
    with pytest.raises(ValueError, match=f"{enc.name} gives up on a text of"):
        enc.encode_ordinary(MANUAL[:1000])


@pytest.mark.parametrize("change", [
    {"tokens": [1]}, {"tokens": None}, {"tokens": "abc", "special": {}}, {"special": {"x": "3"}},
    {"special": {"x": -1}}, {"special": {"x": 2**24}}, {"special": {"x": True}}, {"special": []},
    {"added": {"x": 1.0}}, {"late": ["x"]}, {"late": 3},
    {"end": None}, {"end": 10**6}, {"start": "0"}, {"start": 10**6},
    {"unknown": 10**6}, {"stop": [-1]}, {"stop": 3}, {"split": 3}, {"split": ["("]}, {"split": [3]},
    {"split": [BACKTRACKING]}, {"normalizer": "XYZ"}, {"chat": 3}, {"chat": {}}, {"chat": {"user": ["", ""]}},
])
def test_a_spec_of_other_types_is_refused_when_it_is_read(tmp_path, change):
    spec = copy.deepcopy(imported(train(), tmp_path, chat_template=CHATML).spec)
    ByteLevelBPE(spec)
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):      # load_tokenizer says where
        ByteLevelBPE(spec | change)


@pytest.mark.parametrize("name, value", [("default", 3), ("user", [""]), ("user", ["", 3]), ("trim", "yes"),
                                         ("assistant", ["", ""]), ("system", ["", "", ""]), ("system", "ab")])
def test_frames_of_other_types_are_refused_when_they_are_read(tmp_path, name, value):
    spec = imported(train(), tmp_path, chat_template=CHATML).spec
    with pytest.raises(ValueError, match="frames of system, user and assistant"):
        ByteLevelBPE(spec | {"chat": spec["chat"] | {name: value}})
