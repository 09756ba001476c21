"""Generate text from any model folder: a GPT, an RWKV-7 student, or a hybrid.

    python sample.py --ckpt out/rwkv --prompt "def shuffle("
    python sample.py --ckpt out/rwkv --prompt FILE:question.txt --num_samples 5 --temperature 0      (0 = greedy)
    python sample.py --ckpt out/chat --chat          reads a message a line, answers each, remembers what was said

What it is: the prompt in pieces, then one token at a time from the state. RWKV-7's state has the same size after ten
tokens and after ten thousand; the last line on stderr puts it beside what attention would keep. Documents begin behind
<|endoftext|> (or a token that the model has for it) in training, so prompts do too. In a chat the state goes on from
answer to answer: nothing is read twice.
What it is not: a server.
"""

import codecs
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

from config import cli, run
from data.chat import encode_turns
from data.tokenizer import load_tokenizer, opening, stops
from decode import Decoder, kv_bytes
from model import LM, ModelConfig, State, load_model

PREFILL = 512  # prompt tokens per call: fast matrix products, and small activations however long the prompt is


@dataclass(frozen=True)
class SampleConfig:
    """What to generate, and how. None means off."""

    ckpt: str = "out/rwkv"        # a model folder
    prompt: str = ""              # text, or FILE:path; empty = a new document
    chat: bool = False            # messages from stdin, in the model's chat template; the prompt is the first, if there is one
    num_samples: int = 1          # one is printed as it comes; several are generated side by side
    max_tokens: int = 300         # new tokens per sample, or per answer
    temperature: float = 0.8      # 0 = always the likeliest token
    top_k: int | None = None      # only the k likeliest tokens
    top_p: float | None = None    # only the likeliest tokens that together have this probability
    presence: float = 0.0         # taken from the logit of every token generated before
    frequency: float = 0.0        # the same, once for each time
    seed: int = 1337
    stop: bool = True             # end at the model's end tokens; --no-stop goes on with another document
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
             state: State | None = None, stop: tuple[int, ...] = ()) -> Iterator[tuple[Tensor, State]]:
    """Continue `tokens` (B, T >= 1), read from `state`, by up to n tokens; yields (tokens (B,), state) for each.

    The state has not read the tokens it comes with. A row that has drawn one of `stop` goes on with the first of them; the
    end is where all rows have.
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
            counts += torch.nn.functional.one_hot(tokens, cfg.vocab_size)
        if stop:
            tokens = torch.where(done, stop[0], tokens)
            done |= torch.isin(tokens, torch.tensor(stop, device=tokens.device))
        yield tokens, state
        if done.all():
            return


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
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows question marks
    try:
        (chat if cfg.chat else write)(cfg, model, enc, text, device, options)
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough; give Python's own flush at exit another place to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write(cfg: SampleConfig, model: LM, enc: tiktoken.Encoding, text: str, device: str, options: dict) -> None:
    """Print one text as it comes, or several one after another when all are done; then speed and memory to stderr."""
    prompt = [*opening(enc), *enc.encode_ordinary(text)]
    if max(prompt) >= model.cfg.vocab_size:
        raise ValueError(f"the prompt has token {max(prompt)}, the model's vocabulary ends at {model.cfg.vocab_size - 1}: "
                         f"meta.json in {cfg.ckpt} names another tokenizer ({enc.name}) than the model was trained with")
    stop = stops(enc) if cfg.stop else ()
    n = cfg.max_tokens
    if model.cfg.positions == "learned" and "a" in model.cfg.mixers:  # attention ends at its last learned position
        n = min(n, max(1, model.cfg.block_size - len(prompt) + 1))
    steps = generate(Decoder(model), torch.tensor([prompt] * cfg.num_samples, device=device), n, stop=stop,
                     generator=torch.Generator(device).manual_seed(cfg.seed), **options)
    streams = [Characters(enc) for _ in range(cfg.num_samples)]
    samples, times = [text] * len(streams), [time.perf_counter()]
    one = len(streams) == 1
    if one:
        print(text, end="", flush=True)
    for tokens, state in steps:
        pieces = ["" if token in stop else stream(token) for token, stream in zip(tokens.tolist(), streams)]
        times.append(time.perf_counter())
        samples = [sample + piece for sample, piece in zip(samples, pieces)]
        if one:
            print(pieces[0], end="", flush=True)
    ends = [stream(None) for stream in streams]
    print(ends[0] if one else "\n---------------\n".join(sample + end for sample, end in zip(samples, ends)), flush=True)

    B, n = len(streams), len(times) - 2
    speed = f"prefill {B * len(prompt)} tokens, {B * len(prompt) / (times[1] - times[0]):,.0f} tokens/s"
    if n:
        speed += f"; decode {B} x {n} tokens, {B * n / (times[-1] - times[1]):,.0f} tokens/s"
    print(f"{speed}\n{memory(state, model.cfg, B)}", file=sys.stderr)


def memory(state: State, cfg: ModelConfig, B: int = 1) -> str:
    return (f"memory of {state.position:,} tokens: {state.nbytes() // B:,} bytes; attention with as many layers and heads keeps "
            f"{kv_bytes(cfg, state.position):,}")


def chat(cfg: SampleConfig, model: LM, enc: tiktoken.Encoding, text: str, device: str, options: dict) -> None:
    """Answer each line of stdin; one state hears them all. `text`, if there is any, is the first message."""
    if not getattr(enc, "chat", None):
        raise ValueError(f"{cfg.ckpt} has no chat template that frames each message: take an instruct model, or leave --chat away to continue a text")
    if cfg.num_samples > 1 or not cfg.stop:
        raise ValueError("--chat has one conversation whose answers end: leave --num_samples and --no-stop away")
    decoder, generator, stop = Decoder(model), torch.Generator(device).manual_seed(cfg.seed), stops(enc)
    state, unread = None, []
    longest = model.cfg.block_size if model.cfg.positions == "learned" and "a" in model.cfg.mixers else math.inf
    for message in messages(text):
        ids, _ = encode_turns(enc, [("user", message)], opens=state is None, reply=True)
        room = longest + 1 - len(unread + ids) - (state.position if state else 0)
        if room < 1:
            raise ValueError(f"the conversation is longer than the {longest} positions that the model has learned: begin a new one")
        stream = Characters(enc)
        for tokens, state in generate(decoder, torch.tensor([unread + ids], device=device), min(cfg.max_tokens, room), stop=stop, state=state,
                                      generator=generator, **options):
            token = tokens.item()
            print("" if token in stop else stream(token), end="", flush=True)
        print(stream(None), flush=True)
        _, end, after = enc.chat["assistant"]  # whatever ended the answer, the next message stands behind a whole one
        unread = [token] * (token not in stop) + enc.encode(end + after, allowed_special="all")
    if state:
        print(memory(state, model.cfg), file=sys.stderr)


def messages(first: str) -> Iterator[str]:
    """The first one, if it isn't empty, then the lines of stdin that aren't blank; a person at a terminal is asked for each."""
    if first.strip():
        yield first
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


if __name__ == "__main__":
    run(main)
