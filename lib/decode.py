"""One token at a time, fast: what generates with a pure RWKV-7, in place of LM.forward.

A step costs reading every weight once, and a microsecond or two for each operation,
view and new tensor. LM, written to be read and trained, takes 71 operations and 62
views for a layer; here they are 36 and 4 (some more for large matrices), on weights
that lie ready, and most results go to memory that is allocated once. What can be
computed once is: ln0 of the embedding, -e^-0.5, 1 - k_a, the gate's maps, halved; r, k
and v are one product, and so is each half of the four low-rank maps. On a GPU all of it
is one launch, a CUDA graph. The numbers are the same up to rounding, and model.py is
the place to understand them. What it is not: another model, or faster for more than one
token at a time.

Names beyond model.py's: nu = sigmoid(v0 + x_v v1 v2), how much of v_first goes into v;
stored = S kk, what S holds at kk.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels.matvec import Matvec
from lib.processes import using_threads
from lib.states import tensors, tree_map
from model import MIN_LOG_DECAY, LM, Block, State, TimeMixer


class Decoder:
    """tokens (B,), state -> logits (B, V), state: those of LM(tokens[:, None], state).

    The state may come from any call of the model or of this. Reads some of the weights
    where they lie, and copies of others: after a change of the model make another. A
    model with attention, with rotary positions or norms in its RWKV heads, or in half
    precision goes through LM itself.

    `dtype`: of the matrices alone, None = the model's; all between them, the state too,
    is float32. Raises ValueError for one where LM itself has to do the work.
    """

    @torch.no_grad()
    def __init__(self, model: LM, dtype: torch.dtype | None = None):
        cfg = model.cfg
        self.model, self.cfg, self.device = model, cfg, model.emb.weight.device
        self.layers, self.B = None, 0                                 # B: texts that scratch has room for
        by_model = "a" in cfg.mixers or cfg.rwkv_rope or cfg.qk_norm or model.emb.weight.dtype.itemsize < 4
        if by_model and dtype is not None:
            raise ValueError(f"dtype = {str(dtype)[6:]}: only a pure RWKV-7 model in float32, without "
                             "rwkv_rope and qk_norm, takes another; keep float32 for this one")
        if by_model:
            return
        self.layers = [weights(block, dtype) for block in model.blocks]
        self.head = Matvec(model.head.weight, dtype=dtype)
        self.ln0 = norm(model.blocks[0].ln0) if cfg.ln0 else None
        self.ln_out = norm(model.ln_out)
        self.emb = model.emb.weight.detach()
        if self.ln0 and cfg.positions != "learned":                   # else the position comes in between
            self.emb, self.ln0 = self.ln0(self.emb), None
        # a recording has one position, and is made on the current device
        on_current = self.device.type == "cuda" and self.device.index == torch.cuda.current_device()
        self.records = on_current and cfg.positions != "learned"
        self.recorded = None

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        if self.layers is None:
            logits, state = self.model(tokens[:, None], state)
            return logits[:, 0], state
        if self.B != len(tokens):
            self.make_room(tokens, state)
        if self.recorded:
            return self.recorded(tokens, state)
        # matrices too small to divide: a second thread would only wait
        alone = self.B == 1 and self.layers[0].output.threads == 1
        with using_threads(1 if alone else torch.get_num_threads()):
            return self.step(tokens, state)

    def make_room(self, tokens: Tensor, state: State) -> None:
        """For steps of as many texts as there are tokens."""
        self.B, self.recorded = 0, None                               # as if new, should this fail
        self.scratch = scratch(self.layers[0], len(tokens))
        if self.records:
            self.recorded = Recorded(self.step, tokens, state)
        self.B = len(tokens)

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        x, v_first, after = F.embedding(tokens, self.emb), None, []   # x (B, C); as LM, no token -1
        if self.cfg.positions == "learned":
            x = x + self.model.pos(self.model.position_ids(state.position, state.position + 1))
        x = self.ln0(x) if self.ln0 else x
        position = state.position + 1
        for p, ((last, S, _), ffn) in zip(self.layers, state.layers):
            x, v_first, last, S = time_mix(p, self.scratch, x, v_first, last, S)
            x, ffn = channel_mix(p, x, ffn)
            after.append(((last, S, position), ffn))
        return self.head(self.ln_out(x)), State(position, tuple(after))


# ------------------------------------------------------------------------------------------
# As a CUDA graph

class Recorded:
    """A step as a CUDA graph: one launch instead of 36 for each layer.

    A graph reads and writes the memory it was recorded with, so what comes in is copied
    there, and what comes out away from there: a state stays a value.
    """

    def __init__(self, step: Callable, tokens: Tensor, state: State):
        self.tokens, self.state = tokens.clone(), tree_map(torch.clone, state)
        self.replay, self.written = record(lambda: step(self.tokens, self.state))

    def __call__(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        self.tokens.copy_(tokens)
        torch._foreach_copy_(tensors(self.state), tensors(state))     # all of one type: one launch
        self.replay()
        result = tree_map(torch.empty_like, self.written)
        torch._foreach_copy_(tensors(result), tensors(self.written))
        logits, after = result
        position = state.position + 1                                 # Python's numbers are not in the graph
        layers = tuple(((last, S, position), ffn) for (last, S, _), ffn in after.layers)
        return logits, State(position, layers)


def record(step: Callable) -> tuple[Callable[[], None], tuple]:
    """What repeats `step` with its memory of now, and what `step` returns.

    The latter lies in memory that each repetition writes anew.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # what happens in a first run alone, such as cuBLAS taking its workspace, must
        # not be recorded
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


# ------------------------------------------------------------------------------------------
# The two halves of a layer

def time_mix(p: SimpleNamespace, s: SimpleNamespace, x: Tensor, v_first: Tensor | None, last: Tensor,
             S: Tensor) -> tuple[Tensor, ...]:
    """x + TimeMixer(ln1(x)) for x (B, C), v_first, and the new last x and S.

    p: the layer's `weights`, s: the step's `scratch`.
    """
    x1 = p.ln1(x)
    torch.lerp(x1, last, p.mix, out=s.mixed)              # token shift for r, k, v; g, w, a, v     (7, B, C)
    p.rkv(s.mixed_rkv, p.rkv_bias, out=s.rkv)             # r, k, v                                 (3, B, A)
    p.down(s.mixed_low, out=s.inner)                      # the low-rank maps, side by side      (4, B, rank)
    s.inner_g_w.tanh_()
    p.up(s.inner, p.up_bias, out=s.low)                   # gate, w, a, nu                          (4, B, A)
    s.w_a_nu.sigmoid_()
    if v_first is None:
        v_first = s.v.clone()
    else:
        s.v.lerp_(v_first, s.nu)
    torch.mul(s.k, p.k_k, out=s.kk)
    s.kk.div_(torch.linalg.vector_norm(s.kk, dim=-1, keepdim=True).clamp_min_(1e-12))
    s.k.mul_(torch.addcmul(p.k_1, s.a, p.k_a))            # k (1 + (a - 1) k_a)
    # S <- S diag(e^w) - (S kk)(kk * a)^T + v k^T, y = S r; in rows, S kk is kk^T S^T
    torch.bmm(s.kk_row, S.flatten(0, 1).mT, out=s.stored_row)
    S = S * s.w.mul_(p.min_log_decay).exp_()
    S.addcmul_(s.stored, s.kk.mul_(s.a), value=-1).addcmul_(s.v_column, s.k)
    torch.bmm(s.r_row, S.flatten(0, 1).mT, out=s.y_row)
    s.v.mul_(s.r.mul_(s.k).mul_(p.r_k).sum(-1, keepdim=True))    # the bonus
    y = p.ln_x(s.y).add_(s.v_flat).mul_(s.gate)
    return p.output(y, x), v_first, x1, S


def channel_mix(p: SimpleNamespace, x: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x + ffn(ln2(x)) for x (B, C), with ChannelMix or MLP, and the new last x."""
    x2 = p.ln2(x)
    k = p.ffn_key(x2 if last is None else torch.lerp(x2, last, p.x_k))
    if p.kind == "swiglu":
        k.mul_(F.silu(p.ffn_gate(x2)))
    elif p.kind in ("gelu", "gelu_exact"):
        k = F.gelu(k, approximate="tanh" if p.kind == "gelu" else "none")
    else:
        k.relu_()
        k.mul_(k)
    return p.ffn_value(k, x), None if last is None else x2


# ------------------------------------------------------------------------------------------
# Their weights and memory

def weights(block: Block, dtype: torch.dtype | None) -> SimpleNamespace:
    """A block's weights as the functions above want them, its matrices in `dtype`."""
    m, f, cfg = block.att, block.ffn, block.att.cfg
    head = (m.H, 1, m.N)
    gated, sparse = cfg.ffn == "swiglu", cfg.ffn in ("relu2", "channelmix")
    return SimpleNamespace(
        H=m.H, N=m.N, kind=cfg.ffn,
        ln1=norm(block.ln1), ln2=norm(block.ln2), ln_x=norm(m.ln_x),
        **receptance_key_value(m, dtype), **low_rank_maps(m, dtype),
        min_log_decay=m.w0.new_tensor(MIN_LOG_DECAY),      # a tensor: a number costs a microsecond more
        k_k=m.k_k.view(head).clone(), k_a=m.k_a.view(head).clone(), k_1=1 - m.k_a.view(head),
        r_k=m.r_k.view(head).clone(),
        output=Matvec(m.output.weight, m.output.bias, dtype),
        x_k=f.x_k[0].clone() if cfg.ffn == "channelmix" else None,
        ffn_key=Matvec(f.key.weight, f.key.bias, dtype),
        ffn_gate=Matvec(f.gate.weight, f.gate.bias, dtype) if gated else None,
        ffn_value=Matvec(f.value.weight, f.value.bias, dtype, sparse))


def receptance_key_value(m: TimeMixer, dtype: torch.dtype | None) -> dict:
    """The token shift of all inputs, and the maps of the first three as one product."""
    projections = (m.receptance, m.key, m.value)
    bias = None
    if m.cfg.qkv_bias:
        bias = torch.stack([proj.bias for proj in projections])[:, None]                  # (3, 1, A)
    return {"mix": torch.cat([m.x_r, m.x_k, m.x_v, m.x_g, m.x_w, m.x_a, m.x_v]),          # (7, 1, C)
            "rkv": Matvec(torch.stack([proj.weight for proj in projections]), dtype=dtype),
            "rkv_bias": bias}


def low_rank_maps(m: TimeMixer, dtype: torch.dtype | None) -> dict:
    """The maps of gate, w, a and nu side by side; zeros make their ranks equal.

    The gate goes through tanh beside the decay: sigmoid(h) = (1 + tanh(h/2)) / 2, so
    sigmoid(h) g2 = tanh(h/2) g2/2 + sum(g2)/2. Without a gate g2 is 0, and the bias of
    1 is its factor.
    """
    cfg, A = m.cfg, m.key.out_features
    g2 = m.g2 / 2
    v0, v1, v2 = torch.zeros_like(m.w0), torch.zeros_like(m.w1), torch.zeros_like(m.w2)
    if not m.first:
        v0, v1, v2 = m.v0, m.v1, m.v2
    # the same in every layer, for scratch is shared; without a gate g1 is cut to it
    rank = max(cfg.rank(kind) for kind in ("wavg" if cfg.gate else "wav"))
    down = [F.pad(d.T, (0, 0, 0, rank - d.shape[1])) for d in (m.g1 / 2, m.w1, m.a1, v1)] # each (rank, C)
    up = [F.pad(u.T, (0, rank - len(u))) for u in (g2, m.w2, m.a2, v2)]                   # each (A, rank)
    gate_bias = g2.sum(0) if cfg.gate else m.w0.new_ones(A)
    biases = [gate_bias, m.w0.view(A), m.a0.view(A), v0.view(A)]
    return {"rank": rank, "down": Matvec(torch.stack(down), dtype=dtype),
            "up": Matvec(torch.stack(up), dtype=dtype), "up_bias": torch.stack(biases)[:, None]}


def scratch(p: SimpleNamespace, B: int) -> SimpleNamespace:
    """The memory of a step, for all layers, with every view that time_mix needs."""
    H, N, A, C = p.H, p.N, p.H * p.N, p.mix.shape[2]
    new = p.mix.new_empty
    s = SimpleNamespace()
    s.mixed = new(7, B, C)
    s.mixed_rkv, s.mixed_low = s.mixed[:3], s.mixed[3:]
    s.rkv = new(3, B, A)
    s.r, s.k, s.v = s.rkv.view(3, B, H, 1, N)
    s.inner = new(4, B, p.rank)
    s.inner_g_w = s.inner[:2]
    s.low = new(4, B, A)
    s.gate, s.w_a_nu = s.low[0], s.low[1:]
    s.w, s.a, s.nu = s.w_a_nu.view(3, B, H, 1, N)
    s.kk = new(B, H, 1, N)
    s.r_row, s.kk_row = s.r.flatten(0, 1), s.kk.flatten(0, 1)
    s.v_flat, s.v_column = s.v.view(B, A), s.v.mT
    s.stored_row = new(B * H, 1, N)
    s.stored = s.stored_row.view(B, H, N, 1)
    s.y = new(B, A)
    s.y_row = s.y.view(B * H, 1, N)
    return s


def norm(m: nn.Module) -> Callable[[Tensor], Tensor]:
    """A norm as a function: calling a module costs as much as the work at this size."""
    if isinstance(m, nn.RMSNorm):
        return m
    if isinstance(m, nn.Identity):
        return torch.clone                                            # what it returns is written into
    weight, bias, eps = m.weight.detach(), None if m.bias is None else m.bias.detach(), m.eps
    if isinstance(m, nn.GroupNorm):
        groups = m.num_groups
        return lambda x: torch.group_norm(x, groups, weight, bias, eps)
    shape = m.normalized_shape
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
