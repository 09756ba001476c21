"""Generate text from any model folder: a GPT, an RWKV-7 student, or a hybrid.

    python sample.py --ckpt out/rwkv --prompt "def shuffle("
    python sample.py --ckpt out/rwkv --prompt FILE:question.txt --num_samples 5 --temperature 0      (0 = greedy)

What it is: the prompt in pieces, then one token at a time from the state. RWKV-7's state has the same size after ten
tokens and after ten thousand; the last line on stderr puts it beside what attention would keep. Documents begin behind
<|endoftext|> in training, so prompts do too.
What it is not: a chat program or a server.
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

PREFILL = 512  # prompt tokens per call: fast matrix products, and small activations however long the prompt is


@dataclass(frozen=True)
class SampleConfig:
    """What to generate, and how. None means off."""

    ckpt: str = "out/rwkv"        # a model folder
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
    device: str = "auto"          # auto, cpu, cuda


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
            counts += F.one_hot(tokens, cfg.vocab_size)
        if stop is not None:
            tokens = torch.where(done, stop, tokens)
            done |= tokens == stop
        yield tokens, state
        if stop is not None and done.all():
            return


# ---------------------------------------------------------------------------------------------------------------------
# One token through RWKV-7. A step costs reading every weight once, and a microsecond or two for each operation, view and
# new tensor. LM, written for training, takes 71 operations and 62 views for a layer; below they are 36 and 5, on weights
# that lie ready, in memory that is allocated once. The numbers are the same.

class Decoder:
    """tokens (B,), state -> logits (B, V), state, as LM(tokens[:, None], state) gives them. Holds copies of the weights.

    A model with attention, with rotary positions in its RWKV heads, or in half precision goes through LM itself.
    """

    @torch.no_grad()
    def __init__(self, model: LM):
        self.model, self.cfg, self.layers, self.scratch, self.B = model, model.cfg, None, None, 0
        if "a" not in self.cfg.mixers and not self.cfg.rwkv_rope and model.emb.weight.dtype.itemsize >= 4:
            self.layers, self.emb, self.head = [pack(b) for b in model.blocks], model.emb.weight.detach(), product(model.head.weight.T)
            self.ln0, self.ln_out = norm(model.blocks[0].ln0) if self.cfg.ln0 else torch.clone, norm(model.ln_out)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        if self.layers is None:
            logits, state = self.model(tokens[:, None], state)
            return logits[:, 0], state
        if self.B != len(tokens):
            self.B, self.scratch = len(tokens), scratch(self.layers[0], len(tokens))
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if self.B == 1 else threads)  # one token is too little work to share: waiting would take longer
        try:
            return self.step(tokens, state)
        finally:
            torch.set_num_threads(threads)

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        x, v_first, after = self.emb[tokens], None, []                                             # x (B, C)
        if self.cfg.positions == "learned":
            x = x + self.model.pos(self.model.position_ids(state.position, 1))
        x = self.ln0(x)
        for p, (att, ffn) in zip(self.layers, state.layers):
            x, v_first, att = time_mix(p, self.scratch, x, v_first, att)
            x, ffn = channel_mix(p, x, ffn)
            after.append((att, ffn))
        return self.head(self.ln_out(x)), State(state.position + 1, tuple(after))


def time_mix(p: SimpleNamespace, s: SimpleNamespace, x: Tensor, v_first: Tensor | None, state: tuple) -> tuple[Tensor, Tensor, tuple]:
    """x + TimeMixer(ln1(x)) for x (B, C), with the weights p and the memory s. New tensors are only what is returned."""
    last, S, position = state
    x1 = p.ln1(x)
    torch.lerp(x1, last, p.mix, out=s.mixed)                        # token shift for r, k, v; g, w, a, v      (7, B, C)
    p.rkv(s.mixed_rkv, p.rkv_bias, s.rkv)                           #                                          (3, B, A)
    low = p.down(s.mixed_low)                                       # the low-rank maps, side by side          (4, B, rank)
    low[:2].tanh_()
    p.up(low, p.up_bias, s.low)                                     #                                          (4, B, A)
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
    S = S * s.w.mul_(-math.exp(-0.5)).exp_()
    S.addcmul_(s.stored, s.kk.mul_(s.a), value=-1).addcmul_(s.v_column, s.k)
    torch.bmm(s.r_row, S.flatten(0, 1).mT, out=s.y_row)
    s.v.mul_(s.r.mul_(s.k).mul_(p.r_k).sum(-1, keepdim=True))       # the bonus
    y = p.ln_x(s.y).add_(s.v_flat).mul_(s.gate)
    return p.output(y, x), v_first, (x1, S, position + 1)


def channel_mix(p: SimpleNamespace, x: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x + ffn(ln2(x)) for x (B, C), with ChannelMix or MLP."""
    x2 = p.ln2(x)
    k = p.ffn_key(x2 if last is None else torch.lerp(x2, last, p.x_k))
    if p.kind == "gelu":
        k = F.gelu(k, approximate="tanh")
    elif p.kind == "swiglu":
        k.mul_(F.silu(p.ffn_gate(x2)))
    else:
        k.relu_()
        k.mul_(k)
    return p.ffn_value(k, x), None if last is None else x2


def pack(block: Block) -> SimpleNamespace:
    """A block's weights as the two functions above want them. What a switch leaves out becomes zeros, which do nothing."""
    m, f, cfg = block.att, block.ffn, block.att.cfg
    C, A, head = m.key.in_features, m.key.out_features, (m.H, 1, m.N)
    get = lambda name, *shape: getattr(m, name) if hasattr(m, name) else m.w0.new_zeros(shape)  # noqa: E731
    rkv = (m.receptance, m.key, m.value)
    # The gate goes through tanh beside the decay: sigmoid(h) = (1 + tanh(h/2)) / 2, so sigmoid(h) g2 = tanh(h/2) g2/2 + sum(g2)/2
    g2 = get("g2", 1, A) / 2
    downs, ups = (get("g1", C, 1) / 2, m.w1, m.a1, get("v1", C, 1)), (g2, m.w2, m.a2, get("v2", 1, A))
    rank = max(map(len, ups))
    return SimpleNamespace(
        H=m.H, N=m.N, kind=cfg.ffn, ln1=norm(block.ln1), ln2=norm(block.ln2), ln_x=norm(m.ln_x) if cfg.group_norm else torch.clone,
        mix=torch.cat([get("x_" + c, 1, 1, C) for c in "rkvgwav"]),
        rkv=product(torch.stack([q.weight.T for q in rkv])),
        rkv_bias=torch.stack([q.bias for q in rkv])[:, None] if cfg.qkv_bias else torch.zeros_like(m.w0),
        down=product(torch.stack([F.pad(d, (0, rank - d.shape[1])) for d in downs])),
        up=product(torch.stack([F.pad(u, (0, 0, 0, rank - len(u))) for u in ups])),
        up_bias=torch.stack((g2.sum(0, keepdim=True) if cfg.gate else torch.ones_like(m.w0[0]), m.w0[0], m.a0[0], get("v0", 1, 1, A)[0])),
        k_k=m.k_k.view(head).clone(), k_a=m.k_a.view(head).clone(), k_1=1 - m.k_a.view(head), r_k=get("r_k", m.H, m.N).view(head).clone(),
        output=product(m.output.weight.T, m.output.bias),
        x_k=f.x_k[0].clone() if cfg.ffn == "channelmix" else None,
        ffn_key=product(f.key.weight.T, f.key.bias),
        ffn_gate=product(f.gate.weight.T, f.gate.bias) if cfg.ffn == "swiglu" else None,
        ffn_value=product(f.value.weight.T, f.value.bias))


def scratch(p: SimpleNamespace, B: int) -> SimpleNamespace:
    """The memory of one step, used by layer after layer, with every view of it that time_mix needs."""
    H, N, A, new = p.H, p.N, p.H * p.N, p.mix.new_empty
    s = SimpleNamespace(mixed=new(7, B, p.mix.shape[2]), rkv=new(3, B, A), low=new(4, B, A), kk=new(B, H, 1, N),
                        stored_row=new(B * H, 1, N), y=new(B, A))
    s.mixed_rkv, s.mixed_low, s.gate, s.w_a_nu = s.mixed[:3], s.mixed[3:], s.low[0], s.low[1:]
    s.r, s.k, s.v = s.rkv.view(3, B, H, 1, N)
    s.w, s.a, s.nu = s.w_a_nu.view(3, B, H, 1, N)
    s.r_row, s.kk_row, s.y_row = s.r.flatten(0, 1), s.kk.flatten(0, 1), s.y.view(B * H, 1, N)
    s.v_flat, s.v_column, s.stored = s.v.view(B, A), s.v.mT, s.stored_row.view(B, H, N, 1)
    return s


def product(W: Tensor, bias: Tensor | None = None) -> Callable[..., Tensor]:
    """The function x, add -> x W + add + bias, x (B, C) and W (C, A), or G of them at once, x (G, B, C) and W (G, C, A).

    One text on a CPU: W's rows are added up by embedding_bag, which streams memory at 1.5 times the speed of the BLAS's
    matrix-vector product (measured 32 against 20 GB/s). Otherwise a matrix product.
    """
    W = W.detach().contiguous()
    A, G = W.shape[-1], W.shape[:-2].numel()
    rows, index = W.view(-1, A), torch.arange(W.numel() // A)
    starts, shape = index[:: len(rows) // G].clone(), (*W.shape[:-2], 1, A)
    by_rows = W.device.type == "cpu" and W.numel() >= 2**17  # below, the call costs more than the reading
    multiply, multiply_add = (torch.mm, torch.addmm) if W.ndim == 2 else (torch.bmm, torch.baddbmm)

    def apply(x: Tensor, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if by_rows and x.shape[-2] == 1:
            y = torch.embedding_bag(rows, index, starts, mode=0, per_sample_weights=x.view(-1))[0].view(shape)
            y = y if add is None else torch.add(y, add, out=out)
        else:
            y = multiply(x, W) if add is None else multiply_add(add, x, W, out=out)
        return y if bias is None else y.add_(bias)

    return apply


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
    options = {name: getattr(cfg, name) for name in ("temperature", "top_k", "top_p", "presence", "frequency")}
    check(cfg.max_tokens, **options)
    if cfg.num_samples < 1:
        raise ValueError(f"num_samples = {cfg.num_samples}: it must be at least 1")
    if not 0 <= cfg.seed < 2**63:
        raise ValueError(f"seed = {cfg.seed}: it must be in 0 ... 2^63 - 1")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if cfg.device not in ["auto", *devices]:
        raise ValueError(f"device = {cfg.device!r}: choose auto or {' or '.join(devices)}, which is what this machine has")
    device = devices[-1] if cfg.device == "auto" else cfg.device

    text = read_prompt(cfg.prompt)
    model, enc = load_model(cfg.ckpt, device).eval(), load_tokenizer(cfg.ckpt)
    prompt = [enc.eot_token, *enc.encode_ordinary(text)]
    if max(prompt) >= model.cfg.vocab_size:
        raise ValueError(f"the prompt has token {max(prompt)}, the model's vocabulary ends at {model.cfg.vocab_size - 1}: "
                         f"meta.json in {cfg.ckpt} names another tokenizer ({enc.name}) than the model was trained with")
    stop = enc.eot_token if cfg.stop else None
    steps = generate(Decoder(model), torch.tensor([prompt] * cfg.num_samples, device=device), cfg.max_tokens, stop=stop,
                     generator=torch.Generator(device).manual_seed(cfg.seed), **options)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows question marks
    try:
        write(text, steps, [Characters(enc) for _ in range(cfg.num_samples)], stop, len(prompt), model.cfg)
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
