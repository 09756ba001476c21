"""Generate text from any model folder: a GPT, an RWKV-7 student, or a hybrid.

    python sample.py --ckpt out/rwkv --prompt "def shuffle("
    python sample.py --ckpt out/rwkv --prompt FILE:question.txt --num_samples 5
    python sample.py --prompt FILE:book.txt --max_tokens 0 --save_state book.state
    python sample.py --load_state book.state --prompt " And then"

The prompt is read in pieces, then one token at a time comes from the state. RWKV-7's
state has the same size after ten tokens and after ten thousand; the last line on stderr
puts it beside what attention would keep. A saved state goes on without its book.
Prompts begin as documents do in training, after <|endoftext|>. A chat: tools/chat.py;
many prompts: tools/batch.py.
"""

import time
from collections.abc import Iterator
from typing import Annotated

from config import at_least, cli, hush, run as run_script, settings     # before torch: see config/script.py
import torch
import torch.nn.functional as F
from torch import Tensor
from tyro.conf import OmitArgPrefixes

from data.tokenizer import read_prompt
from lib.decode import Decoder
from lib.session import Ending, Session, SessionConfig, first_tokens, read_only, report, room, session
from lib.states import process, repeat
from model import LM, State


@settings
class Sampling:
    """How tokens are drawn. None means off."""

    temperature: float = at_least(0.0, 1.0)      # 0 = always the likeliest token
    top_k: int | None = at_least(1, None)        # only the k likeliest tokens
    top_p: float | None = None                   # only the likeliest that together have this probability
    presence: float = at_least(-1e20, 0.0, below=1e20)     # off the logit of every token generated before
    frequency: float = at_least(-1e20, 0.0, below=1e20)    # the same, once for each time

    def __post_init__(self):
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: it must be above 0 and at most 1")


@settings
class SampleConfig:
    prompt: str = ""                             # text, or FILE:path; empty = a new document
    num_samples: int = at_least(1, 1, below=2**16)    # one is printed as it comes; several side by side
    max_tokens: int = at_least(0, 300, below=2**31)   # new ones per sample; 0 only reads, for --save_state
    seed: int = at_least(0, 1337, below=2**63)
    ending: Annotated[Ending, OmitArgPrefixes] = Ending()
    how: Annotated[Sampling, OmitArgPrefixes] = Sampling(temperature=0.8)
    session: Annotated[SessionConfig, OmitArgPrefixes] = SessionConfig()

    def __post_init__(self):
        saves, dtype = self.session.save_state, self.session.state_dtype
        if self.max_tokens == 0 and not saves:
            raise ValueError("max_tokens = 0: at least one new token must be asked for, or a --save_state")
        if saves and self.num_samples > 1:
            raise ValueError("--save_state writes the state of one text: omit --num_samples")
        if dtype != "float32" and not saves:
            raise ValueError(f"--state_dtype {dtype} is for --save_state and tools.chat: omit it")


def choose(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | None = None) -> Tensor:
    """One token (B,) from each row of logits (B, V).

    top_k first, then top_p, whose probabilities are those among all V tokens: it keeps
    the fewest likeliest tokens that together reach it, and at least one.
    """
    largest = logits.float().amax(-1, keepdim=True)
    if not largest.isfinite().all():
        raise ValueError("the model's logits are not finite: it has diverged, take an earlier checkpoint")
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax((logits.float() - largest) / max(temperature, 1e-30), -1)    # <= 0: it divides safely
    if top_k is None and top_p is None:
        return torch.multinomial(p, 1, generator=generator).squeeze(1)
    p, order = p.topk(min(top_k or p.shape[1], p.shape[1]))                # likeliest first
    if top_p is not None:
        p = p * (p.cumsum(-1) - p < max(top_p, 1e-30))                     # what stands before is not enough
    return order.gather(1, torch.multinomial(p, 1, generator=generator)).squeeze(1)


@torch.inference_mode()
def generate(model: LM | Decoder, tokens: Tensor, n: int, *, state: State | None = None,
             stop: tuple[int, ...] = (), generator: torch.Generator | None = None,
             **sampling) -> Iterator[tuple[Tensor, State]]:
    """Continue `tokens` (B, T) from `state` by up to n; yields (tokens (B,), state).

    A yielded state has not yet read the tokens yielded with it. After one of `stop` a
    row yields stop[0]; it ends when every row has. Penalties as OpenAI has them: logit
    -= presence (count > 0) + frequency count. Raises ValueError for `sampling` (the
    fields of Sampling) or tokens out of range, and for text beyond learned positions.
    """
    how = Sampling(**sampling)
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    if n < 1:
        raise ValueError(f"max_tokens = {n}: at least one new token must be asked for")
    end, limit = (state.position if state else 0) + tokens.shape[1] + n - 1, decoder.cfg.longest
    if limit and end > limit:
        raise ValueError(f"prompt and max_tokens need {end} positions, the model has learned {limit}: "
                         "shorten one of them")
    logits, state = process(decoder.model, tokens, state)                  # (B, V)
    counts = torch.zeros_like(logits)
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for i in range(n):
        if i:
            logits, state = decoder(tokens, state)
        if how.presence or how.frequency:
            logits = logits - how.presence * (counts > 0) - how.frequency * counts
        tokens = choose(logits, how.temperature, how.top_k, how.top_p, generator)            # (B,)
        if how.presence or how.frequency:
            counts += F.one_hot(tokens, counts.shape[1])
        if stop:
            tokens = torch.where(done, stop[0], tokens)
            done |= torch.isin(tokens, torch.tensor(stop, device=tokens.device))
        yield tokens, state
        if done.all():
            return


# ------------------------------------------------------------------------------------------
# To the terminal

def write(cfg: SampleConfig, text: str, here: Session) -> None:
    """Continue `text`, and leave in `here` what is remembered. Ctrl-C ends the text."""
    decoder, B, prompt = here.decoder, cfg.num_samples, first_tokens(text, here, cfg.session.ckpt)
    if cfg.max_tokens == 0:
        return read_only(prompt if text or not here.state else [], here)
    n = int(min(cfg.max_tokens, room(here, len(prompt))))
    rows = torch.tensor([prompt], device=decoder.device).expand(B, -1)     # (B, T)
    generator = torch.Generator(decoder.device).manual_seed(cfg.seed)
    steps = generate(decoder, rows, n, state=here.state and repeat(here.state, B),
                     stop=here.ends(cfg.ending), generator=generator, **vars(cfg.how))
    streams = [here.stream(cfg.ending, () if text else here.unread) for _ in rows]
    samples, times = [""] * B, [time.perf_counter()]
    print(text if B == 1 else "", end="", flush=True)
    try:
        for tokens, _ in here.hear(steps):
            times.append(time.perf_counter())
            pieces = [add(token) for token, add in zip(tokens.tolist(), streams)]
            samples = [sample + piece for sample, piece in zip(samples, pieces)]
            print(pieces[0] if B == 1 else "", end="", flush=True)
            if all(stream.ended for stream in streams):
                break
    except (KeyboardInterrupt, OSError) as e:                              # what is to be kept is kept
        if not cfg.session.save_state or len(times) == 1:
            raise
        if isinstance(e, OSError):
            hush(e)
    here.keep(streams[0])
    ends = [add(None) for add in streams]
    texts = (text + sample + end for sample, end in zip(samples, ends))
    print(ends[0] if B == 1 else "\n---------------\n".join(texts), flush=True)
    report(times, rows.numel(), [here.state], decoder.cfg, B)


def main(argv: list[str] | None = None) -> None:
    cfg = cli(SampleConfig, argv)
    text = read_prompt(cfg.prompt)                                         # before a large model is loaded
    with session(cfg.session) as here:
        write(cfg, text, here)


if __name__ == "__main__":
    run_script(main, output=True)
