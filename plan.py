"""What a model costs, on paper: parameters, memory for training and memory for reading, before anything is built.

    python train.py config/rwkv7-3b.toml --plan 8        per GPU, with 8 of them
    describe(cfg, T)                                     attention and RWKV-7 of a hybrid side by side, after T tokens

The model is made on the meta device, which has shapes but no memory. A training step of DistributedDataParallel holds on every GPU

    weights 4 P    gradients 4 P, and DDP's buckets 4 P more where N > 1    AdamW's two moments 8 P      bytes, for P parameters
    activations    what the backward pass needs of each token, of B sequences of T tokens: activation_floats

so more GPUs read more tokens a step, but none of them holds less. All is in float32, which is what the CPU computes in and
what the tests measure; on a GPU bfloat16 halves the activations of the matrix products, so there it is an upper bound.
What it is not: a profiler; what one layer's backward pass needs for a moment is not in it.
"""

import torch

from model import LM, ModelConfig, cache_bytes

CHUNK = 32  # tokens of the operator's chunked form


def on_paper(cfg: ModelConfig) -> LM:
    """The model with shapes and without memory."""
    with torch.device("meta"):
        return LM(cfg)


def unit(n: float) -> str:
    """Bytes for people, in powers of 1000."""
    power = next((p for p, name in enumerate(("bytes", "kB", "MB", "GB")) if n < 1000 ** (p + 1)), 4)
    return f"{n / 1000**power:,.{0 if power == 0 else 2}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def describe(cfg: ModelConfig, T: int) -> str:
    """A table for people: layers, parameters of the mixers and memory of T tokens, of attention and of RWKV-7.

    Shares of parameters are of the whole model's, shares of memory of all that the mixers remember, in float32.
    Raises ValueError for T < 1.
    """
    if T < 1:
        raise ValueError(f"describe at T = {T} tokens: it must be at least 1")
    model = on_paper(cfg)
    total, memory = model.n_params(), {kind: cfg.mixers.count(kind) * cache_bytes(cfg, kind, T) for kind in "ar"}
    lines = [f"{cfg.n_layer} layers, {cfg.mixers}; {total:,} parameters; memory of {T:,} tokens: {unit(sum(memory.values()))}"]
    for kind, name in (("a", "attention"), ("r", "RWKV-7")):
        layers = [block.att for block, letter in zip(model.blocks, cfg.mixers) if letter == kind]
        n = sum(p.numel() for layer in layers for p in layer.parameters())
        share = memory[kind] / sum(memory.values())
        lines.append(f"  {name:10}{len(layers):3} layers  {n:14,} parameters {n / total:6.1%}  {unit(memory[kind]):>12} {share:6.1%}")
    return "\n".join(lines)


def activation_floats(cfg: ModelConfig, T: int) -> float:
    """Numbers per token that autograd keeps for the backward pass, read off model.py: T is the sequence's length.

    A product of two things keeps both, a matrix product its input, a nonlinearity its output, a norm its input.
    """
    C, A, H, F = cfg.n_embd, cfg.rwkv_size or cfg.n_embd, cfg.n_head, cfg.ffn_width
    q, kv = H * cfg.att_head_size, cfg.kv_heads * cfg.att_head_size
    norm = C + 2 if cfg.norm == "layernorm" else 2 * C + 1
    # x; q, k, v and y; the softmax's sum; with rope y once more in another order
    attention = C + 2 * q + 2 * kv + H + q * (cfg.positions == "rope") + (2 * q + 2 * kv) * cfg.qk_norm
    # x (channelmix: x_k and x_{t-1} - x_t); key's output and the nonlinearity's; swiglu: both of gate's and their product too
    ffn = {"swiglu": C + 4 * F, "channelmix": 2 * C + 2 * F}.get(cfg.ffn, C + 2 * F)
    # x_{t-1} - x_t and the mixes; sigmoids of w and a, what makes k, kk and kk * a of them, output's input; ranks of w and a
    H = A // cfg.rwkv_head_size
    rwkv = (C * (6 + cfg.gate) if cfg.token_shift else C) + 8 * A + 2 * H + cfg.rank("w") + cfg.rank("a")
    rwkv += (A + 2 * H) * cfg.group_norm + (4 * A + H) * cfg.bonus + (2 * A + cfg.rank("g")) * cfg.gate + 4 * A * cfg.qk_norm
    rwkv += operator_floats(A, cfg.rwkv_head_size, T)
    residual = 2 * A + cfg.rank("v")                       # v and its sigmoid, in every RWKV layer but the first
    a, r = (cfg.mixers.count(kind) for kind in "ar")
    return a * attention + r * rwkv + max(0, r - 1) * residual + cfg.n_layer * (2 * norm + ffn) + norm * (1 + cfg.ln0) + C + cfg.vocab_size


def operator_floats(A: int, N: int, T: int) -> float:
    """As activation_floats, of wkv7 in chunks of L tokens: W and 1/W, z~ r~, b~ k~, U v (2A each) and P; two matrices and an inverse
    of L x L a head, one S (N, N) a chunk."""
    L = min(CHUNK, -(-T // 16) * 16)
    return 11 * A + 5 * L * A / N + A * N / L


def training_bytes(cfg: ModelConfig, B: int, T: int, n_gpus: int = 1) -> dict[str, float]:
    """Bytes on each GPU at a step's peak, the end of a forward pass, by what they hold; B sequences of T tokens on each.

    Gradients count as if they were there already, as with --accum 2 or DDP they are; what autograd itself needs there is the
    gradient of the logits, twice. Raises ValueError for n_gpus < 1.
    """
    if n_gpus < 1:
        raise ValueError(f"plan = {n_gpus}: it is the number of GPUs, at least 1")
    P = on_paper(cfg).n_params()
    return {"weights": 4 * P, "gradients": 4 * P, **({"DDP's buckets": 4 * P} if n_gpus > 1 else {}), "optimizer": 8 * P,
            "activations": 4 * B * T * activation_floats(cfg, T), "logits' gradient": 4 * B * T * 2 * cfg.vocab_size}


def plan(cfg: ModelConfig, B: int, accum: int, T: int, n_gpus: int) -> str:
    """The whole plan for people: describe, memory per GPU, and what a step reads. T: tokens whose activations exist at once."""
    parts = training_bytes(cfg, B, T, n_gpus)
    lines = [describe(cfg, cfg.block_size), f"training in float32, per GPU of {n_gpus}, {B} x {T:,} tokens at once:"]
    lines += [f"  {name:18}{unit(n):>12}" for name, n in parts.items()]
    lines += [f"  {'together':18}{unit(sum(parts.values())):>12}", f"a step reads {n_gpus * accum * B * cfg.block_size:,} tokens"]
    return "\n".join(lines)
