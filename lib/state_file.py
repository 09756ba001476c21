"""What a model remembers, as a value: read a text into it, set rows of it side by side, make it small, keep it in a file.

    logits, book = process(model, tokens)          any length, a piece at a time; no call changes a state
    a = generate(model, question, 100, state=book)     so both of these continue the same book
    b = generate(model, another, 100, state=book)
    save_state("book.state", model, compress(book, "int8"), "bytes")

What it is: functions on model.State, for attention's growing cache as for RWKV-7's constant one. Dimension 0 of each of its
tensors is the text in the batch. What it is not: a cache of prompts, or a way to train (detached from autograd).

int8 holds every row x of a tensor (its last dimension) as q s, q = round(x / s) in -127 ... 127 and s = max |x| / 127, one
scale in bfloat16 for each row: 1 + 2/N bytes for a number instead of 4, and an error of at most s/2 (s/2 + 0.4 % for the largest).
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import LM, ModelConfig, State, stored_shapes, tensors, tree_map

PIECE = 512  # tokens per call, of all rows: fast matrix products, and small activations however long the text is
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
FORMAT = "nanoRWKVInside state, version 1"


class Int8(NamedTuple):
    """A tensor in 8 bits: q int8 of its shape, scale bfloat16 (..., 1)."""

    q: Tensor
    scale: Tensor


# ---------------------------------------------------------------------------------------------------------------------
# Reading

@torch.no_grad()
def process(model: LM, tokens: Tensor, state: State | None = None, piece: int = PIECE) -> tuple[Tensor, State]:
    """Read tokens (B, T >= 1), continuing from `state`: logits (B, V) of what comes next, and the state.

    Needs memory for the activations of one piece: `piece` tokens of all rows together, but at least 16 of each.
    Raises ValueError for an empty text or piece, a state of another number of rows or in int8, and what LM raises.
    """
    B, T = tokens.shape
    if B * T == 0 or piece < 1:
        raise ValueError(f"{B} texts of {T} tokens in pieces of {piece}: there must be at least one of each")
    held = tensors(state)
    if held and (len(held[0]) != B or held[0].dtype == torch.int8):
        raise ValueError(f"{B} texts, and the {held[0].dtype} state of {len(held[0])}: select as many rows of it, and expand a compressed one")
    for part in tokens.split(min(piece, max(16, piece // B)), 1):
        x, state = model.hidden(part, state)
    return model.head(x[:, -1]), state


def process_rows(model: LM, rows: Sequence[Tensor], state: State | None = None, piece: int = PIECE) -> tuple[Tensor, list[State]]:
    """Read rows (T_i >= 1,) of any lengths, continuing from `state`: logits (B, V), and each row's state.

    All read as far as the shortest goes; whoever is at the end steps out, the others read on. So nothing is padded, no state
    sees what is not its text, and every token is computed once. Raises ValueError for no rows, and as `process`.
    """
    if not len(rows):
        raise ValueError("no rows: there must be at least one text")
    logits, states = [None] * len(rows), [None] * len(rows)
    reading, read = list(range(len(rows))), 0
    for end in sorted({len(row) for row in rows}):
        out, state = process(model, torch.stack([rows[i][read:end] for i in reading]), state, piece)
        for j, i in enumerate(reading):
            if len(rows[i]) == end:
                logits[i], states[i] = out[j], select(state, [j])
        stay = [j for j, i in enumerate(reading) if len(rows[i]) > end]
        reading, state, read = [reading[j] for j in stay], select(state, stay), end
    return torch.stack(logits), states


# ---------------------------------------------------------------------------------------------------------------------
# As values

def copy(state: State) -> State:
    """The same in memory of its own, and out of autograd: for whoever writes into a state's tensors."""
    return tree_map(lambda x: x.detach().clone(), state)


def reset(state: State) -> State:
    """As many texts on the same device, of which nothing is read: gives what None gives."""
    def empty(att):
        if len(att) == 2:  # attention's (k, v), each (B, H, T, N)
            return tuple(x[:, :, :0].clone() for x in att)
        last, S, _ = att
        return torch.zeros_like(last), torch.zeros_like(S), 0

    return State(0, tuple((empty(att), tree_map(torch.zeros_like, ffn)) for att, ffn in state.layers))


def select(state: State, rows: list[int]) -> State:
    """The texts `rows` of a batch, in this order, in memory of their own; one may come several times."""
    return tree_map(lambda x: x[torch.tensor(rows, dtype=torch.long, device=x.device)], state)


def join(cfg: ModelConfig, states: Sequence[State]) -> list[tuple[list[int], State]]:
    """States side by side, as far as one step can serve them all: batches, each with the indices of its states.

    RWKV-7 does not count its tokens, so all its states fit in one batch, whose position is the longest text's. Attention does, by its
    cache's length, and so do rotary and learned positions: there each batch is of states with one position.
    """
    counts = "a" in cfg.mixers or cfg.rwkv_rope or cfg.positions == "learned"
    batches: dict[int, list[int]] = {}
    for i, state in enumerate(states):
        batches.setdefault(state.position if counts else 0, []).append(i)
    joined = []
    for rows in batches.values():
        layers = tree_map(lambda *xs: torch.cat(xs), *(states[i].layers for i in rows))
        joined.append((rows, State(max(states[i].position for i in rows), layers)))
    return joined


# ---------------------------------------------------------------------------------------------------------------------
# Smaller

def compress(state: State, dtype: str) -> State:
    """The state in float16, bfloat16 or int8, for keeping, not for computing. float32 changes nothing, and an int8 state stays int8.

    Raises ValueError for another dtype, and for a number that it cannot hold.
    """
    if dtype not in DTYPES:
        raise ValueError(f"state_dtype = {dtype!r}: choose one of {', '.join(DTYPES)}")

    def small(x):
        if dtype == "int8":
            scale = (x.abs().amax(-1, keepdim=True).float() / 127).bfloat16().clamp_min(torch.finfo(torch.bfloat16).tiny)
            y = Int8((x.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale)
        else:
            y = x.to(DTYPES[dtype])
        if not all(part.isfinite().all() for part in tensors(y)):
            raise ValueError(f"the state has numbers that {dtype} cannot hold, up to {x.abs().max():.3g}: keep it in bfloat16, "
                             "and if they are not finite, take an earlier checkpoint")
        return y

    if dtype == "float32" or any(x.dtype == torch.int8 for x in tensors(state)):
        return state
    return tree_map(small, state)


def expand(state: State) -> State:
    """A compressed state in float32 again, for computing."""
    def full(x):
        if isinstance(x, Int8):
            return x.q.float() * x.scale.float()
        if isinstance(x, tuple):
            return tuple(map(full, x))
        return x.float() if isinstance(x, Tensor) else x

    return State(state.position, full(state.layers))


# ---------------------------------------------------------------------------------------------------------------------
# In a file

def fingerprint(model: LM) -> str:
    """SHA-256 of what decides a model's numbers: the settings that are not the defaults, and the weights."""
    # settings at their defaults are left out, so that a setting added later changes no fingerprint
    settings = {name: value for name, value in asdict(model.cfg).items() if value != getattr(ModelConfig(), name)}
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    weights = model.state_dict()
    for name in sorted(stored_shapes(model)):
        sha.update(name.encode())
        sha.update(raw(weights[name]))
    return sha.hexdigest()


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
    """Write a state, compressed or not, as a .safetensors file that appears whole or not at all.

    `unread`: tokens of the text that the state has not read yet, such as the last one drawn. Raises ValueError if it can't be written.
    """
    file = Path(file)
    parts = {name: x.cpu().contiguous() for name, x in named(copy(state).layers)}  # a copy: safetensors refuses memory that tensors share
    meta = {"format": FORMAT, "model": fingerprint(model), "tokenizer": tokenizer, "position": str(state.position), "unread": json.dumps(list(unread))}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".tmp")
    try:
        save_file(parts, part, meta | {"digest": digest(parts, meta)})
        os.replace(part, file)
    except (SafetensorError, OSError) as e:
        part.unlink(missing_ok=True)
        raise ValueError(f"the state could not be written to {file} ({e}): is the disk full?") from None


def load_state(file: str | Path, model: LM, tokenizer: str | None = None) -> tuple[State, list[int]]:
    """Read (state, unread tokens), as they were saved, onto the model's device.

    Raises ValueError, in one line, for a file that is missing, damaged, no state, or that of another model or tokenizer.
    """
    file = Path(file)
    try:
        if not file.is_file():
            raise ValueError(f"no state at {file}: check the path, or make one with --save_state")
        with safe_open(file, "pt") as f:
            meta, parts = f.metadata() or {}, {name: f.get_tensor(name).clone() for name in f.keys()}  # not mapped
    except (SafetensorError, OSError) as e:
        raise ValueError(f"the state {file} is damaged or no state ({e}): save it again") from None
    if meta.get("format") != FORMAT:
        raise ValueError(f"{file} is no state: its format is {meta.get('format')!r}, expected {FORMAT!r}; give a file that --save_state wrote")
    if meta.pop("digest", None) != digest(parts, meta):
        raise ValueError(f"the state {file} is damaged (its contents are not what was written): save it again")
    if meta["model"] != fingerprint(model):
        raise ValueError(f"the state {file} was made by another model ({meta['model'][:12]}..., this is {fingerprint(model)[:12]}...): load it with that one")
    if tokenizer is not None and meta["tokenizer"] != tokenizer:
        raise ValueError(f"the state {file} was made with the tokenizer {meta['tokenizer']}, this model has {tokenizer}: take that one")
    position, device = int(meta["position"]), model.emb.weight.device
    with torch.no_grad():
        _, like = model.hidden(torch.zeros(1, 1, dtype=torch.long, device=device))

    def build(x, name: str):  # the same model's states are all trees of one shape
        if f"{name}.q" in parts:
            return Int8(*(parts[f"{name}.{field}"].to(device) for field in Int8._fields))
        if isinstance(x, tuple):
            return tuple(build(part, f"{name}.{i}") for i, part in enumerate(x))
        return parts[name].to(device) if isinstance(x, Tensor) else position if isinstance(x, int) else None

    return State(position, build(like.layers, "blocks")), json.loads(meta["unread"])
