"""Sources that cannot be used: one line with the file and the place."""

import gzip
import os
import socket
import zlib

import pytest

from common import one_line
from common_data import write_jsonl
from data.prepare import prepare


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
def test_an_unusable_source_is_one_clear_line_and_leaves_nothing(tmp_path, name, content, complaint):
    (tmp_path / "in" / name).parent.mkdir(parents=True)
    (tmp_path / "in" / name).write_bytes(content)
    source = tmp_path / "in" / name.split("/")[0]
    with pytest.raises(ValueError) as e:
        prepare(source, tmp_path / "deep" / "out")
    assert complaint in one_line(e.value) and [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("content, complaint", [
    (b"ab\ncaf\xe9 au lait", "byte 6:"),
    ("\ufeffab\n".encode("utf-16-le"), "byte 0, but UTF-16.*-f utf-16 -t utf-8"),
    ("\ufeffab\n".encode("utf-32-le"), "byte 0, but UTF-32"),
    ("ab\nc".encode("utf-16-le"), "NUL byte at byte 1"),
    (b"fine\n" * 30_000 + b"a\0b", "NUL byte at byte 150001"),
    (b"x" * 1_100_000 + b"\xff", "byte 1100000:"),
    (b"x" + "é".encode() * 2**19 + b"\xc3", "byte 1048577:"),
])
def test_other_encodings_are_named_with_the_place(tmp_path, content, complaint):
    names = ("a.txt", "b.jsonl") if content[:1] > b"~" else ("a.txt",)
    for name in names:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} .*{complaint}") as e:
            prepare(tmp_path / name, tmp_path / "out")
        one_line(e.value)


@pytest.mark.parametrize("line, complaint", [
    ("[" * 100_000, "nested too deeply"),
    ('{"text": ' * 100_000, "nested too deeply"),
    ('{"text": "a", "text": "b"}', "'text' comes twice"),
    ('{"text": NaN}', "'text' is float"),
    ('{"text": ' + "1" * 400 + "}", "'text' is int"),
    ('{"text": ' + "1" * 5000 + "}", "not JSON"),
    ('{"text": "a\0"}', "NUL byte at byte 27"),
    ("\ufeff{}", "not JSON"),
    ('"text"', "has the fields"),
    ("{" + ", ".join(f'"{i}": 1' for i in range(5000)) + "}", "has the fields"),
])
def test_strange_json_is_named_with_its_line(tmp_path, line, complaint):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n{line}', encoding="utf-8")
    with pytest.raises(ValueError, match=f"a.jsonl.*{complaint}") as e:
        prepare(tmp_path / "a.jsonl", tmp_path / "out")
    assert len(one_line(e.value)) < 1000


def test_crlf_a_mark_and_numbers_of_any_length_do_no_harm(tmp_path):
    lines = [f'{{"text": "t{i}", "n": {"9" * 400}, "x": NaN}}\r\n' for i in range(200)]
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + "".join(lines)).encode())
    assert sum(prepare(tmp_path / "a.jsonl", tmp_path / "out")["documents"].values()) == 200


# ------------------------------------------------------------------------------------------
# What is no file

def test_devices_sockets_and_pipes_without_a_writer_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "link.txt").symlink_to("/dev/zero")
    (tmp_path / "a.txt").symlink_to("b.txt")
    (tmp_path / "b.txt").symlink_to("a.txt")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s.txt"))
    cases = {"/dev/zero": "a device", "/dev/null": "a device", "/dev/random": "a device",
             tmp_path / "link.txt": "a device", tmp_path / "s.txt": "a socket",
             tmp_path / "pipe.txt": "start first what writes to it",
             tmp_path / "a.txt": "symbolic links", tmp_path / "no.txt": "no source"}
    for source, complaint in cases.items():
        with pytest.raises(ValueError, match=complaint) as e:
            prepare(source, tmp_path / "out")
        assert str(source) in one_line(e.value) and not (tmp_path / "out").exists()
    listener.close()


def test_a_bomb_is_refused_before_it_fills_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.LITTLE", 2**20)
    packer = zlib.compressobj(9, wbits=31)
    some = b"a" * 2**20
    bomb = b"".join(packer.compress(some) for _ in range(30)) + packer.flush()
    for name in ("a.txt.gz", "b.jsonl.gz"):
        (tmp_path / name).write_bytes(bomb)
        with pytest.raises(ValueError, match=f"{name} unpacks to more than 200 times its size") as e:
            prepare(tmp_path / name, tmp_path / "out")
        one_line(e.value)


def test_a_record_without_end_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.LONGEST", 10_000)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "' + "x" * 20_000 + '"}')
    with pytest.raises(ValueError, match="a.jsonl, line 2 has more than 10,000 characters"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out")


# ------------------------------------------------------------------------------------------
# Conversations


def test_lone_surrogates_in_json_do_not_stop_it(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": f"\ud800 {i}"} for i in range(30)])
    assert sum(prepare(source, tmp_path / "out")["documents"].values()) == 30


@pytest.mark.parametrize("messages, word", [
    ("hello", "list of"),
    ([], "roles of no message"),
    ([{"role": "user"}], "list of"),
    ([{"role": "tool", "content": "x"}], "message 1 of messages has the role 'tool'"),
    ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "calls a tool"),
    ([{"role": "user", "content": [{"type": "image"}]}], "no content that is a string"),
    ([{"from": "human", "value": "x"}], "list of"),
    ([{"role": "user", "content": "x"}], "at least one assistant"),
    ([3], "list of"),
    ([{"role": role, "content": "x"} for role in ("user", "system", "assistant")],
     "system may only come first"),
])
def test_other_messages_are_refused_with_their_line(tmp_path, messages, word):
    with pytest.raises(ValueError, match=f"a.jsonl, line 1.*{word}") as e:
        prepare(write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}]), tmp_path / "out")
    one_line(e.value)
