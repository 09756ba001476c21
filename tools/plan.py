"""What a model costs, on paper: parameters, memory for training, before it is built.

    python -m tools.plan config/rwkv7-3b.toml --gpus 8        per GPU, with 8 of them
    python -m tools.plan config/qwen2-7b.toml --gpus 8 --teacher

Its settings are train.py's. The model is on the meta device, with shapes but no memory.
A training step of DistributedDataParallel holds per GPU, in bytes, for P parameters

    weights 4 P    AdamW's two moments 8 P; Muon has one of the blocks' matrices
    gradients 4 P, and DDP's buckets 4 P more where N > 1
    activations    what the backward pass needs of each token: activation_floats

so more GPUs read more tokens a step, but none of them holds less. With --shard each
of N GPUs holds an Nth of weights, gradients and moments, and what is gathered: the root
(embedding and head), two blocks, the gradients of root and block. --teacher counts one
of the same shape beside it, sharded as the model is. All is in float32, which is what
the CPU computes in and what the tests measure. On a GPU autocast halves the activations
of the matrix products, and adds a bfloat16 copy of every matrix, 2 P: for large models
with few tokens that is more. What it is not: a profiler; what one layer's backward pass
needs for a moment is not in it.
"""

from dataclasses import replace

from config import at_least, cli, run, settings
from kernels import chunk_of
from lib.folders import check_start, on_paper, open_model
from lib.hybrid import describe, unit
from model import ModelConfig
from train import FitConfig, TrainConfig, param_groups


@settings
class PlanConfig(TrainConfig):
    gpus: int = at_least(1, 1)
    teacher: bool = False         # one with attention stands beside the model, as in distill.py


# ------------------------------------------------------------------------------------------
# Activations: numbers per token that autograd keeps for the backward pass, on each line
# those of the tensors named beside it. A product keeps both factors, a matrix product
# its input, a nonlinearity its input or its output.

def activation_floats(cfg: ModelConfig, T: int) -> float:
    """Of the whole model, reading sequences of T tokens."""
    attention, rwkv = (cfg.mixers.count(kind) for kind in "ar")
    # x, its mean and deviation; rmsnorm: x, x / rms, rms
    norm = cfg.n_embd + 2 if cfg.norm == "layernorm" else 2 * cfg.n_embd + 1
    residual = 2 * (cfg.rwkv_width) + cfg.rank("v")               # v, its sigmoid, x_v v1
    return (attention * attention_floats(cfg)
            + rwkv * time_mixer_floats(cfg, T)
            + max(0, rwkv - 1) * residual                                      # the first RWKV layer has none
            + cfg.n_layer * ffn_floats(cfg)
            + (cfg.ln0 + 2 * cfg.n_layer + 1) * norm                           # ln0; ln1 and ln2; ln_out
            + cfg.n_embd                                                       # head's input
            + cfg.vocab_size)                                                  # log probabilities


def attention_floats(cfg: ModelConfig) -> int:
    """Of CausalSelfAttention."""
    q, kv = cfg.n_head * cfg.att_head_size, cfg.kv_heads * cfg.att_head_size
    return (cfg.n_embd                                   # x
            + q + 2 * kv                                 # q, k, v
            + q + cfg.n_head                             # y, the softmax's sum
            + q * (cfg.positions == "rope")              # y in o_proj's order
            + 2 * (q + kv) * cfg.qk_norm)                # q and k before the norm, and divided by their rms


def time_mixer_floats(cfg: ModelConfig, T: int) -> float:
    """Of TimeMixer, without the value residual."""
    C, A, N = cfg.n_embd, cfg.rwkv_width, cfg.rwkv_head_size
    H = A // N
    return (C * cfg.token_shift                          # x_{t-1} - x_t
            + (5 + cfg.gate) * C                         # the mixes for r, k, v, w, a and gate
            + 4 * A * cfg.qk_norm                        # r and k before the norm, and divided by their rms
            + cfg.rank("w") + A                          # tanh(x_w w1), w's sigmoid
            + cfg.rank("a") + A                          # x_a a1, a
            + 2 * A + 2 * H                              # k, k k_k, its length before and after the clamp
            + 2 * A                                      # a - 1, 1 + (a - 1) k_a
            + A                                          # kk
            + operator_floats(A, N, T)
            + (A + 2 * H) * cfg.group_norm               # y, its mean and deviation
            + (3 + cfg.bonus) * A + H                    # r, k, v, r k; the sum
            + (cfg.rank("g") + 2 * A) * cfg.gate         # sigmoid(x_g g1), gate, y
            + A)                                         # output's input


def operator_floats(A: int, N: int, T: int) -> float:
    """Of wkv7 in chunks of L tokens, by the names in WKV7Chunk; one number per chunk
    and head is A / (L N) per token.

    Below 16 tokens wkv7 takes its loop, which keeps two to three times as much.
    """
    L = chunk_of(T)
    return (4 * A                                        # decay, grow: 2L x N
            + 4 * A                                      # zr, bk: 2L x N
            + 4 * L * A / N                              # the four products: 2L x 2L
            + L * A / N                                  # X: L x L
            + A                                          # P: L x N
            + 2 * A                                      # UV: 2L x N
            + N * A / L)                                 # states: N x N


def ffn_floats(cfg: ModelConfig) -> int:
    """Of MLP or ChannelMix."""
    C, width = cfg.n_embd, cfg.ffn_width
    return (C                                            # key's input
            + C * (cfg.ffn == "channelmix")              # x_{t-1} - x_t
            + width                                      # key's output; relu's where there is one
            + 2 * width * (cfg.ffn == "swiglu")          # gate's output, silu's
            + width)                                     # value's input


def checkpointed_floats(cfg: ModelConfig, T: int) -> float:
    """Of a model whose blocks are run again in the backward pass (--checkpoint_blocks):
    the blocks' inputs, v_first, and all of one block.
    """
    one = max(activation_floats(replace(cfg, n_layer=1, mixer=letter), T) for letter in set(cfg.mixers))
    residual = 3 * cfg.rwkv_width + cfg.rank("v") if cfg.mixers.count("r") > 1 else 0
    return cfg.n_layer * cfg.n_embd + residual + one


# ------------------------------------------------------------------------------------------
# The plan

def training_bytes(cfg: ModelConfig, B: int, T: int, n_gpus: int = 1, shard: bool = False,
                   checkpointed: bool = False, teacher: bool = False, muon: bool = False) -> dict[str, float]:
    """Bytes on each GPU at a step's peak, the end of a forward pass, by what they hold;
    B sequences of T tokens on each.

    Gradients are counted in full: with accum > 1 or DDP they exist already when the
    last forward pass ends. On top comes the logits' gradient, twice, as the backward
    pass of the loss makes it. Raises ValueError for n_gpus < 1.
    """
    if n_gpus < 1:
        raise ValueError(f"gpus = {n_gpus}: it is the number of GPUs, at least 1")
    (P, root, block), n = sizes(cfg), n_gpus if shard else 1
    P_t, root_t, block_t = sizes(replace(cfg, mixer="a")) if teacher else (0, 0, 0)
    floats = checkpointed_floats(cfg, T) if checkpointed else activation_floats(cfg, T)
    return {
        "weights": 4 * P / n,
        "gradients": 4 * P / n,
        **({"DDP's buckets": 4 * P} if n_gpus > 1 and not shard else {}),
        "optimizer": 4 * moments(cfg, muon) / n,
        **({"gathered": 4 * (root + 2 * block) + 4 * (root + block)} if shard else {}),
        **({"teacher": 4 * (P_t / n + (root_t + block_t) * shard)} if teacher else {}),
        "activations": 4 * B * T * floats,
        "logits' gradient": 4 * B * T * 2 * cfg.vocab_size,
    }


def sizes(cfg: ModelConfig) -> tuple[int, int, int]:
    """Parameters of the model, of all but its blocks, and of its largest block."""
    model = on_paper(cfg)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    return model.n_params(), model.n_params() - sum(blocks), max(blocks)


def moments(cfg: ModelConfig, muon: bool) -> int:
    """Numbers that the optimizer keeps: two for each parameter, one for Muon's."""
    groups = param_groups(on_paper(cfg), FitConfig(optimizer="muon" if muon else "adamw"))
    return sum((1 if group["muon"] else 2) * p.numel() for group in groups for p in group["params"])


def plan(cfg: ModelConfig, B: int, accum: int, T: int, n_gpus: int, **how: bool) -> str:
    """The whole plan for people: describe, memory per GPU, and what a step reads.

    T: tokens whose activations exist at once; `how` is training_bytes'.
    """
    columns = [training_bytes(cfg, B, T, n_gpus, shard, **how) for shard in ((False, True)[: min(2, n_gpus)])]
    lines = [
        describe(cfg, cfg.block_size),
        f"training in float32, per GPU of {n_gpus}, {B} x {T:,} tokens at once:",
    ]
    lines += [f"{'':20}{'with DDP':>12}{'--shard':>12}"] * (n_gpus > 1)
    for name in dict.fromkeys(name for parts in columns for name in parts):
        lines.append(f"  {name:18}" + "".join(f"{unit(parts.get(name, 0)):>12}" for parts in columns))
    lines += [
        f"  {'together':18}" + "".join(f"{unit(sum(parts.values())):>12}" for parts in columns),
        f"a step reads {n_gpus * accum * B * cfg.block_size:,} tokens",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    cfg = cli(PlanConfig, argv)
    shape = open_model(cfg.init)[0].cfg if cfg.init else cfg.shape
    check_start(cfg, shape)
    T = min(shape.block_size, cfg.fit.bptt_chunk or shape.block_size)
    how = {"checkpointed": cfg.run.checkpoint_blocks, "teacher": cfg.teacher,
           "muon": cfg.fit.optimizer == "muon"}
    print(plan(shape, cfg.fit.batch_size, cfg.fit.accum, T, cfg.gpus, **how))


if __name__ == "__main__":
    run(main)
