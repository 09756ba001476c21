"""GGUF files of llama.cpp: a llama, qwen2 or qwen3, or an RWKV-7 (gguf_rwkv.py).

Quantised weights become what they stand for. llama's rows of q and k are in the order
that interleaved rope wants. A model may come in parts, NAME-00001-of-00003.gguf: give
any one of them.
"""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.foreign import brief, require_file
from model import ModelConfig, rope_frequencies
from tools.checkpoint import TABLE, Checkpoint, refuse, rename, take, unchanged
from tools.gguf_rwkv import FORMS, rwkv_checkpoint
from tools.gguf_tokenizer import contents, read_tokenizer

MOST_SETTINGS, MOST_TENSORS = 2**12, 2**14
MOST_ITEMS = 2**22  # in all arrays of a file together: tokens, their types, merges


def from_gguf(file: Path) -> Checkpoint:
    """The checkpoint in a file, or in the parts of which it is one.

    Raises ValueError for what is not supported or damaged.
    """
    places, fields, values = open_parts(part_names(file))
    shapes = {name: tuple(map(int, reversed(t.shape))) for name, (_, t) in places.items()}
    arch = take(values, "general.architecture", str)
    if arch not in ("llama", "qwen2", "qwen3", *FORMS):
        raise ValueError(f"architecture {brief(repr(arch))} is not supported: llama, qwen2, qwen3, "
                         f"{', '.join(FORMS)} are")
    values = {key.removeprefix(arch + "."): value for key, value in values.items()}
    require_rows(fields, shapes)
    has_tokenizer = contents(fields, "model") not in (None, "none")
    common = {"read": lambda name: read_gguf_tensor(*places[name]),
              "tokenizer": (lambda: read_tokenizer(fields)) if has_tokenizer else None}
    if arch in FORMS:
        return rwkv_checkpoint(arch, values, shapes, **common)
    return llama_checkpoint(arch, values, {name: t for name, (_, t) in places.items()}, shapes, common)


def llama_checkpoint(arch: str, values: dict, tensors: dict, shapes: dict, common: dict) -> Checkpoint:
    """That of a transformer; `common` are a Checkpoint's fields that all files have."""
    refuse(values, (0, 1), "a mixture of experts", "expert_count")
    refuse(values, (0,), "a sliding window", "attention.sliding_window")
    refuse(values, (0.0,), "soft-capping of logits", "attn_logit_softcapping", "final_logit_softcapping")
    cfg = gguf_config(values, tensors)

    def uninterleave(name: str, t: Tensor) -> Tensor:
        """llama.cpp turns neighbouring channels (2i, 2i + 1), we turn (i, i + N/2).

        So the rows of q and k are put back into halves.
        """
        if not re.search(r"att\.[qk]_proj", name):
            return t
        return t.unflatten(0, (-1, cfg.att_head_size // 2, 2)).transpose(1, 2).flatten(0, 2)

    return Checkpoint(cfg, shapes, lambda name: rename(name, TABLE["gguf"]),
                      arrange=uninterleave if arch == "llama" else unchanged,
                      ignored="rope_freqs.weight", **common)


def require_rows(fields: dict, shapes: dict) -> None:
    """Raises ValueError where the embedding has not a row for each token."""
    tokens, (rows, *_) = contents(fields, "tokens"), shapes.get("token_embd.weight") or (None,)
    if rows is not None and isinstance(tokens, list) and len(tokens) != rows:
        raise ValueError(f"tokenizer.ggml.tokens has {len(tokens)} tokens, token_embd.weight {rows} rows: "
                         "the file is damaged, fetch it again")


# ------------------------------------------------------------------------------------------
# Parts

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
MOST_PARTS = 2**10


def part_names(file: Path) -> list[Path]:
    """All parts of the model of which `file` is one, in order; often there is but one.

    Raises ValueError for one that is missing.
    """
    match = PART.fullmatch(file.name)
    if not match or not 0 < int(match[2]) <= int(match[3]):
        return [file]
    n = int(match[3])
    require_at_most(n, MOST_PARTS, "parts")
    parts = [file.with_name(f"{match[1]}-{i:05}-of-{n:05}{match[4]}") for i in range(1, n + 1)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise ValueError(f"of its {n} parts {len(missing)} are missing beside it: "
                         f"{brief(', '.join(missing))}; fetch them too")
    return parts


def open_parts(files: list[Path]) -> tuple[dict, dict, dict]:
    """Of all files together: (file, gguf.ReaderTensor) by name, the first's fields, and
    its settings by key.

    Raises ValueError for parts that are not of one model.
    """
    places, n_tensors, first = {}, 0, None
    for i, file in enumerate(files):
        require_file(file)
        try:
            reader, values = open_gguf(file)
        except ValueError as e:
            raise ValueError(f"{file.name}: {e}" if len(files) > 1 else str(e)) from None
        first = first or (reader.fields, values)
        require_part(file, values, i, len(files))
        n_tensors += len(reader.tensors)
        places |= {t.name: (file, t) for t in reader.tensors}
    expected = take(first[1], "split.tensors.count", int, n_tensors)
    if not n_tensors == len(places) == expected:
        raise ValueError(f"its parts have {n_tensors} tensors, {len(places)} of them different, where it "
                         f"says {expected}: they are not of one model, or damaged; fetch all of them again")
    return places, *first


def require_part(file: Path, values: dict, i: int, n: int) -> None:
    """Raises ValueError for a file that is not part i of n (from 0), as it says."""
    number, count = take(values, "split.no", int, 0), take(values, "split.count", int, 1)
    if n == 1 and count > 1:
        raise ValueError(f"it is part {number + 1} of {count}: the parts are found by their names, which "
                         f"must end in -{number + 1:05}-of-{count:05}.gguf")
    if (number, max(1, count)) != (i, n):
        raise ValueError(f"{file.name} says that it is part {number + 1} of {count}: the parts are not of "
                         "one model; fetch all of them again")


# ------------------------------------------------------------------------------------------
# One file

def open_gguf(file: Path) -> tuple:
    """A gguf.GGUFReader of the file, weights left on disk, and its settings by key.

    Raises ValueError where the file is damaged, or the package is missing.
    """
    try:
        reader_class = bounded_reader()
    except ImportError:
        raise ValueError("GGUF files are read by the package gguf: pip install gguf") from None
    try:
        with np.errstate(all="raise"):
            reader = reader_class(file)
        settings = [key for key in reader.fields if not key.startswith("tokenizer.")]
        values = {key: reader.fields[key].contents() for key in settings}
        require_apart(reader.tensors, reader.data_offset)
    except Exception as e:  # gguf and numpy raise many kinds here; each means the same to the user
        raise ValueError(f"damaged, or not a GGUF file ({type(e).__name__}: {brief(e)}): "
                         "fetch it again") from None
    return reader, values


def bounded_reader() -> type:
    """A GGUFReader whose time and memory are bounded by the file's size.

    gguf's own takes a kilobyte for each element of an array, and lets it hold others.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        items = 0  # in all arrays until now

        def _get(self, offset, dtype, count=1, *args, **kwargs):
            # past the end there are empty arrays, of which it may read 2^64
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("the file ends too early")
            return super()._get(offset, dtype, count, *args, **kwargs)

        def _build_fields(self, offset, count):
            if self.byte_order != "I":
                raise ValueError("written for machines of the other byte order")
            require_at_most(int(count), MOST_SETTINGS, "settings")
            return super()._build_fields(offset, int(count))

        def _build_tensor_info(self, offset, count):
            require_at_most(int(count), MOST_TENSORS, "tensors")
            return super()._build_tensor_info(offset, int(count))

        def _get_field_parts(self, offset, kind):
            """(bytes, parts, which of them are the content, types) of a value."""
            if kind != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(offset, kind)
            head = self._get(offset, np.uint32), self._get(offset + 4, np.uint64)
            kind, n = gguf.GGUFValueType(int(head[0][0])), int(head[1][0])
            self.items += n
            require_at_most(self.items, MOST_ITEMS, "items in arrays")
            if kind == gguf.GGUFValueType.STRING:
                content, size = read_strings(np.asarray(self.data), offset + 12, n)
            else:
                content = [self._get(offset + 12, self.gguf_scalar_to_np[kind], n)]
                size = content[0].nbytes
            places = list(range(2, 2 + len(content)))
            return 12 + size, [*head, *content], places, [gguf.GGUFValueType.ARRAY, kind]

    return Reader


def read_strings(data: np.ndarray, offset: int, n: int) -> tuple[list[np.ndarray], int]:
    """n strings of a file as views of it, and the bytes that they take."""
    at, views = offset, []
    for _ in range(n):
        start = at + 8
        at = start + int.from_bytes(data[at:start].tobytes(), "little")
        if max(start, at) > len(data):
            raise ValueError("the file ends too early")
        views.append(data[start:at])
    return views, at - offset


def require_at_most(n: int, limit: int, what: str) -> None:
    if n > limit:
        raise ValueError(f"{n:,} {what}, more than {limit:,}, which no model has")


def require_apart(tensors: list, start: int) -> None:
    """Raises ValueError where tensors overlap, or lie before the data's `start`."""
    end = int(start)
    for t in sorted(tensors, key=lambda t: (t.data_offset, t.n_bytes)):
        if t.data_offset < end:
            raise ValueError(f"the numbers of {brief(t.name)} lie where others are")
        end = t.data_offset + int(t.n_bytes)


def read_gguf_tensor(file: Path, place) -> Tensor:
    """The numbers of a gguf.ReaderTensor, in float32 or as they are stored.

    `place.data` is mapped into memory and would stay: they are read from the file.
    """
    import gguf

    data = np.fromfile(file, place.data.dtype, place.data.size, offset=place.data_offset)
    try:
        return torch.from_numpy(gguf.dequantize(data.reshape(place.data.shape), place.tensor_type))
    except NotImplementedError:
        raise ValueError(f"{place.name} is of type {place.tensor_type.name}, "
                         "which the package gguf does not decode") from None


# ------------------------------------------------------------------------------------------
# Shapes

def gguf_config(values: dict, tensors: dict) -> ModelConfig:
    """What a file says of the model's shape, and what only its tensors say."""
    n_embd, n_head = take(values, "embedding_length", int), take(values, "attention.head_count", int)
    N = take(values, "attention.key_length", int, n_embd // max(1, n_head))
    refuse(values, (N,), f"with heads of {N} another size of values, or rotation of a part,",
           "attention.value_length", "rope.dimension_count")
    embedding = tensors.get("token_embd.weight")
    return ModelConfig(
        vocab_size=embedding.data.shape[0] if embedding and embedding.data.ndim else 1,
        block_size=take(values, "context_length", int),
        n_layer=take(values, "block_count", int),
        n_embd=n_embd,
        n_head=n_head,
        n_kv_head=take(values, "attention.head_count_kv", int, n_head),
        head_size=N,
        **gguf_rope(values, tensors, N),
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        bias="blk.0.ffn_up.bias" in tensors,
        ffn="swiglu",
        ffn_size=take(values, "feed_forward_length", int),
        norm="rmsnorm",
        ln0=False,
        tied="output.weight" not in tensors,
        norm_eps=take(values, "attention.layer_norm_rms_epsilon", float),
    )


def gguf_rope(values: dict, tensors: dict, N: int) -> dict:
    """The rotary settings, for heads of N.

    A factor without a type is linear, as in llama.cpp, and 0 is none. llama3's scaling
    stands in a file as one factor for each frequency; they are its published settings,
    or refused.
    """
    older = take(values, "rope.scale_linear", float, 1.0)
    factor = take(values, "rope.scaling.factor", float, older) or 1.0
    kind = take(values, "rope.scaling.type", str, "none" if factor == 1 else "linear")
    if kind not in ("none", "linear"):
        raise ValueError(f"rope scaling {kind!r} is not supported: none, linear and llama3 are")
    rope = {"rope_theta": take(values, "rope.freq_base", float, 10000.0)}
    if kind == "linear":
        rope |= {"rope_scaling": "linear", "rope_factor": factor}
    if "rope_freqs.weight" not in tensors:
        return rope
    stored = tensors["rope_freqs.weight"].data
    if kind != "none" or stored.size != max(1, N // 2):
        raise ValueError(f"rope_freqs.weight has {stored.size} factors for heads of {N}, beside the "
                         f"rope scaling {kind!r}: not supported")
    factors = torch.tensor(stored).flatten().float()
    rope |= {"rope_scaling": "llama3", "rope_factor": factors.max().item(),
             "rope_low": 1.0, "rope_high": 4.0, "rope_original": 8192}
    scaled = rope_frequencies(ModelConfig(**rope), N, "cpu")
    plain = rope_frequencies(ModelConfig(**rope | {"rope_scaling": "default"}), N, "cpu")
    if not torch.allclose(plain / scaled, factors, rtol=1e-4):
        raise ValueError("rope_freqs.weight is not llama3's (low 1, high 4, original length 8192): "
                         "other factors are not supported")
    return rope
