"""Model folders: config.json, model.safetensors, and meta.json, which names the
tokenizer.

Loading one runs no pickled code. Whatever is written here appears whole or not at all.
"""

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.loader import Loader
from data.tokenizer import read_meta
from lib.hybrid import is_letters, mixer_letters
from model import LM, ModelConfig


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """`write` a file under another name, then rename it: it is there whole or not at
    all.
    """
    part = file.with_name(file.name + ".tmp")
    try:
        write(part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def write_json(file: Path, values: dict) -> None:
    text = json.dumps(values, indent=1) + "\n"
    write_whole(file, lambda part: part.write_text(text, encoding="utf-8"))


def save_model(model: LM, folder: str | Path, meta: dict) -> None:
    """Write a model folder; `meta` names the tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict()
    stored = {name: weights[name].detach().cpu().contiguous() for name in stored_shapes(model)}
    write_json(folder / "config.json", asdict(model.cfg))
    write_json(folder / "meta.json", meta)
    checksums = {name: checksum(weight) for name, weight in stored.items()}
    metadata = {"format": "pt", "crc32": json.dumps(checksums)}
    write_whole(folder / "model.safetensors", lambda part: save_file(stored, part, metadata))


def checksum(x: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(x.contiguous().view(torch.uint8).numpy())


def digests_of(file: str | Path) -> dict[str, int]:
    """The checksums that `save_model` wrote into a .safetensors file; others have none.
    """
    with safe_open(file, "pt") as f:
        text = (f.metadata() or {}).get("crc32", "{}")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{file} is damaged: its checksums are; restore it from a checkpoint") from None


def fingerprint(folder: str | Path) -> int | None:
    """A number for what is in a model or data folder, the same wherever it lies.

    None for a folder that does not exist.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").exists():
        known = digests_of(folder / "model.safetensors")
        files = ["model.safetensors"]
    elif (folder / "meta.json").exists():
        meta = read_meta(folder)
        known = meta.get("blocks") and [meta[key] for key in ("kind", "tokenizer", "vocab_size", "blocks")]
        files = sorted(file.name for file in folder.glob("*.bin"))
    else:
        return None
    if known:
        return zlib.crc32(json.dumps(known, sort_keys=True).encode())
    crc = 0
    for name in files:                             # of before: all of them are read
        with (folder / name).open("rb") as f:
            while piece := f.read(2**24):
                crc = zlib.crc32(piece, crc)
    return crc


def open_model(folder: str | Path) -> tuple[LM, Path]:
    """The model of a folder without its weights, on the meta device, and the file that
    has them all.

    Raises ValueError, in one line, for a folder that is missing, damaged or of another
    shape.
    """
    folder = Path(folder)
    file = folder / "model.safetensors"
    try:
        values = json.loads((folder / "config.json").read_text())
        model = on_paper(read_config(values, f"{folder}/config.json"))
        model.pattern = values.get("mixer", model.cfg.mixer)  # as it was written; see lib/state_file.py
        with safe_open(file, "pt") as f:
            shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
    except FileNotFoundError as e:
        raise ValueError(
            f"no model at {folder}: {Path(e.filename or file).name} is missing; train one first, "
            "or check the path"
        ) from None
    except NotADirectoryError:
        raise ValueError(f"no model at {folder}: it is a file; give the folder that holds config.json "
                         "and model.safetensors") from None
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, TypeError, AttributeError) as e:
        raise ValueError(f"the model at {folder} is damaged ({e}): restore it from a checkpoint") from None
    expected = stored_shapes(model)
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise ValueError(f"the model at {folder} does not fit its config.json: {name} is "
                             f"{shapes.get(name, 'missing')}, expected {expected.get(name, 'none')}")
    return model, file


def read_config(values: dict, name: str) -> ModelConfig:
    """The settings in a config.json.

    Older ones have a pattern such as "all" where letters stand today.
    """
    unknown = set(values) - {f.name for f in fields(ModelConfig)}
    if unknown:
        raise ValueError(f"{name} has unknown keys: {', '.join(sorted(unknown))}")
    pattern = values.get("mixer", "a")
    if isinstance(pattern, str) and not is_letters(pattern):
        values = values | {"mixer": mixer_letters(ModelConfig(**values | {"mixer": "a"}), pattern)}
    return ModelConfig(**values)


def on_paper(cfg: ModelConfig) -> LM:
    """The model with shapes, but without memory and initial values."""
    with torch.device("meta"):
        return LM(cfg)


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> LM:
    """Read a model folder, weight by weight, into float32 whatever they are stored as.

    Raises ValueError as `open_model`.
    """
    model, file = open_model(folder)
    weights = {
        name: read_tensor(file, name).to(device, torch.float32, copy=True) for name in stored_shapes(model)
    }
    model.load_state_dict(weights, strict=False, assign=True)
    for name, left_out in model.named_buffers():                      # zeros, which no file has
        module = model.get_submodule(name.rpartition(".")[0])
        module._buffers[name.rpartition(".")[2]] = torch.zeros(left_out.shape, device=device)
    if model.cfg.tied:
        model.head.weight = model.emb.weight
    return model


def stored_shapes(model: LM) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight that a model folder holds: a tied head is not
    among them.
    """
    tied = {"head.weight"} if model.cfg.tied else set()
    return {name: tuple(p.shape) for name, p in model.state_dict().items() if name not in tied}


def read_tensor(file: str | Path, name: str) -> Tensor:
    """One tensor of a .safetensors file, mapped into memory.

    The file is opened anew each time, for an open one keeps what it has read. Raises
    ValueError where it has the tensor's checksum, and that is another.
    """
    with safe_open(file, "pt") as f:
        x = f.get_tensor(name)
    expected = digests_of(file).get(name)
    if expected is not None and expected != checksum(x):
        raise ValueError(f"{file} is damaged: {name} has another checksum than when it was saved; restore it "
                         "from a checkpoint, or from a copy")
    return x


# ------------------------------------------------------------------------------------------
# Do model and data belong together?

def check_vocabulary(teacher: LM, student: LM, loader: Loader) -> None:
    """Raises ValueError where data, student and teacher do not have the same tokens."""
    if loader.vocab_size > student.cfg.vocab_size:
        raise ValueError(
            f"{loader.folder} has {loader.vocab_size} tokens, the student {student.cfg.vocab_size}: "
            "prepare the data with the model's tokenizer"
        )
    if teacher.cfg.vocab_size < student.cfg.vocab_size:
        raise ValueError(f"the teacher has {teacher.cfg.vocab_size} tokens, fewer than the student's "
                         f"{student.cfg.vocab_size}: it cannot teach them; choose a teacher with the same "
                         "tokenizer")


def same_tokenizer(loader: Loader, *folders: str | Path) -> None:
    """Raises ValueError where a model folder was made for another tokenizer than the
    loader's.
    """
    for folder in folders:
        names = read_meta(folder).get("tokenizer"), loader.meta["tokenizer"]
        if names[0] != names[1]:
            raise ValueError(f"{folder} reads {names[0]} tokens, {loader.folder} holds {names[1]}: "
                             f"prepare the data again with the model's tokenizer, --tokenizer {folder}")
