"""A pure RWKV-7 as a GGUF, for llama.cpp and what stands on it: Ollama, LM Studio, ...

    python -m tools.convert export out/demo --format gguf --dtype q8_0

The table of names is in gguf_rwkv.py, the tokenizer's part in gguf_tokenizer.py. Heads
of less than 64 channels become 64, exactly (widen.py). Vectors, token shifts and
low-rank maps are float32 in every file; matrices have --dtype. For Ollama there is a
Modelfile beside it.
"""

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor

from data.folder import read_meta
from data.tokenizer import load_tokenizer, stops
from lib.folders import expected_shapes, open_model, read_tensor, stored_shapes, write_text, write_whole
from model import ModelConfig
from tools.checkpoint import as_dtype
from tools.from_gguf import open_gguf
from tools.gguf_rwkv import FORMS, SHIFTS, architecture, full_form, place, settings_of
from tools.gguf_tokenizer import tokenizer_settings
from tools.pure_rwkv import not_in
from tools.widen import HEAD_SIZE, factor, widened, widened_parameter

FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
Q8_BLOCK = 32  # numbers of a row that have one scale


def reasons(cfg: ModelConfig) -> list[str]:
    """What of this model neither architecture has a place for."""
    return not_in(cfg, FORMS[architecture(cfg)])


def require_own(file: Path) -> None:
    """Raises ValueError for a file that --overwrite may not replace."""
    try:
        is_ours = open_gguf(file)[1].get("general.architecture") in FORMS
    except (ValueError, OSError):
        is_ours = False
    if not is_ours:
        raise ValueError(f"{file} is no RWKV-7 of this format, so it is not replaced: choose another --out")
    require_own_modelfile(file)


# ------------------------------------------------------------------------------------------
# The model that is written

@dataclass(frozen=True)
class Source:
    """A model of ours as the format has it: every parameter by its name, read now."""

    cfg: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def open_source(folder: Path) -> tuple[Source, str]:
    """The model in a folder, in its full form, and the type that its matrices have."""
    model, file = open_model(folder)
    full, stored = full_form(model.cfg), stored_shapes(model)
    shapes = expected_shapes(full)

    def read(name: str) -> Tensor:
        if name not in stored and not (name == "head.weight" and model.cfg.tied):
            return torch.zeros(shapes[name])
        # a copy, so that nothing of the file stays in memory
        return read_tensor(file, name if name in stored else "emb.weight").clone()

    kind = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
    return Source(full, shapes, read), kind.get(read("emb.weight").dtype, "float32")


def wider(source: Source) -> Source:
    cfg = widened(source.cfg)
    return Source(cfg, expected_shapes(cfg),
                  lambda name: widened_parameter(name, source.read(name), source.cfg))


def fit_heads(source: Source, widen: bool) -> Source:
    """The model with heads that llama.cpp computes everywhere; says what that costs."""
    N = source.cfg.rwkv_head_size
    if widen and factor(source.cfg) > 1:
        wide = wider(source)
        before, after = (sum(map(math.prod, model.shapes.values())) for model in (source, wide))
        print(f"heads of {N} become {HEAD_SIZE} with the same logits, for llama.cpp computes others wrongly "
              f"on some CPUs: {before:,} parameters become {after:,} (--no-widen leaves them)")
        return wide
    if N == 2 * HEAD_SIZE:
        print(f"heads of {N}: llama.cpp has them on CPUs and CUDA, not on Metal and Vulkan")
    elif N != HEAD_SIZE:
        print(f"heads of {N}: llama.cpp computes only {HEAD_SIZE} right everywhere; others give wrong text "
              "without a word on some CPUs, and end in an error on GPUs")
    return source


def tensors_of(source: Source) -> list[tuple[str, str, list[str], tuple[int, ...]]]:
    """Of each tensor in the file, in order: name, form, our parameters in it, shape."""
    cfg, arch = source.cfg, architecture(source.cfg)
    rest = [name for name in source.shapes if name[-3:] not in SHIFTS or ".ffn." in name]
    shifts = [f"blocks.{i}.att.{x}" for i in range(cfg.n_layer) for x in SHIFTS[: 5 + cfg.gate]]
    placed = [(*place(name, arch), name) for name in rest + shifts]
    tensors = []
    for (tensor, form), group in groupby(placed, key=lambda entry: entry[:2]):
        parts = [name for *_, name in group]
        tensors.append((tensor, form, parts, shape_there(form, [source.shapes[part] for part in parts])))
    # llama.cpp asks for a value residual in layer 0, too, with the rank of a, and does
    # not use it
    C, R = cfg.n_embd, cfg.rank("a")
    unused = {"v0": (C,), "v1": (R, C), "v2": (C, R)}
    return tensors + [(f"blk.0.time_mix_{name}.weight", "zeros", [], shape) for name, shape in unused.items()]


def assembled(form: str, parts: list[Tensor]) -> Tensor:
    """The tensor in the file, of the parameters that stand in it."""
    if form == "mix":
        return torch.stack([part.flatten() for part in parts]).view(len(parts), 1, 1, -1)
    if form == "vector":
        return parts[0].flatten()
    return parts[0].T if form == "turned" else parts[0]


# ------------------------------------------------------------------------------------------
# The file

def write(folder: Path, out: Path, dtype: str | None, widen: bool = True) -> None:
    """Write a model folder as the file `out`, with a Modelfile beside it.

    Raises ValueError for what no file can say, of the tokenizer too.
    """
    require_own_modelfile(out)
    source, stored = open_source(folder)
    values = tokenizer_of(folder, source.cfg)
    source = fit_heads(source, widen)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, lambda part: write_file(part, source, KINDS[dtype or stored], values))
    write_modelfile(folder, out)


def write_file(file: Path, source: Source, matrix: str, more: dict[str, object]) -> None:
    """A file of matrices of this type, tensor by tensor, with `more` settings."""
    try:
        from gguf import GGMLQuantizationType as Type, GGUFWriter
    except ImportError:
        raise ValueError("GGUF files are written by the package gguf: pip install gguf") from None
    entries = tensors_of(source)
    kinds = [type_of(form, shape, matrix) for _, form, _, shape in entries]

    writer = GGUFWriter(file, architecture(source.cfg))
    for key, value in (shape_settings(source.cfg, matrix) | more).items():
        add_setting(writer, key, value)
    for (name, _, _, shape), kind in zip(entries, kinds):
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes(shape, kind), Type[kind])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (name, form, parts, shape), kind in zip(entries, kinds):
            t = assembled(form, [source.read(part) for part in parts]) if parts else torch.zeros(shape)
            writer.write_tensor_data(encoded(name, t, shape, kind))
    finally:
        writer.close()


def shape_there(form: str, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Of the tensor that parameters of these shapes make."""
    if form == "mix":
        return len(shapes), *shapes[0]
    if form == "vector":
        return (math.prod(shapes[0]),)
    return shapes[0][::-1] if form == "turned" else shapes[0]


def type_of(form: str, shape: tuple[int, ...], matrix: str) -> str:
    """A row that is no multiple of 32 cannot be quantised, and stays F16."""
    if form != "matrix":
        return "F32"
    return "F16" if matrix == "Q8_0" and shape[-1] % Q8_BLOCK else matrix


def n_bytes(shape: tuple[int, ...], kind: str) -> int:
    n = math.prod(shape)
    return n // Q8_BLOCK * (Q8_BLOCK + 2) if kind == "Q8_0" else n * (4 if kind == "F32" else 2)


def encoded(name: str, t: Tensor, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """A tensor's numbers as they stand in a file of this type."""
    if kind == "Q8_0":
        import gguf

        numbers = as_dtype(name, t, shape, torch.float32).numpy()
        return gguf.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)
    if kind == "BF16":                                  # which numpy does not know
        return as_dtype(name, t, shape, torch.bfloat16).view(torch.int16).numpy()
    return as_dtype(name, t, shape, torch.float16 if kind == "F16" else torch.float32).numpy()


def shape_settings(cfg: ModelConfig, matrix: str) -> dict[str, object]:
    """Nothing in the settings depends on the folder's name."""
    values = {"general.file_type": FILE_TYPES[matrix], "general.quantization_version": 2}
    return values | {f"{architecture(cfg)}.{key}": value for key, value in settings_of(cfg).items()}


def tokenizer_of(folder: Path, cfg: ModelConfig) -> dict[str, object]:
    """The settings of a folder's tokenizer; a file can do without one."""
    if not read_meta(folder).get("tokenizer"):
        return {f"{architecture(cfg)}.vocab_size": cfg.vocab_size, "tokenizer.ggml.model": "none"}
    return tokenizer_settings(load_tokenizer(folder), cfg.vocab_size)


def add_setting(writer, key: str, value: object) -> None:
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool,
           list: writer.add_array}
    add[type(value)](key, value)


# ------------------------------------------------------------------------------------------
# Ollama

MARK = "# Written by nanoRWKVInside for Ollama, beside "


def modelfile_of(out: Path) -> Path:
    return out.with_suffix(".Modelfile")


def require_own_modelfile(out: Path) -> None:
    """Raises ValueError where another file stands in the Modelfile's place."""
    file = modelfile_of(out)
    try:
        is_ours = not file.exists() or file.read_bytes().startswith(MARK.encode())
    except OSError:
        is_ours = False
    if not is_ours:
        raise ValueError(f"{file} was not written by this program, so it is not replaced: "
                         "choose another --out")


def write_modelfile(folder: Path, out: Path) -> None:
    """What `ollama create NAME -f FILE` reads: file, template, and where to stop."""
    lines = [MARK + out.name, f"FROM ./{out.name}"]
    enc = load_tokenizer(folder) if read_meta(folder).get("tokenizer") else None
    chat = getattr(enc, "chat", None)
    if chat:
        lines.append(f'TEMPLATE """{go_template(chat)}"""')
    for end in sorted(ends_of(enc) if enc else ()):
        quote = '"""' if '"' in end else '"'           # there are no escapes
        lines.append(f"PARAMETER stop {quote}{end}{quote}")
    text = "\n".join(lines) + "\n"
    write_text(modelfile_of(out), text)


def ends_of(enc: tiktoken.Encoding) -> set[str]:
    """The texts that end what is generated; a token need not have one."""
    ends = {enc.decode([i]) for i in stops(enc)}
    chat = getattr(enc, "chat", None)
    return (ends | {chat["assistant"][1]} if chat else ends) - {""}


def go_template(chat: dict) -> str:
    """The frames of data/chat.py in the language of Go's templates."""
    def said(text: str) -> str:
        return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""

    def framed(role: str, content: str) -> str:
        before, *after = chat[role]
        before += chat.get("lead", "") * (role == "assistant")
        return said(before) + content + said("".join(after))

    system = framed("system", "{{ .System }}") if chat["system"] else ""
    user, assistant = framed("user", "{{ .Content }}"), framed("assistant", "{{ .Content }}")
    return ("{{ if .System }}" + system + "{{ else }}" + said(chat["default"]) + "{{ end }}"
            '{{ range .Messages }}{{ if eq .Role "user" }}' + user
            + '{{ else if eq .Role "assistant" }}' + assistant
            + "{{ end }}{{ end }}" + said(chat["assistant"][0]))


def how_to_run(out: Path) -> str:
    """One line: llama.cpp's command, and Ollama's."""
    if out.is_relative_to(Path.cwd()):
        out = out.relative_to(Path.cwd())
    file, name = shlex.quote(str(out)), shlex.quote(out.stem.lower())
    return (f'{out}: llama-completion -m {file} -p "The " -n 300 -no-cnv, or ollama create {name} -f '
            f"{shlex.quote(str(modelfile_of(out)))} && ollama run {name}")
