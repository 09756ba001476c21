"""Tokenizers that are unknown, out of reach or damaged."""

import pytest
import tiktoken

from common import one_line
from common_bpe import save, train
from data.foreign import read_tokenizer_json
from data.tokenizer import get_tokenizer, load_tokenizer, read_prompt, write_tokenizer


def test_an_unknown_tokenizer_is_answered_with_the_choices():
    with pytest.raises(ValueError, match="'gpt9'.*bytes, gpt2"):
        get_tokenizer("gpt9")


def test_gpt2_offline_names_the_cache_folder_in_one_line(monkeypatch):
    def offline(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR.*--tokenizer bytes") as error:
        get_tokenizer("gpt2")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"tokenizer": 3}', b"\xff"])
def test_a_missing_or_damaged_meta_is_one_clear_line(tmp_path, content):
    if content is not None:
        (tmp_path / "meta.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="meta.json") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"{", b"{}", b'{"tokens": []}', b"[]", b"\xff"])
def test_a_damaged_tokenizer_of_ours_is_one_clear_line(tmp_path, content):
    write_tokenizer(read_tokenizer_json(save(train(), tmp_path / "hf")), tmp_path)
    file = tmp_path / "tokenizer.json"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json") as e:
        load_tokenizer(tmp_path)
    one_line(e.value)


def test_a_name_in_meta_json_is_never_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "meta.json").write_text('{"tokenizer": "here"}')
    with pytest.raises(ValueError, match="unknown tokenizer 'here'"):
        load_tokenizer("here")


def test_a_prompt_may_stand_in_a_file_which_must_be_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffWhy?\n".encode())
    assert read_prompt(f"FILE:{tmp_path / 'a.txt'}") == "Why?\n" and read_prompt("file: x") == "file: x"
    (tmp_path / "b.txt").write_bytes(b"ab\xff")
    for prompt, message in ((tmp_path / "b.txt", "b.txt is not UTF-8 .byte 2.*iconv"),
                            (tmp_path / "c.txt", "c.txt' can't be read .*check the path")):
        with pytest.raises(ValueError, match=message) as e:
            read_prompt(f"FILE:{prompt}")
        one_line(e.value)
