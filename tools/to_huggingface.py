"""A pure RWKV-7 as a Hugging Face folder: `tools.convert export --format hf`.

    config.json, generation_config.json      as fla (rwkv7) or RWKVInside (rwkv_hybrid)
    model.safetensors                        has it: huggingface_rwkv.py
    tokenizer.json, tokenizer_config.json    the tokenizer, where the model has one:
                                             huggingface_tokenizer.py
    rwkv_vocab_v20230424.txt                 instead of tokenizer.json, for World

What it is not: code. `rwkv7-hf` or fla have the classes that load it.
"""

import importlib.util
import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from data.foreign import read_json
from data.tokenizer import load_tokenizer, read_meta
from lib.folders import expected_shapes, open_model, read_tensor, stored_shapes
from model import LM, ModelConfig
from tools.checkpoint import DTYPES, write_safetensors
from tools.huggingface_rwkv import (arrange_there, factor, full_form, kind_of, not_in, place, settings_of,
                                    shape_there)
from tools.huggingface_tokenizer import spec_of, tokenizer_config, tokenizer_json

WORLD = "rwkv_vocab_v20230424.txt"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json", WORLD)
MARK = {"exported_by": "nanoRWKVInside"}  # in config.json: such a folder may be replaced


def reasons(cfg: ModelConfig) -> list[str]:
    """What of this model a Hugging Face folder has no place for."""
    return not_in(cfg, kind_of(cfg))


def is_export(folder: Path) -> bool:
    """Whether a folder holds nothing, or only what was written here."""
    if not folder.is_dir() or any(p.name not in FILES or p.is_dir() for p in folder.iterdir()):
        return False
    try:
        return not any(folder.iterdir()) or MARK.items() <= read_json(folder / "config.json").items()
    except ValueError:
        return False


def write(folder: Path, out: Path, dtype: torch.dtype | None = None) -> None:
    """Write the model folder `folder` as the new folder `out`, weight by weight.

    `dtype` is that of the weights there, None as here. Raises ValueError, before there
    is a folder, for what the format cannot say.
    """
    model, file = open_model(folder)
    cannot = reasons(model.cfg)
    if cannot:
        raise ValueError(f"{folder} cannot be written for Hugging Face: it has {'; '.join(cannot)}")
    ids, files = tokenizer_files(folder, model.cfg.vocab_size)
    dtype, kind = dtype or stored_dtype(file), kind_of(model.cfg)
    config = settings_of(model.cfg, kind) | ids | {"torch_dtype": str(dtype).removeprefix("torch.")} | MARK
    files |= {"config.json": as_json(config), "generation_config.json": as_json(ids)}
    out.mkdir(parents=True)
    write_tensors(model, file, kind, dtype, out / "model.safetensors")
    for name, content in files.items():
        (out / name).write_bytes(content)


def as_json(values: dict) -> bytes:
    return (json.dumps(values, ensure_ascii=False, indent=1) + "\n").encode()


def write_tensors(model: LM, file: Path, kind: str, dtype: torch.dtype, out: Path) -> None:
    """Every parameter in its place there, zeros for what a recipe left out."""
    cfg, stored = full_form(model.cfg), stored_shapes(model)
    shapes, s = expected_shapes(cfg), factor(cfg, kind)
    places = {place(name, kind)[0]: name for name in shapes}

    def read(there: str) -> Tensor:
        name = places[there]
        if name == "head.weight" and model.cfg.tied:
            name = "emb.weight"
        t = read_tensor(file, name) if name in stored else torch.zeros(shapes[name])
        return arrange_there(t, place(name, kind)[1], s, dtype)

    forms = {there: shape_there(shapes[name], place(name, kind)[1]) for there, name in places.items()}
    write_safetensors(out, forms, dtype, read)


def stored_dtype(file: Path) -> torch.dtype:
    """One that holds every weight of a model's file as it is."""
    names = {name: dtype for dtype, name in DTYPES.items()}
    with safe_open(file, "pt") as f:
        found = {names.get(f.get_slice(name).get_dtype(), torch.float32) for name in f.keys()}
    return found.pop() if len(found) == 1 else torch.float32


# ------------------------------------------------------------------------------------------
# The tokenizer

def tokenizer_files(folder: Path, rows: int) -> tuple[dict, dict[str, bytes]]:
    """What opens, ends and pads a text, by the keys of config.json, and files by name.

    A model without a tokenizer has none. Raises ValueError for tokens without a row.
    """
    name = read_meta(folder).get("tokenizer") if (folder / "meta.json").exists() else None
    if name is None:
        return special_ids(None, None, None), {}
    if name == "world":
        return special_ids(0, 0, 0), world_files(folder, rows)
    spec = spec_of(load_tokenizer(folder))
    if len(spec["tokens"]) > rows:
        raise ValueError(f"the tokenizer {name} of {folder} has {len(spec['tokens'])} tokens, the model "
                         f"{rows} rows: texts with the others would crash there; import it again with "
                         "--tokenizer")
    files = {"tokenizer.json": tokenizer_json(spec), "tokenizer_config.json": tokenizer_config(spec)}
    start = spec["end"] if spec["start"] is None else spec["start"]
    stop = spec["stop"] if len(spec["stop"]) > 1 else spec["end"]
    return special_ids(start, stop, spec["end"]), {file: as_json(content) for file, content in files.items()}


def special_ids(bos: int | None, eos: int | list[int] | None, pad: int | None) -> dict:
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}


def world_files(folder: Path, rows: int) -> dict[str, bytes]:
    """World's vocabulary, from beside the model or the package rwkv."""
    file, package = folder / WORLD, importlib.util.find_spec("rwkv")
    if not file.exists() and package:
        file = Path(package.submodule_search_locations[0]) / WORLD
    if not file.exists():
        raise ValueError(f"{WORLD} is neither in {folder} nor in the package rwkv: put it beside the model")
    config = {"tokenizer_class": "RWKV7Tokenizer", "model_vocab_size": rows, "pad_token": "<|padding|>",
              "eos_token": "<|endoftext|>"}
    return {WORLD: file.read_bytes(), "tokenizer_config.json": as_json(config)}
