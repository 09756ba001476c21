"""The two shapes of pure RWKV-7 that other programs run, and what has no place in them.
"""

from model import ModelConfig

# By setting, the values that it may have
OFFICIAL = {"norm": ("layernorm",), "ln0": (True,), "ffn": ("channelmix", "relu2"), "gate": (True,),
            "group_norm": (True,)}
LLAMA_SHAPED = {"norm": ("rmsnorm",), "ln0": (False,), "ffn": ("swiglu",)}
NOWHERE = ("rwkv_rope", "qk_norm", "qkv_bias", "output_bias", "bias")


def best_form(cfg: ModelConfig, forms: dict[str, dict[str, tuple]]) -> str:
    """The name of the shape that says most of the model."""
    return min(forms, key=lambda name: len(not_in(cfg, forms[name])))


def not_in(cfg: ModelConfig, shape: dict[str, tuple]) -> list[str]:
    """What of this model a shape has no place for."""
    allowed = shape | dict.fromkeys(NOWHERE, (False,))
    reasons = [f"{key} = {getattr(cfg, key)} instead of {' or '.join(map(str, values))}"
               for key, values in allowed.items() if getattr(cfg, key) not in values]
    if "a" in cfg.mixers:
        reasons.append(f"attention in layer {cfg.mixers.index('a')}")
    if cfg.positions == "learned":
        reasons.append("learned positions")
    if cfg.rwkv_width != cfg.n_embd:
        reasons.append(f"heads of {cfg.rwkv_width} together in a width of {cfg.n_embd}")
    return reasons
