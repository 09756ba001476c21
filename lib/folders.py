"""Model folders: config.json, model.safetensors, and meta.json, naming the tokenizer.

Loading one runs no pickled code. Whatever is written here appears whole or not at all.
"""

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from typing import get_type_hints

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from config import as_type
from data.folder import digests
from data.foreign import brief, read_json, require_file, unreadable
from data.loader import Loader
from data.pairing import check_folder, too_small
from data.tokenizer import read_meta
from lib.hybrid import is_letters, mixer_letters
from lib.processes import is_part, whole
from model import LM, ModelConfig

TENSORS_PER_LAYER = 8      # at least: two norms, q, k, v, o, and two of the feed-forward layer
LARGEST_HEADER = 2**24     # bytes of names and shapes in a .safetensors file: 150,000 tensors
# What a new model must have, else these settings would do nothing. A student has its
# teacher's ranks and theta, so they are not among them.
NEEDS = {
    "--mixer with an r": (lambda shape: "r" in shape.mixers,
                          ("gate", "group_norm", "token_shift", "bonus", "rwkv_rope", "rwkv_size")),
    "--rope_scaling linear or llama3": (lambda shape: shape.rope_scaling != "default", ("rope_factor",)),
    "--rope_scaling llama3": (lambda shape: shape.rope_scaling == "llama3",
                              ("rope_low", "rope_high", "rope_original")),
}


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """`write` a file under another name, then rename it: it is whole or not there."""
    part = file.with_name(file.name + ".tmp")
    try:
        write(part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    write_whole(file, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(file: Path, values: dict) -> None:
    write_text(file, json.dumps(values, indent=1) + "\n")


def write_sealed(file: Path, values: dict) -> None:
    """As `write_json`, with a checksum of the values, for `require_sealed`."""
    write_json(file, values | {"crc32": checksum_of(values)})


def require_sealed(values: dict) -> dict:
    """What `write_sealed` was given; files of before have no checksum.

    Raises ValueError where it is another one's.
    """
    rest = {key: value for key, value in values.items() if key != "crc32"}
    if "crc32" in values and values["crc32"] != checksum_of(rest):
        raise ValueError("it does not fit its own checksum")
    return rest


def checksum_of(values) -> int:
    """CRC-32 of what JSON can hold, the same after it was written and read."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def save_model(model: LM, folder: str | Path, meta: dict, rank: int = 0) -> None:
    """Write a model folder; `meta` names the tokenizer.

    Of a sharded model every process gives its parts, and rank 0 alone writes.
    """
    folder = Path(folder)
    weights = model.state_dict()
    weights = {name: weights[name].detach() for name in stored_shapes(model)}
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", asdict(model.cfg))
        write_json(folder / "meta.json", meta)
    checksums = {"config.json": checksum_of_config(model.cfg)}
    file = folder / "model.safetensors"
    if any(map(is_part, weights.values())):
        write_parts(file, weights, checksums, rank)
        return
    stored = {name: weight.cpu().contiguous() for name, weight in weights.items()}
    checksums = {name: checksum(weight) for name, weight in stored.items()} | checksums
    metadata = {"crc32": json.dumps(checksums)}        # one entry alone: several come in any order
    write_whole(file, lambda part: save_file(stored, part, metadata))


def write_parts(file: Path, tensors: dict[str, Tensor], checksums: dict[str, int], rank: int) -> None:
    """A .safetensors file of float32 tensors of which each process has a part.

    One is whole at a time, so save_file cannot do it. Checksums stand in front, and are
    known at the end: there is room for the longest.
    """
    if rank > 0:
        for x in tensors.values():
            whole(x)
        return
    entries, end = {}, 0
    for name, x in tensors.items():
        start, end = end, end + 4 * x.numel()
        entries[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [start, end]}

    def header(checksums: dict[str, int]) -> bytes:
        return json.dumps({"__metadata__": {"crc32": json.dumps(checksums)}} | entries).encode()

    size = -(-len(header(checksums | dict.fromkeys(tensors, 2**32))) // 8) * 8

    def write(part: Path) -> None:
        with open(part, "wb") as f:
            f.seek(8 + size)
            for name, x in tensors.items():
                x = whole(x).cpu().float().contiguous()
                checksums[name] = checksum(x)
                f.write(x.flatten().view(torch.uint8).numpy())
            f.seek(0)
            f.write(size.to_bytes(8, "little") + header(checksums).ljust(size))

    write_whole(file, write)


def checksum(x: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(x.flatten().view(torch.uint8).numpy())


def checksum_of_config(cfg: ModelConfig) -> int:
    """CRC-32 of settings but for defaults: a setting added later changes none."""
    return checksum_of(other_than_default(cfg, cfg.mixers))


def other_than_default(cfg: ModelConfig, mixer: str) -> dict:
    """The settings that identify a model, the same whatever the defaults become.

    What it is compared with are the first defaults; `mixer` is the pattern to name.
    """
    defaults = asdict(ModelConfig()) | {"n_layer": 3, "n_embd": 96, "n_head": 3}
    values = asdict(cfg) | {"mixer": mixer}
    return {name: value for name, value in values.items() if value != defaults[name]}


def checksums_in(f, file: str | Path) -> dict[str, int]:
    """What `save_model` wrote into the open .safetensors file; others have none."""
    try:
        return dict(json.loads((f.metadata() or {}).get("crc32", "{}")))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{file} is damaged: its checksums are; restore it from a checkpoint") from None


def fingerprint(folder: str | Path) -> int | None:
    """A number for what is in a model or data folder, the same wherever it lies.

    None for a folder that does not exist.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").exists():
        with safe_open(folder / "model.safetensors", "pt") as f:
            known = checksums_in(f, folder / "model.safetensors")
    elif (folder / "meta.json").exists():
        meta = read_meta(folder)
        blocks = meta.get("blocks") or digests(folder)       # of before: all is read
        known = [*(meta.get(key) for key in ("kind", "tokenizer", "vocab_size")), blocks]
    else:
        return None
    if known:
        return checksum_of(known)
    crc = 0
    with (folder / "model.safetensors").open("rb") as f:     # of before: all of it is read
        while piece := f.read(2**24):
            crc = zlib.crc32(piece, crc)
    return crc


def open_model(folder: str | Path) -> tuple[LM, Path]:
    """A folder's model without weights, on the meta device, and the file of them all.

    Raises ValueError, in one line, for a folder that is missing, damaged or of another
    shape. What the weights' file holds is read first: no larger model is built.
    """
    folder = Path(folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    for path in (config, file):
        try:
            require_file(path)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(missing(folder, path)) from None
        except OSError as e:
            raise unreadable(path, e) from None
    values = read_json(config, "restore it from a checkpoint")
    shapes = read_shapes(file, "restore it from a checkpoint")
    n_layer = values.get("n_layer")
    if isinstance(n_layer, int) and n_layer * TENSORS_PER_LAYER > len(shapes):
        raise ValueError(f"the model at {folder} does not fit its config.json: of n_layer = {brief(n_layer)} "
                         f"layers some are missing in {file.name}, which has {len(shapes)} tensors")
    cfg = read_config(values, str(config))
    try:
        expected = expected_shapes(cfg)
    except ValueError as e:
        raise ValueError(f"{config} is damaged ({e}): restore it from a checkpoint") from None
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise ValueError(f"the model at {folder} does not fit its config.json: {name} is "
                             f"{shapes.get(name, 'missing')}, expected {expected.get(name, 'none')}; restore "
                             "both from a checkpoint, or from a copy")
    with safe_open(file, "pt") as f:
        if checksums_in(f, file).get("config.json") not in (None, checksum_of_config(cfg)):
            raise ValueError(f"{config} is damaged: it has another checksum than when the model was saved; "
                             "restore it from a checkpoint, or from a copy")
    model = on_paper(cfg)
    model.pattern = values.get("mixer", cfg.mixer)  # as it was written; see lib/state_file.py
    return model, file


def missing(folder: Path, path: Path) -> str:
    """What to say of a model folder without the file `path`."""
    if folder.is_file():
        return (f"no model at {folder}: it is a file; give the folder that holds config.json "
                "and model.safetensors")
    return f"no model at {folder}: {path.name} is missing; train one first, or check the path"


def read_shapes(file: Path, remedy: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a .safetensors file; no tensor is read.

    Raises ValueError, with the remedy, where it can't be read or is damaged.
    """
    try:
        require_file(file)
        with open(file, "rb") as f:
            header = int.from_bytes(f.read(8), "little")
        if header > LARGEST_HEADER:
            raise ValueError(f"its header claims {header:,} bytes, more than any model's")
        with safe_open(file, "pt") as f:
            return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
    except OSError as e:
        raise unreadable(file, e) from None
    except (SafetensorError, ValueError) as e:
        raise ValueError(f"{file} is damaged ({brief(e)}): {remedy}") from None


def read_config(values: dict, name: str) -> ModelConfig:
    """The settings in a config.json, which `name` names.

    Older ones have a pattern such as "all" where letters stand today. Raises ValueError
    for keys, types and values that no model has.
    """
    hints = get_type_hints(ModelConfig)
    unknown = set(values) - set(hints)
    if unknown:
        raise ValueError(f"{name} has unknown keys: {brief(', '.join(sorted(unknown)))}")
    try:
        values = {key: as_type(value, hints[key], key) for key, value in values.items()}
        pattern = values.get("mixer", "a")
        if not is_letters(pattern):
            values |= {"mixer": mixer_letters(ModelConfig(**values | {"mixer": "a"}), pattern)}
        return ModelConfig(**values)
    except (ValueError, OverflowError) as e:
        raise ValueError(f"{name} is damaged ({brief(e)}): restore it from a checkpoint") from None


def on_paper(cfg: ModelConfig) -> LM:
    """The model with shapes, but without memory and initial values.

    Raises ValueError for sizes that no tensor can have.
    """
    try:
        with torch.device("meta"):
            return LM(cfg)
    except (RuntimeError, TypeError, OverflowError) as e:
        raise ValueError(f"no tensor can be as large as these settings say ({brief(e)})") from None


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> LM:
    """Read a model folder, weight by weight, into float32 whatever they are stored as.

    Raises ValueError as `open_model`.
    """
    model, file = open_model(folder)
    weights = {
        name: finite(file, name).to(device, torch.float32, copy=True) for name in stored_shapes(model)
    }
    model.load_state_dict(weights, strict=False, assign=True)
    for name, left_out in model.named_buffers():                      # zeros, which no file has
        module = model.get_submodule(name.rpartition(".")[0])
        module._buffers[name.rpartition(".")[2]] = torch.zeros(left_out.shape, device=device)
    if model.cfg.tied:
        model.head.weight = model.emb.weight
    return model


def finite(file: Path, name: str) -> Tensor:
    """One tensor of a model's file. Raises ValueError for infinite values, and NaN."""
    t = read_tensor(file, name)
    if not t.isfinite().all():
        raise ValueError(f"{name} in {file} has infinite values or NaN: it is damaged, or its training "
                         "diverged; restore it from an earlier checkpoint")
    return t


def expected_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """`stored_shapes` of a model that is not built: of layers that are alike, one is.

    Layer 0 has a norm more, and the first RWKV-7 has no value residual.
    """
    letters, first_of = cfg.mixers, {}
    kinds = [(i == 0, letter, i == letters.find("r")) for i, letter in enumerate(letters)]
    for i, kind in enumerate(kinds):
        first_of.setdefault(kind, i)
    small = replace(cfg, n_layer=len(first_of), mixer="".join(letters[i] for i in first_of.values()))
    layers, rest = {kind: {} for kind in first_of}, {}
    for name, shape in stored_shapes(on_paper(small)).items():
        _, i, part = name.split(".", 2) if name.startswith("blocks.") else ("", "", name)
        (layers[list(first_of)[int(i)]] if i else rest)[part] = shape
    last = {name: rest.pop(name) for name in list(rest) if name.startswith(("ln_out.", "head."))}
    blocks = {f"blocks.{i}.{part}": shape for i, kind in enumerate(kinds)
              for part, shape in layers[kind].items()}
    return rest | blocks | last


def stored_shapes(model: LM) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight in a model folder; a tied head is not stored."""
    tied = {"head.weight"} if model.cfg.tied else set()
    return {name: tuple(p.shape) for name, p in model.state_dict().items() if name not in tied}


def read_tensor(file: str | Path, name: str) -> Tensor:
    """One tensor of a .safetensors file, mapped into memory.

    The file is opened anew each time, for an open one keeps what it has read. Raises
    ValueError where it has the tensor's checksum, and that is another.
    """
    with safe_open(file, "pt") as f:
        x, expected = f.get_tensor(name), checksums_in(f, file).get(name)
    if expected is not None and expected != checksum(x):
        raise ValueError(f"{file} is damaged: {name} has another checksum than when it was saved; restore it "
                         "from a checkpoint, or from a copy")
    return x


# ------------------------------------------------------------------------------------------
# Do model and data belong together?

def check_start(cfg, shape: ModelConfig) -> None:
    """Raises ValueError where a TrainConfig describes another model than --init has, a
    new one with settings of what it has not, or one that its loop cannot train.
    """
    same = replace(cfg.shape, vocab_size=shape.vocab_size) == replace(shape, mixer=shape.mixers)
    if cfg.init and not same and (cfg.mixer or cfg.model != ModelConfig()):
        raise ValueError(f"--init takes the model of {cfg.init} as it is: omit flags that describe another")
    for need, (is_met, names) in NEEDS.items():
        idle = [name for name in names if getattr(shape, name) != getattr(ModelConfig(), name)]
        if idle and not cfg.init and not is_met(shape):
            raise ValueError(f"{idle[0]} = {getattr(shape, idle[0])}: without {need} it would do nothing; "
                             "omit it, or give that too")
    if cfg.fit.bptt_truncate and "a" in shape.mixers:
        raise ValueError("bptt_truncate: attention's state would grow without end; it is for --mixer r alone")


def check_vocabulary(teacher: LM, student: LM, loader: Loader) -> None:
    """Raises ValueError where the data have tokens that student or teacher have not.

    A tokenizer may have more: it is the ids in the data that count. And models may have
    more rows than it has tokens, one more than the other.
    """
    for model, name in ((student, "student"), (teacher, "teacher")):
        if loader.vocab_size > model.cfg.vocab_size and largest_id(loader) >= model.cfg.vocab_size:
            raise ValueError(f"{loader.folder} has {loader.vocab_size} tokens, the {name} "
                             f"{model.cfg.vocab_size}, and token {largest_id(loader)} occurs: prepare the "
                             "data with the model's tokenizer, without texts that spell its added tokens")


def rows(cfg: ModelConfig, loader: Loader) -> int:
    """How many tokens a new model knows: the data's, or as many more as are asked for.

    Raises ValueError for more than rounding up explains.
    """
    if too_small(loader.vocab_size, cfg.vocab_size):
        raise ValueError(f"vocab_size = {cfg.vocab_size}, but {loader.folder} has {loader.vocab_size} "
                         "tokens: prepare the data with another tokenizer, or give --vocab_size "
                         f"{loader.vocab_size}")
    return max(cfg.vocab_size, loader.vocab_size)


def largest_id(loader: Loader) -> int:
    """Of all tokens in a data folder, in every split."""
    files = [part.folder / f"{split}.bin" for part in loader.parts for split in part.meta["tokens"]]
    return max(int(np.memmap(file, loader.meta["dtype"], "r").max()) for file in files if file.stat().st_size)


def same_tokenizer(loader: Loader, *folders: str | Path) -> None:
    """Raises ValueError where a model folder's tokenizer is not the loader's, or by its
    size not the model's.
    """
    for folder in folders:
        names = read_meta(folder).get("tokenizer"), loader.meta["tokenizer"]
        if names[0] is None:
            raise ValueError(f"{folder} has no tokenizer, {loader.folder} holds {names[1]}: import the model "
                             "again with --tokenizer, and prepare the data with that")
        if names[0] != names[1]:
            raise ValueError(f"{folder} reads {names[0]} tokens, {loader.folder} holds {names[1]}: "
                             "prepare the data again with the model's tokenizer, --tokenizer "
                             f"{quote(str(folder))}")
        check_folder(folder, names[0], loader.vocab_size)
