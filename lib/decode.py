"""One token at a time, fast: what generation runs for a pure RWKV-7 model in place of LM.forward.

A step costs reading every weight once, and a microsecond or two for each operation, view and new tensor. LM, written to be
read and trained, takes 71 operations and 62 views for a layer; here they are 36 and 4, on weights that lie ready, in memory
that is allocated once. What can be computed once is: ln0 of the embedding, -e^-0.5, 1 - k_a, the gate's maps, halved; r, k
and v are one product, and so is each half of the four low-rank maps. On a GPU all of it is one launch, a CUDA graph. The
numbers are the same up to rounding, and model.py is the place to understand them. What it is not: another model, or faster
for more than one token at a time.

Names beyond model.py's: nu = sigmoid(v0 + x_v v1 v2), how much of v_first goes into v; stored = S kk, what S holds at kk.
"""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lib.states import tensors, tree_map
from model import LM, Block, State


class Decoder:
    """tokens (B,), state -> logits (B, V), state, as LM(tokens[:, None], state) gives them, from the state of some call
    of the model or of this. Holds copies of the weights.

    `dtype`: of the matrices alone, None = the model's; all between them, the state too, is float32.
    A model with attention, with rotary positions or norms in its RWKV heads, or in half precision goes through LM itself.
    """

    @torch.no_grad()
    def __init__(self, model: LM, dtype: torch.dtype | None = None):
        self.model, self.cfg, self.device, self.layers, self.B = model, model.cfg, model.emb.weight.device, None, 0
        if "a" not in self.cfg.mixers and not (self.cfg.rwkv_rope or self.cfg.qk_norm) and model.emb.weight.dtype.itemsize >= 4:
            self.layers, self.emb, self.head = [weights(b, dtype) for b in model.blocks], model.emb.weight.detach(), Product(model.head.weight.T, dtype=dtype)
            self.ln0, self.ln_out = norm(model.blocks[0].ln0) if self.cfg.ln0 else None, norm(model.ln_out)
            if self.ln0 and self.cfg.positions != "learned":  # else the position comes in between
                self.emb, self.ln0 = self.ln0(self.emb), None
            self.recorded = None
            # a recording has one position, and is made on the current device
            self.records = self.device.type == "cuda" and self.device.index == torch.cuda.current_device() and self.cfg.positions != "learned"
        elif dtype is not None:
            raise ValueError(f"dtype = {dtype}: only a pure RWKV-7 model in float32, without rwkv_rope and qk_norm, takes another; "
                             "keep float32 for this one, or use model.to(dtype)")

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        if self.layers is None:
            logits, state = self.model(tokens[:, None], state)
            return logits[:, 0], state
        if self.B != len(tokens):
            self.B, self.recorded, self.scratch = 0, None, scratch(self.layers[0], len(tokens))
            self.recorded = Recorded(self.step, tokens, state) if self.records else None
            self.B = len(tokens)
        if self.recorded:
            return self.recorded(tokens, state)
        threads = torch.get_num_threads()
        if self.B == 1 and self.layers[0].output.parts == 1:
            torch.set_num_threads(1)  # one token of a small model is too little work to share: waiting would take longer
        try:
            return self.step(tokens, state)
        finally:
            torch.set_num_threads(threads)

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        x, v_first, after = self.emb[tokens], None, []                                             # x (B, C)
        if self.cfg.positions == "learned":
            x = x + self.model.pos(self.model.position_ids(state.position, 1))
        x = self.ln0(x) if self.ln0 else x
        for p, ((last, S, _), ffn) in zip(self.layers, state.layers):
            x, v_first, last, S = time_mix(p, self.scratch, x, v_first, last, S)
            x, ffn = channel_mix(p, x, ffn)
            after.append(((last, S, state.position + 1), ffn))
        return self.head(self.ln_out(x)), State(state.position + 1, tuple(after))


class Recorded:
    """A step as a CUDA graph: one launch instead of 36 for each layer.

    A graph reads and writes the memory it was recorded with, so what comes in is copied there, and what comes out away from
    there: a state stays a value.
    """

    def __init__(self, step: Callable, tokens: Tensor, state: State):
        self.tokens, self.state = tokens.clone(), tree_map(torch.clone, state)
        self.replay, self.written = record(lambda: step(self.tokens, self.state))

    def __call__(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        self.tokens.copy_(tokens)
        torch._foreach_copy_(tensors(self.state), tensors(state))  # all of one type: one launch
        self.replay()
        logits, after = result = tree_map(torch.empty_like, self.written)
        torch._foreach_copy_(tensors(result), tensors(self.written))
        position = state.position + 1  # Python's numbers are not in the graph
        return logits, State(position, tuple(((last, S, position), ffn) for (last, S, _), ffn in after.layers))


def record(step: Callable) -> tuple[Callable[[], None], tuple]:
    """What repeats `step` with its memory of now, and what it returns, in memory that each repetition writes anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what happens in a first run alone, such as cuBLAS taking its workspace, must not be recorded
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


def time_mix(p: SimpleNamespace, s: SimpleNamespace, x: Tensor, v_first: Tensor | None, last: Tensor, S: Tensor) -> tuple[Tensor, ...]:
    """x + TimeMixer(ln1(x)) for x (B, C), with the weights p and the memory s; v_first, and the new last x and S."""
    x1 = p.ln1(x)
    torch.lerp(x1, last, p.mix, out=s.mixed)                        # token shift for r, k, v; g, w, a, v      (7, B, C)
    p.rkv(s.mixed_rkv, p.rkv_bias, out=s.rkv)                       # r, k, v                                  (3, B, A)
    p.down(s.mixed_low, out=s.inner)                                # the low-rank maps, side by side          (4, B, rank)
    s.inner_g_w.tanh_()
    p.up(s.inner, p.up_bias, out=s.low)                             # gate, w, a, nu                           (4, B, A)
    s.w_a_nu.sigmoid_()
    if v_first is None:
        v_first = s.v.clone()
    else:
        s.v.lerp_(v_first, s.nu)
    torch.mul(s.k, p.k_k, out=s.kk)
    s.kk.div_(torch.linalg.vector_norm(s.kk, dim=-1, keepdim=True).clamp_min_(1e-12))
    s.k.mul_(torch.addcmul(p.k_1, s.a, p.k_a))                      # k (1 + (a - 1) k_a)
    # S <- S diag(e^w) - (S kk)(kk * a)^T + v k^T, y = S r; in rows, S kk is kk^T S^T
    torch.bmm(s.kk_row, S.flatten(0, 1).mT, out=s.stored_row)
    S = S * s.w.mul_(p.minus).exp_()
    S.addcmul_(s.stored, s.kk.mul_(s.a), value=-1).addcmul_(s.v_column, s.k)
    torch.bmm(s.r_row, S.flatten(0, 1).mT, out=s.y_row)
    s.v.mul_(s.r.mul_(s.k).mul_(p.r_k).sum(-1, keepdim=True))       # the bonus
    y = p.ln_x(s.y).add_(s.v_flat).mul_(s.gate)
    return p.output(y, x), v_first, x1, S


def channel_mix(p: SimpleNamespace, x: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x + ffn(ln2(x)) for x (B, C), with ChannelMix or MLP."""
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


def weights(block: Block, dtype: torch.dtype | None) -> SimpleNamespace:
    """A block's weights as the two functions above want them. What a switch leaves out becomes zeros, which do nothing."""
    product = partial(Product, dtype=dtype)
    m, f, cfg = block.att, block.ffn, block.att.cfg
    C, A, head = m.key.in_features, m.key.out_features, (m.H, 1, m.N)
    get = lambda name, *shape: getattr(m, name) if hasattr(m, name) else m.w0.new_zeros(shape)  # noqa: E731
    rkv = (m.receptance, m.key, m.value)
    # The gate goes through tanh beside the decay: sigmoid(h) = (1 + tanh(h/2)) / 2, so sigmoid(h) g2 = tanh(h/2) g2/2 + sum(g2)/2
    g2 = get("g2", 1, A) / 2
    downs, ups = (get("g1", C, 1) / 2, m.w1, m.a1, get("v1", C, 1)), (g2, m.w2, m.a2, get("v2", 1, A))
    rank = max(cfg.rank(kind) for kind in ("wavg" if cfg.gate else "wav"))  # in every layer the same: they share scratch's memory
    return SimpleNamespace(
        H=m.H, N=m.N, rank=rank, kind=cfg.ffn, minus=m.w0.new_tensor(-math.exp(-0.5)),  # a tensor: a number costs a microsecond more
        ln1=norm(block.ln1), ln2=norm(block.ln2), ln_x=norm(m.ln_x) if cfg.group_norm else torch.clone,
        mix=torch.cat([get("x_" + c, 1, 1, C) for c in "rkvgwav"]),
        rkv=product(torch.stack([q.weight.T for q in rkv])),
        rkv_bias=torch.stack([q.bias for q in rkv])[:, None] if cfg.qkv_bias else None,
        down=product(torch.stack([F.pad(d, (0, rank - d.shape[1])) for d in downs])),
        up=product(torch.stack([F.pad(u, (0, 0, 0, rank - len(u))) for u in ups])),
        # without a gate g2 is 0, and the bias of 1 is its factor
        up_bias=torch.stack((g2.sum(0, keepdim=True) if cfg.gate else torch.ones_like(m.w0[0]), m.w0[0], m.a0[0], get("v0", 1, 1, A)[0])),
        k_k=m.k_k.view(head).clone(), k_a=m.k_a.view(head).clone(), k_1=1 - m.k_a.view(head), r_k=get("r_k", m.H, m.N).view(head).clone(),
        output=product(m.output.weight.T, m.output.bias),
        x_k=f.x_k[0].clone() if cfg.ffn == "channelmix" else None,
        ffn_key=product(f.key.weight.T, f.key.bias),
        ffn_gate=product(f.gate.weight.T, f.gate.bias) if cfg.ffn == "swiglu" else None,
        ffn_value=product(f.value.weight.T, f.value.bias, sparse=cfg.ffn in ("relu2", "channelmix")))


def scratch(p: SimpleNamespace, B: int) -> SimpleNamespace:
    """The memory of one step, used by layer after layer, with every view of it that time_mix needs."""
    H, N, A, new = p.H, p.N, p.H * p.N, p.mix.new_empty
    s = SimpleNamespace(mixed=new(7, B, p.mix.shape[2]), rkv=new(3, B, A), inner=new(4, B, p.rank), low=new(4, B, A), kk=new(B, H, 1, N),
                        stored_row=new(B * H, 1, N), y=new(B, A))
    s.mixed_rkv, s.mixed_low, s.inner_g_w, s.gate, s.w_a_nu = s.mixed[:3], s.mixed[3:], s.inner[:2], s.low[0], s.low[1:]
    s.r, s.k, s.v = s.rkv.view(3, B, H, 1, N)
    s.w, s.a, s.nu = s.w_a_nu.view(3, B, H, 1, N)
    s.r_row, s.kk_row, s.y_row = s.r.flatten(0, 1), s.kk.flatten(0, 1), s.y.view(B * H, 1, N)
    s.v_flat, s.v_column, s.stored = s.v.view(B, A), s.v.mT, s.stored_row.view(B, H, N, 1)
    return s


class Product:
    """x, add -> x W + add + bias, for x (B, C) and W (C, A), or G of them at once: x (G, B, C) and W (G, C, A).

    For one text on a CPU W's rows are added up by embedding_bag (mode 0: the sum), which streams memory at 1.5 times the speed
    of the BLAS (measured 32 against 20 GB/s; in 16 bits 27 against 10 for bfloat16, 1 for float16); from 2^18 numbers on in
    `parts`, one for each thread (33 to 41 GB/s with two). Otherwise it is a matrix product. Where W has another dtype, x is
    converted to it and the result back.
    `sparse`, for a single product: rows that meet a zero of x are not read. After relu that is half of them, in trained models
    nine tenths.
    """

    def __init__(self, W: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None, sparse: bool = False):
        self.W, self.bias, self.sparse = W.detach().to(dtype or W.dtype).contiguous(), bias, sparse
        *G, C, A = W.shape
        assert not (G and sparse), "zeros are skipped in one product, not in G"
        self.mm, self.addmm = (torch.bmm, torch.baddbmm) if G else (torch.mm, torch.addmm)
        least = 2**17 if self.W.dtype == torch.float32 else 0  # numbers; with fewer, the call costs more than the reading
        self.by_rows = W.device.type == "cpu" and self.W.dtype.itemsize <= 4 and W.numel() >= least
        self.parts = max(1, min(torch.get_num_threads(), C)) if self.by_rows and W.numel() >= 2**18 else 1
        self.shape, rows = (*G, 1, A), W.numel() // A
        self.rows, self.index = self.W.view(-1, A), torch.arange(rows)
        self.starts = torch.tensor([row + C * part // self.parts for row in range(0, rows, C) for part in range(self.parts)])

    def __call__(self, x: Tensor, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if self.by_rows and x.shape[-2] == 1:
            index, starts, factors = self.index, self.starts, x.view(-1)
            if self.sparse:
                index = factors.nonzero().view(-1)
                starts, factors = torch.tensor([len(index) * part // self.parts for part in range(self.parts)]), factors[index]
            y = torch.embedding_bag(self.rows, index, starts, mode=0, per_sample_weights=factors.to(self.W.dtype))[0].to(x.dtype)
            y = (y.unflatten(0, (-1, self.parts)).sum(1) if self.parts > 1 else y).view(self.shape)
        elif self.W.dtype != x.dtype:
            y = self.mm(x.to(self.W.dtype), self.W).to(x.dtype)
        else:
            y = self.mm(x, self.W, out=out) if add is None else self.addmm(add, x, self.W, out=out)
            add = out = None
        if add is not None:
            y = torch.add(y, add, out=out)
        elif out is not None:
            y = out.copy_(y)
        return y if self.bias is None else y.add_(self.bias)


def norm(m: nn.Module) -> Callable[[Tensor], Tensor]:
    """A norm as a plain function: calling the module costs as much as the work, at this size."""
    if isinstance(m, nn.RMSNorm):
        return m
    w, b, eps = m.weight.detach(), None if m.bias is None else m.bias.detach(), m.eps
    if isinstance(m, nn.GroupNorm):
        groups = m.num_groups
        return lambda x: torch.group_norm(x, groups, w, b, eps)
    shape = m.normalized_shape
    return lambda x: torch.layer_norm(x, shape, w, b, eps)


def optimize_for_inference(model: LM, dtype: torch.dtype | None = None) -> Decoder:
    """A model made ready to generate: the Decoder above. Change the weights afterwards and it goes on with the old ones.

    Raises ValueError for a dtype where LM itself has to do the work.
    """
    return Decoder(model, dtype)

