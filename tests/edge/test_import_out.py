"""Where an import and an export write: the old model or the new one, whole, whatever
happens; and nothing of somebody else.
"""

import errno
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

import data.folder
from common import start
from common_convert import KINDS, original, refused, rwkv
from lib.folders import load_model, save_model
from tools import convert
from tools.convert import ExportConfig, ImportConfig, export_model, import_model

@pytest.fixture
def source(tmp_path):
    original(*KINDS["qwen2"]).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def bring(source, out, **settings) -> None:
    import_model(ImportConfig(path=str(source), out=str(out), tokenizer="bytes", **settings))


def old_model(folder) -> bytes:
    """A model of ours, with a tokenizer.json; returns the bytes of its weights."""
    save_model(rwkv(), folder, {"tokenizer": "bytes"})
    (folder / "tokenizer.json").write_text("{}")
    return (folder / "model.safetensors").read_bytes()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def is_whole(folder) -> bool:
    return len(load_file(folder / "model.safetensors")) > 9 and load_model(folder) is not None


# ------------------------------------------------------------------------------------------
# In one step

@pytest.mark.parametrize("at_once", [True, False])
def test_the_new_model_stands_where_the_old_one_was(at_once, source, tmp_path, monkeypatch):
    old_model(tmp_path / "out")
    if not at_once:
        monkeypatch.setattr(data.folder, "exchange", lambda a, b: False)
    refused("--overwrite", call=lambda: bring(source, tmp_path / "out"))
    bring(source, tmp_path / "out", overwrite=True)
    assert load_model(tmp_path / "out").cfg.qkv_bias
    assert names(tmp_path / "out") == ["config.json", "meta.json", "model.safetensors"]
    assert names(tmp_path) == ["out", "source"]


def test_a_link_to_another_disk_is_followed(source, tmp_path):
    """What is written stands beside the folder that the link leads to."""
    disk = tmp_path / "disk"
    old_model(disk / "model")
    (tmp_path / "out").symlink_to(disk / "model")
    seen = []

    def watch(new, out):
        seen.append((new.parent, out))
        os.rename(out, disk / "before")
        os.rename(new, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "publish", watch)
        bring(source, tmp_path / "out", overwrite=True)
    assert seen == [(disk, disk / "model")]
    assert (tmp_path / "out").is_symlink() and is_whole(tmp_path / "out")
    (tmp_path / "away").symlink_to(tmp_path / "no" / "disk")
    refused("leads nowhere", str(tmp_path / "no" / "disk"), call=lambda: bring(source, tmp_path / "away"))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EBUSY])
@pytest.mark.parametrize("where", ["mkdir", "write", "rename"])
def test_what_the_disk_refuses_is_one_line_and_the_old_model_stays(where, number, source, tmp_path,
                                                                    monkeypatch):
    weights = old_model(tmp_path / "out")

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(data.folder, "exchange", lambda a, b: False)
    if where == "mkdir":
        monkeypatch.setattr(convert.Path, "mkdir", fail)
    elif where == "write":
        monkeypatch.setattr(convert, "write_safetensors", fail)
    else:
        rename = os.rename
        monkeypatch.setattr(os, "rename", lambda a, b: fail() if "partial" in str(a) else rename(a, b))
    refused(str(tmp_path / "out"), f"can't be written ({os.strerror(number)})", "make room",
            call=lambda: bring(source, tmp_path / "out", overwrite=True))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights and is_whole(tmp_path / "out")
    assert names(tmp_path) == ["out", "source"]


def test_what_dead_imports_left_is_swept_up_or_put_back(source, tmp_path):
    """Of two renames, a kill came between; a living import's folder stays."""
    weights = old_model(tmp_path / ".out.999999999.old")
    left, kept = (999999998, os.getpid()), (os.getppid(), "x")
    for process in (*left, *kept):
        (tmp_path / f".out.{process}.partial").mkdir()
    refused("--overwrite", call=lambda: bring(source, tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    assert names(tmp_path) == [*(f".out.{process}.partial" for process in kept), "out", "source"]
    shutil.copytree(tmp_path / "out", tmp_path / ".out.999999999.old")
    bring(source, tmp_path / "out", overwrite=True)
    assert not (tmp_path / ".out.999999999.old").exists()


def test_an_import_that_is_killed_leaves_a_whole_model_and_the_next_one_sweeps_up(source, tmp_path):
    weights = old_model(tmp_path / "out")
    stop = ("import os, sys, signal; sys.path.insert(0, '.'); from tools import convert\n"
            "convert.publish = lambda new, out: os.kill(os.getpid(), signal.SIGKILL)\n"
            "convert.main(sys.argv[1:])")
    process = start("-c", stop, "import", source, "--out", tmp_path / "out", "--overwrite")
    assert process.communicate() and process.returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights and is_whole(tmp_path / "out")
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    bring(source, tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out", "source"]


# ------------------------------------------------------------------------------------------
# Of somebody else

def test_only_a_model_of_ours_is_replaced(source, tmp_path):
    out = tmp_path / "out"

    def is_refused() -> None:
        before = sorted((p, p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*"))
        refused("another --out", call=lambda: bring(source, out, overwrite=True))
        assert sorted((p, p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*")) == before

    shutil.copytree(source, out)                     # somebody's model, with names as ours
    (out / "generation_config.json").unlink()
    is_refused()
    shutil.rmtree(out)
    old_model(out)
    (out / "notes.txt").write_text("mine")
    is_refused()
    (out / "notes.txt").unlink()
    (out / "meta.json").unlink()
    (out / "meta.json").mkdir()
    is_refused()
    shutil.rmtree(out)
    out.write_text("a file")
    is_refused()
    out.unlink()
    for name in ("source", "source/model.safetensors", "source/inside"):
        refused("another --out", call=lambda: bring(source, tmp_path / name, overwrite=True))
    for name in ("", " ", "a\0b", "/"):
        refused("out", call=lambda: bring(source, name, overwrite=True))
    (source / "link.bin").symlink_to(tmp_path / "elsewhere" / "weights.bin")
    save_model(rwkv(), tmp_path / "elsewhere", {"tokenizer": "bytes"})
    refused("another --out", call=lambda: bring(source, tmp_path / "elsewhere", overwrite=True))
    out.mkdir()
    bring(source, out)                               # an empty folder
    for name in ("config.json", "model.safetensors"):
        (out / name).write_bytes(b"{")
        bring(source, out, overwrite=True)           # a damaged model of ours
        assert is_whole(out)


def test_a_file_that_cannot_be_read_is_not_called_missing(source, tmp_path, monkeypatch):
    for name in ("config.json", "model.safetensors"):
        os.rename(source / name, tmp_path / "kept")
        os.mkfifo(source / name)
        refused(f"{name} can't be read (it is no regular file)", call=lambda: bring(source, tmp_path / "out"))
        os.remove(source / name)
        os.rename(tmp_path / "kept", source / name)
    for name in ("m.gguf", "m.pth"):
        os.mkfifo(tmp_path / name)
        refused(name, "no regular file", call=lambda: bring(tmp_path / name, tmp_path / "out"))
        (tmp_path / f"f{name}").mkdir()
        refused("no config.json", call=lambda: bring(tmp_path / f"f{name}", tmp_path / "out"))


# ------------------------------------------------------------------------------------------
# Export

def test_an_export_replaces_only_what_is_of_its_kind(tmp_path):
    save_model(rwkv(), tmp_path / "m", {"tokenizer": "bytes"})
    out = tmp_path / "out.pth"
    write = {
        "a text": lambda: out.write_text("mine"),
        "somebody's weights": lambda: torch.save({"emb.weight": torch.zeros(3)}, out),
        "a link to them": lambda: out.symlink_to(tmp_path / "other.pth"),
        "a pipe": lambda: os.mkfifo(out),
        "a folder": lambda: out.mkdir(),
    }
    def export(file, overwrite: bool = True) -> bytes:
        export_model(ExportConfig(folder=str(tmp_path / "m"), out=str(file), overwrite=overwrite))
        return file.read_bytes()

    torch.save([1], tmp_path / "other.pth")
    for make in write.values():
        make()
        refused("other.pth" if out.is_symlink() else "out.pth", call=lambda: export(out))
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    first = export(out, overwrite=False)
    assert export(out) == first
    (tmp_path / "link.pth").symlink_to(out)
    assert export(tmp_path / "link.pth") == first and (tmp_path / "link.pth").is_symlink()
    (tmp_path / "file").write_text("x")
    refused("file/x.pth can't be written", call=lambda: export(tmp_path / "file" / "x.pth"))


def test_an_export_of_the_present_folder_stands_beside_it_by_its_name(tmp_path, monkeypatch):
    save_model(rwkv(V=257), tmp_path / "up" / "m", {"tokenizer": "bytes"})
    (tmp_path / "up" / "m" / "in").mkdir()
    for place, folder in (("m", "."), ("m/in", "..")):
        monkeypatch.chdir(tmp_path / "up" / place)
        for format, name in (("rwkv-pth", "m.pth"), ("gguf", "m.gguf"), ("hf", "m-hf")):
            out = export_model(ExportConfig(folder=folder, format=format, overwrite=True))
            assert out == tmp_path / "up" / name and out.exists()
    assert names(tmp_path / "up" / "m") == ["config.json", "in", "meta.json", "model.safetensors"]


@pytest.mark.parametrize("format, ending", [("rwkv-pth", ".pth"), ("gguf", ".gguf")])
def test_what_the_system_refuses_of_an_export_is_said_in_its_own_words(format, ending, tmp_path):
    """Permissions stop no administrator, but this does: a link to nowhere, where the
    file is written until it is whole.
    """
    save_model(rwkv(V=257), tmp_path / "m", {"tokenizer": "bytes"})
    out = tmp_path / f"out{ending}"
    (tmp_path / f"out{ending}.tmp").symlink_to(tmp_path / "nowhere" / "x")
    settings = ExportConfig(folder=str(tmp_path / "m"), format=format, out=str(out))
    refused(f"can't be written ({os.strerror(errno.ENOENT)})", call=lambda: export_model(settings))
    assert names(tmp_path) == ["m"]
