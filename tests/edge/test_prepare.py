"""Prepared folders: never half a one, and nothing else is destroyed."""

import pytest

import data.prepare
from common_data import text_file  # noqa: F401
from data.prepare import main, prepare


@pytest.mark.parametrize("names", [["thesis.txt"], ["train.bin"], ["meta.json", "model.safetensors"]])
def test_a_folder_with_other_things_is_never_destroyed(tmp_path, text_file, names):
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "out" / name).write_text("precious")
    with pytest.raises(ValueError, match="choose another --out"):
        prepare(text_file, tmp_path / "out", overwrite=True)
    assert [(tmp_path / "out" / name).read_text() for name in names] == ["precious"] * len(names)


@pytest.mark.parametrize("before", [False, True])
def test_a_broken_off_run_changes_nothing(tmp_path, text_file, monkeypatch, before):
    if before:
        prepare(text_file, tmp_path / "out")
    files = sorted(tmp_path.rglob("*"))

    def killed(*args):
        assert (tmp_path / "out").exists() == before  # nothing under the final name while it is being written
        raise KeyboardInterrupt

    monkeypatch.setattr(data.prepare, "save_tokenizer", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(text_file, tmp_path / "out", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == files


def test_a_full_disk_is_one_clear_line(tmp_path, text_file, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.prepare, "_write", full)
    assert main([str(text_file), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "data.prepare: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("bad", [{"val_fraction": 0}, {"val_fraction": 1.5}, {"split": "middle"}])
def test_impossible_settings_are_refused(tmp_path, text_file, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        prepare(text_file, tmp_path / "out", **bad)
