"""Hugging Face folders: config.json, one or several .safetensors, and a tokenizer.json.

    gpt2                          q, k and v stand in one matrix; matrices (in, out);
                                  learned positions
    llama, mistral, qwen2, qwen3  qwen2 has biases on q, k and v, qwen3 norms on q and k
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.foreign import read_tokenizer_json
from lib.folders import read_tensor
from model import ModelConfig
from tools.checkpoint import TABLE, Checkpoint, refuse, rename, take, unchanged

ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}  # gpt2's: ours
DEFAULTS = {  # of settings that a file omits, by kind
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}


def from_hugging_face(folder: Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises ValueError for what is not supported, missing or damaged.
    """
    config = read_json(folder / "config.json")
    refuse(config, (0, 1), "a mixture of experts", "num_local_experts", "num_experts", "n_routed_experts")
    kind = take(config, "model_type", str)
    if kind not in ("gpt2", *DEFAULTS):
        raise ValueError(f"model_type {kind!r} is not supported: gpt2, llama, mistral, qwen2 and qwen3 are")
    refuse(config, (), "a quantised checkpoint", "quantization_config")
    refuse(config, (), "soft-capping of logits", "attn_logit_softcapping", "final_logit_softcapping")

    places = find_tensors(folder)
    if kind == "gpt2":
        cfg, table, arrange = gpt2_config(config), TABLE["gpt2"], split_conv1d
        ignored = r"h\.\d+\.attn\.(masked_)?bias"        # causal masks
    else:
        cfg, table, arrange = llama_config(config, kind), TABLE["llama"], unchanged
        ignored = r".*\.rotary_emb\.inv_freq"            # rotary frequencies
    emb, head = places.get(f"{table['emb']}.weight"), places.get(f"{table['head']}.weight")
    if cfg.tied and emb and head and not torch.equal(read_tensor(*emb), read_tensor(*head)):
        cfg = replace(cfg, tied=False)  # the file has a head of its own, whatever its config says
    if cfg.tied:
        ignored += r"|lm_head\.weight"
    return Checkpoint(cfg, set(places), lambda name: rename(name, table),
                      lambda name: read_tensor(*places[name]), arrange, ignored, tokenizer_beside(folder))


def find_tensors(folder: Path) -> dict[str, tuple[Path, str]]:
    """(file, name there) of each tensor, by its name without GPT-2's prefix."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = []
    if single.exists():
        files = [single.name]
    elif index.exists():
        files = sorted(set(map(str, take(read_json(index), "weight_map", dict).values())))
    if not files:
        raise ValueError("there is no model.safetensors and no model.safetensors.index.json; "
                         "a .bin may hold code: save it as safetensors first")
    places = {}
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{name!r}, named by {index.name}, is no file of this folder")
        try:
            with safe_open(folder / name, "pt") as tensors:
                places |= {key.removeprefix("transformer."): (folder / name, key) for key in tensors.keys()}
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{name} is damaged ({e})") from None
    return places


def tokenizer_beside(folder: Path) -> Callable[[], dict] | None:
    """Reads the folder's tokenizer; None where it has none."""
    return (lambda: read_tokenizer_json(folder)) if (folder / "tokenizer.json").exists() else None


# ------------------------------------------------------------------------------------------
# Shapes

def gpt2_config(config: dict) -> ModelConfig:
    refuse(config, (True,), "attention without its scale", "scale_attn_weights")
    refuse(config, (False,), "attention scaled by layer, or to another text,",
           "scale_attn_by_inverse_layer_idx", "add_cross_attention")
    refuse(config, tuple(ACTIVATIONS), "this activation", "activation_function")
    return ModelConfig(
        vocab_size=take(config, "vocab_size", int),
        block_size=take(config, "n_positions", int, 1024),
        n_layer=take(config, "n_layer", int),
        n_embd=take(config, "n_embd", int),
        n_head=take(config, "n_head", int),
        positions="learned",
        qkv_bias=True,
        bias=True,
        ln0=False,
        ffn=ACTIVATIONS[take(config, "activation_function", str, "gelu_new")],
        ffn_size=take(config, "n_inner", int, None),
        norm_eps=take(config, "layer_norm_epsilon", float, 1e-5),
        tied=take(config, "tie_word_embeddings", bool, True),
    )


def llama_config(config: dict, kind: str) -> ModelConfig:
    """Llama and what is built as it is.

    Settings that a file omits have the default of their kind.
    """
    refuse(config, ("silu",), "this activation", "hidden_act")
    refuse(config, (1,), "partial rotation", "partial_rotary_factor")
    defaults = DEFAULTS[kind]
    complete = defaults | config
    longest = defaults.get("max_position_embeddings", 2048)
    block_size = take(config, "max_position_embeddings", int, longest)
    refuse_windows(config, kind, block_size)
    bias = kind in ("llama", "qwen3") and take(config, "attention_bias", bool, False)
    return ModelConfig(
        vocab_size=take(config, "vocab_size", int),
        block_size=block_size,
        n_layer=take(config, "num_hidden_layers", int),
        n_embd=take(config, "hidden_size", int),
        n_head=take(config, "num_attention_heads", int),
        n_kv_head=take(complete, "num_key_value_heads", int, None),
        head_size=take(complete, "head_dim", int, None),
        **rope_config(config),
        qk_norm=kind == "qwen3",
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias,
        bias=kind == "llama" and take(config, "mlp_bias", bool, False),
        ffn="swiglu",
        ffn_size=take(config, "intermediate_size", int),
        norm="rmsnorm",
        norm_eps=take(config, "rms_norm_eps", float, 1e-6),
        ln0=False,
        tied=take(config, "tie_word_embeddings", bool, False),
    )


def refuse_windows(config: dict, kind: str, block_size: int) -> None:
    """Raises ValueError for other attention, or a window shorter than the context."""
    others = set(map(str, take(config, "layer_types", list, ()))) - {"full_attention"}
    window = None
    if config.get("sliding_window", 4096) is not None:
        window = take(config, "sliding_window", int, 4096)
    switched_on = config.get("layer_types") is None and config.get("use_sliding_window")
    if not (others or kind == "mistral" or switched_on):
        return
    # a window as long as the context changes nothing
    if others - {"sliding_attention"} or window is not None and window < block_size:
        attention = ", ".join(sorted(others)) or f"a sliding window of {window}"
        raise ValueError(f"attention of {attention}, in a context of {block_size}, is not supported")


def rope_config(config: dict) -> dict:
    """The rotary settings.

    Since transformers 5 they are all in rope_parameters, before in rope_theta and
    rope_scaling.
    """
    values = take(config, "rope_parameters", dict, take(config, "rope_scaling", dict, {}))
    if values != take(config, "rope_scaling", dict, values):
        raise ValueError("rope_parameters and rope_scaling are both there and differ: "
                         "leave one of them in config.json")
    kind = values.get("rope_type", values.get("type", "default"))
    by_layer = any(isinstance(value, dict) for value in values.values())
    if kind not in ("default", "linear", "llama3") or by_layer:
        raise ValueError(f"rope scaling {kind!r} is not supported: default, linear and llama3 are, "
                         "the same for all layers")
    refuse(values, (1,), "partial rotation", "partial_rotary_factor")
    theta = take(values, "rope_theta", float, take(config, "rope_theta", float, 10000.0))
    rope = {"rope_theta": theta, "rope_scaling": kind}
    if kind != "default":
        rope["rope_factor"] = take(values, "factor", float)
    if kind == "llama3":
        rope["rope_low"] = take(values, "low_freq_factor", float)
        rope["rope_high"] = take(values, "high_freq_factor", float)
        rope["rope_original"] = take(values, "original_max_position_embeddings", int)
    return rope


# ------------------------------------------------------------------------------------------
# Arrangement, files

def split_conv1d(name: str, t: Tensor) -> Tensor:
    """GPT-2's Conv1D is a linear map with its matrix (in, out).

    q, k and v are three thirds of one.
    """
    if name.startswith("blocks.") and t.ndim == 2:
        t = t.T
    part = re.search(r"att\.([qkv])_proj", name)
    return t.chunk(3)["qkv".index(part[1])] if part else t


def read_json(file: Path) -> dict:
    """Raises ValueError for a file that is missing or is not a JSON object."""
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"there is no {file.name}: give a Hugging Face folder, "
                         "a .gguf or a .pth file") from None
    except (ValueError, RecursionError) as e:  # bad JSON and bad UTF-8 alike
        raise ValueError(f"{file.name} is damaged ({e})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file.name} is damaged: not a JSON object")
    return values
