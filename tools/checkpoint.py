"""A checkpoint of the world on its way into a model folder, one tensor at a time.

A format (`from_huggingface.py`, `from_gguf.py`, `rwkv_pth.py`) is a function that reads
the shape of a model and returns a `Checkpoint`: where each of our parameters stands,
how to read it, and how its numbers are arranged there. The loop that reads, arranges
and writes them one by one is here, and so are the rules by which all formats refuse:
every tensor of a checkpoint has its place, every parameter its tensor, and a setting
that model.py does not know is named.
"""

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from data.foreign import brief
from lib.folders import expected_shapes
from model import ModelConfig

Dtype = Literal["float32", "bfloat16", "float16"]                               # of weights on disk
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # torch's: safetensors' name

NAMES = """
model       llama                     gpt2          gguf
emb         model.embed_tokens        wte           token_embd
pos         -                         wpe           -
ln_out      model.norm                ln_f          output_norm
head        lm_head                   lm_head       output
blocks      model.layers              h             blk
ln1         input_layernorm           ln_1          attn_norm
att.q_proj  self_attn.q_proj          attn.c_attn   attn_q
att.k_proj  self_attn.k_proj          attn.c_attn   attn_k
att.v_proj  self_attn.v_proj          attn.c_attn   attn_v
att.q_norm  self_attn.q_norm          -             attn_q_norm
att.k_norm  self_attn.k_norm          -             attn_k_norm
att.o_proj  self_attn.o_proj          attn.c_proj   attn_output
ln2         post_attention_layernorm  ln_2          ffn_norm
ffn.gate    mlp.gate_proj             -             ffn_gate
ffn.key     mlp.up_proj               mlp.c_fc      ffn_up
ffn.value   mlp.down_proj             mlp.c_proj    ffn_down
"""
ROWS = [line.split() for line in NAMES.strip().splitlines()]
TABLE = {kind: {row[0]: row[i] for row in ROWS} for i, kind in enumerate(ROWS[0])}


@dataclass(frozen=True)
class Checkpoint:
    """What stands in a checkpoint; its weights are not read yet.

    Of the functions, `source` gives the name of the tensor that a parameter of ours
    stands in, `read` that tensor, and `arrange` makes the parameter out of it.
    """

    cfg: ModelConfig
    shapes: dict[str, tuple[int, ...]]             # of all its tensors, by their names
    source: Callable[[str], str]                   # parameter's name -> tensor's name
    read: Callable[[str], Tensor]                  # tensor's name -> tensor
    arrange: Callable[[str, Tensor], Tensor]       # parameter's name, tensor -> parameter
    ignored: str = "(?!)"                          # pattern of tensors that are known and not needed;
                                                   # this one fits nothing
    tokenizer: Callable[[], dict] | None = None    # reads its tokenizer, where it has one


def rename(name: str, table: dict[str, str]) -> str:
    """The name of a parameter in another format, by one column of NAMES.

    blocks.3.att.q_proj.weight -> model.layers.3.self_attn.q_proj.weight
    """
    block, module, end = re.fullmatch(r"(blocks\.\d+\.)?(.+)\.(\w+)", name).groups()
    return (block or "").replace("blocks", table["blocks"]) + f"{table[module]}.{end}"


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Their names there, by those without what compilers and trainers put around them.

    _orig_mod.model.norm.weight -> model.norm.weight. Raises ValueError for a LoRA
    adapter, which is no model, and where two would bear one name.
    """
    plain = {}
    for name in names:
        if re.search(r"\.(lora_\w+|base_layer)\.", name):
            raise ValueError(f"{brief(name)} belongs to a LoRA adapter: merge it into its model first, "
                             "with peft's merge_and_unload, and import that")
        short = name.replace("_orig_mod.", "")
        short = re.sub(r"^((module|_forward_module|base_model\.model)\.)+", "", short)
        if short in plain:
            raise ValueError(f"{brief(short)} is there twice, also as {brief(name)}: which is meant?")
        plain[short] = name
    return plain


def unchanged(name: str, t: Tensor) -> Tensor:
    """The arrangement of formats that have each parameter as we do."""
    return t


# ------------------------------------------------------------------------------------------
# Settings of a stranger's file

def take(values: dict, key: str, kind: type, default: object = ...):
    """values[key], or the default where it is missing or null.

    Raises ValueError where it is of another type, or missing without a default.
    """
    value = values.get(key)
    if value is None and default is not ...:
        return default
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind:
        shown = "missing" if value is None else repr(value)[:60]
        raise ValueError(f"{key} is {shown}, expected {kind.__name__}")
    if kind is int and value > 2**24:
        raise ValueError(f"{key} = {brief(value)}: no size is so large; the file is damaged")
    return value


def refuse(values: dict, harmless: tuple, meaning: str, *keys: str) -> None:
    """Raises ValueError, naming the meaning, for a setting that is not harmless."""
    for key in keys:
        if values.get(key) is not None and values[key] not in harmless:
            raise ValueError(f"{key} = {values[key]!r}"[:80] + f": {meaning} is not supported")


# ------------------------------------------------------------------------------------------
# Tensors

def fit_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name and shape of all our parameters.

    Raises ValueError unless each parameter has its tensor, each tensor a parameter, and
    as many numbers. No number is read.
    """
    cfg, tensors = checkpoint.cfg, checkpoint.shapes
    if cfg.n_layer > len(tensors):
        raise ValueError(f"{cfg.n_layer} layers, but {len(tensors)} tensors: damaged")
    shapes = expected_shapes(cfg)
    needed = {checkpoint.source(name) for name in shapes}
    surplus = {name for name in tensors.keys() - needed if not re.fullmatch(checkpoint.ignored, name)}
    name_some(needed - tensors.keys(), "are missing", "fetch the checkpoint again")
    name_some(surplus, "have no place in such a model", "it is of another kind, or damaged")
    numbers = Counter()
    for name, shape in shapes.items():
        numbers[checkpoint.source(name)] += math.prod(shape)
    for name, shape in shapes.items():
        source = checkpoint.source(name)
        if math.prod(tensors[source]) != numbers[source]:
            raise ValueError(f"{source} is {tensors[source]}, which is no shape for {name}, expected "
                             f"{shape}: fetch the checkpoint again")
    return shapes


def name_some(names: set[str], what: str, remedy: str) -> None:
    """Raises ValueError for these tensors, if there are any, naming the first four."""
    if names:
        some = brief(", ".join(sorted(names)[:4])) + " ..." * (len(names) > 4)
        raise ValueError(f"{len(names)} tensors {what}: {some} ({remedy})")


UNREADABLE = (OSError, SafetensorError, RuntimeError, MemoryError)


def same(read: Callable[[str], Tensor], name: str, other: str) -> bool:
    """Whether two tensors have the same numbers.

    What can't be read or compared, such as float8, has not: it is refused by its name
    when it is to be written.
    """
    try:
        return torch.equal(read(name), read(other))
    except UNREADABLE:
        return False


def parameter(checkpoint: Checkpoint, name: str) -> Tensor:
    """Our parameter `name`, read now.

    Raises ValueError for a tensor that cannot be read, taken apart or put in order.
    """
    source = checkpoint.source(name)
    try:
        t = checkpoint.read(source)
    except UNREADABLE as e:
        raise ValueError(f"{source} can't be read ({brief(e)}): fetch the checkpoint again") from None
    try:
        return checkpoint.arrange(name, t)
    except (RuntimeError, IndexError):
        raise ValueError(f"{source} is {tuple(t.shape)}, which is no shape for {name}") from None


def write_safetensors(file: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype,
                      read: Callable[[str], Tensor]) -> None:
    """A .safetensors file of which one tensor at a time is in memory.

    In it stand the header's length, the header as JSON, and all bytes in its order.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            f.write(as_dtype(name, read(name), shape, dtype).flatten().view(torch.uint8).numpy())


def as_dtype(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor in another type.

    Raises ValueError for another shape, what is no number, and what becomes none.
    """
    if t.shape != shape or t.dtype not in (torch.float64, *DTYPES):
        raise ValueError(f"{name} is {tuple(t.shape)} of {t.dtype}, expected {shape} of "
                         "floating-point numbers: fetch the checkpoint again")
    t = t.to(dtype).contiguous()
    if not t.isfinite().all():
        raise ValueError(f"{name} has infinite values or NaN as {dtype}: choose another --dtype, "
                         "or the checkpoint is damaged")
    return t
