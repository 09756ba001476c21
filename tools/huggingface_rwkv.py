"""RWKV-7 in a Hugging Face folder: names, arrangements, settings, in both directions.

    rwkv7        fla's: the official layer, with layernorm, ln0 and channelmix
    rwkv_hybrid  RWKVInside's: a Llama whose attention is RWKV-7, under our own names

The norm of the heads has the eps 64e-5 here and in rwkv_hybrid; in rwkv7 it has
head_dim norm_eps, which is the same for heads of 64 alone. But a group norm of s y with
the eps s^2 e is one of y with the eps e. So, exactly, for heads of any size:

    s = sqrt(head_dim norm_eps / 64e-5)
    value.weight there = s value.weight,  r_k there = r_k / s

v, v_first and y are then s times ours in every layer, the bonus r k r_k v is ours.

    same     as here           turned   transposed          times    as here, times s
    mix      (1, 1, C)         flat     without the ones    over     as here, over s
"""

import math
import re
from dataclasses import replace

import torch
from torch import Tensor

from data.foreign import brief
from lib.folders import expected_shapes
from model import ModelConfig
from tools.checkpoint import Checkpoint, refuse, take
from tools.pure_rwkv import LLAMA_SHAPED, OFFICIAL, best_form, not_in

NAMES = """
ours            rwkv7                       rwkv_hybrid               form
emb             model.embeddings            model.embed_tokens        same
ln_out          model.norm                  model.norm                same
head            lm_head                     lm_head                   same
ln0             pre_norm                    -                         same
ln1             attn_norm                   input_layernorm           same
ln2             ffn_norm                    post_attention_layernorm  same
att             attn                        self_attn.time_mixer      mix
att.w0          attn.w_lora.lora.2.bias     -                         flat
att.w1          attn.w_lora.lora.0.weight   -                         turned
att.w2          attn.w_lora.lora.2.weight   -                         turned
att.a0          attn.a_lora.lora.2.bias     -                         flat
att.a1          attn.a_lora.lora.0.weight   -                         turned
att.a2          attn.a_lora.lora.2.weight   -                         turned
att.v0          attn.v_lora.lora.2.bias     -                         flat
att.v1          attn.v_lora.lora.0.weight   -                         turned
att.v2          attn.v_lora.lora.2.weight   -                         turned
att.g1          attn.g_lora.lora.0.weight   -                         turned
att.g2          attn.g_lora.lora.2.weight   -                         turned
att.k_k         attn.k_k                    -                         flat
att.k_a         attn.k_a                    -                         flat
att.r_k         attn.r_k                    -                         over
att.receptance  attn.r_proj                 -                         same
att.key         attn.k_proj                 -                         same
att.value       attn.v_proj                 -                         times
att.output      attn.o_proj                 -                         same
att.ln_x        attn.g_norm                 -                         same
ffn.x_k         ffn.x_k                     -                         flat
ffn.gate        -                           mlp.gate_proj             same
ffn.key         ffn.key                     mlp.up_proj               same
ffn.value       ffn.value                   mlp.down_proj             same
"""
HEADER, *ROWS = [line.split() for line in NAMES.strip().splitlines()]
TABLE = {kind: {row[0]: (row[i], row[3] if kind == "rwkv7" else "same") for row in ROWS if row[i] != "-"}
         for i, kind in enumerate(HEADER) if kind.startswith("rwkv")}
MIXES = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")  # older rwkv7 has one x_x, in this order

FORMS = {"rwkv7": OFFICIAL, "rwkv_hybrid": LLAMA_SHAPED}


# ------------------------------------------------------------------------------------------
# What of ours they can say

def kind_of(cfg: ModelConfig) -> str:
    """The model_type that says more of the model."""
    return best_form(cfg, FORMS)


def reasons(cfg: ModelConfig) -> list[str]:
    """What of this model a Hugging Face folder has no place for."""
    kind = kind_of(cfg)
    found = not_in(cfg, FORMS[kind])
    if kind == "rwkv7" and cfg.norm_eps <= 0:
        found.append(f"norm_eps = {cfg.norm_eps}, of which the eps of the heads' norm is a multiple there")
    return found


def full_form(cfg: ModelConfig) -> ModelConfig:
    """The same model, with zeros for what a recipe left out: shifts and the bonus."""
    ffn = "channelmix" if cfg.ffn == "relu2" else cfg.ffn
    return replace(cfg, token_shift=True, bonus=True, tied=False, ffn=ffn, ffn_size=cfg.ffn_width)


# ------------------------------------------------------------------------------------------
# Names and arrangements

def place(name: str, kind: str) -> tuple[str, str]:
    """The tensor that a parameter stands in, and its form there.

    blocks.3.att.w1 -> model.layers.3.attn.w_lora.lora.0.weight, turned
    """
    block, rest = re.fullmatch(r"(blocks\.\d+\.)?(.+)", name).groups()
    parts, table = rest.split("."), TABLE[kind]
    n = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in table)
    there, form = table[".".join(parts[:n])]
    return (block or "").replace("blocks", "model.layers") + ".".join([there, *parts[n:]]), form


def factor(cfg: ModelConfig, kind: str) -> float:
    """By which values are multiplied there: s."""
    official = 64 * 1e-5
    return math.sqrt(cfg.rwkv_head_size * cfg.norm_eps / official) if kind == "rwkv7" else 1.0


def shape_there(shape: tuple[int, ...], form: str) -> tuple[int, ...]:
    if form == "turned":
        return shape[::-1]
    return (math.prod(shape),) if form == "flat" else shape


def arrange_there(t: Tensor, form: str, s: float, dtype: torch.dtype) -> Tensor:
    """A parameter of ours in its form there."""
    if form in ("times", "over"):
        return scaled(t, s if form == "times" else 1 / s, dtype)
    if form == "flat":
        return t.flatten()
    return t.T if form == "turned" else t


def scaled(t: Tensor, s: float, dtype: torch.dtype) -> Tensor:
    """The tensor times s, rounded so that import and export change no bit of it.

    A product is not always what its quotient gives when it is multiplied again (near
    powers of two, where some numbers have one product). The second time it is.
    """
    if s == 1:
        return t
    once = (t.double() * s).to(dtype)
    return ((once.double() / s).to(dtype).double() * s).to(dtype)


def arrange_here(t: Tensor, form: str, s: float, shape: tuple[int, ...]) -> Tensor:
    """A tensor of theirs as the parameter of this shape."""
    if form in ("times", "over") and s != 1:
        return t.double() / (s if form == "times" else 1 / s)
    if form == "turned":
        return t.T
    return t.reshape(shape) if form in ("flat", "mix") else t


# ------------------------------------------------------------------------------------------
# Settings

LORA_KEYS = {"w": "decay", "a": "a", "v": "v", "g": "gate"}  # *_low_rank_dim of rwkv7


def settings_of(cfg: ModelConfig, kind: str) -> dict:
    """What config.json says of the model's shape."""
    C, F, H = cfg.n_embd, cfg.ffn_width, cfg.n_embd // cfg.rwkv_head_size
    shape = {
        "model_type": kind,
        "vocab_size": cfg.vocab_size,
        "hidden_size": C,
        "intermediate_size": F,
        "num_hidden_layers": cfg.n_layer,
        "max_position_embeddings": cfg.block_size,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    if kind == "rwkv_hybrid":
        return {"architectures": ["RwkvHybridForCausalLM"]} | shape | {
            "num_attention_heads": H,
            "num_key_value_heads": H,
            "head_size": cfg.rwkv_head_size,
            "head_size_divisor": 8,
            "hidden_act": "silu",
            "rms_norm_eps": cfg.norm_eps,
            "wkv_version": 7,
            "wkv_has_gate": cfg.gate,
            "wkv_has_group_norm": cfg.group_norm,
        }
    return {"architectures": ["RWKV7ForCausalLM"]} | shape | {
        "attn": None,
        "attn_mode": "chunk",
        "head_dim": cfg.rwkv_head_size,
        "num_heads": H,
        "value_dim": [C] * cfg.n_layer,
        "hidden_ratio": F / C,
        **{f"{key}_low_rank_dim": cfg.rank(rank) for rank, key in LORA_KEYS.items()},
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": cfg.norm_bias,
        "norm_eps": cfg.norm_eps,
        "fuse_norm": False,
        "fuse_cross_entropy": False,
    }


def rwkv7_config(config: dict, shapes: dict[str, tuple[int, ...]]) -> ModelConfig:
    """Raises ValueError where it says what model.py is not, or the tensors are not."""
    refuse(config, ({},), "attention in some layers", "attn")
    refuse(config, ("sqrelu", "relu2"), "this activation", "hidden_act")
    H, N = sizes("model.layers.0.attn.r_k", shapes)
    F, C = sizes("model.layers.0.ffn.key.weight", shapes)
    V, L, A = sizes("model.embeddings.weight", shapes)[0], count_layers(shapes), H * N
    agree(config, hidden_size=C, vocab_size=V, num_hidden_layers=L)
    agree(config, optional=True, intermediate_size=F, head_dim=N, num_heads=H, num_attention_heads=H,
          attention_hidden_size=A)
    widths = config.get("value_dim")
    if widths not in (None, A, [A] * L):
        raise ValueError(f"value_dim = {brief(widths)}: values of another width than the keys' {A} are not "
                         "supported")
    eps = take(config, "norm_eps", float, 1e-5)
    if not eps > 0:
        raise ValueError(f"norm_eps = {eps}: it must be positive, for the eps of the heads' norm "
                         "is a multiple of it")
    return ModelConfig(
        vocab_size=V,
        block_size=take(config, "max_position_embeddings", int, 2048),
        n_layer=L,
        n_embd=C,
        mixer="r",
        positions="none",
        rwkv_head_size=N,
        rwkv_size=A,
        **rwkv7_ranks(config, shapes, L),
        ffn="channelmix",
        ffn_size=F,
        norm_eps=eps,
        norm_bias=take(config, "norm_bias", bool, True),
        ln0=take(config, "norm_first", bool, True),
        tied=take(config, "tie_word_embeddings", bool, False),
    )


def rwkv7_ranks(config: dict, shapes: dict[str, tuple[int, ...]], n_layer: int) -> dict[str, int | None]:
    """As the tensors have them. Layer 0 has none for v: the setting counts."""
    ranks = {}
    for rank, key in LORA_KEYS.items():
        layer, key = int(rank == "v"), f"{key}_low_rank_dim"
        if layer < n_layer:
            size = sizes(f"model.layers.{layer}.attn.{rank}_lora.lora.0.weight", shapes)[0]
            agree(config, optional=True, **{key: size})
        ranks[f"rank_{rank}"] = size if layer < n_layer else take(config, key, int, None)
    return ranks


def hybrid_config(config: dict, shapes: dict[str, tuple[int, ...]]) -> ModelConfig:
    """Raises ValueError where it says what model.py is not, or the tensors are not."""
    refuse(config, (7,), "another RWKV than 7", "wkv_version")
    refuse(config, (8,), "another eps of the heads' norm than 64e-5", "head_size_divisor")
    refuse(config, ("silu", "swish"), "this activation", "hidden_act")
    mixer = "model.layers.0.self_attn.time_mixer"
    F, C = sizes("model.layers.0.mlp.up_proj.weight", shapes)
    H, N = sizes(f"{mixer}.r_k", shapes)
    V, L = sizes("model.embed_tokens.weight", shapes)[0], count_layers(shapes)
    agree(config, hidden_size=C, vocab_size=V, num_hidden_layers=L)
    agree(config, optional=True, intermediate_size=F, head_size=N, num_wkv_heads=H)
    refuse(config, ("full", [*range(L)]), "attention in the other layers", "wkv_layers")
    parts = {"gate": f"{mixer}.g1", "group_norm": f"{mixer}.ln_x.weight"}
    for part, name in parts.items():
        if take(config, f"wkv_has_{part}", bool, name in shapes) != (name in shapes):
            raise ValueError(f"wkv_has_{part} = {config[f'wkv_has_{part}']}, but {name} is "
                             f"{'there' if name in shapes else 'missing'}: which is meant?")
    kinds = "wa" + "v" * (L > 1) + "g" * (parts["gate"] in shapes)
    ranks = {f"rank_{k}": sizes(f"model.layers.{int(k == 'v')}.self_attn.time_mixer.{k}1", shapes)[1]
             for k in kinds}
    return ModelConfig(
        vocab_size=V,
        block_size=take(config, "max_position_embeddings", int, 32768),
        n_layer=L,
        n_embd=C,
        mixer="r",
        positions="none",
        rwkv_head_size=N,
        rwkv_size=H * N,
        **ranks,
        **{part: name in shapes for part, name in parts.items()},
        ffn="swiglu",
        ffn_size=F,
        norm="rmsnorm",
        norm_eps=take(config, "rms_norm_eps", float, 1e-6),
        ln0=False,
        tied=take(config, "tie_word_embeddings", bool, False),
    )


def sizes(name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """Of a matrix that every such model has."""
    if len(shapes.get(name, ())) != 2:
        raise ValueError(f"{name} is {shapes.get(name, 'missing')}, expected a matrix: it is no RWKV-7 "
                         "of this model_type, or damaged; fetch it again")
    return shapes[name]


def count_layers(shapes: dict[str, tuple[int, ...]]) -> int:
    return len({name.split(".")[2] for name in shapes if name.startswith("model.layers.")})


def agree(config: dict, optional: bool = False, **of_the_tensors: int) -> None:
    """Raises ValueError for a setting that is missing or contradicts the tensors."""
    for key, size in of_the_tensors.items():
        value = take(config, key, int, size) if optional else take(config, key, int)
        if value != size:
            raise ValueError(f"{key} = {value} in config.json, but the tensors say {size}: one of them is of "
                             "another model; fetch both again")


# ------------------------------------------------------------------------------------------
# Import

READ = {"rwkv7": rwkv7_config, "rwkv_hybrid": hybrid_config}
IGNORED = {  # layer 0's value residual is never used, nor a share for a gate that is not there
    "rwkv7": r"model\.layers\.0\.attn\.v_lora\.lora\..*",
    "rwkv_hybrid": r"model\.layers\.0\.self_attn\.time_mixer\.v[012]|.*\.rotary_emb\.inv_freq",
}


def rwkv_checkpoint(kind: str, config: dict, shapes: dict, read) -> Checkpoint:
    """The checkpoint in a folder of this model_type.

    `read` gives a tensor by its name there. Raises ValueError for what no model of ours
    can be.
    """
    cfg = READ[kind](config, shapes)
    ours, s = expected_shapes(cfg), factor(cfg, kind)

    def source(name: str) -> str:
        there = place(name, kind)[0]
        before, _, last = there.rpartition(".")
        return f"{before}.x_x" if last in MIXES and f"{before}.x_x" in shapes else there

    def arrange(name: str, t: Tensor) -> Tensor:
        if source(name).endswith(".x_x"):
            t = t.reshape(len(MIXES), -1)[MIXES.index(name[-3:])]
        return arrange_here(t, place(name, kind)[1], s, ours[name])

    ignored = IGNORED[kind] if cfg.gate else IGNORED[kind] + r"|.*\.time_mixer\.x_g"
    return Checkpoint(cfg, shapes, source, read, arrange, ignored)
