"""A pure RWKV-7 as a Hugging Face folder: what `tools.convert export --format hf` writes.

    config.json, generation_config.json      as fla (rwkv7) or RWKVInside (rwkv_hybrid)
    model.safetensors                        has it: huggingface_rwkv.py
    tokenizer.json, tokenizer_config.json    the tokenizer, where the model has one:
                                             huggingface_tokenizer.py
    rwkv_vocab_v20230424.txt                 instead of tokenizer.json, for World

What it is not: code. `rwkv7-hf` or fla have the classes that load it.
"""

import importlib.util
import json
import shutil
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
from tools.huggingface_tokenizer import spec_of, write_tokenizer_files

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
    """Write the model folder `folder` into the empty folder `out`, weight by weight.

    `dtype` is that of the weights there, None as here. Raises ValueError for what the
    format cannot say.
    """
    model, file = open_model(folder)
    cannot = reasons(model.cfg)
    if cannot:
        raise ValueError(f"{folder} cannot be written for Hugging Face: it has {'; '.join(cannot)}")
    ids = write_tokenizer(folder, model.cfg.vocab_size, out)
    dtype = dtype or stored_dtype(file)
    kind = kind_of(model.cfg)
    config = settings_of(model.cfg, kind) | ids | {"torch_dtype": str(dtype).removeprefix("torch.")} | MARK
    write_tensors(model, file, kind, dtype, out / "model.safetensors")
    for name, values in (("config.json", config), ("generation_config.json", ids)):
        (out / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


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

def write_tokenizer(folder: Path, rows: int, out: Path) -> dict:
    """The files of the model's tokenizer; returns what opens, ends and pads a text.

    All None for a model without one. Raises ValueError for tokens without a row.
    """
    name = read_meta(folder).get("tokenizer") if (folder / "meta.json").exists() else None
    if name is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if name == "world":
        return write_world(folder, rows, out)
    spec = spec_of(load_tokenizer(folder))
    size = 1 + max(len(spec["tokens"]) - 1, *spec["special"].values(), *spec["added"].values())
    if size > rows:
        raise ValueError(f"the tokenizer {name} of {folder} has {size} tokens, the model {rows} rows: there "
                         "such texts would crash; import the model again with its own --tokenizer")
    write_tokenizer_files(spec, out)
    stop = spec["stop"] if len(spec["stop"]) > 1 else spec["end"]
    start = spec["end"] if spec["start"] is None else spec["start"]
    return {"bos_token_id": start, "eos_token_id": stop, "pad_token_id": spec["end"]}


def write_world(folder: Path, rows: int, out: Path) -> dict:
    """World's vocabulary, from beside the model or the package rwkv; token 0 ends."""
    file, package = folder / WORLD, importlib.util.find_spec("rwkv")
    if not file.exists() and package:
        file = Path(package.submodule_search_locations[0]) / WORLD
    if not file.exists():
        raise ValueError(f"{WORLD} is neither in {folder} nor in the package rwkv: put it beside the model")
    shutil.copyfile(file, out / WORLD)
    config = {"tokenizer_class": "RWKV7Tokenizer", "model_vocab_size": rows, "pad_token": "<|padding|>",
              "eos_token": "<|endoftext|>"}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
