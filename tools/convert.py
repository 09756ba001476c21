"""Real weights in, real weights out: Hugging Face, GGUF and the official RWKV-7.

A checkpoint of the world becomes a model folder, a pure RWKV-7 an official .pth.

    python -m tools.convert import PATH --out out/teacher
        a Hugging Face folder, a .gguf file, or an RWKV-7 .pth
    python -m tools.convert export out/rwkv --format rwkv-pth
        writes out/rwkv.pth, as the PyPI package `rwkv` reads it

Each format has a file of its own: from_huggingface.py, from_gguf.py, rwkv_pth.py. It
tells the model's shape and where each of our parameters stands; checkpoint.py reads,
arranges and writes them one by one. It is exact or it refuses: every tensor of a
checkpoint has its place, and what model.py cannot compute is named. What it is not: a
downloader. No code of a stranger is run, and nothing but tensors unpickled.

    gpt2                          q, k and v stand in one matrix; matrices (in, out);
                                  learned positions
    llama, mistral, qwen2, qwen3  qwen2 has biases on q, k and v, qwen3 norms on q and k
    .gguf of llama, qwen2, qwen3  quantised; llama's q and k rows are in the order that
                                  interleaved rope wants
    .pth of RWKV-7                as it is: our names are the official ones
"""

import json
import os
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from config import cli, run, settings
import tiktoken
import torch
from torch import Tensor
from tyro.conf import Positional

from data.tokenizer import get_tokenizer, save_tokenizer, write_tokenizer
from lib.folders import open_model, read_tensor, write_whole
from model import LM, ModelConfig
from tools.checkpoint import Checkpoint, as_dtype, fit_shapes, parameter, write_safetensors
from tools.from_gguf import from_gguf
from tools.from_huggingface import from_hugging_face
from tools.rwkv_pth import from_pth, not_official, official_names

# A model folder. config.json comes last: without it there is no model.
FILES = ("tokenizer.json", "meta.json", "model.safetensors", "config.json")
USAGE = ("say what to do: python -m tools.convert import PATH --out FOLDER, or python -m tools.convert "
         "export FOLDER; each has its --help")
Dtype = Literal["float32", "bfloat16", "float16"]


@settings
class ImportConfig:
    path: Positional[str] = ""       # a Hugging Face folder, a .gguf file or an RWKV-7 .pth
    out: str = "out/teacher"         # the model folder to write
    dtype: Dtype = "float32"         # of the weights on disk. In memory models are float32
    tokenizer: str | None = None     # None = the checkpoint's own; else bytes, gpt2, ... or a model folder
    overwrite: bool = False


@settings
class ExportConfig:
    folder: Positional[str] = ""     # a model folder, of RWKV-7 alone
    format: Literal["rwkv-pth"] = "rwkv-pth"
    out: str | None = None           # None = the folder's name with .pth
    dtype: Dtype | None = None       # None = as in the folder
    overwrite: bool = False


# ------------------------------------------------------------------------------------------
# Import

def import_model(cfg: ImportConfig) -> ModelConfig:
    """Write the checkpoint `cfg.path` as a model folder, weight by weight.

    Raises ValueError for what is not supported or damaged.
    """
    path, out = Path(cfg.path), Path(cfg.out).absolute()
    check_paths(cfg, path, out)
    staging = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        checkpoint = open_checkpoint(path)
        shapes = fit_shapes(checkpoint)
        tokenizer = choose_tokenizer(cfg.tokenizer, checkpoint)
        sweep_up(out)
        staging.mkdir(parents=True)
        write_safetensors(staging / "model.safetensors", shapes, getattr(torch, cfg.dtype),
                          lambda name: parameter(checkpoint, name))
        (staging / "config.json").write_text(json.dumps(asdict(checkpoint.cfg), indent=1) + "\n")
        (staging / "meta.json").write_text(json.dumps({"source": cfg.path}) + "\n")
        add_tokenizer(tokenizer, staging, path)
        publish(staging, out)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return checkpoint.cfg


def check_paths(cfg: ImportConfig, path: Path, out: Path) -> None:
    """Raises ValueError where nothing can be read, or nothing may be written."""
    if not cfg.path or not path.exists():
        raise ValueError(f"there is no {cfg.path!r}: give a Hugging Face folder, a .gguf or a .pth file")
    present = {p.name for p in out.iterdir()} if out.is_dir() else set()
    would_overwrite_source = path.resolve() in (out.resolve(), *out.resolve().parents)
    if out.is_file() or present - set(FILES) or would_overwrite_source:
        raise ValueError(f"{out} is not (only) a model folder, or it is what is to be read: "
                         "choose another --out")
    if present and not cfg.overwrite:
        raise ValueError(f"{out} holds a model already: replace it with --overwrite, or choose another --out")


def open_checkpoint(path: Path) -> Checkpoint:
    if path.is_dir():
        return from_hugging_face(path)
    return from_gguf(path) if path.suffix.lower() == ".gguf" else from_pth(path)


def choose_tokenizer(name: str | None, checkpoint: Checkpoint) -> tiktoken.Encoding | dict | None:
    """The tokenizer called `name`, else the checkpoint's own, as its specification.

    None where it has none.
    """
    if name:
        tokenizer = get_tokenizer(name)
        if tokenizer.n_vocab > checkpoint.cfg.vocab_size:
            print(f"tokenizer {name} has {tokenizer.n_vocab} tokens, the model {checkpoint.cfg.vocab_size}: "
                  "texts with the others will be refused")
        return tokenizer
    try:
        return checkpoint.tokenizer() if checkpoint.tokenizer else None
    except ValueError as e:
        raise ValueError(f"{e}. Give another tokenizer with --tokenizer, or bytes") from None


def add_tokenizer(tokenizer: tiktoken.Encoding | dict | None, folder: Path, path: Path) -> None:
    """Put the tokenizer into the model folder, and say what the folder will lack."""
    if isinstance(tokenizer, tiktoken.Encoding):
        save_tokenizer(tokenizer, folder)
    elif tokenizer is None:
        print(f"{path} has no tokenizer: import it again with --tokenizer before data are prepared for it")
    else:
        write_tokenizer(tokenizer, folder)
        if not tokenizer.get("chat"):
            print("it has no chat template that only frames the messages: "
                  "python -m tools.chat will not work with it")


def sweep_up(out: Path) -> None:
    """Remove what an import that was killed has left beside `out`."""
    for folder in out.parent.glob(f".{out.name}.*.partial"):
        process = Path("/proc") / folder.suffixes[-2][1:]
        if Path("/proc/self").exists() and not process.exists():
            shutil.rmtree(folder, ignore_errors=True)


def publish(staging: Path, out: Path) -> None:
    """Move the files into their folder. config.json is removed first and comes last.

    So nobody takes half a model for a whole one.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").unlink(missing_ok=True)
    for name in FILES:
        if (staging / name).exists():
            os.replace(staging / name, out / name)
        else:
            (out / name).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------
# Export

def export_model(cfg: ExportConfig) -> Path:
    """Write a model folder as an official RWKV-7 .pth.

    Raises ValueError naming what that format cannot express.
    """
    if not cfg.folder:
        raise ValueError("name the model folder to export")
    folder = Path(cfg.folder)
    out = Path(cfg.out or f"{folder}.pth")
    if out.suffix != ".pth" or out.is_dir():
        raise ValueError(f"{out} must be a file whose name ends in .pth")
    if out.exists() and not cfg.overwrite:
        raise ValueError(f"{out} exists already: replace it with --overwrite, or choose another --out")
    model, file = open_model(folder)
    reasons = not_official(model.cfg)
    if reasons:
        raise ValueError(f"{folder} cannot be written as an official RWKV-7: it has {'; '.join(reasons)}")
    tensors = official_tensors(model, file, cfg.dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_whole(out, lambda part: torch.save(tensors, part))
    except (RuntimeError, OSError) as e:  # torch's writer says "enforce fail" of a full disk
        raise ValueError(f"{out} could not be written ({str(e)[:80]}): is the disk full?") from None
    return out


def official_tensors(model: LM, file: Path, dtype: str | None) -> dict[str, Tensor]:
    """Every parameter of the model whose weights are in `file`, in the official order.

    torch.save wants all of them at once; each is a copy, of whose file nothing stays in
    memory.
    """
    def read(name: str) -> Tensor:
        tied = model.cfg.tied and name == "head.weight"
        t = read_tensor(file, "emb.weight" if tied else name)  # a tied head is written as a copy
        return as_dtype(name, t, shapes[name], getattr(torch, dtype) if dtype else t.dtype).clone()

    names = official_names(model.cfg.n_layer)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert set(names) == set(shapes), "a model that passes not_official has the official parameters"
    return {name: read(name) for name in names}


# ------------------------------------------------------------------------------------------
# The command

def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = argv.pop(0) if argv else None
    if verb == "import":
        cfg = cli(ImportConfig, argv)
        model = import_model(cfg)
        print(json.dumps(asdict(model)))
        folder = shlex.quote(cfg.out)
        print(f"{cfg.out}: {cfg.dtype}. Now: python -m data.prepare SOURCE --tokenizer {folder} "
              f"--out data/NAME, and python distill.py --teacher {folder} --data data/NAME")
    elif verb == "export":
        out = export_model(cli(ExportConfig, argv))
        print(f"{out}: for the package rwkv, RWKV(model=\"{out.with_suffix('')}\", strategy=\"cpu fp32\")")
    elif verb in ("-h", "--help"):
        print(__doc__)
        sys.exit(0)
    else:
        raise ValueError(USAGE)


if __name__ == "__main__":
    run(main)
