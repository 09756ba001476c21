"""Where results go: what is not a program's own is never replaced."""

import json
import os

import pytest

from common import one_line
from lib.owned import check_place, contents


def is_own(file) -> bool:
    return contents(file).get("own") is True


def refused(files) -> None:
    before = [(path, path.read_bytes()) for path in files if path.is_file()]
    with pytest.raises(ValueError, match="^--out: .* exists, and this command did not write it") as e:
        check_place(files, is_own, "--out")
    one_line(e.value)
    assert before == [(path, path.read_bytes()) for path in files if path.is_file()]


def test_only_what_is_its_own_is_replaced(tmp_path):
    files = [tmp_path / "new" / "r.json", tmp_path / "new" / "r.md"]
    check_place(files, is_own, "--out")                      # nothing there: the folder is made, and is empty
    assert list((tmp_path / "new").iterdir()) == []
    files[0].write_text(json.dumps({"own": True}))
    files[1].write_text("a table")
    check_place(files, is_own, "--out")
    for text in ('{"own": false}', "[]", "", "{", "[" * 100000):
        files[0].write_text(text)
        refused(files)
    files[0].unlink()
    refused(files)                                           # a table of whom?
    files[1].unlink()
    files[0].mkdir()
    refused(files)


def test_devices_pipes_and_links_to_nowhere_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in (tmp_path / "pipe", tmp_path / "link", *map(type(tmp_path), (os.devnull, "/dev/zero"))):
        refused([name])


def test_a_place_that_cannot_be_written_is_found_out_at_once(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder in ("file", "file/deep", "link", "x" * 300):
        with pytest.raises(OSError) as e:
            check_place([tmp_path / folder / "r.json"], is_own, "--out")
        assert folder.partition("/")[0] in str(e.value.filename)


def test_a_file_too_large_to_be_ours_is_not_read(tmp_path):
    (tmp_path / "r.json").write_text('{"own": true}')
    assert contents(tmp_path / "r.json") == {"own": True} and contents(tmp_path / "r.json", most=3) == {}
