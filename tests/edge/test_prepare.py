"""Prepared folders: never half a one, and nothing else is destroyed."""

import pytest

import data.prepare
from common import one_line
from common_data import text_file, write_jsonl  # noqa: F401
from data.prepare import ensure_prepared, main, prepare


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


@pytest.mark.parametrize("step", ["Spool.write", "save_tokenizer", "seal", "publish"])
def test_a_full_disk_is_one_clear_line_and_keeps_what_was_there(tmp_path, text_file, monkeypatch, step):
    def full(*args):
        raise OSError(28, "No space left on device")

    prepare(text_file, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(f"data.prepare.{step}", full)
    with pytest.raises(ValueError) as e:
        main([str(text_file), "--out", str(tmp_path / "out"), "--overwrite"])
    assert one_line(e.value) == (f"{tmp_path}: No space left on device: free some space, or choose another "
                                 "--out; what was there is as it was")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


def test_an_interrupt_ends_in_one_line_and_changes_nothing(tmp_path, text_file, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("data.prepare.Spool.write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main([str(text_file), "--out", str(tmp_path / "deep" / "out")])
    assert "interrupted: nothing half-made is left" in one_line(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("words, complaint", [
    ([""], "source is empty"),
    (["a.txt", "--out", ""], "out is empty"),
    (["a.txt", "--tokenizer", ""], "tokenizer is empty"),
    ([".."], "gives the data set no name"),
    (["a.txt", "--vocab_size", "300"], "vocab_size"),
    (["a.txt", "--vocab-size=300"], "vocab-size"),
    (["a.txt", "b.txt"], "b.txt"),
    (["a.txt", "--val_fraction", "nan"], "val_fraction = nan"),
    (["a.txt", "--val_fraction", "x"], "val.fraction"),
    (["a.txt", "--split", "middle"], "split"),
])
def test_a_command_that_cannot_be_is_one_line(tmp_path, text_file, monkeypatch, words, complaint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=complaint) as e:
        main(words)
    one_line(e.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_data_set_without_a_name_is_not_looked_for_where_we_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("", " "):
        with pytest.raises(ValueError, match="name is empty"):
            ensure_prepared(folder)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [{"val_fraction": 0}, {"val_fraction": 1.5}, {"split": "middle"}])
def test_impossible_settings_are_refused(tmp_path, text_file, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        prepare(text_file, tmp_path / "out", **bad)


def test_an_interrupt_of_one_that_is_resumed_says_what_waits(tmp_path, monkeypatch, capsys):
    """Whoever then left --resume away would lose it."""
    def broken(*args):
        raise KeyboardInterrupt

    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"text number {i}"} for i in range(60)])
    command = [str(texts), "--out", str(tmp_path / "out"), "--resume"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.prepare.Spool, "write", broken)
        main(command)
    assert "what is tokenized waits" in one_line(capsys.readouterr().err)
    main(command)
    assert "going on after" in capsys.readouterr().err
