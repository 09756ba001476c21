"""Generate text from any model folder: a GPT, an RWKV-7 student, or a hybrid.

    python sample.py --ckpt out/rwkv --prompt "def shuffle("
    python sample.py --ckpt out/rwkv --prompt FILE:question.txt --num_samples 5 --temperature 0
    python sample.py --ckpt out/rwkv --prompt FILE:book.txt --max_tokens 0 --save_state book.state
    python sample.py --ckpt out/rwkv --load_state book.state --prompt " And then"

The prompt is read in pieces, then one token at a time comes from the state. RWKV-7's state has
the same size after ten tokens and after ten thousand; the last line on stderr puts it beside what
attention would keep. A saved state goes on without the book it has read.

Documents begin after <|endoftext|> (or a token that the model has for it) in training, so prompts
do too. A chat: tools/chat.py. Many prompts side by side: tools/batch.py.
"""

import time
from collections.abc import Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor
from tyro.conf import OmitArgPrefixes

from config import at_least, cli, run as run_script, settings
from data.tokenizer import TextStream, opening, read_prompt, stops
from lib.decode import Decoder
from lib.session import (Session, SessionConfig, as_tensor, check_prompt, hush, read_only, report, room,
                         session)
from lib.states import process, repeat
from model import LM, State


@settings
class Sampling:
    """How tokens are drawn. None means off."""

    temperature: float = at_least(0.0, 1.0)      # 0 = always the likeliest token
    top_k: int | None = at_least(1, None)        # only the k likeliest tokens
    top_p: float | None = None                   # only the likeliest that together have this probability
    presence: float = 0.0                        # taken from the logit of every token generated before
    frequency: float = 0.0                       # the same, once for each time

    def __post_init__(self):
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: it must be above 0 and at most 1")


@settings
class SampleConfig:
    """What to generate, and how."""

    prompt: str = ""                             # text, or FILE:path; empty = a new document
    num_samples: int = at_least(1, 1)            # one is printed as it comes; several side by side
    max_tokens: int = at_least(0, 300)           # new tokens per sample; 0 only reads, for --save_state
    stop: bool = True                            # end at the model's end tokens; --no-stop goes on
    seed: int = at_least(0, 1337, below=2**63)
    how: Annotated[Sampling, OmitArgPrefixes] = Sampling(temperature=0.8)
    session: Annotated[SessionConfig, OmitArgPrefixes] = SessionConfig()

    def __post_init__(self):
        saves = self.session.save_state
        if self.max_tokens == 0 and not saves:
            raise ValueError("max_tokens = 0: at least one new token must be asked for, or a --save_state")
        if saves and self.num_samples > 1:
            raise ValueError("--save_state writes the state of one text: omit --num_samples")
        if self.session.state_dtype != "float32" and not saves:
            raise ValueError(f"--state_dtype {self.session.state_dtype} is for --save_state and "
                             "tools/chat.py: omit it, or give a --save_state")


# ------------------------------------------------------------------------------------------
# Choosing tokens

def choose(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | None = None) -> Tensor:
    """One token (B,) from each row of logits (B, V).

    top_k first, then top_p; both count in the full distribution. top_p keeps the smallest set of
    likeliest tokens whose probability reaches it, and always the likeliest one.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() - logits.float().amax(-1, keepdim=True)        # so that 1e-9 divides safely
    p = torch.softmax(logits / temperature, -1)
    if not p.isfinite().all():
        raise ValueError("the model's logits are not finite: its training has diverged, take an earlier "
                         "checkpoint")
    if top_k is None and top_p is None:
        return torch.multinomial(p, 1, generator=generator).squeeze(1)
    p, order = p.topk(min(top_k or p.shape[1], p.shape[1]))                # likeliest first
    if top_p is not None:
        p = p * (p.cumsum(-1) - p < top_p)                                 # what stands before is not enough
    return order.gather(1, torch.multinomial(p, 1, generator=generator)).squeeze(1)


@torch.inference_mode()
def generate(model: LM | Decoder, tokens: Tensor, n: int, *, state: State | None = None,
             stop: tuple[int, ...] = (), generator: torch.Generator | None = None,
             **sampling) -> Iterator[tuple[Tensor, State]]:
    """Continue `tokens` (B, T >= 1), read from `state`, by up to n tokens; yields (tokens (B,), state).

    A yielded state has not yet read the tokens yielded with it. After one of `stop` a row yields
    stop[0]; it ends when every row has. `sampling` are the fields of Sampling; presence and
    frequency as OpenAI has them: logit -= presence (count > 0) + frequency count.
    Raises ValueError for options or tokens out of range, and for text beyond learned positions.
    """
    how = Sampling(**sampling)
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    if n < 1:
        raise ValueError(f"max_tokens = {n}: at least one new token must be asked for")
    end = (state.position if state else 0) + tokens.shape[1] + n - 1
    if decoder.cfg.longest and end > decoder.cfg.longest:
        raise ValueError(f"prompt and max_tokens need {end} positions, the model has learned "
                         f"{decoder.cfg.longest}: shorten one of them")
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
    """Continue `text`, and leave in `here` what is remembered.

    One sample is printed as it comes, several when all are done; then speed and memory on
    stderr. Ctrl-C ends the text.
    """
    decoder, stop = here.decoder, stops(here.enc) if cfg.stop else ()
    ids = here.enc.encode_ordinary(text)
    prompt = (here.unread + ids if here.state else opening(here.enc) + ids) or opening(here.enc)
    check_prompt(prompt, here, cfg.session.ckpt)
    if cfg.max_tokens == 0:
        return read_only(prompt, here)
    start = here.state.position if here.state else 0
    n = int(min(cfg.max_tokens, room(decoder, start, len(prompt))))
    rows = as_tensor([prompt] * cfg.num_samples, decoder)                  # (B, T)
    generator = torch.Generator(decoder.device).manual_seed(cfg.seed)
    steps = generate(decoder, rows, n, state=here.state and repeat(here.state, len(rows)), stop=stop,
                     generator=generator, **vars(cfg.how))
    streams, samples, times = [TextStream(here.enc) for _ in rows], [text] * len(rows), [time.perf_counter()]
    live = cfg.num_samples == 1
    print(text if live else "", end="", flush=True)
    try:
        for tokens, state in steps:
            times.append(time.perf_counter())
            pieces = ["" if token in stop else add(token) for token, add in zip(tokens.tolist(), streams)]
            samples = [sample + piece for sample, piece in zip(samples, pieces)]
            print(pieces[0] if live else "", end="", flush=True)
    except (KeyboardInterrupt, BrokenPipeError) as e:                      # what is to be kept is kept
        if not cfg.session.save_state or len(times) == 1:
            raise
        if isinstance(e, BrokenPipeError):
            hush()
    # only now, and both: Ctrl-C may come between any two lines above
    here.state, here.unread = state, [token for token in tokens.tolist() if token not in stop]
    ends = [add(None) for add in streams]
    whole = [sample + end for sample, end in zip(samples, ends)]
    print(ends[0] if live else "\n---------------\n".join(whole), flush=True)
    report(times, rows.numel(), [here.state], decoder.cfg, len(rows))


def main(argv: list[str] | None = None) -> None:
    cfg = cli(SampleConfig, argv)
    text = read_prompt(cfg.prompt)                                         # before a large model is loaded
    with session(cfg.session) as here:
        write(cfg, text, here)


if __name__ == "__main__":
    run_script(main)
