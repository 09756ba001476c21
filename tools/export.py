"""A pure RWKV-7 in the formats of other programs: `tools.convert export`.

    rwkv-pth    rwkv_pth.py: one file, as the PyPI package `rwkv` reads it
    gguf        to_gguf.py: one file, for llama.cpp and Ollama
    hf          to_huggingface.py: a folder, for fla, `rwkv7-hf` and RWKVInside

Each says what of a model it has no place for, what it may replace, and how its result
is run; what is the same for all stands here.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from config import settings
from tyro.conf import Positional

from data.folder import publish
from data.foreign import brief
from lib.folders import open_model
from model import ModelConfig
from tools import rwkv_pth, to_gguf, to_huggingface
from tools.checkpoint import Dtype
from tools.staging import sweep_up, written


@settings
class ExportConfig:
    folder: Positional[str] = ""     # a model folder, of RWKV-7 alone
    format: Literal["rwkv-pth", "gguf", "hf"] = "rwkv-pth"
    out: str | None = None           # None = the folder's name with .pth, .gguf or -hf
    dtype: Literal[Dtype, "q8_0"] | None = None  # None = as in the folder; q8_0: a GGUF's matrices in 8 bits
    overwrite: bool = False
    widen: bool = True               # a GGUF's heads of 32, 16 become 64: the same logits, a larger model


@dataclass(frozen=True)
class Format:
    """A format that is one file; its functions stand in a file of its own."""

    name: str                                    # a model "cannot be written as ..."
    ending: str                                  # of the file's name
    reasons: Callable[[ModelConfig], list[str]]  # what of a model it has no place for
    require_own: Callable[[Path], None]          # refuses to replace what is of another kind
    write: Callable                              # (model folder, out, dtype): out is whole, or as it was
    how_to_run: Callable[[Path], str]            # one line


FORMATS = {
    "rwkv-pth": Format("an official RWKV-7", ".pth", rwkv_pth.not_official, rwkv_pth.require_own,
                       rwkv_pth.write, rwkv_pth.how_to_run),
    "gguf": Format("a GGUF", ".gguf", to_gguf.reasons, to_gguf.require_own, to_gguf.write,
                   to_gguf.how_to_run),
}


def export_model(cfg: ExportConfig) -> Path:
    """Write a model folder in another format.

    Raises ValueError naming what that format cannot express.
    """
    if not cfg.folder:
        raise ValueError("name the model folder to export")
    if not cfg.widen and cfg.format != "gguf":
        raise ValueError(f"--no-widen is for --format gguf: {cfg.format} has heads of every size; omit it")
    if cfg.dtype == "q8_0" and cfg.format != "gguf":
        raise ValueError(f"--dtype q8_0 is a GGUF's, --format {cfg.format} has float32, bfloat16, float16")
    if cfg.format == "hf":
        return export_folder(cfg)
    kind, folder = FORMATS[cfg.format], Path(cfg.folder)
    out = Path(os.path.realpath(cfg.out or f"{named(folder)}{kind.ending}"))
    if out.suffix != kind.ending or out.is_dir() or cfg.out == "":
        raise ValueError(f"{cfg.out or out} must be a file whose name ends in {kind.ending}")
    if out.exists() and not cfg.overwrite:
        raise ValueError(f"{out} exists already: replace it with --overwrite, or choose another --out")
    model, _ = open_model(folder)
    reasons = kind.reasons(model.cfg)
    if reasons:
        raise ValueError(f"{folder} cannot be written as {kind.name}: it has {'; '.join(reasons)}")
    if out.exists():
        kind.require_own(out)
    more = {"widen": cfg.widen} if cfg.format == "gguf" else {}
    try:
        with written(str(out)):
            kind.write(folder, out, cfg.dtype, **more)
    except RuntimeError as e:  # torch's writer says "enforce fail" of a full disk
        raise ValueError(f"{out} could not be written ({brief(e)}): is the disk full?") from None
    return out


def named(folder: Path) -> Path:
    """The same folder by a path that ends in its name, which . and .. are not."""
    return folder if folder.name not in ("", "..") else Path(os.path.realpath(folder))


def export_folder(cfg: ExportConfig) -> Path:
    """Write a model folder as a Hugging Face folder, in one step when it is whole."""
    folder = Path(cfg.folder)
    name = f"{named(folder)}-hf" if cfg.out is None else cfg.out
    if not name.strip() or "\0" in name or os.path.realpath(name) == os.sep:
        raise ValueError(f"--out {name!r} is no name: name the folder to write")
    out = Path(os.path.realpath(name))
    staging = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with written(name):
        sweep_up(out)
        require_own(name, out, folder, cfg.overwrite)
    try:
        with written(name):
            to_huggingface.write(folder, staging, cfg.dtype)
            publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def require_own(name: str, out: Path, folder: Path, overwrite: bool) -> None:
    """Raises ValueError where no folder may be written, or this one not replaced.

    `out` is the folder that `name` leads to, `folder` what is to be exported.
    """
    source = Path(os.path.realpath(folder))
    nested = source in (out, *out.parents) or out in source.parents
    if Path(name).is_symlink() and not out.exists():
        raise ValueError(f"{name!r} leads nowhere: make the folder {out} first, or choose another --out")
    if nested:
        raise ValueError(f"{name} is, holds or is in the model that is to be read: choose another --out")
    if out.exists():
        to_huggingface.require_own(out)
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{name} exists already: replace it with --overwrite, or choose another --out")


def how_to_run(cfg: ExportConfig, out: Path) -> str:
    """One line for who has exported."""
    return to_huggingface.how_to_run(out) if cfg.format == "hf" else FORMATS[cfg.format].how_to_run(out)
