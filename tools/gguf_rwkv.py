"""RWKV-7 in a GGUF, as llama.cpp has it: names, forms, settings, in both directions.

    rwkv7    the official layer: layernorm, ln0, channelmix, gate and group norm
    arwkv7   in a Llama's block: rmsnorm, swiglu; gate and group norm or not

What a recipe leaves out has a place there all the same: switched-off shift and bonus,
and norms without bias, are zeros, and a tied head is written out. So what is written is
the model's `full_form`, and that is also what is read back.

    matrix   as here; 32 or 16 bits, or quantised
    vector   flat, float32
    turned   transposed, float32
    mix      the shares of all token shifts in one tensor (6, 1, 1, C), float32
"""

from dataclasses import replace

from torch import Tensor

from lib.folders import expected_shapes
from model import ModelConfig
from tools.checkpoint import Checkpoint, refuse, take
from tools.pure_rwkv import LLAMA_SHAPED, OFFICIAL, best_form

NAMES = """
ours            rwkv7                 arwkv7                form
emb             token_embd            token_embd            matrix
ln0             token_embd_norm       -                     vector
ln_out          output_norm           output_norm           vector
head            output                output                matrix
ln1             attn_norm             attn_norm             vector
ln2             attn_norm_2           ffn_norm              vector
att.x_r         time_mix_lerp_fused   time_mix_lerp_fused   mix
att.x_w         time_mix_lerp_fused   time_mix_lerp_fused   mix
att.x_k         time_mix_lerp_fused   time_mix_lerp_fused   mix
att.x_v         time_mix_lerp_fused   time_mix_lerp_fused   mix
att.x_a         time_mix_lerp_fused   time_mix_lerp_fused   mix
att.x_g         time_mix_lerp_fused   time_mix_lerp_fused   mix
att.w0          time_mix_w0           time_mix_w0           vector
att.w1          time_mix_w1           time_mix_w1           turned
att.w2          time_mix_w2           time_mix_w2           turned
att.a0          time_mix_a0           time_mix_a0           vector
att.a1          time_mix_a1           time_mix_a1           turned
att.a2          time_mix_a2           time_mix_a2           turned
att.v0          time_mix_v0           time_mix_v0           vector
att.v1          time_mix_v1           time_mix_v1           turned
att.v2          time_mix_v2           time_mix_v2           turned
att.g1          time_mix_g1           time_mix_g1           turned
att.g2          time_mix_g2           time_mix_g2           turned
att.k_k         time_mix_k_k          time_mix_k_k          vector
att.k_a         time_mix_k_a          time_mix_k_a          vector
att.r_k         time_mix_r_k          time_mix_r_k          vector
att.receptance  time_mix_receptance   time_mix_receptance   matrix
att.key         time_mix_key          time_mix_key          matrix
att.value       time_mix_value        time_mix_value        matrix
att.output      time_mix_output       time_mix_output       matrix
att.ln_x        time_mix_ln           time_mix_ln           vector
ffn.x_k         channel_mix_lerp_k    -                     vector
ffn.gate        -                     ffn_gate              matrix
ffn.key         channel_mix_key       ffn_up                matrix
ffn.value       channel_mix_value     ffn_down              matrix
"""
HEADER, *ROWS = [line.split() for line in NAMES.strip().splitlines()]
TABLE = {row[0]: dict(zip(HEADER, row)) for row in ROWS}
SHIFTS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")  # in this order in one tensor; x_g with a gate alone

FORMS = {"rwkv7": OFFICIAL, "arwkv7": LLAMA_SHAPED}
EPS_KEYS = {"rwkv7": "attention.layer_norm_epsilon", "arwkv7": "attention.layer_norm_rms_epsilon"}
LORA_KEYS = {"w": "decay", "a": "iclr", "v": "value_residual_mix", "g": "gate"}  # attention.*_lora_rank


# ------------------------------------------------------------------------------------------
# What of ours it can say

def architecture(cfg: ModelConfig) -> str:
    """That of the two which says more of the model."""
    return best_form(cfg, FORMS)


def full_form(cfg: ModelConfig) -> ModelConfig:
    """The same model with everything in it that its architecture has a place for."""
    ranks = {f"rank_{kind}": cfg.rank(kind) for kind in "wav" + "g" * cfg.gate}
    official = {} if architecture(cfg) == "arwkv7" else {"ffn": "channelmix", "norm_bias": True}
    return replace(cfg, token_shift=True, bonus=True, tied=False, ffn_size=cfg.ffn_width, **ranks, **official)


def place(name: str, arch: str) -> tuple[str, str]:
    """The tensor that a parameter stands in, and its form there.

    blocks.3.att.w1 -> blk.3.time_mix_w1.weight, turned
    """
    stem, dot, end = name.rpartition(".")
    module, end = (stem, end) if end in ("weight", "bias") else (name, "weight")
    _, layer, module = module.split(".", 2) if module.startswith("blocks.") else ("", "", module)
    row = TABLE[module]
    block = f"blk.{layer}." if layer and module != "ln0" else ""      # ln0 is there but once
    return f"{block}{row[arch]}.{end}", row["form"]


# ------------------------------------------------------------------------------------------
# Settings

def settings_of(cfg: ModelConfig) -> dict[str, int | float]:
    """What a file says of the model's shape, by key without the architecture."""
    ranks = {kind: cfg.rank(kind) if kind != "g" or cfg.gate else 0 for kind in LORA_KEYS}
    shape = {
        "context_length": 2**20,       # as llama.cpp's converter; no limit follows from it
        "embedding_length": cfg.n_embd,
        "block_count": cfg.n_layer,
        "feed_forward_length": cfg.ffn_width,
        "wkv.head_size": cfg.rwkv_head_size,
        "attention.head_count": 0,
        EPS_KEYS[architecture(cfg)]: cfg.norm_eps,
    } | {f"attention.{LORA_KEYS[kind]}_lora_rank": rank for kind, rank in ranks.items()}
    if architecture(cfg) == "arwkv7":  # else llama.cpp takes two, and ends in an assertion
        shape["token_shift_count"] = 1
    return shape


def config_of(arch: str, values: dict, shapes: dict[str, tuple[int, ...]]) -> ModelConfig:
    """The model in a file, by its settings and the shapes of its tensors.

    Raises ValueError for a setting that is missing, or that model.py does not know.
    """
    refuse(values, (0,), "rescaling of weights", "rescale_every_n_layers")
    if arch == "arwkv7":
        refuse(values, (1,), "a token shift in the feed-forward layer", "token_shift_count")

    def rows(name: str, default: int) -> int:
        return shapes[name][0] if shapes.get(name) else default

    n_layer = take(values, "block_count", int)
    gate = "blk.0.time_mix_g1.weight" in shapes
    ranks = {}
    for kind in "wav" + "g" * gate:
        key = take(values, f"attention.{LORA_KEYS[kind]}_lora_rank", int)
        layer = 1 if kind == "v" else 0             # layer 0's have another rank, and no use
        ranks[f"rank_{kind}"] = rows(f"blk.{layer}.time_mix_{kind}1.weight", key)
    eps = take(values, EPS_KEYS[arch], float)
    form = {key: options[0] for key, options in FORMS[arch].items() if key != "gate"}
    form |= {"gate": gate, "group_norm": "blk.0.time_mix_ln.weight" in shapes} if arch == "arwkv7" else {}
    return ModelConfig(
        vocab_size=rows("token_embd.weight", 1),
        block_size=4096,
        n_layer=n_layer,
        n_embd=take(values, "embedding_length", int),
        mixer="r",
        positions="none",
        rwkv_head_size=take(values, "wkv.head_size", int),
        ffn_size=take(values, "feed_forward_length", int),
        norm_eps=float(f"{eps:.7g}"),               # 1e-5 is 9.99999974e-06 in float32
        **form,
        **ranks,
    )


# ------------------------------------------------------------------------------------------
# Import

def rwkv_checkpoint(arch: str, values: dict, shapes: dict, read, tokenizer) -> Checkpoint:
    """The checkpoint in a file of this architecture.

    `read` gives a tensor by its name there, `tokenizer` reads its tokenizer.
    """
    cfg = config_of(arch, values, shapes)
    ours = expected_shapes(cfg) if cfg.n_layer <= len(shapes) else {}

    def arrange(name: str, t: Tensor) -> Tensor:
        form = place(name, arch)[1]
        if form == "mix":
            return t.reshape(-1, cfg.n_embd)[SHIFTS.index(name[-3:])].view(ours[name])
        if form == "vector":
            return t.reshape(ours[name])
        return t.T if form == "turned" else t

    return Checkpoint(cfg, shapes, lambda name: place(name, arch)[0], read, arrange,
                      ignored=r"blk\.0\.time_mix_v[012]\.weight", tokenizer=tokenizer)
