"""Real weights in, real weights out: Hugging Face, GGUF, nanoGPT, official RWKV-7.

A checkpoint of the world becomes a model folder, a pure RWKV-7 an official .pth.

    python -m tools.convert import PATH --out out/teacher
        a Hugging Face folder, a .gguf file, an RWKV-7 .pth, or nanoGPT's ckpt.pt
    python -m tools.convert export out/rwkv --format rwkv-pth
        writes out/rwkv.pth, as the PyPI package `rwkv` reads it
    python -m tools.convert export out/rwkv --format hf
        writes the folder out/rwkv-hf, as `rwkv7-hf` and fla read it

Each format has a file of its own: from_huggingface.py, from_gguf.py, from_nanogpt.py,
rwkv_pth.py. It tells the model's shape and where each of our parameters stands;
checkpoint.py reads, arranges and writes them one by one. It is exact or it refuses:
every tensor of a checkpoint has its place, and what model.py cannot compute is named.
What it is not: a downloader. No code of a stranger is run, and nothing but tensors and
plain values unpickled.

    gpt2                          q, k and v stand in one matrix; matrices (in, out);
                                  learned positions
    llama, mistral, qwen2, qwen3  qwen2 has biases on q, k and v, qwen3 norms on q and k
    .gguf of llama, qwen2, qwen3  quantised; llama's q and k rows are in the order that
                                  interleaved rope wants
    nanoGPT's ckpt.pt             a GPT-2 with matrices (out, in); biases or none
    .pth of RWKV-7                as it is: our names are the official ones
    rwkv7, rwkv_hybrid            Hugging Face folders of RWKV-7, as fla and RWKVInside
                                  have them
"""

import contextlib
import ctypes
import glob
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from config import cli, run, settings
import tiktoken
import torch
from torch import Tensor
from tyro.conf import Positional

from data.foreign import brief, read_json, unreadable
from data.tokenizer import get_tokenizer, save_tokenizer, write_tokenizer
from lib.folders import open_model, read_config, read_tensor, write_whole
from model import LM, ModelConfig
from tools import to_huggingface
from tools.checkpoint import Checkpoint, as_dtype, fit_shapes, parameter, write_safetensors
from tools.from_gguf import from_gguf
from tools.from_huggingface import from_hugging_face
from tools.from_nanogpt import from_nanogpt, is_nanogpt
from tools.rwkv_pth import from_pth, not_official, official_names, open_pth

# A model folder.
FILES = ("tokenizer.json", "meta.json", "model.safetensors", "config.json")
USAGE = ("say what to do: python -m tools.convert import PATH --out FOLDER, or python -m tools.convert "
         "export FOLDER; each has its --help")
Dtype = Literal["float32", "bfloat16", "float16"]


@settings
class ImportConfig:
    path: Positional[str] = ""       # a Hugging Face folder, a .gguf, an RWKV-7 .pth or nanoGPT's ckpt.pt
    out: str = "out/teacher"         # the model folder to write
    dtype: Dtype = "float32"         # of the weights on disk. In memory models are float32
    tokenizer: str | None = None     # None = the checkpoint's own; else bytes, gpt2, ... or a model folder
    overwrite: bool = False


@settings
class ExportConfig:
    folder: Positional[str] = ""     # a model folder, of RWKV-7 alone
    format: Literal["rwkv-pth", "hf"] = "rwkv-pth"
    out: str | None = None           # None = the folder's name with .pth, or with -hf
    dtype: Dtype | None = None       # None = as in the folder
    overwrite: bool = False


# ------------------------------------------------------------------------------------------
# Import

def import_model(cfg: ImportConfig) -> ModelConfig:
    """Write the checkpoint `cfg.path` as a model folder, weight by weight.

    What stood there is whole until, in one step, the new one stands there. Raises
    ValueError for what is not supported or damaged, and where nothing can be written.
    """
    if not cfg.out.strip() or "\0" in cfg.out:
        raise ValueError(f"--out {cfg.out!r} is no name: name the model folder to write")
    path, out = Path(cfg.path), Path(os.path.realpath(cfg.out))
    if out == Path(out.root):
        raise ValueError(f"{out} is not (only) a model folder of this program: choose another --out")
    staging = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        sweep_up(out)
        check_paths(cfg, path, out)
    except OSError as e:
        raise unreadable(e.filename or path, e) from None
    try:
        checkpoint = open_checkpoint(path)
        shapes = fit_shapes(checkpoint)
        tokenizer = choose_tokenizer(cfg.tokenizer, checkpoint)
        with written(cfg.out):
            staging.mkdir(parents=True)
            write_safetensors(staging / "model.safetensors", shapes, getattr(torch, cfg.dtype),
                              lambda name: parameter(checkpoint, name))
            (staging / "config.json").write_text(json.dumps(asdict(checkpoint.cfg), indent=1) + "\n")
            (staging / "meta.json").write_text(json.dumps({"source": cfg.path}) + "\n")
            add_tokenizer(tokenizer, staging)
            publish(staging, out)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    except OSError as e:
        raise unreadable(e.filename or path, e) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    tell(cfg.tokenizer, tokenizer, checkpoint)
    return checkpoint.cfg


def check_paths(cfg: ImportConfig, path: Path, out: Path) -> None:
    """Raises ValueError where nothing can be read, or nothing may be written.

    `out` is the folder that `cfg.out` leads to.
    """
    if not cfg.path or not path.exists():
        raise ValueError(f"there is no {cfg.path!r}: give a Hugging Face folder, a .gguf, a .pth, "
                         "or nanoGPT's ckpt.pt")
    if Path(cfg.out).is_symlink() and not out.exists():
        raise ValueError(f"{cfg.out!r} leads nowhere: make the folder {out} first, or choose another --out")
    files = [path, *path.iterdir()] if path.is_dir() else [path]
    sources = [Path(os.path.realpath(file)) for file in files]
    is_source = any(out in (source, *source.parents) for source in sources) or sources[0] in out.parents
    if is_source or out.exists() and not is_model(out):
        raise ValueError(f"{cfg.out} is not (only) a model folder of this program, or it is what is "
                         "to be read: choose another --out")
    if out.exists() and any(out.iterdir()) and not cfg.overwrite:
        raise ValueError(f"{cfg.out} holds a model already: replace it with --overwrite, or choose another "
                         "--out")


def is_model(folder: Path) -> bool:
    """Whether a folder holds nothing, or only a model of ours, damaged or not."""
    if not folder.is_dir() or any(p.name not in FILES or p.is_dir() for p in folder.iterdir()):
        return False
    config, meta = folder / "config.json", folder / "meta.json"
    try:
        if config.exists() and read_config(read_json(config), str(config)):
            return True
    except ValueError:
        pass
    try:
        return not any(folder.iterdir()) or not {"tokenizer", "source"}.isdisjoint(read_json(meta))
    except ValueError:
        return False


def open_checkpoint(path: Path) -> Checkpoint:
    if path.is_dir():
        return from_hugging_face(path)
    if path.suffix.lower() == ".gguf":
        return from_gguf(path)
    content = open_pth(path)
    return from_nanogpt(content, path.parent) if is_nanogpt(content) else from_pth(content)


def choose_tokenizer(name: str | None, checkpoint: Checkpoint) -> tiktoken.Encoding | dict | None:
    """The tokenizer called `name`, else the checkpoint's own, as its specification.

    None where it has none.
    """
    if name:
        return get_tokenizer(name)
    try:
        return checkpoint.tokenizer() if checkpoint.tokenizer else None
    except ValueError as e:
        raise ValueError(f"{e}. Give another tokenizer with --tokenizer, or bytes") from None


def add_tokenizer(tokenizer: tiktoken.Encoding | dict | None, folder: Path) -> None:
    if isinstance(tokenizer, tiktoken.Encoding):
        save_tokenizer(tokenizer, folder)
    elif tokenizer is not None:
        write_tokenizer(tokenizer, folder)


def tell(name: str | None, tokenizer: tiktoken.Encoding | dict | None, checkpoint: Checkpoint) -> None:
    """Say what the folder lacks, once it is there."""
    if tokenizer is None:
        print("it has no tokenizer: import it again with --tokenizer before data are prepared for it")
        return
    size = len(tokenizer["tokens"]) if isinstance(tokenizer, dict) else tokenizer.n_vocab
    if size > checkpoint.cfg.vocab_size:
        print(f"tokenizer {name or 'of the checkpoint'} has {size} tokens, the model "
              f"{checkpoint.cfg.vocab_size}: texts with the others will be refused")
    if isinstance(tokenizer, dict) and not tokenizer.get("chat"):
        print("it has no chat template that only frames the messages: "
              "python -m tools.chat will not work with it")


# ------------------------------------------------------------------------------------------
# In the place of what was there

@contextlib.contextmanager
def written(out: str) -> Iterator[None]:
    """What the system says while `out` is written, in one line with the remedy."""
    try:
        yield
    except OSError as e:
        raise ValueError(f"{out} can't be written ({e.strerror or brief(e)}); what was there is kept: "
                         "make room, or choose another --out") from None


def publish(new: Path, out: Path) -> None:
    """Put the folder `new` in the place of `out`, which may hold a model.

    At every moment one of them, whole, is at `out`: two folders change their names in
    one step where the system can do it (Linux). Elsewhere `sweep_up` puts the old one
    back if the program was killed between two steps.
    """
    if not out.exists() or not any(out.iterdir()):
        os.rename(new, out)
    elif not exchange(new, out):
        old = out.with_name(f".{out.name}.{os.getpid()}.old")
        os.rename(out, old)
        try:
            os.rename(new, out)
        except OSError:
            os.rename(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)


def exchange(a: Path, b: Path) -> bool:
    """Let two folders change their names at once; False where that can't be done."""
    here, at_once = -100, 2                                     # AT_FDCWD, RENAME_EXCHANGE
    try:
        return ctypes.CDLL(None).renameat2(here, os.fsencode(a), here, os.fsencode(b), at_once) == 0
    except (AttributeError, OSError):
        return False


def sweep_up(out: Path) -> None:
    """Remove what an import that was killed has left beside `out`, or put it back."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*"):
        process, _, kind = folder.name.removeprefix(f".{out.name}.").partition(".")
        if kind not in ("partial", "old") or not process.isdecimal() or is_running(int(process)):
            continue
        if kind == "old" and not out.exists():
            os.rename(folder, out)
        shutil.rmtree(folder, ignore_errors=True)


def is_running(process: int) -> bool:
    """Whether another process has this number."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return process != os.getpid()


# ------------------------------------------------------------------------------------------
# Export

def export_model(cfg: ExportConfig) -> Path:
    """Write a model folder as an official RWKV-7 .pth, or as a Hugging Face folder.

    Raises ValueError naming what that format cannot express.
    """
    if not cfg.folder:
        raise ValueError("name the model folder to export")
    if cfg.format == "hf":
        return export_folder(cfg)
    folder = Path(cfg.folder)
    out = Path(os.path.realpath(cfg.out or f"{folder}.pth"))
    if out.suffix != ".pth" or out.is_dir() or cfg.out == "":
        raise ValueError(f"{cfg.out or out} must be a file whose name ends in .pth")
    if out.exists() and not cfg.overwrite:
        raise ValueError(f"{out} exists already: replace it with --overwrite, or choose another --out")
    model, file = open_model(folder)
    reasons = not_official(model.cfg)
    if reasons:
        raise ValueError(f"{folder} cannot be written as an official RWKV-7: it has {'; '.join(reasons)}")
    if out.exists():
        require_official(out)
    tensors = official_tensors(model, file, cfg.dtype)
    try:
        with written(str(out)):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(out, lambda part: torch.save(tensors, part))
    except RuntimeError as e:  # torch's writer says "enforce fail" of a full disk
        raise ValueError(f"{out} could not be written ({brief(e)}): is the disk full?") from None
    return out


def export_folder(cfg: ExportConfig) -> Path:
    """Write a model folder as a Hugging Face folder, in one step when it is whole."""
    folder = Path(cfg.folder)
    name = f"{folder}-hf" if cfg.out is None else cfg.out
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


def require_official(file: Path) -> None:
    """Raises ValueError for a file that --overwrite may not replace."""
    try:
        from_pth(open_pth(file))
    except (ValueError, OSError):
        raise ValueError(f"{file} is no RWKV-7 of this format, so it is not replaced: "
                         "choose another --out") from None


def official_tensors(model: LM, file: Path, dtype: str | None) -> dict[str, Tensor]:
    """Every parameter of the model whose weights are in `file`, in the official order.

    torch.save wants all at once; each is a copy, of whose file nothing stays in memory.
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
        cfg = cli(ExportConfig, argv)
        out = export_model(cfg)
        if cfg.format == "hf":
            print(to_huggingface.how_to_run(out))
            return
        print(f"{out}: for the package rwkv, RWKV(model=\"{out.with_suffix('')}\", strategy=\"cpu fp32\")")
    elif verb in ("-h", "--help"):
        print(__doc__)
        sys.exit(0)
    else:
        raise ValueError(USAGE)


if __name__ == "__main__":
    run(main)
