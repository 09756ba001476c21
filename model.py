"""The language model: one class for the GPT teacher, its RWKV-7 student, hybrids of both, and RWKV-7 from scratch.

What it is: token embedding, a stack of blocks, a head. A block mixes over time and then over channels:

    x = x + att(ln1(x))        att: CausalSelfAttention (remembers every key and value) or TimeMixer (a state of fixed size)
    x = x + ffn(ln2(x))        ffn: MLP (gelu, swiglu, relu2) or ChannelMix (RWKV's)

What it is not: a trainer (train.py), a converter (distill.py), a kernel (wkv.py).

One contract, `mixer(x, v_first, state) -> (y, v_first, state)`, makes the two mixers interchangeable, and
`LM(tokens, state) -> (logits, state)` gives the same logits for a whole sequence, for pieces, and for single tokens.
Parameters bear the official RWKV-7 names, so that a pure RWKV-7 model's state_dict is the official .pth dict.

    B batch   T time   C channels (n_embd)   H heads   N head size   A = H N, all heads together   V vocabulary
    v_first   the value of the first RWKV layer; later RWKV layers mix it into their own (value residual)

References: nanoGPT (the GPT), RWKV-LM RWKV-v7/train_temp/src/model.py (RWKV-7 and its initial values), arXiv 2503.14456.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wkv import wkv7


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. GPT-2, Llama and RWKV-7 are settings of it; a student is its teacher's with other mixers."""

    vocab_size: int = 257        # the byte tokenizer's: 256 bytes and <|endoftext|>
    block_size: int = 256        # tokens per training sequence; a hard limit only for learned positions
    n_layer: int = 3
    n_embd: int = 96
    mixer: str = "a"             # one letter a layer, repeated (a = attention, r = RWKV-7), or all, first:K, ...: see mixer_letters
    # attention
    n_head: int = 3
    n_kv_head: int | None = None  # grouped heads: fewer keys and values than queries; None = n_head
    head_size: int | None = None  # None = n_embd / n_head
    positions: str = "rope"      # rope, learned, none
    rope_theta: float = 10000.0
    rope_scaling: str = "default"  # default, linear, llama3: slower turns, for texts longer than those of the first training
    rope_factor: float = 1.0     # how many times slower: every pair of channels, or for llama3 only pairs that turn
    rope_low: float = 1.0        # fewer than rope_low times within rope_original tokens; more than rope_high turns stay
    rope_high: float = 4.0       # as they are, and in between is between
    rope_original: int = 8192
    qk_norm: bool = False        # an RMS norm on every head's query and key
    qkv_bias: bool = False
    # RWKV-7; the switches are what recipes for converting transformers change, all on is the official layer
    rwkv_head_size: int = 32
    rwkv_size: int | None = None  # width of all heads together; None = n_embd
    rank_w: int | None = None    # ranks of the low-rank maps for decay, learning rate, value residual and gate;
    rank_a: int | None = None    # None = the official rule
    rank_v: int | None = None
    rank_g: int | None = None
    gate: bool = True
    group_norm: bool = True
    token_shift: bool = True
    bonus: bool = True
    rwkv_rope: bool = False      # rotate r, k and kk as attention does q and k
    # the rest of a block
    ffn: str = "relu2"           # gelu (GPT-2's, by tanh), gelu_exact, swiglu, relu2, channelmix
    ffn_size: int | None = None  # None = 4 n_embd; for swiglu two thirds of that
    norm: str = "layernorm"      # layernorm, rmsnorm
    norm_eps: float = 1e-5
    norm_bias: bool = True       # of layernorm
    bias: bool = False           # of the linear maps after attention and in the MLP
    o_bias: bool | None = None   # of the map after attention alone; None = bias
    ln0: bool = True             # a norm after the embedding, as RWKV has it
    tied: bool = False           # the head is the embedding's weight

    def __post_init__(self):
        for name, choices in (("positions", ("rope", "learned", "none")), ("norm", ("layernorm", "rmsnorm")),
                              ("rope_scaling", ("default", "linear", "llama3")),
                              ("ffn", ("gelu", "gelu_exact", "swiglu", "relu2", "channelmix"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} = {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        for f in fields(self):
            value = getattr(self, f.name)
            if "int" in str(f.type) and value is not None and value < 1:
                raise ValueError(f"{f.name} = {value}: it must be at least 1")
        self.mixers  # refuses a pattern that it does not understand
        if "a" in self.mixers and self.head_size is None and self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not divisible by n_head = {self.n_head}: change one, or set head_size")
        if "a" in self.mixers and self.n_head % self.kv_heads:
            raise ValueError(f"n_head = {self.n_head} is not a multiple of n_kv_head = {self.n_kv_head}: change one")
        if "a" in self.mixers and self.positions == "rope" and self.att_head_size % 2:
            raise ValueError(f"rope turns pairs of channels: head size {self.att_head_size} must be even")
        if "r" in self.mixers and self.rwkv_rope and self.rwkv_head_size % 2:
            raise ValueError(f"rope turns pairs of channels: rwkv_head_size {self.rwkv_head_size} must be even")
        if not (self.rope_theta > 0 and self.rope_factor > 0 and self.rope_high > self.rope_low):
            raise ValueError(f"rope_theta = {self.rope_theta}, rope_factor = {self.rope_factor}, rope_low = {self.rope_low}, rope_high = {self.rope_high}: "
                             "the first two must be positive, and the last one larger than the one before")
        if not 0 <= self.norm_eps < 1:
            raise ValueError(f"norm_eps = {self.norm_eps}: it must be at least 0 and less than 1")
        if "r" in self.mixers and (self.rwkv_size or self.n_embd) % self.rwkv_head_size:
            raise ValueError(f"RWKV's width {self.rwkv_size or self.n_embd} is not divisible by rwkv_head_size = {self.rwkv_head_size}: change one")

    @property
    def mixers(self) -> str:
        """One letter per layer."""
        return mixer_letters(self)

    @property
    def longest(self) -> int | None:
        """Most tokens that the model can read; None = any number. Only attention with learned positions has a limit."""
        return self.block_size if self.positions == "learned" and "a" in self.mixers else None

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def att_head_size(self) -> int:
        return self.head_size or self.n_embd // self.n_head

    @property
    def output_bias(self) -> bool:
        return self.bias if self.o_bias is None else self.o_bias

    @property
    def ffn_width(self) -> int:
        """Width of the feed-forward layer."""
        return self.ffn_size or (-(-8 * self.n_embd // 3 // 32) * 32 if self.ffn == "swiglu" else 4 * self.n_embd)

    def rank(self, kind: str) -> int:
        """Rank of the low-rank map `kind` in w, a, v, g: as set, or the official max(32, 32 round(m sqrt(C) / 32))."""
        m = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}[kind]
        return getattr(self, f"rank_{kind}") or max(32, 32 * round(m * self.n_embd**0.5 / 32))


def mixer_letters(cfg: ModelConfig) -> str:
    """The pattern cfg.mixer as one letter per layer, a for attention and r for RWKV-7; layers count from 0.

    Letters are repeated over the layers ("a", "rrra"). Every name says which layers are RWKV-7; the others are attention:
    `all`; `every:K`: 0, K, 2K, ...; `alternate`: every:2; `first:K`, `last:K`: K of them; a list such as `0,2,5`.
    `auto:T`: as many layers stay attention as fit. After T tokens the model may hold no more than it would with attention
    in every layer after block_size tokens. They are spread evenly, the last in the last layer.
    Raises ValueError for any other pattern, and for layers that the model does not have.
    """
    pattern, L = cfg.mixer, cfg.n_layer
    name, _, number = pattern.partition(":")
    if pattern and set(pattern) <= set("ar") and len(pattern) <= L:
        return (pattern * L)[:L]
    K = int(number) if number.isdecimal() else 0
    rwkv: set[int] | None = None
    if pattern in ("all", "alternate"):
        rwkv = set(range(0, L, 1 if pattern == "all" else 2))
    elif all(part.isdecimal() and int(part) < L for part in pattern.split(",")):
        rwkv = set(map(int, pattern.split(",")))
    elif name == "auto" and K >= 1:
        T, cache, fixed = K, cache_bytes(cfg, "a", 1), cache_bytes(cfg, "r", 1)  # bytes: per token; in all
        # the most attention layers n with n T cache + (L - n) fixed <= L block_size cache
        n = max((n for n in range(L + 1) if n * T * cache + (L - n) * fixed <= L * cfg.block_size * cache), default=0)
        rwkv = set(range(L)) - {(i + 1) * L // n - 1 for i in range(n)}
    elif 1 <= K <= L:
        rwkv = {"first": set(range(K)), "last": set(range(L - K, L)), "every": set(range(0, L, K))}.get(name)
    if rwkv is None:
        raise ValueError(f"mixer = {pattern!r}: with n_layer = {L} write a (attention) and r (RWKV-7) for up to {L} layers, all, alternate, first:K, "
                         f"last:K or every:K with K up to {L}, numbers of RWKV-7 layers from 0 to {L - 1} with commas, or auto:T for T tokens")
    return "".join("r" if i in rwkv else "a" for i in range(L))


def cache_bytes(cfg: ModelConfig, kind: str, T: int) -> int:
    """What a mixer of this kind, a or r, remembers of T tokens in float32: keys and values, or the last x and S."""
    A = cfg.rwkv_size or cfg.n_embd
    return 4 * (T * 2 * cfg.kv_heads * cfg.att_head_size if kind == "a" else cfg.n_embd + A * cfg.rwkv_head_size)


def remembered_bytes(cfg: ModelConfig, T: int) -> int:
    """What the whole model remembers of T tokens in float32, State.nbytes(): its mixers' caches, and ChannelMix's last x."""
    return sum(cache_bytes(cfg, kind, T) for kind in cfg.mixers) + 4 * cfg.n_embd * cfg.n_layer * (cfg.ffn == "channelmix")


@dataclass(frozen=True)
class State:
    """What a model remembers: a plain value that no call changes."""

    position: int    # tokens read so far
    layers: tuple    # for each (mixer's, ffn's): attention's (k, v) or TimeMixer's (last x, S, position); ChannelMix's last x or None

    def nbytes(self) -> int:
        """Bytes of all its tensors: constant for RWKV-7, growing with the text for attention."""
        return sum(x.nbytes for x in tensors(self))


def tree_map(fn: Callable, *trees):
    """fn of the tensors that stand at the same place of trees of one structure, in that structure.

    A tree is a nest of tuples and State; what else stands in it (positions, None) is taken from the first.
    """
    first = trees[0]
    if isinstance(first, Tensor):
        return fn(*trees)
    if isinstance(first, State):
        return State(first.position, tree_map(fn, *(tree.layers for tree in trees)))
    if not isinstance(first, tuple):
        return first
    parts = [tree_map(fn, *nodes) for nodes in zip(*trees, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)  # a NamedTuple stays one


def tensors(tree) -> list[Tensor]:
    """The tensors of a tree, in order."""
    found: list[Tensor] = []
    tree_map(found.append, tree)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Attention

def rope_frequencies(cfg: ModelConfig, N: int, device: torch.device) -> Tensor:
    """Radians per position for each pair of N channels, theta^(-2i/N), slowed down as cfg.rope_scaling says: (N/2,)."""
    freq = cfg.rope_theta ** (-torch.arange(0, N, 2, device=device, dtype=torch.float32) / N)
    if cfg.rope_scaling == "llama3":
        turns = freq * cfg.rope_original / (2 * math.pi)
        slow = ((cfg.rope_high - turns) / (cfg.rope_high - cfg.rope_low)).clamp(0, 1)
        return freq * (1 - slow + slow / cfg.rope_factor)
    return freq / cfg.rope_factor if cfg.rope_scaling == "linear" else freq


def rotate(x: Tensor, start: int, freq: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864): turn channel pairs (i, i + N/2) of x (B, H, T, N) by position times freq (N/2,)."""
    angle = torch.arange(start, start + x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * freq  # (T, N/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


class CausalSelfAttention(nn.Module):
    """Softmax attention with grouped heads. Its state is the cache of all keys and values: (k, v), each (B, Hkv, T, N)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg, self.n_head, self.n_kv, self.N = cfg, cfg.n_head, cfg.kv_heads, cfg.att_head_size
        self.q_proj = nn.Linear(cfg.n_embd, self.n_head * self.N, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.n_embd, self.n_kv * self.N, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.n_embd, self.n_kv * self.N, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(self.n_head * self.N, cfg.n_embd, bias=cfg.output_bias)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(self.N, eps=cfg.norm_eps) for _ in "qk")

    def qkv(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, N), keys and values (B, Hkv, T, N) of the tokens from position `start` on."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.N)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.cfg.positions == "rope":
            freq = rope_frequencies(self.cfg, self.N, x.device)
            q, k = rotate(q, start, freq), rotate(k, start, freq)
        return q, k, v

    def forward(self, x, v_first, state):
        B, T, _ = x.shape
        past = 0 if state is None else state[0].shape[2]
        q, k, v = self.qkv(x, past)
        if past:
            k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
        mask = None if past == 0 else torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=past == 0, enable_gqa=self.n_kv < self.n_head)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1)), v_first, (k, v)


# ---------------------------------------------------------------------------------------------------------------------
# RWKV-7

def shift(x: Tensor, last: Tensor | None) -> Tensor:
    """Each token's predecessor: x (B, T, C) moved one step on, with `last` (B, C), or zero, in front."""
    return torch.cat((torch.zeros_like(x[:, :1]) if last is None else last[:, None], x[:, :-1]), 1)


class TimeMixer(nn.Module):
    """RWKV-7 time mixing. Its state is (last x (B, C), S (B, H, N, N) float32, position): of constant size.

    `layer` is the block's index; the first RWKV layer of a model gives v_first, the others take it.
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        C, A, N = cfg.n_embd, cfg.rwkv_size or cfg.n_embd, cfg.rwkv_head_size
        self.cfg, self.H, self.N = cfg, A // N, N
        self.first = layer == cfg.mixers.index("r")
        new = lambda *shape: nn.Parameter(torch.empty(*shape))  # noqa: E731   init_time_mixer gives the values
        if cfg.token_shift:
            for name in ("x_r", "x_w", "x_k", "x_v", "x_a") + (("x_g",) if cfg.gate else ()):
                setattr(self, name, new(1, 1, C))
        for kind in "wa" if self.first else "wav":
            setattr(self, kind + "0", new(1, 1, A))
            setattr(self, kind + "1", new(C, cfg.rank(kind)))
            setattr(self, kind + "2", new(cfg.rank(kind), A))
        if cfg.gate:
            self.g1, self.g2 = new(C, cfg.rank("g")), new(cfg.rank("g"), A)
        self.k_k, self.k_a = new(1, 1, A), new(1, 1, A)
        if cfg.bonus:
            self.r_k = new(self.H, N)
        self.receptance = nn.Linear(C, A, bias=cfg.qkv_bias)
        self.key = nn.Linear(C, A, bias=cfg.qkv_bias)
        self.value = nn.Linear(C, A, bias=cfg.qkv_bias)
        self.output = nn.Linear(A, C, bias=cfg.output_bias)
        if cfg.qk_norm:
            self.r_norm, self.k_norm = (nn.RMSNorm(N, eps=cfg.norm_eps) for _ in "rk")
        if cfg.group_norm:
            self.ln_x = nn.GroupNorm(self.H, A, eps=64e-5)
        init_time_mixer(self, layer, cfg)

    def forward(self, x, v_first, state):
        B, T, _ = x.shape
        last, S, start = state or (None, None, 0)
        heads = lambda z: z.view(B, T, self.H, self.N)  # noqa: E731
        xx = shift(x, last) - x if self.cfg.token_shift else None
        mix = lambda name: torch.addcmul(x, xx, getattr(self, name)) if self.cfg.token_shift else x  # noqa: E731

        x_v = mix("x_v")
        r, k, v = self.receptance(mix("x_r")), self.key(mix("x_k")), self.value(x_v)                   # (B, T, A)
        if self.cfg.qk_norm:
            r, k = self.r_norm(heads(r)).flatten(2), self.k_norm(heads(k)).flatten(2)
        # log decay w = -e^-0.5 sigmoid(w0 + tanh(x_w w1) w2), in (-0.607, 0)
        w = -math.exp(-0.5) * torch.sigmoid((self.w0 + torch.tanh(mix("x_w") @ self.w1) @ self.w2).float())
        # value residual: v += (v_first - v) sigmoid(v0 + x_v v1 v2)
        if self.first:
            v_first = v
        else:
            v = torch.lerp(v, v_first.to(v.dtype), torch.sigmoid(self.v0 + (x_v @ self.v1) @ self.v2).to(v.dtype))
        # in-context learning rate a = sigmoid(a0 + x_a a1 a2)
        a = torch.sigmoid(self.a0 + (mix("x_a") @ self.a1) @ self.a2)
        # removal key: the direction of k * k_k; write key: k scaled by 1 + (a - 1) k_a
        kk = F.normalize(heads(k * self.k_k).float(), dim=-1, eps=1e-12)
        k = k * (1 + (a - 1) * self.k_a)

        r, w, k, v, a = map(heads, (r, w, k, v, a))
        if self.cfg.rwkv_rope:
            freq = rope_frequencies(self.cfg, self.N, x.device)
            r, k, kk = (rotate(z.transpose(1, 2), start, freq).transpose(1, 2) for z in (r, k, kk))
        y, S = wkv7(r, w, k, v, kk, a, S, lowest=-math.exp(-0.5))                                     # (B, T, H, N)
        if self.cfg.group_norm:
            y = self.ln_x(y.reshape(B * T, -1)).view_as(y)
        if self.cfg.bonus:  # the present token once more, past the state and the norm
            y = y + (r * k * self.r_k).sum(-1, keepdim=True) * v
        y = y.reshape(B, T, -1)
        if self.cfg.gate:
            y = y * (torch.sigmoid(mix("x_g") @ self.g1) @ self.g2)
        return self.output(y), v_first, (x[:, -1].clone(), S, start + T)  # clone: a view would hold all of x


class ChannelMix(nn.Module):
    """RWKV-7's feed-forward layer, W_value relu(W_key x_k)^2. Its state is the last x (B, C)."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.x_k = nn.Parameter(1 - channel(cfg.n_embd) ** ((1 - layer / cfg.n_layer) ** 4))
        self.key = nn.Linear(cfg.n_embd, cfg.ffn_width, bias=cfg.bias)
        self.value = nn.Linear(cfg.ffn_width, cfg.n_embd, bias=cfg.bias)

    def forward(self, x, state):
        x_k = torch.addcmul(x, shift(x, state) - x, self.x_k)
        return self.value(torch.relu(self.key(x_k)).square()), x[:, -1].clone()


class MLP(nn.Module):
    """The transformer's feed-forward layer: W_value f(W_key x), for swiglu W_value (silu(W_gate x) * W_key x). No state."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.kind = cfg.ffn
        self.key = nn.Linear(cfg.n_embd, cfg.ffn_width, bias=cfg.bias)
        if cfg.ffn == "swiglu":
            self.gate = nn.Linear(cfg.n_embd, cfg.ffn_width, bias=cfg.bias)
        self.value = nn.Linear(cfg.ffn_width, cfg.n_embd, bias=cfg.bias)

    def forward(self, x, state):
        k = self.key(x)
        if self.kind == "swiglu":
            k = F.silu(self.gate(x)) * k
        elif self.kind != "relu2":
            k = F.gelu(k, approximate="tanh" if self.kind == "gelu" else "none")
        else:
            k = torch.relu(k).square()
        return self.value(k), None


# ---------------------------------------------------------------------------------------------------------------------
# The whole model

def make_norm(cfg: ModelConfig) -> nn.Module:
    if cfg.norm == "rmsnorm":
        return nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
    return nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps, bias=cfg.norm_bias)


class Block(nn.Module):
    """Mix over time, then over channels, each as a correction to the residual stream x (B, T, C)."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        if layer == 0 and cfg.ln0:
            self.ln0 = make_norm(cfg)
        self.ln1, self.ln2 = make_norm(cfg), make_norm(cfg)
        self.att = CausalSelfAttention(cfg) if cfg.mixers[layer] == "a" else TimeMixer(cfg, layer)
        self.ffn = ChannelMix(cfg, layer) if cfg.ffn == "channelmix" else MLP(cfg)

    def forward(self, x, v_first, state):
        att_state, ffn_state = state or (None, None)
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        y, v_first, att_state = self.att(self.ln1(x), v_first, att_state)
        x = x + y
        y, ffn_state = self.ffn(self.ln2(x), ffn_state)
        return x + y, v_first, (att_state, ffn_state)


class LM(nn.Module):
    """A causal language model over tokens (B, T)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.emb = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        if cfg.positions == "learned":
            self.pos = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layer))
        self.ln_out = make_norm(cfg)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        init_model(self)
        if cfg.tied:
            self.head.weight = self.emb.weight

    def hidden(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """All but the head: tokens (B, T) -> (B, T, C), for losses that want the logits piece by piece."""
        if tokens.device.type == "cpu" and tokens.numel() and (tokens.max() >= self.cfg.vocab_size or tokens.min() < 0):
            raise ValueError(f"token {tokens.max() if tokens.min() >= 0 else tokens.min()} is outside the vocabulary of {self.cfg.vocab_size}: "
                             "the text was prepared with another tokenizer than the model's")
        start, layers = (0, [None] * len(self.blocks)) if state is None else (state.position, state.layers)
        x = self.emb(tokens)
        if self.cfg.positions == "learned":
            x = x + self.pos(self.position_ids(start, tokens.shape[1]))
        v_first, after = None, []
        for block, layer in zip(self.blocks, layers):
            x, v_first, layer = block(x, v_first, layer)
            after.append(layer)
        return self.ln_out(x), State(start + tokens.shape[1], tuple(after))

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens (B, T) int64, continuing from `state` -> logits (B, T, V) and the state after the last token.

        Raises ValueError for a token outside the vocabulary, and for text longer than an attention model's learned positions.
        """
        x, state = self.hidden(tokens, state)
        return self.head(x), state

    def position_ids(self, start: int, T: int) -> Tensor:
        """Learned positions end at block_size. A pure RNN goes on at the last one; attention there was never trained."""
        if self.cfg.longest and start + T > self.cfg.longest:
            raise ValueError(f"position {start + T} is beyond the {self.cfg.longest} learned positions: shorten the text")
        return torch.arange(start, start + T, device=self.pos.weight.device).clamp(max=self.cfg.block_size - 1)

    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Initial values

def init_model(model: LM) -> None:
    """GPT: normal with deviation 0.02, the maps into the residual stream by sqrt(2 layers) smaller, as GPT-2 and nanoGPT.

    RWKV-7 without any attention: the official trainer's values. TimeMixers have set their own already.
    """
    cfg = model.cfg
    ours = ("q_proj", "k_proj", "v_proj", "o_proj", "ffn.key", "ffn.gate", "ffn.value", "emb", "pos", "head")
    to_stream = ("o_proj", "ffn.value")
    for name, p in model.named_parameters():
        module = name.rpartition(".")[0]
        if module.endswith(ours) and p.ndim == 1:
            nn.init.zeros_(p)
        elif module.endswith(ours):
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.n_layer) if module.endswith(to_stream) else 0.02)
    if cfg.ffn == "channelmix" and "a" not in cfg.mixers:
        for block in model.blocks:
            orthogonal(block.ffn.key.weight, 1.0)
            nn.init.zeros_(block.ffn.value.weight)
        if cfg.ln0:
            nn.init.uniform_(model.emb.weight, -1e-4, 1e-4)
        orthogonal(model.head.weight, 0.5)


def channel(C: int) -> Tensor:
    """c / C for each channel, shaped (1, 1, C)."""
    return torch.arange(C).view(1, 1, C) / C


def orthogonal(p: Tensor, gain: float) -> None:
    """Orthogonal in place, the gain larger by sqrt(rows / columns) for tall matrices, as the official trainer has it."""
    nn.init.orthogonal_(p, gain * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


@torch.no_grad()
def init_time_mixer(m: TimeMixer, layer: int, cfg: ModelConfig) -> None:
    """The official initial values of RWKV-7 time mixing for block `layer` of L (the code's, not its README's table)."""
    L, C, A, N = cfg.n_layer, cfg.n_embd, m.key.out_features, m.N
    rho01, rho1 = layer / max(1, L - 1), 1 - layer / L
    n = torch.arange(A).view(1, 1, A)
    lin = n / max(1, A - 1) - 0.5                           # -1/2 ... 1/2 over all channels
    zig = (n % N - (N - 1) / 2) / max(0.5, (N - 1) / 2)
    zig = zig * zig.abs()                                   # -1 ... 1 within each head
    if cfg.token_shift:
        power = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}
        for name in power:
            if hasattr(m, name):
                getattr(m, name).copy_(1 - channel(C) ** (power[name] * rho1))
    m.w0.copy_(-6 + 6 * (n / max(1, A - 1)) ** (1 + rho01**0.3) + 0.5 + 2.5 * zig)
    m.a0.copy_(-0.19 + 0.3 * zig + 0.4 * lin)
    if not m.first:
        m.v0.copy_(0.73 - 0.4 * lin)
    for kind in "wavg":
        if hasattr(m, kind + "1"):
            nn.init.zeros_(getattr(m, kind + "1"))
            orthogonal(getattr(m, kind + "2"), 0.1)
    m.k_k.copy_(0.71 - 0.1 * lin)
    m.k_a.fill_(1.02)
    if cfg.bonus:
        m.r_k.fill_(-0.04)
    orthogonal(m.receptance.weight, 1.0)
    orthogonal(m.key.weight, 0.1)
    orthogonal(m.value.weight, 1.0)
    nn.init.zeros_(m.output.weight)
    for linear in (m.receptance, m.key, m.value, m.output):
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    if cfg.group_norm:
        m.ln_x.weight.fill_(((1 + layer) / L) ** 0.7)


# ---------------------------------------------------------------------------------------------------------------------
# Model folders: config.json, model.safetensors, meta.json (the tokenizer). Loading one runs no pickled code.

def save_model(model: LM, folder: str | Path, meta: dict) -> None:
    """Write a model folder; `meta` names the tokenizer. Each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict()
    stored = {name: weights[name].detach().cpu().contiguous() for name in stored_shapes(model)}

    def write(name: str, to: Callable[[Path], object]) -> None:
        to(folder / f"{name}.tmp")
        os.replace(folder / f"{name}.tmp", folder / name)

    write("config.json", lambda f: f.write_text(json.dumps(asdict(model.cfg), indent=1) + "\n"))
    write("meta.json", lambda f: f.write_text(json.dumps(meta, indent=1) + "\n"))
    write("model.safetensors", lambda f: save_file(stored, f))


def open_model(folder: str | Path) -> tuple[LM, Path]:
    """What a model folder holds: the model without its weights, on the meta device, and the .safetensors file that has them all.

    Raises ValueError, in one line, for a folder that is missing, damaged or of another shape.
    """
    folder = Path(folder)
    file = folder / "model.safetensors"
    try:
        cfg = json.loads((folder / "config.json").read_text())
        unknown = set(cfg) - {f.name for f in fields(ModelConfig)}
        if unknown:
            raise ValueError(f"{folder}/config.json has unknown keys: {', '.join(sorted(unknown))}")
        with torch.device("meta"):  # shapes, but no memory and no initial values
            model = LM(ModelConfig(**cfg))
        with safe_open(file, "pt") as f:
            there = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
    except FileNotFoundError as e:
        raise ValueError(f"no model at {folder}: {Path(e.filename or file).name} is missing; train one first, or check the path") from None
    except NotADirectoryError:
        raise ValueError(f"no model at {folder}: it is a file; give the folder that holds config.json and model.safetensors") from None
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, TypeError) as e:
        raise ValueError(f"the model at {folder} is damaged ({e}): restore it from a checkpoint") from None
    want = stored_shapes(model)
    for name in sorted(want.keys() | there.keys()):
        if want.get(name) != there.get(name):
            raise ValueError(f"the model at {folder} does not fit its config.json: {name} is {there.get(name, 'missing')}, expected {want.get(name, 'none')}")
    return model, file


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> LM:
    """Read a model folder, weight by weight, into float32 whatever they are stored as. Errors as open_model's."""
    model, file = open_model(folder)
    model.load_state_dict({name: read_tensor(file, name).to(device, torch.float32, copy=True) for name in stored_shapes(model)}, strict=False, assign=True)
    if model.cfg.tied:
        model.head.weight = model.emb.weight
    return model


def stored_shapes(model: LM) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight that a model folder holds: a tied head is not among them."""
    return {name: tuple(p.shape) for name, p in model.state_dict().items() if not (model.cfg.tied and name == "head.weight")}


def read_tensor(file: str | Path, name: str) -> Tensor:
    """One tensor of a .safetensors file, mapped into memory. Opened anew each time, for an open file keeps what it has read."""
    with safe_open(file, "pt") as f:
        return f.get_tensor(name)
