"""Real weights in, real weights out: Hugging Face, GGUF, nanoGPT, official RWKV-7.

A checkpoint of the world becomes a model folder, a pure RWKV-7 a file or a folder for
other programs.

    python -m tools.convert import PATH --out out/teacher
        a Hugging Face folder, a .gguf file, an RWKV-7 .pth, or nanoGPT's ckpt.pt
    python -m tools.convert export out/rwkv --format rwkv-pth
        writes out/rwkv.pth, as the PyPI package `rwkv` reads it
    python -m tools.convert export out/rwkv --format gguf --dtype q8_0
        writes out/rwkv.gguf for llama.cpp, and out/rwkv.Modelfile for Ollama
    python -m tools.convert export out/rwkv --format hf
        writes the folder out/rwkv-hf, as `rwkv7-hf` and fla read it

Each format has a file of its own: from_huggingface.py, from_gguf.py, from_nanogpt.py,
rwkv_pth.py; export.py lists those that are written. It tells the model's shape and
where each of our parameters stands; checkpoint.py reads, arranges and writes them one
by one. It is exact or it refuses: every tensor of a checkpoint has its place, and what
model.py cannot compute is named. What it is not: a downloader. No code of a stranger is
run, and nothing but tensors and plain values unpickled.

    gpt2                          q, k and v stand in one matrix; matrices (in, out);
                                  learned positions
    llama, mistral, qwen2, qwen3  qwen2 has biases on q, k and v, qwen3 norms on q and k
    .gguf of llama, qwen2, qwen3  quantised; llama's q and k rows are in the order that
                                  interleaved rope wants
    .gguf of rwkv7, arwkv7        pure RWKV-7, official or in a Llama's block
    nanoGPT's ckpt.pt             a GPT-2 with matrices (out, in); biases or none
    .pth of RWKV-7                as it is: our names are the official ones
    rwkv7, rwkv_hybrid            Hugging Face folders of RWKV-7, as fla and RWKVInside
                                  have them
"""

import json
import os
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from config import cli, run, settings
import tiktoken
import torch
from tyro.conf import Positional

from data.folder import publish
from data.foreign import read_json, unreadable
from data.pairing import advice, instead, require_pair, too_small
from data.tokenizer import get_tokenizer, save_tokenizer, write_tokenizer
from lib.folders import read_config
from model import ModelConfig
from tools.checkpoint import Checkpoint, Dtype, fit_shapes, parameter, write_safetensors
from tools.export import ExportConfig, export_model, how_to_run
from tools.from_gguf import from_gguf
from tools.from_huggingface import from_hugging_face
from tools.from_nanogpt import from_nanogpt, is_nanogpt
from tools.rwkv_pth import from_pth, open_pth
from tools.staging import sweep_up, written

# A model folder.
FILES = ("tokenizer.json", "meta.json", "model.safetensors", "config.json")
USAGE = ("say what to do: python -m tools.convert import PATH --out FOLDER, or python -m tools.convert "
         "export FOLDER; each has its --help")


@settings
class ImportConfig:
    path: Positional[str] = ""       # a Hugging Face folder, a .gguf, an RWKV-7 .pth or nanoGPT's ckpt.pt
    out: str = "out/teacher"         # the model folder to write
    dtype: Dtype = "float32"         # of the weights on disk. In memory models are float32
    tokenizer: str | None = None     # None = the checkpoint's own; else world, gpt2, ... or a model folder
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
        tokenizer = choose_tokenizer(cfg.tokenizer, checkpoint, path)
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
    if path.suffix.lower() in (".safetensors", ".json"):
        raise ValueError("it is one file of a model: give the folder that holds it and config.json")
    if path.suffix.lower() == ".gguf":
        return from_gguf(path)
    content = open_pth(path)
    return from_nanogpt(content, path.parent) if is_nanogpt(content) else from_pth(content)


def choose_tokenizer(name: str | None, checkpoint: Checkpoint,
                     path: Path) -> tiktoken.Encoding | dict | None:
    """The tokenizer called `name`, else the checkpoint's own, as its specification.

    None where it has none. Raises ValueError where it can't be the model's.
    """
    rows = checkpoint.cfg.vocab_size
    if name:
        enc = get_tokenizer(name, path if path.is_dir() else path.parent)
        require_pair(enc.name, enc.n_vocab, rows)
        return enc
    try:
        return checkpoint.tokenizer() if checkpoint.tokenizer else None
    except ValueError as e:
        raise ValueError(f"{e}. {instead(e, rows)}") from None


def add_tokenizer(tokenizer: tiktoken.Encoding | dict | None, folder: Path) -> None:
    if isinstance(tokenizer, tiktoken.Encoding):
        save_tokenizer(tokenizer, folder)
    elif tokenizer is not None:
        write_tokenizer(tokenizer, folder)


def tell(name: str | None, tokenizer: tiktoken.Encoding | dict | None, checkpoint: Checkpoint) -> None:
    """Say what the folder lacks, once it is there."""
    rows = checkpoint.cfg.vocab_size
    if tokenizer is None:
        print("it has no tokenizer that can be read: import it again with one before data are prepared for "
              f"it; {advice(rows)}")
        return
    size = len(tokenizer["tokens"]) if isinstance(tokenizer, dict) else tokenizer.n_vocab
    if size > rows:
        print(f"tokenizer {name or 'of the checkpoint'} has {size} tokens, the model {rows}: texts with the "
              "others will be refused")
    if too_small(size, rows):
        print(f"the checkpoint's own tokenizer has {size:,} tokens, the model {rows:,} rows, more than "
              "rounding up adds: is it that model's?")
    if isinstance(tokenizer, dict) and not tokenizer.get("chat"):
        print("it has no chat template that only frames the messages: "
              "python -m tools.chat will not work with it")


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
        has_tokenizer = "tokenizer" in read_json(Path(cfg.out) / "meta.json")
        print(f"{cfg.out}: {cfg.dtype}." + has_tokenizer * (
              f" Now: python -m data.prepare SOURCE --tokenizer {folder} "
              f"--out data/NAME, and python distill.py --teacher {folder} --data data/NAME"))
    elif verb == "export":
        cfg = cli(ExportConfig, argv)
        print(how_to_run(cfg, export_model(cfg)))
    elif verb in ("-h", "--help"):
        print(__doc__)
        sys.exit(0)
    else:
        raise ValueError(USAGE)


if __name__ == "__main__":
    run(main)
