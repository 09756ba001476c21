"""Generate text from any model folder: a GPT, an RWKV-7 student, or a hybrid.

    python sample.py --ckpt out/rwkv --prompt "def shuffle("
    python sample.py --ckpt out/rwkv --prompt FILE:question.txt --num_samples 5 --temperature 0      (0 = greedy)
    python sample.py --ckpt out/rwkv --prompts questions.txt         one prompt per line, of any lengths, side by side
    python sample.py --ckpt out/chat --chat          reads a message a line, answers each, remembers what was said
    python sample.py --ckpt out/rwkv --prompt FILE:book.txt --max_tokens 0 --save_state book.state --state_dtype int8
    python sample.py --ckpt out/rwkv --load_state book.state --prompt " And then"        goes on without the book

What it is: the prompt in pieces, then one token at a time from the state. RWKV-7's state has the same size after ten
tokens and after ten thousand; the last line on stderr puts it beside what attention would keep. Documents begin after
<|endoftext|> (or a token that the model has for it) in training, so prompts do too. In a chat the state goes on from
answer to answer: nothing is read twice.
What it is not: a server.
"""

import codecs
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

from config import cli, run
from data.chat import encode_turns
from data.tokenizer import load_tokenizer, opening, stops
from decode import Decoder, optimize_for_inference
from model import LM, ModelConfig, State, cache_bytes, load_model
from state import DTYPES, compress, expand, join, load_state, process, process_rows, save_state, select

Batches = list[tuple[list[int], State]]  # [(rows, the State that holds them side by side), ...]


@dataclass(frozen=True)
class SampleConfig:
    """What to generate, and how. None means off."""

    ckpt: str = "out/rwkv"        # a model folder
    prompt: str = ""              # text, or FILE:path; empty = a new document
    prompts: str | None = None    # a text file with one prompt per line, instead of prompt
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
    load_state: str | None = None  # continue a text that was read before
    save_state: str | None = None  # write what the model remembers in the end, for --load_state; with max_tokens 0 that is the prompt
    state_dtype: str = "float32"  # of a state in a file, and in a chat while it waits: float32, bfloat16, float16, int8
    dtype: str = "float32"        # of the matrices of a pure RWKV-7 while it generates: float32, bfloat16, float16; large ones gain, small ones lose
    device: str = "auto"          # auto, cpu, cuda

    def __post_init__(self):
        check(1 if self.max_tokens == 0 and self.save_state and not self.chat else self.max_tokens, **self.sampling)
        if self.num_samples < 1:
            raise ValueError(f"num_samples = {self.num_samples}: it must be at least 1")
        for name in ("prompts", "load_state", "save_state"):
            if getattr(self, name) == "":  # an unset "$FILE" in the shell
                raise ValueError(f"--{name} is empty: name a file, or omit it")
        if self.prompts and (self.prompt or self.chat or self.num_samples > 1):
            raise ValueError("--prompts has one text for each line of its file: omit --prompt, --chat and --num_samples")
        if self.save_state and (self.prompts or self.num_samples > 1):
            raise ValueError("--save_state writes the state of one text: omit --prompts and --num_samples")
        if self.save_state and Path(self.save_state).is_dir():  # found out before all the reading, not after it
            raise ValueError(f"--save_state {self.save_state} is a folder: name a file")
        for name, choices in (("state_dtype", list(DTYPES)), ("dtype", [name for name in DTYPES if name != "int8"])):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} = {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed}: it must be in 0 ... 2^63 - 1")
        if self.state_dtype != "float32" and not (self.save_state or self.chat):
            raise ValueError(f"--state_dtype {self.state_dtype} is for --save_state and --chat: omit it, or give one of them")

    @property
    def sampling(self) -> dict:
        """The options of `generate` that say how tokens are drawn."""
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "presence", "frequency")}


def check(n: int, temperature: float, top_k: int | None, top_p: float | None, presence: float, frequency: float) -> None:
    """Raise ValueError for a sampling option outside its range."""
    if n < 1:
        raise ValueError(f"max_tokens = {n}: at least one new token must be asked for")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature = {temperature}: it must be a number of at least 0 (0 = greedy)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}: it must be at least 1; omit it to keep every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: it must be above 0 and at most 1")
    if not (math.isfinite(presence) and math.isfinite(frequency)):
        raise ValueError(f"presence = {presence}, frequency = {frequency}: both must be finite numbers (0 = off)")


# ---------------------------------------------------------------------------------------------------------------------
# Choosing tokens

def choose(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           generator: "torch.Generator | Sequence[torch.Generator] | None" = None) -> Tensor:
    """One token (B,) from each row of logits (B, V). top_k first, then top_p; both count in the full distribution.

    top_p keeps the smallest set of likeliest tokens whose probability reaches it, and always the likeliest one. With a list
    of generators each row draws by its own, and so what it would draw alone.
    """
    def draw(p: Tensor) -> Tensor:  # (B, 1)
        if isinstance(generator, Sequence):
            return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(p.split(1), generator, strict=True)])
        return torch.multinomial(p, 1, generator=generator)

    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    p = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)  # minus the maximum: 1e-9 divides safely
    if not p.isfinite().all():
        raise ValueError("the model's logits are not finite: its training has diverged, take an earlier checkpoint")
    if top_k is None and top_p is None:
        return draw(p).squeeze(1)
    p, order = p.topk(min(top_k or p.shape[1], p.shape[1]))                        # likeliest first
    if top_p is not None:
        p = p * (p.cumsum(-1) - p < top_p)                                         # what stands before a token is not enough
    return order.gather(1, draw(p)).squeeze(1)


@torch.inference_mode()
def generate(model: "LM | Decoder", tokens: Tensor | Sequence[Sequence[int]], n: int, *, temperature: float = 1.0, top_k: int | None = None,
             top_p: float | None = None, presence: float = 0.0, frequency: float = 0.0,
             generator: "torch.Generator | Sequence[torch.Generator] | None" = None, state: State | None = None,
             stop: tuple[int, ...] = ()) -> "Iterator[tuple[Tensor, State | Batches]]":
    """Continue `tokens` (B, T >= 1), read from `state`, by up to n tokens; yields (tokens (B,), state) for each.

    Prompts of different lengths come as a list of lists; each gets the tokens that it would get alone. The state is then a list
    [(rows, their state), ...] (state.join): one entry for RWKV-7, for attention one for each length.
    A yielded state has not yet read the tokens yielded with it. After one of `stop` a row yields stop[0]; a row of a list that
    has reached the last learned position yields -1. Ends when every row has.
    `presence` and `frequency` as OpenAI has them: logit -= presence * (count > 0) + frequency * count, over what was generated.
    Raises ValueError for options outside their range, tokens outside the vocabulary, and text beyond learned positions.
    """
    check(n, temperature, top_k, top_p, presence, frequency)
    decoder = model if isinstance(model, Decoder) else optimize_for_inference(model)
    cfg, device = decoder.cfg, decoder.device
    rows = list(tokens) if isinstance(tokens, Tensor) else [torch.tensor(row, dtype=torch.long, device=device) for row in tokens]
    for row in rows:
        if len(row) == 0 or row.min() < 0 or row.max() >= cfg.vocab_size:
            raise ValueError(f"a prompt needs at least one token, all in 0 ... {cfg.vocab_size - 1}, the model's vocabulary: got {row.tolist()}"[:300])
    one = isinstance(tokens, Tensor)
    needed = (state.position if state else 0) + max(map(len, rows)) + (n - 1 if one else 0)
    if cfg.longest and needed > cfg.longest:
        raise ValueError(f"prompt and max_tokens need {needed} positions, the model has learned {cfg.longest}: shorten one of them")

    if one:
        logits, state = process(decoder.model, tokens, state)                      # (B, V)
    else:
        logits, states = process_rows(decoder.model, rows, state)
        batches = join(cfg, states)
    counts = torch.zeros_like(logits)
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    full = torch.zeros_like(done)  # at the last learned position
    for i in range(n):
        if i and one:
            logits, state = decoder(tokens, state)
        elif i:
            before, batches, logits = batches, [], torch.zeros_like(logits)
            for batch, after in before:
                if after.position != cfg.longest:
                    logits[batch], after = decoder(tokens[batch], after)
                batches.append((batch, after))
        if presence or frequency:
            logits = logits - presence * (counts > 0) - frequency * counts
        tokens = choose(logits, temperature, top_k, top_p, generator)              # (B,)
        if presence or frequency:
            counts += torch.nn.functional.one_hot(tokens, cfg.vocab_size)
        if not one:
            tokens = tokens.masked_fill(full, -1)
        if stop:
            tokens = torch.where(done, stop[0], tokens)
            done |= torch.isin(tokens, torch.tensor(stop, device=device))
        yield tokens, state if one else batches
        if not one:
            for batch, after in batches:
                full[batch] = after.position == cfg.longest
        if (done if one else done | full).all():
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
        return Path(prompt[5:]).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"prompt file {prompt[5:]} is not UTF-8 (byte {e.start}): convert it, for example with iconv") from None
    except OSError as e:
        raise ValueError(f"prompt file {prompt[5:]!r} can't be read ({e.strerror}): check the path") from None


def main(argv: list[str] | None = None) -> None:
    cfg = cli(SampleConfig, argv)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if cfg.device not in ["auto", *devices]:
        raise ValueError(f"device = {cfg.device!r}: choose auto or {' or '.join(devices)}, which is what this machine has")
    device = devices[-1] if cfg.device == "auto" else cfg.device

    texts = [read_prompt(cfg.prompt)] * cfg.num_samples
    if cfg.prompts:
        text = read_prompt(f"FILE:{cfg.prompts}")
        if not text:
            raise ValueError(f"prompts = {cfg.prompts!r} has no line: write one prompt on each")
        texts = text.removesuffix("\n").split("\n")
    if cfg.save_state:
        Path(cfg.save_state).parent.mkdir(parents=True, exist_ok=True)
    model, enc = load_model(cfg.ckpt, device).eval(), load_tokenizer(cfg.ckpt)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows question marks
    try:
        state, unread = load_state(cfg.load_state, model, enc.name) if cfg.load_state else (None, [])
        state = state and expand(state)
        decoder = optimize_for_inference(model, None if cfg.dtype == "float32" else DTYPES[cfg.dtype])
        state, unread = (chat if cfg.chat else write)(cfg, decoder, enc, texts, state, unread)
        if cfg.save_state:
            save_state(cfg.save_state, model, compress(state, cfg.state_dtype), enc.name, unread)
    except BrokenPipeError:
        hush()
        if cfg.save_state:
            raise ValueError(f"nothing was saved to {cfg.save_state}: whatever reads the output ended before the text began") from None


def hush() -> None:
    """The reader of stdout, `head` perhaps, has seen enough: give what is still printed, and Python's own flush at exit, another place to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write(cfg: SampleConfig, decoder: Decoder, enc: tiktoken.Encoding, texts: list[str], state: State | None,
          unread: list[int]) -> tuple[State | Batches, list[int]]:
    """Print one text as it comes, or several one after another when all are done; then speed and memory to stderr.

    Returns the state in the end, and what it has not read. Ctrl-C ends the text.
    """
    prompts = [unread + enc.encode_ordinary(text) if state else [*opening(enc), *enc.encode_ordinary(text)] for text in texts]
    prompts = [prompt or opening(enc) for prompt in prompts]  # after all that was read, and with nothing to continue: another document
    highest, lengths = max(map(max, prompts)), list(map(len, prompts))
    if highest >= decoder.cfg.vocab_size:
        raise ValueError(f"the prompt has token {highest}, the model's vocabulary ends at {decoder.cfg.vocab_size - 1}: "
                         f"meta.json in {cfg.ckpt} names another tokenizer ({enc.name}) than the model was trained with")
    if cfg.max_tokens == 0:
        return read(decoder, prompts[0], state)
    stop = stops(enc) if cfg.stop else ()
    n, B, device = cfg.max_tokens, len(texts), decoder.device
    start, limit = state.position if state else 0, decoder.cfg.longest or math.inf
    if start + max(lengths) > limit:
        line = f" in line {lengths.index(max(lengths)) + 1}" if cfg.prompts else ""
        raise ValueError(f"the prompt{line} ends at position {start + max(lengths)}, the model has learned {limit}: shorten it"
                         + (f", or begin without the {start} of --load_state" if state else ""))
    n = min(n, limit - start - min(lengths) + 1)
    generators = [torch.Generator(device).manual_seed(cfg.seed) for _ in texts]
    steps = generate(decoder, prompts if cfg.prompts else torch.tensor(prompts, device=device), n, stop=stop,
                     generator=generators if cfg.prompts else generators[0], state=state and select(state, [0] * B), **cfg.sampling)
    streams = [Characters(enc) for _ in texts]
    samples, times = list(texts), [time.perf_counter()]
    one = B == 1
    if one:
        print(texts[0], end="", flush=True)
    try:
        for tokens, state in steps:
            pieces = ["" if token in (-1, *stop) else stream(token) for token, stream in zip(tokens.tolist(), streams)]
            times.append(time.perf_counter())
            samples = [sample + piece for sample, piece in zip(samples, pieces)]
            if one:
                print(pieces[0], end="", flush=True)
    except (KeyboardInterrupt, BrokenPipeError) as e:  # what is to be kept is kept
        if not cfg.save_state or len(times) == 1:
            raise
        if isinstance(e, BrokenPipeError):
            hush()
    ends = [stream(None) for stream in streams]
    print(ends[0] if one else "\n---------------\n".join(sample + end for sample, end in zip(samples, ends)), flush=True)

    n, read_tokens = len(times) - 2, sum(map(len, prompts))
    speed = f"prefill {read_tokens} tokens, {read_tokens / (times[1] - times[0]):,.0f} tokens/s"
    if n:
        speed += f"; decode {B} x {n} tokens, {B * n / (times[-1] - times[1]):,.0f} tokens/s"
    print(f"{speed}\n{memory(state, decoder.cfg, B)}", file=sys.stderr)
    return state, [token for token in tokens.tolist() if token not in (-1, *stop)]


def read(decoder: Decoder, prompt: list[int], state: State | None) -> tuple[State, list[int]]:
    """Read a prompt but for its last token, which is to be read when there is something to say."""
    if len(prompt) > 1:
        _, state = process(decoder.model, torch.tensor([prompt[:-1]], device=decoder.device), state)
        print(memory(state, decoder.cfg), file=sys.stderr)
    if state is None:
        raise ValueError("--max_tokens 0 with an empty prompt: there is nothing to read and to remember; give a prompt")
    return state, prompt[-1:]


def memory(state: State | Batches, cfg: ModelConfig, B: int = 1) -> str:
    """Mean bytes for each of B texts, beside what attention would keep for the longest one."""
    states = [state] if isinstance(state, State) else [s for _, s in state]
    T = max(s.position for s in states)
    return (f"memory of {T:,} tokens: {sum(s.nbytes() for s in states) // B:,} bytes; attention with as many layers and heads keeps "
            f"{cfg.n_layer * cache_bytes(cfg, 'a', T):,}")


def chat(cfg: SampleConfig, decoder: Decoder, enc: tiktoken.Encoding, texts: list[str], state: State | None,
         unread: list[int]) -> tuple[State, list[int]]:
    """Answer each line of stdin; one state hears them all. texts[0], if there is any, is the first message. Ctrl-C ends it. Returns as `write`."""
    if not getattr(enc, "chat", None):
        raise ValueError(f"{cfg.ckpt} has no chat template that frames each message: take an instruct model, or omit --chat to continue a text")
    if cfg.num_samples > 1 or not cfg.stop:
        raise ValueError("--chat has one conversation whose answers end: omit --num_samples and --no-stop")
    generator, stop = torch.Generator(decoder.device).manual_seed(cfg.seed), stops(enc)
    _, end, between = enc.chat["assistant"]
    closing = enc.encode(end + between, allowed_special="all")
    state = state and compress(state, cfg.state_dtype)  # while it waits
    limit = decoder.cfg.longest or math.inf
    try:
        for message in messages(texts[0]):
            ids, _ = encode_turns(enc, [("user", message)], opens=state is None, reply=True)
            room = limit + 1 - len(unread + ids) - (state.position if state else 0)
            if room < 1:
                print(f"the conversation is longer than the {limit} positions that the model has learned: begin a new one", file=sys.stderr)
                break
            stream = Characters(enc)
            for tokens, after in generate(decoder, torch.tensor([unread + ids], device=decoder.device), min(cfg.max_tokens, room), stop=stop,
                                          state=state and expand(state), generator=generator, **cfg.sampling):
                token = tokens.item()
                state, unread = after, [token] * (token not in stop) + closing  # whatever ends the answer, the next message follows a whole one
                print("" if token in stop else stream(token), end="", flush=True)
            print(stream(None), flush=True)
            state = compress(state, cfg.state_dtype)
    except KeyboardInterrupt:  # as people leave a chat: what was said is kept
        print(file=sys.stderr)
    except BrokenPipeError:
        hush()
    if state:
        print(memory(state, decoder.cfg), file=sys.stderr)
    elif cfg.save_state:
        raise ValueError("--save_state: nothing was said, so there is nothing to save")
    return state, unread


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
