"""Sources that cannot be used: one line with the file and the place."""

import gzip

import pytest

from common import one_line
from common_data import write_jsonl
from data.prepare import main, prepare


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{bad", "not JSON"),
        ("[1]", "fields"),
        ('{"prompt": "p"}', r"\['prompt'\].*prompt, response"),
        ('{"text": 5}', "'text' is int"),
        ('{"prompt": "p", "response": null}', "'response' is NoneType"),
        ('{"prompt": "p", "response": "r"}', "supervised data, but what came before it is text"),
    ],
)
def test_a_bad_json_line_is_named_by_its_number(tmp_path, line, complaint):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=f"a.jsonl, line 3.*{complaint}"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\ndef\xe9 ghi\n")
    with pytest.raises(ValueError, match="a.txt is not UTF-8 at byte 7.*iconv"):
        prepare(tmp_path / "a.txt", tmp_path / "out")


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b"\n \n", "no text"),
        ("a.jsonl", b'{"prompt": "alone", "response": "r"}', "too little"),
        ("a.txt", b"a", "too little"),
        ("a.txt.gz", gzip.compress(b"text " * 999, mtime=0)[:-20], "damaged .gz"),
        ("a.txt.gz", b"not zipped", "damaged .gz"),
        ("a.pdf", b"%PDF", "rename or convert"),
        ("folder/a.pdf", b"%PDF", "holds no .txt"),
    ],
)
def test_an_unusable_source_is_one_clear_line_and_leaves_nothing(tmp_path, capsys, name, content, complaint):
    (tmp_path / "in" / name).parent.mkdir(parents=True)
    (tmp_path / "in" / name).write_bytes(content)
    source = tmp_path / "in" / name.split("/")[0]
    assert main([str(source), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip()
    assert complaint in error and "\n" not in error and [p.name for p in tmp_path.iterdir()] == ["in"]


def test_lone_surrogates_in_json_do_not_stop_it(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": f"\ud800 {i}"} for i in range(30)])
    assert sum(prepare(source, tmp_path / "out")["documents"].values()) == 30


@pytest.mark.parametrize("messages, word", [
    ("hello", "list of"),
    ([], "roles of no message"),
    ([{"role": "user"}], "list of"),
    ([{"role": "tool", "content": "x"}], "list of"),
    ([{"role": "user", "content": "x"}], "at least one assistant"),
    ([3], "list of"),
    ([{"role": role, "content": "x"} for role in ("user", "system", "assistant")],
     "system may only come first"),
])
def test_other_messages_are_refused_with_their_line(tmp_path, messages, word):
    with pytest.raises(ValueError, match=f"a.jsonl, line 1.*{word}") as e:
        prepare(write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}]), tmp_path / "out")
    one_line(e.value)
