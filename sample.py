"""Generate text from any model folder: a GPT, an RWKV-7 student, or a hybrid.

    python sample.py --ckpt out/student --prompt "def shuffle("
    python sample.py --ckpt out/student --prompt FILE:question.txt --num_samples 5 --temperature 0      (0 = greedy)

What it is: read the prompt in pieces, then one token at a time from the state. For RWKV-7 the state has the same size
after ten tokens and after ten thousand; the last lines on stderr put it beside what attention would hold.
What it is not: a chat program or a server.

Documents begin behind <|endoftext|> in training, so prompts do too.
"""

import codecs
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import cli, run
from data.tokenizer import load_tokenizer
from model import LM, Block, ModelConfig, State, load_model

PREFILL = 512  # prompt tokens per call: enough for fast matrix products, and activations stay small however long the prompt


@dataclass(frozen=True)
class SampleConfig:
    """What to generate, and how. None means off."""

    ckpt: str = "out/student"     # a model folder
    prompt: str = ""              # text, or FILE:path; empty = a new document
    num_samples: int = 1          # one is printed as it comes; several are generated side by side
    max_tokens: int = 300         # new tokens per sample
    temperature: float = 0.8      # 0 = always the likeliest token
    top_k: int | None = None      # only the k likeliest tokens
    top_p: float | None = None    # only the likeliest tokens that together have this probability
    presence: float = 0.0         # taken from the logit of every token generated before
    frequency: float = 0.0        # the same, once for each time
    seed: int = 1337
    stop: bool = True             # end at <|endoftext|>; --no-stop goes on with another document
    device: str = "auto"

    def __post_init__(self):
        check(self.max_tokens, self.temperature, self.top_k, self.top_p, self.presence, self.frequency)
        if self.num_samples < 1:
            raise ValueError(f"num_samples = {self.num_samples}: it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed}: it must be in 0 ... 2^63 - 1")


def check(n: int, temperature: float, top_k: int | None, top_p: float | None, presence: float, frequency: float) -> None:
    """Raise ValueError for a sampling option outside its range."""
    if n < 1:
        raise ValueError(f"max_tokens = {n}: at least one new token must be asked for")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature = {temperature}: it must be a number of at least 0 (0 = greedy)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}: it must be at least 1; leave it away to keep every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: it must be above 0 and at most 1")
    if not (math.isfinite(presence) and math.isfinite(frequency)):
        raise ValueError(f"presence = {presence}, frequency = {frequency}: both must be finite numbers (0 = off)")


# ---------------------------------------------------------------------------------------------------------------------
# Choosing tokens

def choose(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | None = None) -> Tensor:
    """One token (B,) from each row of logits (B, V). top_k first, then top_p; both count in the full distribution.

    top_p keeps the smallest set of likeliest tokens whose probability reaches it, and always the likeliest one.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    p = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)  # minus the maximum: 1e-9 divides safely
    if not p.isfinite().all():
        raise ValueError("the model's logits are not finite: its training has diverged, take an earlier checkpoint")
    if top_k is None and top_p is None:
        return torch.multinomial(p, 1, generator=generator).squeeze(1)
    p, order = p.topk(min(top_k or p.shape[1], p.shape[1]))                        # likeliest first
    if top_p is not None:
        p = p * (p.cumsum(-1) - p < top_p)                                         # what stands before a token is not enough
    return order.gather(1, torch.multinomial(p, 1, generator=generator)).squeeze(1)


@torch.inference_mode()
def generate(model: "LM | Decoder", tokens: Tensor, n: int, *, temperature: float = 1.0, top_k: int | None = None,
             top_p: float | None = None, presence: float = 0.0, frequency: float = 0.0, generator: torch.Generator | None = None,
             state: State | None = None, stop: int | None = None) -> Iterator[tuple[Tensor, State]]:
    """Continue `tokens` (B, T >= 1), read from `state`, by up to n tokens; yields (tokens (B,), state) for each.

    The state has not read the tokens it comes with. A row that has drawn `stop` repeats it; the end is where all rows have.
    `presence` and `frequency` as OpenAI has them: logit -= presence * (count > 0) + frequency * count, over what was generated.
    Raises ValueError for options outside their range, tokens outside the vocabulary, and text beyond learned positions.
    """
    check(n, temperature, top_k, top_p, presence, frequency)
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    cfg, (B, T) = decoder.cfg, tokens.shape
    if T == 0 or tokens.min() < 0 or tokens.max() >= cfg.vocab_size:
        raise ValueError(f"a prompt needs at least one token, all in 0 ... {cfg.vocab_size - 1}, the model's vocabulary: got {tokens.tolist()}"[:300])
    longest = (state.position if state else 0) + T + n - 1
    if cfg.positions == "learned" and "a" in cfg.mixers and longest > cfg.block_size:
        raise ValueError(f"prompt and max_tokens need {longest} positions, the model has learned {cfg.block_size}: shorten one of them")

    for piece in tokens.split(PREFILL, 1):
        x, state = decoder.model.hidden(piece, state)
    logits = decoder.model.head(x[:, -1])                                          # (B, V)
    counts = torch.zeros_like(logits)
    done = torch.zeros(B, dtype=torch.bool, device=tokens.device)
    for i in range(n):
        if i:
            logits, state = decoder(tokens, state)
        if presence or frequency:
            logits = logits - presence * (counts > 0) - frequency * counts
        tokens = choose(logits, temperature, top_k, top_p, generator)              # (B,)
        if presence or frequency:
            counts[torch.arange(B), tokens] += 1
        if stop is not None:
            tokens = torch.where(done, stop, tokens)
            done |= tokens == stop
        yield tokens, state
        if stop is not None and done.all():
            return


# ---------------------------------------------------------------------------------------------------------------------
# One token through RWKV-7. With a single token the cost is reading every weight once, and the number of operations: LM
# takes about 100 for a layer, written for training; here it is 50, on weights that lie ready. Same numbers, half the time.

class Decoder:
    """tokens (B,), state -> logits (B, V), state, as LM(tokens[:, None], state) gives them. Holds copies of the weights.

    A model with attention, or with rotary positions in its RWKV heads, goes through LM itself.
    """

    @torch.no_grad()
    def __init__(self, model: LM):
        self.model, self.cfg, self.layers = model, model.cfg, None
        if "a" not in self.cfg.mixers and not self.cfg.rwkv_rope:
            self.layers, self.ln_out, self.head = [pack(b) for b in model.blocks], norm(model.ln_out), linear(model.head)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        if self.layers is None:
            logits, state = self.model(tokens[:, None], state)
            return logits[:, 0], state
        threads = torch.get_num_threads()
        if len(tokens) == 1:
            torch.set_num_threads(1)  # too little work to share: waiting for the other threads takes longer
        x, v_first, after = self.model.emb.weight[tokens], None, []                               # x (B, C)
        if self.cfg.positions == "learned":
            x = x + self.model.pos(self.model.position_ids(state.position, 1))
        if self.cfg.ln0:
            x = self.model.blocks[0].ln0(x)
        for p, (att, ffn) in zip(self.layers, state.layers):
            x, v_first, att = time_mix(p, x, v_first, att)
            x, ffn = channel_mix(p, x, ffn)
            after.append((att, ffn))
        logits = self.head(self.ln_out(x))
        torch.set_num_threads(threads)
        return logits, State(state.position + 1, tuple(after))


def time_mix(p: SimpleNamespace, x: Tensor, v_first: Tensor | None, state: tuple) -> tuple[Tensor, Tensor, tuple]:
    """x + TimeMixer(ln1(x)) for x (B, C). Only what was made here is changed in place."""
    (last, S, position), B, H, N = state, len(x), p.H, p.N
    row, column = (B * H, 1, N), (B * H, N, 1)
    x1 = p.ln1(x)
    mixed = torch.lerp(x1, last, p.mix)                             # token shift for r, k, v and g, w, a, v   (7, B, C)
    r, k, v = p.rkv(mixed[:3]).view(3, B, H, N).unbind()
    low = p.down(mixed[3:])                                         # the low-rank maps, side by side       (4, B, rank)
    low[:2].tanh_()
    low = p.up(low)                                                 #                                          (4, B, A)
    w, a, nu = low[1:].sigmoid_().view(3, B, H, N).unbind()
    v_first, v = (v, v) if v_first is None else (v_first, torch.lerp(v, v_first, nu))
    kk = k * p.k_k
    kk.div_(torch.linalg.vector_norm(kk, dim=-1, keepdim=True).clamp_min_(1e-12))
    k = torch.addcmul(p.k_1, a, p.k_a).mul_(k)                      # k (1 + (a - 1) k_a)
    # S <- S diag(e^w) - (S kk)(kk * a)^T + v k^T, then y = S r; as rows, S r is r^T S^T
    S = S.view(B * H, N, N)
    stored = torch.bmm(kk.view(row), S.mT).view(column)
    S = S * w.mul_(-math.exp(-0.5)).exp_().view(row)
    S.addcmul_(stored, kk.mul_(a).view(row), value=-1).addcmul_(v.view(column), k.view(row))
    y = p.ln_x(torch.bmm(r.view(row), S.mT).view(B, -1))
    y.view(B, H, N).addcmul_(r.mul_(k).mul_(p.r_k).sum(-1, keepdim=True), v)                      # the bonus
    return p.output(y.mul_(low[0])).add_(x), v_first, (x1, S.view(B, H, N, N), position + 1)


def channel_mix(p: SimpleNamespace, x: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x + ffn(ln2(x)) for x (B, C), with ChannelMix or MLP."""
    x2 = p.ln2(x)
    k = p.ffn_key(x2 if last is None else torch.lerp(x2, last, p.x_k))
    if p.kind == "gelu":
        k = F.gelu(k, approximate="tanh")
    elif p.kind == "swiglu":
        k = F.silu(p.ffn_gate(x2)).mul_(k)
    else:
        k = k.relu_()
        k.mul_(k)
    return p.ffn_value(k).add_(x), None if last is None else x2


def pack(block: Block) -> SimpleNamespace:
    """A block's weights as the two functions above want them. What a switch leaves out becomes zeros, which do nothing."""
    m, f, cfg = block.att, block.ffn, block.att.cfg
    C, A, head = m.key.in_features, m.key.out_features, (m.H, m.N)
    get = lambda name, *shape: getattr(m, name, m.w0.new_zeros(shape)).detach()  # noqa: E731
    # The gate goes through tanh beside the decay: sigmoid(h) = (1 + tanh(h / 2)) / 2, so sigmoid(h) g2 = tanh(h / 2) g2 / 2 + sum(g2) / 2
    g2 = get("g2", 1, A) / 2
    downs, ups = (get("g1", C, 1) / 2, m.w1, m.a1, get("v1", C, 1)), (g2, m.w2, m.a2, get("v2", 1, A))
    rank = max(len(up) for up in ups)
    bias = torch.stack((g2.sum(0, keepdim=True) if cfg.gate else torch.ones_like(g2), m.w0[0], m.a0[0], get("v0", 1, 1, A)[0]))
    qkv = (m.receptance, m.key, m.value)
    return SimpleNamespace(
        H=m.H, N=m.N, kind=cfg.ffn, ln1=norm(block.ln1), ln2=norm(block.ln2), ln_x=norm(m.ln_x) if cfg.group_norm else lambda y: y,
        mix=torch.cat([get("x_" + c, 1, 1, C) for c in "rkvgwav"]), x_k=f.x_k[0].detach() if cfg.ffn == "channelmix" else None,
        k_k=get("k_k").view(head), k_a=get("k_a").view(head), k_1=1 - get("k_a").view(head), r_k=get("r_k", *head),
        rkv=product(torch.stack([q.weight.T for q in qkv]), torch.stack([q.bias for q in qkv])[:, None] if cfg.qkv_bias else None),
        down=product(torch.stack([F.pad(d, (0, rank - d.shape[1])) for d in downs])),
        up=product(torch.stack([F.pad(u, (0, 0, 0, rank - len(u))) for u in ups]), bias),
        output=linear(m.output), ffn_key=linear(f.key), ffn_value=linear(f.value), ffn_gate=linear(f.gate) if cfg.ffn == "swiglu" else None)


def linear(m: nn.Linear) -> Callable[[Tensor], Tensor]:
    return product(m.weight.T, m.bias)


def product(W: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """The function x -> x W + bias, x (B, C) and W (C, A), or G of them at once, x (G, B, C) and W (G, C, A).

    For one text on a CPU and a W beyond the cache it adds up W's rows by embedding_bag, which streams memory at 1.5 times
    the speed of the BLAS's matrix-vector product (measured 32 against 20 GB/s).
    """
    W, bias = W.detach().contiguous(), None if bias is None else bias.detach()
    (C, A), G = W.shape[-2:], W[..., 0, 0].numel()
    rows, index, starts = W.view(G * C, A), torch.arange(G * C), torch.arange(0, G * C, C)
    multiply = torch.mm if W.ndim == 2 else torch.bmm
    large = W.device.type == "cpu" and W.numel() >= 2**17

    def apply(x: Tensor) -> Tensor:
        if large and x.shape[-2] == 1:
            y = torch.embedding_bag(rows, index, starts, mode=0, per_sample_weights=x.view(-1))[0].view(*x.shape[:-1], A)
        else:
            y = multiply(x, W)
        return y if bias is None else y.add_(bias)

    return apply


def norm(m: nn.Module) -> Callable[[Tensor], Tensor]:
    """The norm as a plain function: a module's own call costs as much as the work at this size."""
    if isinstance(m, nn.RMSNorm):
        return m
    w, b = m.weight.detach(), None if m.bias is None else m.bias.detach()
    if isinstance(m, nn.GroupNorm):
        return lambda x: torch.group_norm(x, m.num_groups, w, b, m.eps)
    return lambda x: torch.layer_norm(x, m.normalized_shape, w, b, m.eps)


# ---------------------------------------------------------------------------------------------------------------------
# To the terminal

class Characters:
    """Tokens in, text out as it becomes whole: a character's bytes may come in several tokens; what is no UTF-8 becomes U+FFFD."""

    def __init__(self, enc: tiktoken.Encoding):
        self.enc, self.decoder = enc, codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, token: int | None) -> str:
        """The characters that `token` completes; None ends the text."""
        if token is None:
            return self.decoder.decode(b"", final=True)
        try:
            return self.decoder.decode(self.enc.decode_single_token_bytes(token))
        except KeyError:  # the model's vocabulary is larger than the tokenizer's
            return self.decoder.decode("\ufffd".encode())


def read_prompt(prompt: str) -> str:
    """The prompt itself, or for FILE:path what that file holds. Raises ValueError if it is missing or not UTF-8."""
    if not prompt.startswith("FILE:"):
        return prompt
    try:
        return Path(prompt[5:]).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"prompt file {prompt[5:]} is not UTF-8 (byte {e.start}): convert it, for example with iconv") from None
    except OSError as e:
        raise ValueError(f"prompt file {prompt[5:]!r} can't be read ({e.strerror}): check the path") from None


def kv_bytes(cfg: ModelConfig, T: int, itemsize: int = 4) -> int:
    """Bytes that attention with this model's layers and heads holds for T tokens: a key and a value for each."""
    return 2 * cfg.n_layer * cfg.kv_heads * cfg.att_head_size * T * itemsize


def main(argv: list[str] | None = None) -> None:
    cfg = cli(SampleConfig, argv)
    if cfg.device not in ("auto", "cpu", "cuda") or (cfg.device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device = {cfg.device!r}: choose auto, cpu" + (" or cuda" if torch.cuda.is_available() else "; there is no CUDA here"))
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    text = read_prompt(cfg.prompt)
    model, enc = load_model(cfg.ckpt, device).eval(), load_tokenizer(cfg.ckpt)
    end = enc.eot_token
    prompt = [end, *enc.encode_ordinary(text)]
    if max(prompt) >= model.cfg.vocab_size:
        raise ValueError(f"the prompt has token {max(prompt)}, the model's vocabulary ends at {model.cfg.vocab_size - 1}: "
                         f"meta.json in {cfg.ckpt} names another tokenizer ({enc.name}) than the model was trained with")
    steps = generate(Decoder(model), torch.tensor([prompt] * cfg.num_samples, device=device), cfg.max_tokens, temperature=cfg.temperature,
                     top_k=cfg.top_k, top_p=cfg.top_p, presence=cfg.presence, frequency=cfg.frequency,
                     generator=torch.Generator(device).manual_seed(cfg.seed), stop=end if cfg.stop else None)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows question marks
    try:
        write(text, steps, [Characters(enc) for _ in range(cfg.num_samples)], end if cfg.stop else None, len(prompt), model.cfg)
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough; give Python's own flush at exit another place to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write(text: str, steps: Iterator, streams: list[Characters], stop: int | None, n_prompt: int, cfg: ModelConfig) -> None:
    """Print one text as it comes, or several one after another when all are done; then speed and memory to stderr."""
    samples, times = [text] * len(streams), [time.perf_counter()]
    one = len(streams) == 1
    if one:
        print(text, end="", flush=True)
    for tokens, state in steps:
        pieces = ["" if token == stop else stream(token) for token, stream in zip(tokens.tolist(), streams)]
        times.append(time.perf_counter())
        samples = [sample + piece for sample, piece in zip(samples, pieces)]
        if one:
            print(pieces[0], end="", flush=True)
    ends = [stream(None) for stream in streams]
    print(ends[0] if one else "\n---------------\n".join(sample + end for sample, end in zip(samples, ends)), flush=True)

    B, n = len(streams), len(times) - 2
    speed = f"prefill {B * n_prompt} tokens, {B * n_prompt / (times[1] - times[0]):,.0f} tokens/s"
    if n:
        speed += f"; decode {B} x {n} tokens, {B * n / (times[-1] - times[1]):,.0f} tokens/s"
    print(f"{speed}\nmemory of {state.position:,} tokens: {state.nbytes() // B:,} bytes; attention with as many layers and heads keeps "
          f"{kv_bytes(cfg, state.position):,}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
