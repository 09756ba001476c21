"""The language model: one class for GPT teacher, RWKV-7 student, hybrids of both.

Token embedding, a stack of blocks, a head. A block mixes over time, then over channels:

    x = x + att(ln1(x))   att: CausalSelfAttention, which remembers every key and value,
                               or TimeMixer, which has a state of fixed size
    x = x + ffn(ln2(x))   ffn: MLP (relu2, gelu, swiglu), or ChannelMix (RWKV's)

One contract, `mixer(x, v_first, state) -> (y, v_first, state)`, makes the two mixers
interchangeable, and `LM(tokens, state) -> (logits, state)` gives the same logits for a
whole sequence, for pieces and for single tokens. Parameters bear the official RWKV-7
names: a pure RWKV-7 model's state_dict is the official .pth dict.

    B batch   T time   C channels (n_embd)   V vocabulary
    H heads   N head size   A = H N, all heads together
    v_first   the value of the first RWKV layer; later ones mix it into their own

References: nanoGPT; RWKV-LM RWKV-v7/train_temp/src/model.py (RWKV-7, initial values);
arXiv 2503.14456. `cfg` is everywhere a ModelConfig (below).
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tyro.conf import Suppress

from config import at_least, settings
from wkv import wkv7

MIN_LOG_DECAY = -math.exp(-0.5)        # RWKV-7 forgets no faster than e^-0.607 = 0.545 per token


@dataclass(frozen=True)
class State:
    """What a model remembers: a plain value that no call changes."""
    position: int    # tokens read so far
    layers: tuple    # per layer (mixer's, ffn's): see CausalSelfAttention, TimeMixer, ChannelMix


# ------------------------------------------------------------------------------------------
# Attention

class CausalSelfAttention(nn.Module):
    """Softmax attention. Its state is the cache: (k, v), each (B, Hkv, T, N)."""

    def __init__(self, cfg):
        super().__init__()
        C, H, Hkv, N = cfg.n_embd, cfg.n_head, cfg.kv_heads, cfg.att_head_size
        self.cfg, self.n_head, self.n_kv, self.N = cfg, H, Hkv, N
        self.q_proj = nn.Linear(C, H * N, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(C, Hkv * N, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(C, Hkv * N, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(H * N, C, bias=cfg.output_bias)
        self.q_norm, self.k_norm = head_norm(cfg, N), head_norm(cfg, N)

    def qkv(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, N), k, v (B, Hkv, T, N) of tokens at positions `start` and on."""
        qkv = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (z.unflatten(-1, (-1, self.N)).transpose(1, 2) for z in qkv)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.cfg.positions == "rope":
            freq = rope_frequencies(self.cfg, self.N, x.device)
            q, k = rotate(q, start, freq), rotate(k, start, freq)
        return q, k, v

    def forward(self, x, v_first, state):
        past = state[0].shape[2] if state else 0
        q, k, v = self.qkv(x, past)
        mask = None
        if past:
            k, v = (torch.cat((old.to(new.dtype), new), 2) for old, new in zip(state, (k, v)))
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(past)
        grouped = self.n_kv < self.n_head
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=not past, enable_gqa=grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2)), v_first, (k, v)


def rotate(x: Tensor, start: int, freq: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864): turn channels i, i + N/2 of (B, H, T, N) by t freq_i."""
    t = torch.arange(start, start + x.shape[-2], device=x.device, dtype=torch.float32)
    angle = t[:, None] * freq                                                         # (T, N/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def rope_frequencies(cfg, N: int, device) -> Tensor:
    """Radians per position for each pair of N channels: theta^(-2i/N), or slower."""
    freq = cfg.rope_theta ** (-torch.arange(0, N, 2, device=device, dtype=torch.float32) / N)
    if cfg.rope_scaling == "linear":
        return freq / cfg.rope_factor
    if cfg.rope_scaling == "llama3":
        # slow down pairs that turn less than rope_low times in rope_original tokens,
        # not those that turn more than rope_high times, and those between in part
        turns = freq * cfg.rope_original / (2 * math.pi)
        slow = ((cfg.rope_high - turns) / (cfg.rope_high - cfg.rope_low)).clamp(0, 1)
        return freq * (1 - slow + slow / cfg.rope_factor)
    return freq


def head_norm(cfg, N: int) -> nn.Module:
    return nn.RMSNorm(N, eps=cfg.norm_eps) if cfg.qk_norm else nn.Identity()


# ------------------------------------------------------------------------------------------
# RWKV-7

class TimeMixer(nn.Module):
    """RWKV-7 time mixing. Its state: (last x (B, C), S (B, H, N, N), position)."""

    def __init__(self, cfg, layer: int):
        super().__init__()
        C, A, N = cfg.n_embd, cfg.rwkv_width, cfg.rwkv_head_size
        self.cfg, self.H, self.N = cfg, A // N, N
        self.first = layer == cfg.mixers.index("r")             # it gives v_first, the others take it
        # token shift: the previous token's share in each of six inputs
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (empty(1, 1, C) for _ in range(6))
        # low-rank maps C -> rank -> A: decay, learning rate, value residual, gate
        self.w0, self.w1, self.w2 = empty(1, 1, A), empty(C, cfg.rank("w")), empty(cfg.rank("w"), A)
        self.a0, self.a1, self.a2 = empty(1, 1, A), empty(C, cfg.rank("a")), empty(cfg.rank("a"), A)
        if not self.first:
            self.v0, self.v1, self.v2 = empty(1, 1, A), empty(C, cfg.rank("v")), empty(cfg.rank("v"), A)
        self.g1, self.g2 = empty(C, cfg.rank("g")), empty(cfg.rank("g"), A)
        self.k_k, self.k_a = empty(1, 1, A), empty(1, 1, A)     # key -> removal key, write key
        self.r_k = empty(self.H, N)                             # bonus of the present token
        self.receptance = nn.Linear(C, A, bias=cfg.qkv_bias)
        self.key = nn.Linear(C, A, bias=cfg.qkv_bias)
        self.value = nn.Linear(C, A, bias=cfg.qkv_bias)
        self.output = nn.Linear(A, C, bias=cfg.output_bias)
        self.r_norm, self.k_norm = head_norm(cfg, N), head_norm(cfg, N)
        self.ln_x = nn.GroupNorm(self.H, A, eps=64e-5) if cfg.group_norm else nn.Identity()
        init_time_mixer(self, layer, cfg)
        leave_out(self, cfg)

    def forward(self, x, v_first, state):
        B, T, _ = x.shape
        last, S, start = state or (None, None, 0)
        xx = shift(x, last) - x
        mixes = (self.x_v, self.x_r, self.x_k, self.x_w, self.x_a, self.x_g)
        x_v, x_r, x_k, x_w, x_a, x_g = (torch.addcmul(x, xx, mix) for mix in mixes)       # (B, T, C)

        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)                    # (B, T, A)
        # log decay w = -e^-0.5 sigmoid(w0 + tanh(x_w w1) w2), in (-0.607, 0)
        w = MIN_LOG_DECAY * torch.sigmoid((self.w0 + torch.tanh(x_w @ self.w1) @ self.w2).float())
        # in-context learning rate a = sigmoid(a0 + x_a a1 a2)
        a = torch.sigmoid(self.a0 + (x_a @ self.a1) @ self.a2)
        # value residual: v += (v_first - v) sigmoid(v0 + x_v v1 v2)
        if self.first:
            v_first = v
        else:
            share = torch.sigmoid(self.v0 + (x_v @ self.v1) @ self.v2)
            v = torch.lerp(v, v_first.to(v.dtype), share.to(v.dtype))

        heads = (self.H, self.N)
        r = self.r_norm(r.unflatten(-1, heads)).to(v.dtype)      # (B, T, H, N); autocast's norms give float32
        k = self.k_norm(k.unflatten(-1, heads)).flatten(2)
        kk = F.normalize((k * self.k_k).unflatten(-1, heads).float(), dim=-1, eps=1e-12)   # removal key
        k = k * (1 + (a - 1) * self.k_a)                                                  # write key
        w, k, v, a = (z.unflatten(-1, heads) for z in (w, k, v, a))
        if self.cfg.rwkv_rope:
            freq = rope_frequencies(self.cfg, self.N, x.device)
            r, k, kk = (rotate(z.transpose(1, 2), start, freq).transpose(1, 2) for z in (r, k, kk))

        y, S = wkv7(r, w, k, v, kk, a, S, min_w=MIN_LOG_DECAY)
        y = self.ln_x(y.reshape(B * T, self.H * self.N)).view_as(y)           # head by head, (B, T, H, N)
        y = (y + (r * k * self.r_k).sum(-1, keepdim=True) * v).flatten(2)     # bonus: beside state and norm
        if self.cfg.gate:
            y = y * (torch.sigmoid(x_g @ self.g1) @ self.g2)
        return self.output(y), v_first, (x[:, -1].clone(), S, start + T)  # clone: a view would hold all of x


class ChannelMix(nn.Module):
    """RWKV-7's feed-forward layer, W_value relu(W_key x_k)^2. State: last x (B, C)."""

    def __init__(self, cfg, layer: int):
        super().__init__()
        share = torch.arange(cfg.n_embd).view(1, 1, -1) / cfg.n_embd             # c / C
        self.x_k = nn.Parameter(1 - share ** ((1 - layer / cfg.n_layer) ** 4))
        self.key = nn.Linear(cfg.n_embd, cfg.ffn_width, bias=cfg.bias)
        self.value = nn.Linear(cfg.ffn_width, cfg.n_embd, bias=cfg.bias)

    def forward(self, x, state):
        x_k = torch.addcmul(x, shift(x, state) - x, self.x_k)
        return self.value(torch.relu(self.key(x_k)).square()), x[:, -1].clone()


def shift(x: Tensor, last: Tensor | None) -> Tensor:
    """x (B, T, C) one step later, with `last` (B, C), or zero, in front."""
    first = torch.zeros_like(x[:, :1]) if last is None else last[:, None].to(x.dtype)
    return torch.cat((first, x[:, :-1]), 1)


def empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


def leave_out(m: TimeMixer, cfg) -> None:
    """What a recipe does without becomes zeros that are neither trained nor saved."""
    off = {"token_shift": "x_r x_w x_k x_v x_a x_g", "bonus": "r_k", "gate": "x_g g1 g2"}
    for name in {x for switch, names in off.items() if not getattr(cfg, switch) for x in names.split()}:
        zeros = torch.zeros_like(getattr(m, name).data)
        delattr(m, name)
        m.register_buffer(name, zeros, persistent=False)


# ------------------------------------------------------------------------------------------
# The whole model

class MLP(nn.Module):
    """The transformer's feed-forward layer, W_value f(W_key x); swiglu has a gate."""

    def __init__(self, cfg):
        super().__init__()
        self.kind = cfg.ffn
        self.key = nn.Linear(cfg.n_embd, cfg.ffn_width, bias=cfg.bias)
        if cfg.ffn == "swiglu":
            self.gate = nn.Linear(cfg.n_embd, cfg.ffn_width, bias=cfg.bias)
        self.value = nn.Linear(cfg.ffn_width, cfg.n_embd, bias=cfg.bias)

    def forward(self, x, state):
        k = self.key(x)
        if self.kind == "relu2":
            k = torch.relu(k).square()
        elif self.kind == "swiglu":
            k = F.silu(self.gate(x)) * k
        else:
            k = F.gelu(k, approximate="tanh" if self.kind == "gelu" else "none")
        return self.value(k), None


class Block(nn.Module):
    """Mix over time, then over channels: corrections to the stream x (B, T, C)."""

    def __init__(self, cfg, layer: int):
        super().__init__()
        if layer == 0 and cfg.ln0:
            self.ln0 = make_norm(cfg)                      # LM applies it to the embedding
        self.ln1, self.ln2 = make_norm(cfg), make_norm(cfg)
        self.att = CausalSelfAttention(cfg) if cfg.mixers[layer] == "a" else TimeMixer(cfg, layer)
        self.ffn = ChannelMix(cfg, layer) if cfg.ffn == "channelmix" else MLP(cfg)

    def forward(self, x, v_first, state):
        att_state, ffn_state = state or (None, None)
        y, v_first, att_state = self.att(self.ln1(x), v_first, att_state)
        x = x + y
        y, ffn_state = self.ffn(self.ln2(x), ffn_state)
        return x + y, v_first, (att_state, ffn_state)


def make_norm(cfg) -> nn.Module:
    if cfg.norm == "rmsnorm":
        return nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
    return nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps, bias=cfg.norm_bias)


class LM(nn.Module):
    """A causal language model over tokens (B, T)."""

    def __init__(self, cfg):
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

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens (B, T) behind `state` -> logits (B, T, V), and the state after."""
        x, state = self.hidden(tokens, state)
        return self.head(x), state

    def hidden(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """All but the head: (B, T) -> (B, T, C), for losses with logits in pieces."""
        state = state or State(0, (None,) * len(self.blocks))
        end = state.position + tokens.shape[1]
        x = self.emb(tokens)
        if self.cfg.positions == "learned":
            x = x + self.pos(self.position_ids(state.position, end))
        if self.cfg.ln0:
            x = self.blocks[0].ln0(x)
        v_first, layers = None, []
        for block, layer in zip(self.blocks, state.layers):
            x, v_first, layer = block(x, v_first, layer)
            layers.append(layer)
        return self.ln_out(x), State(end, tuple(layers))

    def position_ids(self, start: int, end: int) -> Tensor:
        """Learned positions end: an RNN stays at the last one, attention refuses."""
        if (limit := self.cfg.longest) and end > limit:
            raise ValueError(f"position {end} is beyond the {limit} learned positions: shorten the text")
        return torch.arange(start, end, device=self.pos.weight.device).clamp(max=self.cfg.block_size - 1)

    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())


# ------------------------------------------------------------------------------------------
# Its shape

@settings
class ModelConfig:
    """GPT-2, Llama and RWKV-7 are settings of it; a student has its teacher's."""

    vocab_size: int = at_least(1, 257)         # the byte tokenizer's: 256 bytes and <|endoftext|>
    block_size: int = at_least(1, 256)         # tokens per sequence; attention's limit with learned positions
    n_layer: int = at_least(1, 2, below=2**24)
    n_embd: int = at_least(1, 128)
    mixer: Annotated[str, Suppress] = "a"      # a letter per layer, repeated: a = attention, r = RWKV-7
    n_head: int = at_least(1, 2)
    rwkv_head_size: int = at_least(1, 32)
    positions: Literal["rope", "learned", "none"] = "rope"
    ffn: Literal["relu2", "gelu", "gelu_exact", "swiglu", "channelmix"] = "relu2"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    ln0: bool = True                           # a norm after the embedding, as RWKV has it
    tied: bool = False                         # the head is the embedding's weight

    # What the world's checkpoints need; skip it at first reading. None: as in brackets
    n_kv_head: int | None = at_least(1, None)  # fewer keys and values than queries (n_head)
    head_size: int | None = at_least(1, None)  # (n_embd / n_head)
    ffn_size: int | None = at_least(1, None)   # (4 n_embd; swiglu: two thirds, rounded up to 32s)
    rwkv_size: int | None = at_least(1, None)  # width of all RWKV heads together (n_embd)
    rank_w: int | None = at_least(1, None)     # low-rank maps of decay, learning rate, value
    rank_a: int | None = at_least(1, None)     # residual and gate (the official rule, below)
    rank_v: int | None = at_least(1, None)
    rank_g: int | None = at_least(1, None)
    rope_theta: float = 10000.0
    rope_scaling: Literal["default", "linear", "llama3"] = "default"   # see rope_frequencies
    rope_factor: float = 1.0
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_original: int = at_least(1, 8192)
    norm_eps: float = at_least(0.0, 1e-5, below=1.0)
    norm_bias: bool = True                     # of layernorm
    qk_norm: bool = False                      # an RMS norm on every head's query and key
    qkv_bias: bool = False
    bias: bool = False                         # of the maps after the mixer and in the feed-forward layer
    o_bias: bool | None = None                 # of the map after the mixer alone (bias)

    # What recipes for conversion leave out of RWKV-7, or add
    gate: bool = True
    group_norm: bool = True
    token_shift: bool = True
    bonus: bool = True
    rwkv_rope: bool = False                    # rotate r, k and kk as attention does q and k

    def __post_init__(self):
        if not self.mixer or set(self.mixer) - set("ar") or len(self.mixer) > self.n_layer:
            raise ValueError(f"mixer = {self.mixer!r}: write a (attention) and r (RWKV-7), one letter "
                             f"per layer and at most n_layer = {self.n_layer}")
        if "a" in self.mixers and self.head_size is None and self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not divisible by n_head = {self.n_head}: change "
                             "one, or set head_size")
        if "a" in self.mixers and self.n_head % self.kv_heads:
            raise ValueError(f"n_head = {self.n_head} is not a multiple of n_kv_head = {self.n_kv_head}")
        if "r" in self.mixers and self.rwkv_width % self.rwkv_head_size:
            raise ValueError(f"RWKV's width {self.rwkv_width} is not divisible by rwkv_head_size = "
                             f"{self.rwkv_head_size}: change one")
        if "a" in self.mixers and self.positions == "rope" and self.att_head_size % 2:
            raise ValueError(f"rope turns pairs: head size {self.att_head_size} must be even")
        if "r" in self.mixers and self.rwkv_rope and self.rwkv_head_size % 2:
            raise ValueError(f"rope turns pairs: rwkv_head_size {self.rwkv_head_size} must be even")
        if self.rope_theta <= 0 or self.rope_factor <= 0 or self.rope_high <= self.rope_low:
            raise ValueError(f"rope_theta = {self.rope_theta} and rope_factor = {self.rope_factor} must be "
                             f"positive, rope_high = {self.rope_high} above rope_low = {self.rope_low}")

    @property
    def mixers(self) -> str:
        return (self.mixer * self.n_layer)[: self.n_layer]

    @property
    def longest(self) -> int | None:
        """Most tokens that the model can read; None = any number."""
        return self.block_size if self.positions == "learned" and "a" in self.mixers else None

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def att_head_size(self) -> int:
        return self.head_size or self.n_embd // self.n_head

    @property
    def rwkv_width(self) -> int:
        return self.rwkv_size or self.n_embd

    @property
    def output_bias(self) -> bool:
        return self.bias if self.o_bias is None else self.o_bias

    @property
    def ffn_width(self) -> int:
        width = -(-8 * self.n_embd // 3 // 32) * 32 if self.ffn == "swiglu" else 4 * self.n_embd
        return self.ffn_size or width

    def rank(self, kind: str) -> int:
        """Of map w, a, v, g: as set, or official: max(32, 32 round(m sqrt(C) / 32))."""
        m = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}[kind]
        return getattr(self, f"rank_{kind}") or max(32, 32 * round(m * self.n_embd**0.5 / 32))


def init_model(model: LM) -> None:
    """GPT-2's: normal, 0.02, maps into the residual stream smaller by sqrt(2 layers).

    RWKV-7 without attention: the official trainer's. TimeMixers have set their own.
    """
    cfg = model.cfg
    plain = ("q_proj", "k_proj", "v_proj", "o_proj", "ffn.key", "ffn.gate", "ffn.value", "emb", "pos", "head")
    for name, p in model.named_parameters():
        module = name.rpartition(".")[0]
        to_stream = module.endswith(("o_proj", "ffn.value"))
        if module.endswith(plain) and p.ndim == 1:
            nn.init.zeros_(p)
        elif module.endswith(plain):
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.n_layer) if to_stream else 0.02)
    if cfg.ffn == "channelmix" and "a" not in cfg.mixers:
        for block in model.blocks:
            orthogonal(block.ffn.key.weight, 1.0)
            nn.init.zeros_(block.ffn.value.weight)
        if cfg.ln0:
            nn.init.uniform_(model.emb.weight, -1e-4, 1e-4)
        orthogonal(model.head.weight, 0.5)


@torch.no_grad()
def init_time_mixer(m: TimeMixer, layer: int, cfg) -> None:
    """The official values of block `layer`: the trainer's code's, not its README's."""
    L, A, N = cfg.n_layer, cfg.rwkv_width, m.N
    depth, height = layer / max(1, L - 1), 1 - layer / L         # 0 ... 1 and 1 ... 1/L over the layers
    n = torch.arange(A).view(1, 1, A)
    ramp = n / max(1, A - 1) - 0.5                               # -1/2 ... 1/2 over all channels
    zigzag = (n % N - (N - 1) / 2) / max(0.5, (N - 1) / 2)
    zigzag = zigzag * zigzag.abs()                               # -1 ... 1 within each head
    for name, power in {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}.items():
        getattr(m, name).copy_(1 - (torch.arange(cfg.n_embd) / cfg.n_embd) ** (power * height))
    m.w0.copy_(-6 + 6 * (n / max(1, A - 1)) ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag)
    m.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * ramp)
    m.k_k.copy_(0.71 - 0.1 * ramp)
    m.k_a.fill_(1.02)
    m.r_k.fill_(-0.04)
    if not m.first:
        m.v0.copy_(0.73 - 0.4 * ramp)
    for kind in "wa" + "v" * (not m.first) + "g" * cfg.gate:
        nn.init.zeros_(getattr(m, kind + "1"))
        orthogonal(getattr(m, kind + "2"), 0.1)
    orthogonal(m.receptance.weight, 1.0)
    orthogonal(m.key.weight, 0.1)
    orthogonal(m.value.weight, 1.0)
    nn.init.zeros_(m.output.weight)
    for linear in (m.receptance, m.key, m.value, m.output):
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    if cfg.group_norm:
        m.ln_x.weight.fill_(((1 + layer) / L) ** 0.7)


def orthogonal(p: Tensor, gain: float) -> None:
    """In place; tall matrices have a gain larger by sqrt(rows / columns)."""
    nn.init.orthogonal_(p, gain * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)
