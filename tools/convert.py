"""Real weights in, real weights out: a checkpoint of the world becomes a model folder, a pure RWKV-7 an official .pth.

    python convert.py import PATH --out out/teacher            a Hugging Face folder, a .gguf file, or an RWKV-7 .pth
    python convert.py export out/rwkv --format rwkv-pth        writes out/rwkv.pth, as the PyPI package `rwkv` reads it

What it is: for each format a function that reads the model's shape and tells where each of our parameters stands, and one
loop that reads, arranges and writes them one by one. It is exact or it refuses: every tensor of a checkpoint has its place,
and what model.py cannot compute is named. What it is not: a downloader. No code of a stranger is run, and nothing but
tensors unpickled.

    gpt2                            q, k and v stand in one matrix, and matrices (in, out); learned positions
    llama, mistral, qwen2, qwen3    qwen2 has biases on q, k and v, qwen3 norms on q and k
    .gguf of llama, qwen2, qwen3    quantised; llama's q and k rows are in the order that interleaved rope wants
    .pth of RWKV-7                  as it is: our names are the official ones
"""

import json
import math
import os
import re
import shlex
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tyro.conf import Positional

from config import cli, run
from data.tokenizer import get_tokenizer, read_gguf_tokenizer, read_tokenizer_json, save_tokenizer, write_tokenizer
from model import LM, ModelConfig, open_model, read_tensor, rope_frequencies, stored_shapes

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # torch's name: safetensors'
FILES = ("tokenizer.json", "meta.json", "model.safetensors", "config.json")  # a model folder; without the last it is none

NAMES = """
ours        llama                     gpt2          gguf
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
    """What stands in a checkpoint; its weights are not read yet."""

    cfg: ModelConfig
    names: set[str]                              # of all its tensors
    theirs: Callable[[str], str]                 # our parameter's name -> the tensor it stands in
    read: Callable[[str], Tensor]                # that tensor
    arrange: Callable[[str, Tensor], Tensor]     # our parameter's name, that tensor -> our parameter
    ignored: str = "(?!)"                        # pattern of tensors that are known and not needed; this one fits nothing
    tokenizer: Callable[[], dict] | None = None  # reads its tokenizer, where it has one


def take(values: dict, key: str, kind: type, default: object = ...):
    """values[key], or the default where it is missing or null. Raises ValueError where it must be there, or is of another type."""
    value = values.get(key)
    if value is None and default is not ...:
        return default
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{key} is {'missing' if value is None else repr(value)[:60]}, expected {kind.__name__}")
    if kind is int and value > 2**24:
        raise ValueError(f"{key} = {value}: no size is so large; the file is damaged")
    return value


def refuse(values: dict, harmless: tuple, meaning: str, *keys: str) -> None:
    """Raises ValueError, naming what it means, where one of these settings is there and is none of the harmless values."""
    for key in keys:
        if values.get(key) is not None and values[key] not in harmless:
            raise ValueError(f"{key} = {values[key]!r}"[:80] + f": {meaning} is not supported")


def rename(ours: str, table: dict[str, str]) -> str:
    """blocks.3.att.q_proj.weight -> model.layers.3.self_attn.q_proj.weight, by one column of the table above."""
    block, module, end = re.fullmatch(r"(blocks\.\d+\.)?(.+)\.(\w+)", ours).groups()
    return (block or "").replace("blocks", table["blocks"]) + f"{table[module]}.{end}"


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face folders

def from_hugging_face(folder: Path) -> Checkpoint:
    """config.json, one or several .safetensors, and tokenizer.json where it is there."""
    config = read_json(folder / "config.json")
    refuse(config, (0, 1), "a mixture of experts", "num_local_experts", "num_experts", "n_routed_experts")
    kind = take(config, "model_type", str)
    if kind not in ("gpt2", "llama", "mistral", "qwen2", "qwen3"):
        raise ValueError(f"model_type {kind!r} is not supported: gpt2, llama, mistral, qwen2 and qwen3 are")
    refuse(config, (), "a quantised checkpoint", "quantization_config")
    refuse(config, (), "soft-capping of logits", "attn_logit_softcapping", "final_logit_softcapping")

    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single.name] if single.exists() else sorted(set(map(str, take(read_json(index), "weight_map", dict).values()))) if index.exists() else []
    if not files:
        raise ValueError("there is no model.safetensors and no model.safetensors.index.json; a .bin may hold code: save it as safetensors first")
    where = {}
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{name!r}, named by {index.name}, is no file of this folder")
        try:
            with safe_open(folder / name, "pt") as tensors:
                where |= {key.removeprefix("transformer."): (folder / name, key) for key in tensors.keys()}
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{name} is damaged ({e})") from None

    cfg = (gpt2_config if kind == "gpt2" else llama_config)(config, kind)
    emb, head = where.get("wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"), where.get("lm_head.weight")
    if cfg.tied and emb and head and not torch.equal(read_tensor(*emb), read_tensor(*head)):
        cfg = replace(cfg, tied=False)  # the file has a head of its own, whatever its config says
    ignored = r"h\.\d+\.attn\.(masked_)?bias" if kind == "gpt2" else r".*\.rotary_emb\.inv_freq"  # masks and frequencies
    table = TABLE["gpt2" if kind == "gpt2" else "llama"]
    return Checkpoint(cfg, set(where), lambda ours: rename(ours, table), lambda name: read_tensor(*where[name]), split_conv1d if kind == "gpt2" else keep,
                      ignored + (r"|lm_head\.weight" if cfg.tied else ""),
                      (lambda: read_tokenizer_json(folder)) if (folder / "tokenizer.json").exists() else None)


def gpt2_config(config: dict, kind: str) -> ModelConfig:
    refuse(config, (True,), "attention without its scale", "scale_attn_weights")
    refuse(config, (False,), "attention scaled by layer, or to another text,", "scale_attn_by_inverse_layer_idx", "add_cross_attention")
    activations = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}
    refuse(config, tuple(activations), "this activation", "activation_function")
    return ModelConfig(
        vocab_size=take(config, "vocab_size", int), block_size=take(config, "n_positions", int, 1024), n_layer=take(config, "n_layer", int),
        n_embd=take(config, "n_embd", int), n_head=take(config, "n_head", int), positions="learned", qkv_bias=True, bias=True, ln0=False,
        ffn=activations[take(config, "activation_function", str, "gelu_new")], ffn_size=take(config, "n_inner", int, None),
        norm_eps=take(config, "layer_norm_epsilon", float, 1e-5), tied=take(config, "tie_word_embeddings", bool, True))


def llama_config(config: dict, kind: str) -> ModelConfig:
    """Llama and what is built as it is. Settings that a file leaves away have the default of their kind."""
    refuse(config, ("silu",), "this activation", "hidden_act")
    refuse(config, (1,), "partial rotation", "partial_rotary_factor")
    defaults = {"llama": {}, "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072}, "qwen2": {"num_key_value_heads": 32},
                "qwen3": {"num_key_value_heads": 32, "head_dim": 128}}[kind]
    block_size = take(config, "max_position_embeddings", int, defaults.get("max_position_embeddings", 2048))
    # a window as long as the context changes nothing
    layers = set(map(str, take(config, "layer_types", list, ()))) - {"full_attention"}
    window = None if config.get("sliding_window", 4096) is None else take(config, "sliding_window", int, 4096)
    if layers or kind == "mistral" or config.get("layer_types") is None and config.get("use_sliding_window"):
        if layers - {"sliding_attention"} or window is not None and window < block_size:
            raise ValueError(f"attention of {', '.join(sorted(layers)) or f'a sliding window of {window}'}, in a context of {block_size}, is not supported")
    bias = take(config, "attention_bias", bool, False) if kind in ("llama", "qwen3") else False
    return ModelConfig(
        vocab_size=take(config, "vocab_size", int), block_size=block_size, n_layer=take(config, "num_hidden_layers", int),
        n_embd=take(config, "hidden_size", int), n_head=take(config, "num_attention_heads", int),
        n_kv_head=take(defaults | config, "num_key_value_heads", int, None), head_size=take(defaults | config, "head_dim", int, None), **rope_config(config),
        qk_norm=kind == "qwen3", qkv_bias=bias or kind == "qwen2", o_bias=bias, bias=kind == "llama" and take(config, "mlp_bias", bool, False),
        ffn="swiglu", ffn_size=take(config, "intermediate_size", int), norm="rmsnorm", norm_eps=take(config, "rms_norm_eps", float, 1e-6),
        ln0=False, tied=take(config, "tie_word_embeddings", bool, False))


def rope_config(config: dict) -> dict:
    """The rotary settings: since transformers 5 all in rope_parameters, before in rope_theta and rope_scaling."""
    values = take(config, "rope_parameters", dict, take(config, "rope_scaling", dict, {}))
    if values != take(config, "rope_scaling", dict, values):
        raise ValueError("rope_parameters and rope_scaling are both there and differ: leave one of them in config.json")
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ("default", "linear", "llama3") or any(isinstance(v, dict) for v in values.values()):
        raise ValueError(f"rope scaling {kind!r} is not supported: default, linear and llama3 are, the same for all layers")
    refuse(values, (1,), "partial rotation", "partial_rotary_factor")
    rope = {"rope_theta": take(values, "rope_theta", float, take(config, "rope_theta", float, 10000.0)), "rope_scaling": kind}
    if kind != "default":
        rope["rope_factor"] = take(values, "factor", float)
    if kind == "llama3":
        rope |= {"rope_low": take(values, "low_freq_factor", float), "rope_high": take(values, "high_freq_factor", float),
                 "rope_original": take(values, "original_max_position_embeddings", int)}
    return rope


def keep(ours: str, t: Tensor) -> Tensor:
    return t


def split_conv1d(ours: str, t: Tensor) -> Tensor:
    """GPT-2's Conv1D is a linear map with its matrix (in, out); q, k and v are three thirds of one."""
    if ours.startswith("blocks.") and t.ndim == 2:
        t = t.T
    part = re.search(r"att\.([qkv])_proj", ours)
    return t.chunk(3)["qkv".index(part[1])] if part else t


def read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"there is no {file.name}: give a Hugging Face folder, a .gguf or a .pth file") from None
    except (ValueError, RecursionError) as e:  # bad JSON and bad UTF-8 alike
        raise ValueError(f"{file.name} is damaged ({e})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file.name} is damaged: not a JSON object")
    return values


# ---------------------------------------------------------------------------------------------------------------------
# GGUF

def from_gguf(file: Path) -> Checkpoint:
    """A llama, qwen2 or qwen3 of llama.cpp. Quantised weights become what they stand for."""
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF files are read by the package gguf: pip install gguf") from None

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, *args, **kwargs):  # past the end there are empty arrays, of which it may read 2^64
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("the file ends too early")
            return super()._get(offset, dtype, count, *args, **kwargs)

    try:
        reader = Reader(file)
        values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
        if reader.byte_order != "I":
            raise ValueError("written for machines of the other byte order")
    except Exception as e:  # gguf and numpy raise many kinds here; each means the same to the user
        raise ValueError(f"damaged, or not a GGUF file ({type(e).__name__}: {e})") from None
    tensors = {t.name: t for t in reader.tensors}
    arch = take(values, "general.architecture", str)
    if arch not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"architecture {arch!r} is not supported: llama, qwen2 and qwen3 are")
    values = {key.removeprefix(arch + "."): value for key, value in values.items()}
    refuse(values, (0, 1), "a mixture of experts", "expert_count")
    refuse(values, (0,), "a sliding window", "attention.sliding_window")
    refuse(values, (0.0,), "soft-capping of logits", "attn_logit_softcapping", "final_logit_softcapping")

    n_embd, n_head, embedding = take(values, "embedding_length", int), take(values, "attention.head_count", int), tensors.get("token_embd.weight")
    N = take(values, "attention.key_length", int, n_embd // max(1, n_head))
    refuse(values, (N,), f"with heads of {N} another size of values, or rotation of a part,", "attention.value_length", "rope.dimension_count")
    has = lambda name: name in tensors  # noqa: E731
    cfg = ModelConfig(
        vocab_size=len(embedding.data) if embedding else 1, block_size=take(values, "context_length", int), n_layer=take(values, "block_count", int),
        n_embd=n_embd, n_head=n_head, n_kv_head=take(values, "attention.head_count_kv", int, n_head), head_size=N, **gguf_rope(values, tensors, N),
        qk_norm=has("blk.0.attn_q_norm.weight"), qkv_bias=has("blk.0.attn_q.bias"), o_bias=has("blk.0.attn_output.bias"), bias=has("blk.0.ffn_up.bias"),
        ffn="swiglu", ffn_size=take(values, "feed_forward_length", int), norm="rmsnorm", ln0=False, tied=not has("output.weight"),
        norm_eps=take(values, "attention.layer_norm_rms_epsilon", float))

    def read(name: str) -> Tensor:
        t = tensors[name]  # t.data is mapped into memory and would stay there
        data = np.fromfile(file, t.data.dtype, t.data.size, offset=t.data_offset).reshape(t.data.shape)
        try:
            return torch.from_numpy(gguf.dequantize(data, t.tensor_type))
        except NotImplementedError:
            raise ValueError(f"{name} is of type {t.tensor_type.name}, which the package gguf does not decode") from None

    def uninterleave(ours: str, t: Tensor) -> Tensor:
        """llama.cpp turns neighbouring channels (2i, 2i + 1), we turn (i, i + N/2): put the rows of q and k back into halves."""
        return t.unflatten(0, (-1, N // 2, 2)).transpose(1, 2).flatten(0, 2) if re.search(r"att\.[qk]_proj", ours) else t

    return Checkpoint(cfg, set(tensors), lambda ours: rename(ours, TABLE["gguf"]), read, uninterleave if arch == "llama" else keep, "rope_freqs.weight",
                      (lambda: read_gguf_tokenizer(reader.fields)) if "tokenizer.ggml.model" in reader.fields else None)


def gguf_rope(values: dict, tensors: dict, N: int) -> dict:
    """Rotary settings. llama3's scaling stands in a file as one factor for each frequency; these are its published settings or refused."""
    kind = take(values, "rope.scaling.type", str, "none")
    if kind not in ("none", "linear"):
        raise ValueError(f"rope scaling {kind!r} is not supported: none, linear and llama3 are")
    rope = {"rope_theta": take(values, "rope.freq_base", float, 10000.0)}
    if kind == "linear":
        rope |= {"rope_scaling": "linear", "rope_factor": take(values, "rope.scaling.factor", float)}
    if "rope_freqs.weight" in tensors:
        factors = torch.tensor(tensors["rope_freqs.weight"].data).flatten().float()
        if kind != "none" or len(factors) != max(1, N // 2):
            raise ValueError(f"rope_freqs.weight has {len(factors)} factors for heads of {N}, beside the rope scaling {kind!r}: not supported")
        rope |= {"rope_scaling": "llama3", "rope_factor": factors.max().item(), "rope_low": 1.0, "rope_high": 4.0, "rope_original": 8192}
        scaled, plain = (rope_frequencies(ModelConfig(**rope | {"rope_scaling": how}), N, "cpu") for how in ("llama3", "default"))
        if not torch.allclose(plain / scaled, factors, rtol=1e-4):
            raise ValueError("rope_freqs.weight is not llama3's (low 1, high 4, original length 8192): other factors are not supported")
    return rope


# ---------------------------------------------------------------------------------------------------------------------
# Official RWKV-7

def from_pth(file: Path) -> Checkpoint:
    """A flat dict of tensors. Widths, heads and ranks are those of its tensors; layer 0 has no use for a value residual."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # torch, pickle and zipfile raise many kinds here
        raise ValueError(f"damaged, or it holds more than tensors ({type(e).__name__}): only a dict of tensors in torch's zip format is read") from None
    if not isinstance(tensors, dict) or not all(isinstance(k, str) and plain(t) for k, t in tensors.items()):
        raise ValueError("it is not a flat dict of tensors that hold their own numbers: save model.state_dict() alone")
    shape = lambda name, n: tensors[name].shape if name in tensors and tensors[name].ndim == n else no(name)  # noqa: E731

    def no(name: str):
        raise ValueError(f"{name} is missing or has another rank of tensor: it is not an RWKV-7")

    (V, C), (H, N) = shape("emb.weight", 2), shape("blocks.0.att.r_k", 2)
    n_layer = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    rank = {f"rank_{k}": shape(f"blocks.{i}.att.{k}1", 2)[1] for k, i in zip("wagv", (0, 0, 0, 1)) if i < n_layer}
    cfg = ModelConfig(vocab_size=V, block_size=4096, n_layer=n_layer, n_embd=C, mixer="r", positions="none", rwkv_head_size=N, rwkv_size=H * N, **rank,
                      ffn="channelmix", ffn_size=shape("blocks.0.ffn.key.weight", 2)[0])
    return Checkpoint(cfg, set(tensors), lambda ours: ours, tensors.get, keep, r"blocks\.0\.att\.v[012]")


def plain(t: object) -> bool:
    """Whether this is a tensor whose numbers all stand in memory: not on another device, not a view that repeats or negates others."""
    return type(t) is Tensor and t.layout == torch.strided and t.device.type == "cpu" and not (t.is_neg() or t.is_conj()) \
        and t.untyped_storage().nbytes() >= t.numel() * t.itemsize


PER_BLOCK = [  # the official order
    *(f"{ln}.{p}" for ln in ("ln1", "ln2", "ln0") for p in ("weight", "bias")),
    *("att." + name for name in "x_r x_w x_k x_v x_a x_g w1 w2 w0 a1 a2 a0 v1 v2 v0 g1 g2 k_k k_a r_k".split()),
    *(f"att.{name}.weight" for name in ("receptance", "key", "value", "output")), "att.ln_x.weight", "att.ln_x.bias",
    "ffn.x_k", "ffn.key.weight", "ffn.value.weight"]
NOT_IN_LAYER_0, ONLY_IN_LAYER_0 = ("att.v0", "att.v1", "att.v2"), ("ln0.weight", "ln0.bias")


def official_names(n_layer: int) -> list[str]:
    """All parameters of an RWKV-7, in the order in which the official trainer has them."""
    blocks = [f"blocks.{i}.{name}" for i in range(n_layer) for name in PER_BLOCK if name not in (ONLY_IN_LAYER_0 if i else NOT_IN_LAYER_0)]
    return ["emb.weight", *blocks, "ln_out.weight", "ln_out.bias", "head.weight"]


def not_official(cfg: ModelConfig) -> list[str]:
    """What of this model the official RWKV-7 has no place for."""
    official = {"ffn": "channelmix", "norm": "layernorm", "norm_eps": 1e-5, "norm_bias": True, "ln0": True, "gate": True, "group_norm": True,
                "token_shift": True, "bonus": True, "rwkv_rope": False, "qk_norm": False, "qkv_bias": False, "output_bias": False, "bias": False}
    found = [f"{key} = {getattr(cfg, key)} instead of {value}" for key, value in official.items() if getattr(cfg, key) != value]
    found += [f"attention in layer {i}" for i, mixer in enumerate(cfg.mixers) if mixer == "a"][:1]
    found += ["learned positions"] if cfg.positions == "learned" else []
    found += [f"heads of {cfg.rwkv_size} together in a width of {cfg.n_embd}"] if cfg.rwkv_size not in (None, cfg.n_embd) else []
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The two commands

@dataclass(frozen=True)
class ImportConfig:
    path: Positional[str] = ""        # a Hugging Face folder, a .gguf file or an RWKV-7 .pth
    out: str = "out/teacher"          # the model folder to write
    dtype: str = "float32"            # of the weights on disk: float32, bfloat16, float16. In memory models are float32
    tokenizer: str | None = None      # None = the checkpoint's own; else bytes, gpt2, ... or a model folder
    overwrite: bool = False


@dataclass(frozen=True)
class ExportConfig:
    folder: Positional[str] = ""      # a model folder, of RWKV-7 alone
    format: str = "rwkv-pth"          # the only one
    out: str | None = None            # None = the folder's name with .pth
    dtype: str | None = None          # None = as in the folder
    overwrite: bool = False


def import_model(cfg: ImportConfig) -> ModelConfig:
    """Write the checkpoint `cfg.path` as a model folder, weight by weight. Raises ValueError, in one line, for what is not supported or damaged."""
    path, out, dtype = Path(cfg.path), Path(cfg.out).absolute(), dtype_called(cfg.dtype)
    if not cfg.path or not path.exists():
        raise ValueError(f"there is no {cfg.path!r}: give a Hugging Face folder, a .gguf or a .pth file")
    there = {p.name for p in out.iterdir()} if out.is_dir() else set()
    if out.is_file() or there - set(FILES) or path.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"{out} is not (only) a model folder, or it is what is to be read: choose another --out")
    if there and not cfg.overwrite:
        raise ValueError(f"{out} holds a model already: replace it with --overwrite, or choose another --out")

    staging = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        checkpoint = (from_hugging_face if path.is_dir() else from_gguf if path.suffix.lower() == ".gguf" else from_pth)(path)
        shapes = fit_shapes(checkpoint)
        tokenizer = get_tokenizer(cfg.tokenizer) if cfg.tokenizer else own_tokenizer(checkpoint)
        if cfg.tokenizer and tokenizer.n_vocab > checkpoint.cfg.vocab_size:
            print(f"tokenizer {cfg.tokenizer} has {tokenizer.n_vocab} tokens, the model {checkpoint.cfg.vocab_size}: texts with the others will be refused")
        for left in out.absolute().parent.glob(f".{out.name}.*.partial"):  # of an import that was killed
            if Path("/proc/self").exists() and not Path(f"/proc/{left.suffixes[-2][1:]}").exists():
                shutil.rmtree(left, ignore_errors=True)
        staging.mkdir(parents=True)
        write_safetensors(staging / "model.safetensors", shapes, dtype, lambda name: parameter(checkpoint, name))
        (staging / "config.json").write_text(json.dumps(asdict(checkpoint.cfg), indent=1) + "\n")
        (staging / "meta.json").write_text(json.dumps({"source": cfg.path}) + "\n")
        if cfg.tokenizer:
            save_tokenizer(tokenizer, staging)
        elif tokenizer:
            write_tokenizer(tokenizer, staging)
            if not tokenizer.get("chat"):
                print("it has no chat template that only frames the messages: sample.py --chat will not work with it")
        else:
            print(f"{path} has no tokenizer: import it again with --tokenizer before data are prepared for it")
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").unlink(missing_ok=True)  # first out and last in: nobody takes half a model for a whole one
        for name in FILES:
            os.replace(staging / name, out / name) if (staging / name).exists() else (out / name).unlink(missing_ok=True)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return checkpoint.cfg


def own_tokenizer(checkpoint: Checkpoint) -> dict | None:
    try:
        return checkpoint.tokenizer() if checkpoint.tokenizer else None
    except ValueError as e:
        raise ValueError(f"{e}. Give another tokenizer with --tokenizer, or bytes") from None


def fit_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name and shape of all our parameters. Raises ValueError unless each has its tensor, and each tensor a parameter."""
    if checkpoint.cfg.n_layer > len(checkpoint.names):
        raise ValueError(f"{checkpoint.cfg.n_layer} layers, but {len(checkpoint.names)} tensors: damaged")
    with torch.device("meta"):
        shapes = stored_shapes(LM(checkpoint.cfg))
    wanted = {checkpoint.theirs(name) for name in shapes}
    for what, names in (("are missing", wanted - checkpoint.names),
                        ("have no place in such a model", {name for name in checkpoint.names - wanted if not re.fullmatch(checkpoint.ignored, name)})):
        if names:
            raise ValueError(f"{len(names)} tensors {what}: {', '.join(sorted(names)[:4])}{' ...' * (len(names) > 4)}")
    return shapes


def parameter(checkpoint: Checkpoint, name: str) -> Tensor:
    """Our parameter `name`, read now. Raises ValueError for a tensor that cannot be taken apart or put in order as it should be."""
    t = checkpoint.read(checkpoint.theirs(name))
    try:
        return checkpoint.arrange(name, t)
    except (RuntimeError, IndexError):
        raise ValueError(f"{checkpoint.theirs(name)} is {tuple(t.shape)}, which is no shape for {name}") from None


def write_safetensors(file: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, read: Callable[[str], Tensor]) -> None:
    """A .safetensors file of which one tensor at a time is in memory: the header's length, the header as JSON, all bytes in its order."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[str(dtype).removeprefix("torch.")], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            f.write(as_dtype(name, read(name), shape, dtype).flatten().view(torch.uint8).numpy())


def as_dtype(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor in another type. Raises ValueError for another shape, for what is no number, and for what becomes none."""
    if t.shape != shape or t.dtype not in (torch.float64, *map(dtype_called, DTYPES)):
        raise ValueError(f"{name} is {tuple(t.shape)} of {t.dtype}, expected {shape} of floating-point numbers")
    t = t.to(dtype).contiguous()
    if not t.isfinite().all():
        raise ValueError(f"{name} has infinite values as {dtype}: choose another --dtype, or the checkpoint is damaged")
    return t


def export_model(cfg: ExportConfig) -> Path:
    """Write a model folder as an official RWKV-7 .pth. Raises ValueError naming what that format cannot express."""
    folder = Path(cfg.folder)
    out = Path(cfg.out or f"{folder}.pth")
    if not cfg.folder or cfg.format != "rwkv-pth":
        raise ValueError(f"format = {cfg.format!r}: rwkv-pth is the only one" if cfg.folder else "name the model folder to export")
    if out.suffix != ".pth" or out.is_dir() or out.exists() and not cfg.overwrite:
        raise ValueError(f"{out} exists already: replace it with --overwrite, or choose another --out" if out.is_file() else
                         f"{out} must be a file whose name ends in .pth")
    model, file = open_model(folder)
    found = not_official(model.cfg)
    if found:
        raise ValueError(f"{folder} cannot be written as an official RWKV-7: it has {'; '.join(found)}")
    names, shapes = official_names(model.cfg.n_layer), {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert set(names) == set(shapes), "a model that passes not_official has the official parameters"
    tensors = {}
    for name in names:  # a tied head is written as a copy of the embedding
        t = read_tensor(file, "emb.weight" if model.cfg.tied and name == "head.weight" else name)
        tensors[name] = as_dtype(name, t, shapes[name], dtype_called(cfg.dtype) if cfg.dtype else t.dtype).clone()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{out}.tmp")
    try:
        torch.save(tensors, partial)
        os.replace(partial, out)
    except (RuntimeError, OSError) as e:  # torch's writer says "enforce fail" of a full disk
        raise ValueError(f"{out} could not be written ({str(e)[:80]}): is the disk full?") from None
    finally:
        partial.unlink(missing_ok=True)
    return out


def dtype_called(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype = {name!r}: choose one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = argv.pop(0) if argv else None
    if verb == "import":
        cfg = cli(ImportConfig, argv)
        model = import_model(cfg)
        print(json.dumps(asdict(model)))
        folder = shlex.quote(cfg.out)
        print(f"{cfg.out}: {cfg.dtype}. Now: python -m data.prepare SOURCE --tokenizer {folder} --out data/NAME, and "
              f"python distill.py --teacher {folder} --data data/NAME")
    elif verb == "export":
        out = export_model(cli(ExportConfig, argv))
        print(f"{out}: for the package rwkv, RWKV(model=\"{out.with_suffix('')}\", strategy=\"cpu fp32\")")
    elif verb in ("-h", "--help"):
        print(__doc__)
        sys.exit(0)
    else:
        raise ValueError("say what to do: convert.py import PATH --out FOLDER, or convert.py export FOLDER; each has its --help")


if __name__ == "__main__":
    run(main)
