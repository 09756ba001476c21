"""Sources: Python's documentation, files of all kinds, URLs."""

import contextlib
import gzip
import http.server
import io
import json
import os
import re
import sys
import sysconfig
import threading
import urllib.request
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from common import one_line
from common_data import documents, examples, small_library, write_jsonl  # noqa: F401
from data import sources
from data.prepare import main, prepare


@contextlib.contextmanager
def served(body: bytes, length: int | None = None):
    """The URL, without a suffix, of a local server whose replies claim this length."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(length or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/book"
        finally:
            server.shutdown()
            thread.join()


def test_pydoc_rejects_another_functions_docstring(tmp_path, small_library):
    prepare("pydoc-dpo", tmp_path / "dpo")
    prepare("pydoc-sft", tmp_path / "sft")
    for half in ("train", "val"):
        pairs, stored = set(examples(tmp_path / "sft", half)), examples(tmp_path / "dpo", half)
        responses = {response for _, response in pairs}
        assert stored and set(stored[::2]) <= pairs
        assert all(no in responses and no != yes for (_, yes), (_, no) in zip(stored[::2], stored[1::2]))


def test_pysource_is_the_modules_source_each_in_one_half(tmp_path, small_library):
    """Together its documents are the files, but for blank space at their ends."""
    meta = prepare("pysource", tmp_path / "p")
    assert meta["source"] == f"pysource of Python {sys.version.split()[0]}"
    pages = {half: documents(tmp_path / "p", half) for half in ("train", "val")}
    whole = {path.stem: path.read_text() for path in Path(sysconfig.get_path("stdlib")).rglob("*.py")}
    files = [f"# {name}\n{text}" for name, text in whole.items()]
    letters = ["".join("".join(texts).split()) for texts in (pages["train"] + pages["val"], files)]
    assert len(letters[0]) == len(letters[1])
    for name, text in whole.items():
        parts = {half: [page for page in pages[half] if page in f"# {name}\n{text}"] for half in pages}
        assert not (parts["train"] and parts["val"]) or name == "__init__", name


def test_a_docstring_to_be_predicted_is_not_in_the_text_trained_on(tmp_path, small_library):
    prepare("pydoc", tmp_path / "text")
    prepare("pydoc-sft", tmp_path / "sft")
    train = "\n\n".join(documents(tmp_path / "text", "train"))
    pairs = examples(tmp_path / "sft", "val")
    assert pairs and not [response for _, response in pairs if len(response) > 40 and response in train]
    assert all(re.match(r"# [\w.]+\n(async )?def \w+\(.*\n$", prompt) for prompt, _ in pairs)


def test_zipped_marked_and_crlf_files_read_like_the_plain_file(tmp_path):
    text = "".join(f"paragraph {i}\n\n" for i in range(100))
    raw = text.encode()
    (tmp_path / "plain.md").write_bytes(raw)
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n"))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": text}).encode()))
    (tmp_path / "deep" / "b.txt.gz").write_bytes(gzip.compress(b"second document"))
    (tmp_path / "deep" / "ignored.png").write_bytes(b"\xff")
    for name in ("plain.md", "dos.txt"):
        prepare(tmp_path / name, tmp_path / "out" / name, split="tail")
    plain, dos = (documents(tmp_path / "out" / name, "train") for name in ("plain.md", "dos.txt"))
    assert plain == dos
    prepare(tmp_path / "deep", tmp_path / "out" / "deep")
    both = documents(tmp_path / "out" / "deep", "train") + documents(tmp_path / "out" / "deep", "val")
    # two documents are too few for chance: the tail is cut off
    assert "".join(both) == "second document" + text


def test_a_url_is_fetched_and_a_failure_says_to_pass_a_path(tmp_path, monkeypatch, capsys):
    page = b"to be or not to be\n\n" * 30
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(page))
    main(["https://example.org/play", "--out", str(tmp_path / "a")])
    assert json.loads((tmp_path / "a" / "meta.json").read_text())["source"] == "https://example.org/play"

    def refuse(url, timeout):
        raise OSError("name not resolved")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(ValueError, match="tinyshakespeare.*give its path") as e:
        main(["shakespeare", "--out", str(tmp_path / "b")])
    one_line(e.value)


def test_a_download_that_breaks_off_is_refused_and_leaves_nothing(tmp_path):
    with served(b"half of a text\n\n" * 500, length=20_000) as url:
        with pytest.raises(ValueError, match="download .*12,000 bytes before its end.*give its path") as e:
            prepare(url, tmp_path / "out")
    one_line(e.value)
    assert not list(tmp_path.iterdir())


def test_a_source_that_can_be_read_once_is_read_once(tmp_path, monkeypatch):
    """Two documents are too few for chance, so the text is gone through twice."""
    pages = [io.BytesIO(b"one and two")]
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: pages.pop())
    assert prepare("https://example.org/play", tmp_path / "a")["split"] == "tail"


def test_suffixes_have_no_case_and_what_is_left_out_is_counted(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.TXT").write_text(f"text {i}")
    (folder / "Z.Md.GZ").write_bytes(gzip.compress(b"packed"))
    for name in ("a.pdf", "b.pdf", "c.png", "README"):
        (folder / name).write_bytes(b"\xff")
    (folder / "empty.md").touch()
    (folder / "loop").symlink_to(folder)
    (folder / "gone.txt").symlink_to("nowhere")
    main([str(folder), "--out", str(tmp_path / "out")])
    texts = documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")
    assert sorted(texts) == sorted(["packed", *(f"text {i}" for i in range(30))])
    left_out = {"files of the kind .pdf": 2, "files of the kind .png": 1, "empty files": 1,
                "files without a suffix": 1, "links to folders": 1,
                "links to nothing, pipes and the like": 1}
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["left_out"] == left_out
    assert "left out: 2 files of the kind .pdf, 1 empty files, " in capsys.readouterr().out


def test_what_is_left_out_has_a_hundred_kinds_at_most(tmp_path, capsys):
    records = [{"text": f"text {i}", f"{i}" + "x" * 99: i} for i in range(300)]
    main([str(write_jsonl(tmp_path / "a.jsonl", records)), "--out", str(tmp_path / "out")])
    left_out = json.loads((tmp_path / "out" / "meta.json").read_text())["left_out"]
    assert len(left_out) == 101 and sum(left_out.values()) == 300 and max(map(len, left_out)) < 60
    assert "200 of further kinds" in (text := capsys.readouterr().out) and "89 further kinds" in text


def test_what_is_left_out_of_records_is_counted(tmp_path):
    lines = [json.dumps({"text": f"text {i}", "id": i}) for i in range(20)] + ["", " ", '{"text": " "}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    meta = prepare(tmp_path / "a.jsonl", tmp_path / "out")
    assert meta["left_out"] == {"fields 'id'": 20, "blank lines": 2, "blank records": 1}
    twice = write_jsonl(tmp_path / "b.jsonl", [{"text": f"text {i % 10}"} for i in range(30)])
    meta = prepare(twice, tmp_path / "tail", split="tail")
    assert meta["left_out"] == {"documents that come again": 20}


def test_packed_text_is_cut_as_the_text_that_it_unpacks_to(tmp_path):
    text = "".join(f"paragraph {i} of a text that packs well\n\n" for i in range(20_000)).encode()
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text))
    for name in ("a.txt", "b.txt.gz"):
        prepare(tmp_path / name, tmp_path / "out" / name[0])
    for half in ("train.bin", "val.bin"):
        assert (tmp_path / "out/a" / half).read_bytes() == (tmp_path / "out/b" / half).read_bytes()


@pytest.mark.parametrize("content", [b"one line\n\n" * 3000, "漢字 ohne Ende ".encode() * 80_000,
                                     b"x" * (2**20 - 1) + b"\r\n" + "ü\r\n\r\n".encode() * 9])
def test_a_pipe_gives_what_a_file_gives(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    prepare(tmp_path / "a.txt", tmp_path / "a")
    read_end, write_end = os.pipe()
    writer = threading.Thread(target=lambda: os.fdopen(write_end, "wb").write(content))
    writer.start()
    prepare(f"/dev/fd/{read_end}", tmp_path / "b")
    writer.join()
    os.close(read_end)
    for half in ("train.bin", "val.bin"):
        assert (tmp_path / "a" / half).read_bytes() == (tmp_path / "b" / half).read_bytes()


def test_latin1_is_told_how_to_become_utf8_in_any_locale(tmp_path):
    (tmp_path / "a.txt").write_bytes("Überall\n\n".encode("latin1") * 99)
    with pytest.raises(ValueError, match="a.txt is not UTF-8 at byte 0: .* iconv -f latin1 -t utf-8$"):
        prepare(tmp_path / "a.txt", tmp_path / "out")


def test_what_a_pipe_holds_is_seen_from_its_first_line(tmp_path):
    lines = "".join(json.dumps({"prompt": f"{i}", "response": "r"}) + "\n" for i in range(40)).encode()
    for content, kind in ((lines, "supervised"), (gzip.compress(b"text " * 99), "text"), (b"{no", "text"),
                          (gzip.compress(lines), "supervised")):
        (tmp_path / "file").write_bytes(content)
        with open(tmp_path / "file", "rb") as file:
            meta = prepare(f"/dev/fd/{file.fileno()}", tmp_path / "out", overwrite=True)
        assert meta["kind"] == kind


def test_what_a_url_without_a_suffix_holds_is_seen_from_its_beginning(tmp_path):
    lines = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(40)).encode()
    parquet.write_table(pyarrow.table({"text": [f"text {i}" for i in range(40)]}), tmp_path / "a.parquet")
    bodies = [b"\n \r\n" + lines, gzip.compress(lines), zstandard.compress(lines),
              (tmp_path / "a.parquet").read_bytes()]
    for i, body in enumerate(bodies):
        with served(body) as url:
            prepare(url, tmp_path / f"{i}")
        assert "text 7" in documents(tmp_path / f"{i}", "train") + documents(tmp_path / f"{i}", "val"), i


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_a_first_record_of_megabytes_is_a_record(tmp_path, pack):
    texts = ["word " * 500_000, *(f"text {i}" for i in range(40))]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "a.zst").write_bytes(pack(lines))
    with open(tmp_path / "a.zst", "rb") as file:
        prepare(f"/dev/fd/{file.fileno()}", tmp_path / "piped")
    if pack == zstandard.compress:
        prepare(tmp_path / "a.zst", tmp_path / "piped", overwrite=True)
    found = documents(tmp_path / "piped", "train") + documents(tmp_path / "piped", "val")
    assert sorted(found) == sorted(texts)


def test_a_line_is_cut_alike_whether_it_comes_whole_or_in_parts():
    text = "".join(f"{i} " for i in range(500)) + "\nshort\n\n" + "x" * 1000
    for size in (1, 7, 100, 300):
        whole = list(sources._cut(text.splitlines(keepends=True), size))
        for step in (1, 3, 64, 1000):
            lines = text.splitlines(keepends=True)
            parts = [line[i : i + step] for line in lines for i in range(0, len(line), step)]
            assert list(sources._cut(parts, size)) == whole
