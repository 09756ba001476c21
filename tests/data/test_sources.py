"""Sources: Python's documentation, files of all kinds, URLs."""

import gzip
import io
import json
import re
import urllib.request

from common_data import documents, examples, small_library  # noqa: F401
from data.prepare import main, prepare


def test_pydoc_rejects_another_functions_docstring(tmp_path, small_library):
    prepare("pydoc-dpo", tmp_path / "dpo")
    prepare("pydoc-sft", tmp_path / "sft")
    for half in ("train", "val"):
        pairs, stored = set(examples(tmp_path / "sft", half)), examples(tmp_path / "dpo", half)
        responses = {response for _, response in pairs}
        assert stored and set(stored[::2]) <= pairs
        assert all(no in responses and no != yes for (_, yes), (_, no) in zip(stored[::2], stored[1::2]))


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
    assert main(["https://example.org/play", "--out", str(tmp_path / "a")]) == 0

    def refuse(url, timeout):
        raise OSError("name not resolved")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert main(["shakespeare", "--out", str(tmp_path / "b")]) == 1
    error = capsys.readouterr().err.strip()
    assert "tinyshakespeare" in error and "give its path" in error and "\n" not in error
