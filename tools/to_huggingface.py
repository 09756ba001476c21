"""A pure RWKV-7 as a Hugging Face folder: `tools.convert export --format hf`.

    config.json, generation_config.json      as fla (rwkv7) or RWKVInside (rwkv_hybrid)
    model.safetensors                        has it: huggingface_rwkv.py
    tokenizer.json, tokenizer_config.json    the tokenizer, where the model has one:
                                             huggingface_tokenizer.py
    rwkv_vocab_v20230424.txt                 instead of tokenizer.json, for World

What it is not: code. `rwkv7-hf` or fla have the classes that load it.
"""

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
from tools.huggingface_tokenizer import WORLD, chat_template, spec_of, tokenizer_config, tokenizer_json

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json", WORLD)
MARK = {"exported_by": "nanoRWKVInside"}  # in config.json: such a folder may be replaced


def reasons(cfg: ModelConfig) -> list[str]:
    """What of this model a Hugging Face folder has no place for."""
    return not_in(cfg, kind_of(cfg))


def require_own(out: Path) -> None:
    """Raises ValueError for a folder that holds more than was written here."""
    try:
        names = {path.name + "/" * path.is_dir() for path in out.iterdir()}
        own = not names or MARK.items() <= read_json(out / "config.json").items()
    except (OSError, ValueError):
        names, own = set(), False
    if not own or names - {*FILES}:
        raise ValueError(f"{out} is not (only) a Hugging Face folder that was written here, so it is not "
                         "replaced: choose another --out")


def how_to_run(out: Path) -> str:
    kind = read_json(out / "config.json")["model_type"]
    if kind == "rwkv7":
        return f"{out}: for the package rwkv7-hf (or fla), RWKV7ForCausalLM.from_pretrained({str(out)!r})"
    return f"{out}: for the code of RWKVInside, {kind}"


def write(folder: Path, out: Path, dtype: str | None) -> None:
    """Write the model folder `folder` as the new folder `out`, weight by weight.

    `dtype` is that of the weights there, None as here. Raises ValueError, before there
    is a folder, for what the format cannot say.
    """
    model, file = open_model(folder)
    cannot = reasons(model.cfg)
    if cannot:
        raise ValueError(f"{folder} cannot be written for Hugging Face: it has {'; '.join(cannot)}")
    ids, files = tokenizer_files(folder, model.cfg.vocab_size)
    kind = kind_of(model.cfg)
    dtype = getattr(torch, dtype) if dtype else stored_dtype(file)
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
    enc = load_tokenizer(folder)
    if enc.n_vocab > rows:
        raise ValueError(f"the tokenizer {name} of {folder} has {enc.n_vocab} tokens, the model {rows} rows: "
                         "texts with the others would crash there; import it again with --tokenizer")
    if name.startswith("world"):
        return special_ids(0, 0, 0), world_files(enc.tokens, enc.chat, rows)
    spec = spec_of(enc)
    files = {"tokenizer.json": tokenizer_json(spec), "tokenizer_config.json": tokenizer_config(spec)}
    start = spec["end"] if spec["start"] is None else spec["start"]
    stop = spec["stop"] if len(spec["stop"]) > 1 else spec["end"]
    return special_ids(start, stop, spec["end"]), {file: as_json(content) for file, content in files.items()}


def special_ids(bos: int | None, eos: int | list[int] | None, pad: int | None) -> dict:
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}


def world_files(tokens: list[bytes], chat: dict | None, rows: int) -> dict[str, bytes]:
    """World's vocabulary as its own file has it: "id repr length" of each but 0."""
    lines = [f"{i} {text_or_bytes(token)!r} {len(token)}\r\n" for i, token in enumerate(tokens) if i]
    config = {"tokenizer_class": "RWKV7Tokenizer", "model_vocab_size": rows, "pad_token": "<|padding|>",
              "eos_token": "<|endoftext|>"} | chat_template(chat)
    return {WORLD: "".join(lines).encode(), "tokenizer_config.json": as_json(config)}


def text_or_bytes(token: bytes) -> str | bytes:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return token
