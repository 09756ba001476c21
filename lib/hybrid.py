"""Which layers are attention, and what each kind of layer remembers.

    a, r, ra, rrra ...    by letter, repeated over the layers (r: RWKV-7, a: attention);
                          more than 8 letters only as a whole
    all                   every layer is RWKV-7; the names below say which are, the
                          others are attention
    every:K, alternate    0, K, 2K, ...; alternate is every:2
    first:K, last:K       the first K, the last K
    0,2,5                 these; layers count from 0
    auto:T                as many layers stay attention as fit: after T tokens the model
                          may hold no more than it would with attention in every layer
                          after block_size tokens. Spread evenly, up to the last layer
"""

import torch

from config import shown
from model import LM, ModelConfig

MOST_LAYERS = 1024      # of a pattern; every known model has fewer
MOST_CUT = 8            # letters whose last repetition may be cut: of more, one was left out


def is_letters(pattern: str) -> bool:
    return bool(pattern) and set(pattern) <= set("ar")


def mixer_letters(cfg: ModelConfig, pattern: str) -> str:
    """The pattern as one letter per layer of cfg.

    Raises ValueError for what is no pattern, and for layers the model does not have.
    """
    L = cfg.n_layer
    if L > MOST_LAYERS or len(pattern) > 8 * MOST_LAYERS:
        raise ValueError(f"n_layer = {L}, mixer = {shown(pattern)}: a model has at most {MOST_LAYERS} layers")
    if is_letters(pattern) and MOST_CUT < len(pattern) < L and L % len(pattern):
        raise ValueError(f"mixer = {pattern!r} has {len(pattern)} letters, the model {L} layers: write one "
                         "for each layer, or so few that all are repeated as a whole")
    if is_letters(pattern) and len(pattern) <= L:
        return (pattern * L)[:L]
    layers = named_layers(cfg, pattern)
    if layers is None:
        raise ValueError(
            f"mixer = {pattern!r}: with n_layer = {L} write a (attention) and r (RWKV-7) for up to "
            f"{L} layers, all, alternate, first:K, last:K or every:K with K up to {L}, numbers of "
            f"RWKV-7 layers from 0 to {L - 1} with commas, or auto:T for T tokens"
        )
    return letters(L, set(range(L)) - layers)


def letters(L: int, attention: set[int]) -> str:
    """One letter per layer, a for those of `attention`."""
    return "".join("a" if i in attention else "r" for i in range(L))


def evenly(L: int, n: int) -> set[int]:
    """n of L layers, spread evenly, up to the last."""
    return {(i + 1) * L // n - 1 for i in range(n)}


def named_layers(cfg: ModelConfig, pattern: str) -> set[int] | None:
    """The RWKV-7 layers of a pattern that is not letters; None where there is none."""
    L = cfg.n_layer
    name, _, number = pattern.partition(":")
    K = int(number) if number.isdecimal() else 0
    if pattern == "all":
        return set(range(L))
    if pattern == "alternate":
        return set(range(0, L, 2))
    if all(part.isdecimal() and int(part) < L for part in pattern.split(",")):
        return set(map(int, pattern.split(",")))
    if name == "auto" and K >= 1:
        return set(range(L)) - evenly(L, attention_layers_that_fit(cfg, K))
    if 1 <= K <= L:
        return {"first": set(range(K)), "last": set(range(L - K, L)), "every": set(range(0, L, K))}.get(name)
    return None


def attention_layers_that_fit(cfg: ModelConfig, T: int) -> int:
    """The greatest n with n T cache + (L - n) fixed <= L block_size cache, in bytes."""
    L, cache, fixed = cfg.n_layer, cache_bytes(cfg, "a", 1), cache_bytes(cfg, "r", 1)
    room = L * cfg.block_size * cache
    return max((n for n in range(L + 1) if n * T * cache + (L - n) * fixed <= room), default=0)


def cache_bytes(cfg: ModelConfig, kind: str, T: int) -> int:
    """What a mixer of this kind, a or r, remembers of T tokens in float32.

    Attention its keys and values, RWKV-7 the last x and S.
    """
    if kind == "a":
        return 4 * T * 2 * cfg.kv_heads * cfg.att_head_size
    return 4 * (cfg.n_embd + cfg.rwkv_width * cfg.rwkv_head_size)


def remembered_bytes(cfg: ModelConfig, T: int) -> int:
    """What the whole model remembers of T tokens in float32: the bytes of its State."""
    last_x = 4 * cfg.n_embd * cfg.n_layer if cfg.ffn == "channelmix" else 0
    return sum(cache_bytes(cfg, kind, T) for kind in cfg.mixers) + last_x


def unit(n: float) -> str:
    """Bytes for people, in powers of 1000."""
    if n < 1000:
        return f"{n:,.0f} bytes"
    for name in ("kB", "MB", "GB", "TB"):
        n /= 1000
        if n < 1000:
            break
    return f"{n:,.2f} {name}"


def describe(cfg: ModelConfig, T: int) -> str:
    """A table to read: attention's and RWKV-7's layers, parameters, memory of T tokens.

    Percentages are of the whole model's parameters, and of the memory of all mixers, in
    float32. The memory in the first line also counts ChannelMix's last x. Raises
    ValueError for T < 1.
    """
    if T < 1:
        raise ValueError(f"describe at T = {T} tokens: it must be at least 1")
    with torch.device("meta"):
        model = LM(cfg)
    total, whole = model.n_params(), remembered_bytes(cfg, T)
    memory = {kind: cfg.mixers.count(kind) * cache_bytes(cfg, kind, T) for kind in "ar"}
    first = f"{cfg.n_layer} layers, {cfg.mixers}; {total:,} parameters; memory of {T:,} tokens: {unit(whole)}"
    if cfg.ffn == "channelmix":
        first += f", {unit(whole - sum(memory.values()))} of it in ChannelMix"
    lines = [first]
    for kind, name in (("a", "attention"), ("r", "RWKV-7")):
        mixers = [block.att for block, letter in zip(model.blocks, cfg.mixers) if letter == kind]
        n = sum(p.numel() for mixer in mixers for p in mixer.parameters())
        share = memory[kind] / sum(memory.values())
        lines.append(f"  {name:10}{len(mixers):3} layers  {n:14,} parameters {n / total:6.1%}  "
                     f"{unit(memory[kind]):>12} {share:6.1%}")
    return "\n".join(lines)
