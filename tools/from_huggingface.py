"""Hugging Face folders: config.json, one or several .safetensors, and a tokenizer.json.

    gpt2                          q, k and v stand in one matrix; matrices (in, out);
                                  learned positions
    llama, mistral, qwen2, qwen3  qwen2 has biases on q, k and v, qwen3 norms on q and k
    rwkv7, rwkv_hybrid            RWKV-7 of fla, of RWKVInside: huggingface_rwkv.py
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tiktoken
from torch import Tensor

from data.foreign import brief, has_tokenizer, read_json, read_tokenizer_json
from data.tokenizer import get_tokenizer
from lib.folders import read_shapes, read_tensor
from model import ModelConfig
from tools.checkpoint import TABLE, Checkpoint, plain_names, refuse, rename, same, take, unchanged
from tools.huggingface_rwkv import READ, rwkv_checkpoint
from tools.huggingface_tokenizer import WORLD, spec_of

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
    config = read_settings(folder)
    refuse(config, (0, 1), "a mixture of experts", "num_local_experts", "num_experts", "n_routed_experts")
    kind = take(config, "model_type", str)
    if kind not in ("gpt2", *DEFAULTS, *READ):
        raise ValueError(f"model_type {brief(repr(kind))} is not supported: gpt2, llama, mistral, qwen2, "
                         "qwen3, rwkv7 and rwkv_hybrid are")
    refuse(config, ({},), "a quantised checkpoint", "quantization_config")
    refuse(config, (), "soft-capping of logits", "attn_logit_softcapping", "final_logit_softcapping")

    places, shapes = find_tensors(folder, "transformer." if kind == "gpt2" else "")

    def read(name: str) -> Tensor:
        return read_tensor(*places[name])

    checkpoint = rwkv_checkpoint if kind in READ else transformer_checkpoint
    found = checkpoint(kind, config, shapes, read)
    emb, head = found.source("emb.weight"), found.source("head.weight")
    tied, ignored = found.cfg.tied, found.ignored
    if tied and emb in places and head in places and not same(read, emb, head):
        tied = False  # the file has a head of its own, whatever its config says
    if tied:
        ignored += r"|lm_head\.weight"
    has_one = has_tokenizer(folder) or (folder / WORLD).exists()
    tokenizer = (lambda: read_tokenizer(folder)) if has_one else None
    return replace(found, cfg=replace(found.cfg, tied=tied), ignored=ignored, tokenizer=tokenizer)


def transformer_checkpoint(kind: str, config: dict, shapes: dict, read: Callable) -> Checkpoint:
    """Of GPT-2, Llama and what is built as it is; `read` gives a tensor by its name."""
    if kind == "gpt2":
        cfg, table, arrange = gpt2_config(config), TABLE["gpt2"], split_conv1d
        ignored = r"h\.\d+\.attn\.(masked_)?bias"        # causal masks
    else:
        cfg, table, arrange = llama_config(config, kind), TABLE["llama"], unchanged
        ignored = r".*\.rotary_emb\.inv_freq"            # rotary frequencies
    return Checkpoint(cfg, shapes, lambda name: rename(name, table), read, arrange, ignored)


def read_tokenizer(folder: Path) -> dict | tiktoken.Encoding:
    """The folder's tokenizer: World's, a spec, or the bytes where that is no more."""
    if not has_tokenizer(folder):
        return get_tokenizer(str(folder / WORLD))
    spec, plain = read_tokenizer_json(folder), get_tokenizer("bytes")
    return plain if spec == spec_of(plain) else spec


def read_settings(folder: Path) -> dict:
    """config.json. Raises ValueError where there is none; an adapter has none."""
    file = folder / "config.json"
    if not file.exists() and (folder / "adapter_config.json").exists():
        raise ValueError("it is a LoRA adapter: merge it into its model first, with peft's merge_and_unload, "
                         "and import that")
    if not file.exists():
        raise ValueError("there is no config.json: give a Hugging Face folder, a .gguf, a .pth, or nanoGPT's "
                         "ckpt.pt")
    return read_json(file)


def find_tensors(folder: Path, prefix: str) -> tuple[dict[str, tuple[Path, str]], dict[str, tuple[int, ...]]]:
    """(file, name there) and shape of each tensor, by its plain name.

    Of a llama that begins with model., which a headless model's file leaves out;
    GPT-2's `prefix` is left out here.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    weight_map = {}
    if not single.exists() and index.exists():
        weight_map = take(read_json(index), "weight_map", dict)
    files = [single.name] if single.exists() else sorted(set(map(str, weight_map.values())))
    if not files:
        raise ValueError("there is no model.safetensors and no model.safetensors.index.json; "
                         "a .bin may hold code: save it as safetensors first")
    places, shapes = {}, {}
    for name in files:
        if Path(name).name != name or not (folder / name).exists() or (folder / name).is_dir():
            raise ValueError(f"{brief(repr(name))}, named by {index.name}, is no file of this folder")
        found = read_shapes(folder / name, "fetch it again")
        # a tensor in two shards is the one that the index names
        mine = [key for key in found if weight_map.get(key, name) == name]
        places |= {key: folder / name for key in mine}
        shapes |= {key: found[key] for key in mine}
    plain = {short.removeprefix(prefix): key for short, key in plain_names(places).items()}
    if not prefix and not any(short.startswith("model.") for short in plain):
        plain = {short if short.startswith("lm_head.") else f"model.{short}": key
                 for short, key in plain.items()}
    return ({short: (places[key], key) for short, key in plain.items()},
            {short: shapes[key] for short, key in plain.items()})


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
    refuse(config, ("silu", "swish"), "this activation", "hidden_act")
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
    # qwen's windows begin at layer max_window_layers
    n_layer, first = take(config, "num_hidden_layers", int), take(config, "max_window_layers", int, 28)
    switched_on = config.get("layer_types") is None and config.get("use_sliding_window") and first < n_layer
    if not (others or kind == "mistral" or kind.startswith("qwen") and switched_on):
        return
    # a window as long as the context changes nothing
    if others - {"sliding_attention"} or window is not None and window < block_size:
        attention = brief(", ".join(sorted(others))) or f"a sliding window of {window}"
        raise ValueError(f"attention of {attention}, in a context of {block_size}, is not supported")


def rope_config(config: dict) -> dict:
    """The rotary settings.

    Since transformers 5 they are all in rope_parameters, before in rope_theta and
    rope_scaling. Raises ValueError where they say different things.
    """
    forms = [take(config, key, dict, {}) for key in ("rope_parameters", "rope_scaling")]
    scalings = [rope_scaling(form) for form in forms if form.keys() - {"rope_theta"}]
    if scalings and scalings[0] != scalings[-1]:
        raise ValueError("rope_parameters and rope_scaling are both there and differ: "
                         "leave one of them in config.json")
    rope = {"rope_theta": agreed("rope_theta", float, config, *forms) or 10000.0, "rope_scaling": "default"}
    rope |= scalings[0] if scalings else {}
    if rope["rope_scaling"] == "llama3":
        original = agreed("original_max_position_embeddings", int, config, *forms)
        rope["rope_original"] = original or take(config, "max_position_embeddings", int, 2048)
    return rope


def rope_scaling(form: dict) -> dict:
    """Our settings of the scaling in one of the two forms. Scaling by 1 is none."""
    kinds = {str(form[key]) for key in ("rope_type", "type") if form.get(key) is not None}
    if any(isinstance(value, dict) for value in form.values()):
        kinds = {"by layer"}
    elif not kinds and form.get("factor") not in (None, 1):
        raise ValueError(f"rope_type is missing beside factor = {brief(form['factor'])}: "
                         "name it in config.json")
    kind = " or ".join(sorted(kinds)) or "default"
    refuse(form, (1,), "partial rotation", "partial_rotary_factor")
    by_one = form.get("factor") == 1 and form.get("attention_factor") in (None, 1)
    if kind == "default" or kind in ("linear", "llama3", "dynamic", "yarn") and by_one:
        return {"rope_scaling": "default"}
    if kind not in ("linear", "llama3"):
        raise ValueError(f"rope scaling {brief(repr(kind))} is not supported: default, linear and llama3 "
                         "are, the same for all layers")
    scaling = {"rope_scaling": kind, "rope_factor": take(form, "factor", float)}
    if kind == "llama3":
        scaling["rope_low"] = take(form, "low_freq_factor", float)
        scaling["rope_high"] = take(form, "high_freq_factor", float)
    return scaling


def agreed(key: str, kind: type, *places: dict) -> object:
    """The value of a setting that may stand in several places; None where it does not.

    Raises ValueError where they differ.
    """
    values = {take(place, key, kind, None) for place in places} - {None}
    if len(values) > 1:
        raise ValueError(f"{key} is {' and '.join(map(str, sorted(values)))} in two places of config.json: "
                         "leave one of them")
    return values.pop() if values else None


# ------------------------------------------------------------------------------------------
# Arrangement

def split_conv1d(name: str, t: Tensor) -> Tensor:
    """GPT-2's Conv1D is a linear map with its matrix (in, out).

    q, k and v are three thirds of one.
    """
    if name.startswith("blocks.") and t.ndim == 2:
        t = t.T
    part = re.search(r"att\.([qkv])_proj", name)
    return t.chunk(3)["qkv".index(part[1])] if part else t
