"""A state made smaller, and kept in a file.

    save_state("book.state", model, compress(book, "int8"), "bytes")
    book, unread = load_state("book.state", model, "bytes")

int8 holds every row x of a tensor (its last dimension) as q s, with q = round(x / s) in
-127 ... 127 and s = max |x| / 127, one scale in bfloat16 for each row: 1 + 2/N bytes
for a number instead of 4, and an error of at most s/2 (s/2 + 0.4 % for the largest).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib.folders import other_than_default, stored_shapes, write_whole
from lib.states import copy, tensors, tree_map
from model import LM, State


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
FORMAT = "nanoRWKVInside state, version 1"


class Int8(NamedTuple):
    """A tensor in 8 bits: q int8 of its shape, scale bfloat16 (..., 1)."""

    q: Tensor
    scale: Tensor


# ------------------------------------------------------------------------------------------
# Smaller

def compress(state: State, dtype: str) -> State:
    """The state in float16, bfloat16 or int8, for keeping, not for computing.

    float32 changes nothing, and an int8 state stays int8. Raises ValueError for another
    dtype, and for a number that it cannot hold.
    """
    if dtype not in DTYPES:
        raise ValueError(f"state_dtype = {dtype!r}: choose one of {', '.join(DTYPES)}")
    if dtype == "float32" or any(x.dtype == torch.int8 for x in tensors(state)):
        return state

    def small(x):
        y = quantise(x) if dtype == "int8" else x.to(DTYPES[dtype])
        if not all(part.isfinite().all() for part in tensors(y)):
            raise ValueError(
                f"the state has numbers that {dtype} cannot hold, up to {x.abs().max():.3g}: keep it "
                "in bfloat16, and if they are not finite, take an earlier checkpoint"
            )
        return y

    return tree_map(small, state)


def quantise(x: Tensor) -> Int8:
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).bfloat16()
    scale = scale.clamp_min(torch.finfo(torch.bfloat16).tiny)
    return Int8((x.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale)


def expand(state: State) -> State:
    """A compressed state in float32 again, for computing."""
    def full(x):
        if isinstance(x, Int8):
            return x.q.float() * x.scale.float()
        if isinstance(x, tuple):
            return tuple(map(full, x))
        return x.float() if isinstance(x, Tensor) else x

    return State(state.position, full(state.layers))


# ------------------------------------------------------------------------------------------
# In a file

def fingerprint(model: LM, mixer: str | None = None) -> str:
    """SHA-256 of what decides a model's numbers: the settings that are not the
    defaults, and the weights.

    `mixer`: how its layers are written, None = one letter each. Settings at their
    defaults are left out, so that a setting added later changes no fingerprint.
    """
    settings = other_than_default(model.cfg, mixer or model.cfg.mixers)
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    weights = model.state_dict()
    for name in sorted(stored_shapes(model)):
        sha.update(name.encode())
        sha.update(raw(weights[name]))
    return sha.hexdigest()


def fingerprints(model: LM) -> list[str]:
    """The model's, and that of old files, with mixers as written ("r", "first:2")."""
    return [fingerprint(model), fingerprint(model, getattr(model, "pattern", model.cfg.mixer))]


def raw(x: Tensor) -> memoryview:
    return memoryview(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def named(x, name: str = "blocks") -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a tree, with its path."""
    if isinstance(x, Tensor):
        yield name, x
    elif isinstance(x, tuple):
        for key, part in zip(x._fields if isinstance(x, Int8) else range(len(x)), x):
            yield from named(part, f"{name}.{key}")


def digest(parts: dict[str, Tensor], meta: dict[str, str]) -> str:
    sha = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(parts):
        sha.update(f"{name} {parts[name].dtype} {tuple(parts[name].shape)}".encode())
        sha.update(raw(parts[name]))
    return sha.hexdigest()


def save_state(file: str | Path, model: LM, state: State, tokenizer: str, unread: Sequence[int] = ()) -> None:
    """Write a state, compressed or not, as a .safetensors file, whole or not at all.

    `unread`: tokens of the text that the state has not read yet, such as the last one
    drawn. Raises ValueError if it can't be written, or would replace what is no state.
    """
    file = Path(file)
    if file.is_file() and not is_state(file):
        raise ValueError(f"{file} is no state, and would be replaced: choose another name, or move it away")
    parts = {name: x.cpu().contiguous() for name, x in named(copy(state).layers)}  # a copy shares no memory
    meta = {"format": FORMAT, "model": fingerprint(model), "tokenizer": tokenizer,
            "position": str(state.position), "unread": json.dumps(list(unread))}
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_whole(file, lambda part: save_file(parts, part, meta | {"digest": digest(parts, meta)}))
    except (SafetensorError, OSError) as e:
        raise ValueError(f"the state could not be written to {file} ({e}): is the disk full?") from None


def load_state(file: str | Path, model: LM, tokenizer: str | None = None) -> tuple[State, list[int]]:
    """Read (state, unread tokens), as they were saved, onto the model's device.

    Raises ValueError, in one line, for a file that is missing, damaged, no state, or
    that of another model or tokenizer.
    """
    meta, parts = read_parts(Path(file))
    if meta["model"] not in fingerprints(model):
        raise ValueError(f"the state {file} was made by another model ({meta['model'][:12]}..., this is "
                         f"{fingerprint(model)[:12]}...): load it with that one")
    if tokenizer is not None and meta["tokenizer"] != tokenizer:
        raise ValueError(f"the state {file} was made with the tokenizer {meta['tokenizer']}, this model has "
                         f"{tokenizer}: take that one")
    device = model.emb.weight.device
    with torch.no_grad():
        _, like = model.hidden(torch.zeros(1, 1, dtype=torch.long, device=device))
    try:
        position, unread = numbers(meta, model.cfg.vocab_size)
        check_parts(parts, like, position, model.cfg.mixers)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"the state {file} is damaged ({e}): save it again") from None

    def build(x, name: str):                       # the same model's states are all trees of one shape
        if f"{name}.q" in parts:
            return Int8(*(parts[f"{name}.{field}"].to(device, copy=True) for field in Int8._fields))
        if isinstance(x, tuple):
            return tuple(build(part, f"{name}.{i}") for i, part in enumerate(x))
        if isinstance(x, Tensor):
            return parts[name].to(device, copy=True)                               # not mapped
        return position if isinstance(x, int) else None

    return State(position, build(like.layers, "blocks")), unread


def numbers(meta: dict[str, str], vocab_size: int) -> tuple[int, list[int]]:
    """(position, unread tokens). Raises ValueError for what they cannot be."""
    position, unread = int(meta["position"][:20]), json.loads(meta["unread"])
    if not 0 <= position < 2**63:
        raise ValueError(f"its position is {position}")
    if not isinstance(unread, list) or not all(type(t) is int and 0 <= t < vocab_size for t in unread):
        raise ValueError("what is unread are no tokens of the model")
    return position, unread


def check_parts(parts: dict[str, Tensor], like: State, position: int, mixers: str) -> None:
    """Raises ValueError where the parts are not those of `like`, a state of one token,
    for any number of texts. Attention's caches grow with the text.
    """
    rows = next(iter(parts.values())).shape[:1] if parts else ()
    expected = {}
    for name, x in named(like.layers):
        layer, half = map(int, name.split(".")[1:3])
        caches = mixers[layer] == "a" and half == 0                                # (B, H, T, N)
        shape = (*rows, x.shape[1], position, x.shape[3]) if caches else (*rows, *x.shape[1:])
        if f"{name}.q" in parts:
            expected |= {f"{name}.q": (shape, "int8"), f"{name}.scale": ((*shape[:-1], 1), "bfloat16")}
        else:
            expected[name] = shape, "a float"
    for name in sorted(expected.keys() | parts.keys()):
        shape, dtype = expected.get(name, (None, ""))
        x = parts.get(name)
        kinds = [DTYPES[dtype]] if dtype in DTYPES else [DTYPES[name] for name in DTYPES if name != "int8"]
        if x is None or tuple(x.shape) != shape or x.dtype not in kinds:
            seen = "missing" if x is None else f"{x.dtype} {tuple(x.shape)}"
            raise ValueError(f"{name} is {seen}, expected {shape and f'{dtype} {shape}'}")


def is_state(file: str | Path) -> bool:
    """Whether a file is one that `save_state` wrote, by what it says of itself."""
    try:
        with safe_open(file, "pt") as f:
            return (f.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def read_parts(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What is written about a state, and its tensors, mapped into memory.

    Raises ValueError unless both are as they were saved.
    """
    try:
        if not file.is_file():
            raise ValueError(f"no state at {file}: check the path, or make one with --save_state")
        with file.open("rb"), safe_open(file, "pt") as f:
            meta = f.metadata() or {}
            parts = {name: f.get_tensor(name) for name in f.keys()}
    except OSError as e:
        raise ValueError(f"the state {file} can't be read ({e.strerror or e}): check who may read "
                         "it") from None
    except SafetensorError as e:
        raise ValueError(f"the state {file} is damaged or no state ({e}): save it again") from None
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{file} is no state: its format is {meta.get('format')!r}, expected {FORMAT!r}; give "
            "a file that --save_state wrote"
        )
    missing = {"model", "tokenizer", "position", "unread"} - meta.keys()
    if missing or meta.pop("digest", None) != digest(parts, meta):
        raise ValueError(
            f"the state {file} is damaged (its contents are not what was written): save it again"
        )
    return meta, parts
