"""What generating, chatting and batches share: a model ready, and its memory's file."""

import contextlib
import math
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tiktoken
import torch
from torch import Tensor

from config import hush, settings
from data.tokenizer import TextStream, load_tokenizer, opening, stops
from lib.decode import Decoder
from lib.folders import load_model
from lib.owned import check_place
from lib.processes import pick_device
from lib.state_file import DTYPES, compress, expand, is_state, load_state, save_state
from lib.states import memory_line, process, tensors
from model import ModelConfig, State


@settings
class SessionConfig:
    """Which model, and what it remembers from before and for later. None means off."""

    ckpt: str = "out/rwkv"                 # a model folder
    load_state: str | None = None          # continue a text that was read before
    save_state: str | None = None          # write what the model remembers in the end, for --load_state
    # of the state in a file, and in a chat while it waits
    state_dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    # of a pure RWKV-7's matrices while it generates: a token reads half as much in 16
    # bits, a quarter in int8 (on CPUs), which large models gain by on several threads
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    device: str = "auto"                   # auto, cpu, cuda

    def __post_init__(self):
        if self.save_state and Path(self.save_state).is_dir():     # before all the reading, not after it
            raise ValueError(f"--save_state {self.save_state} is a folder: name a file")


@settings
class Ending:
    """What ends a text."""

    stop: tuple[str, ...] = ()             # also these texts, which are not shown: --stop A B
    no_stop: bool = False                  # go on past the model's end tokens

    def __post_init__(self):
        check_stop(self.stop)


def check_stop(stop: tuple[str, ...]) -> None:
    """Raises ValueError for what no text can stop at."""
    if not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop = {stop}: give one or more texts, none of them empty")
    if any(text.lower() in ("true", "false") for text in stop):
        raise ValueError(f"stop = {stop}: it takes texts; --no-stop goes on past the model's end tokens")


@dataclass
class Session:
    """A model that writes, its tokenizer, and its memory: a state, and tokens that it
    has not read yet.
    """

    decoder: Decoder
    enc: tiktoken.Encoding
    state: State | None
    unread: list[int]
    saves: bool = False                    # whether somebody is to go on from it
    # the tokens that came last, each with the state that has not read it
    last: Sequence[tuple[Tensor, State]] = ()

    def ends(self, how: Ending) -> tuple[int, ...]:
        """The tokens that end a text."""
        return () if how.no_stop else stops(self.enc)

    def stream(self, how: Ending, behind: Sequence[int] = ()) -> TextStream:
        """For what is said, at once `behind` tokens that were shown before."""
        stream = TextStream(self.enc, self.ends(how), how.stop)
        stream.follow(behind)
        return stream

    def hear(self, steps: Iterator[tuple[Tensor, State]]) -> Iterator[tuple[Tensor, State]]:
        """generate's steps, of which the first row is remembered by `keep`."""
        self.last = deque(maxlen=4 if self.saves else 1)         # a character's tokens
        for tokens, state in steps:
            self.last.append((tokens[0], state))
            yield tokens, state

    def keep(self, stream: TextStream) -> None:
        """Remember what was heard, with the last token unread; if that is saved, with
        all tokens of a character that isn't whole, which is shown when it is.
        """
        n = 1
        if self.saves and stream.open:
            n = stream.open
            stream.decoder.reset()                 # it is not shown as a broken one
        tokens = [token.item() for token, _ in self.last]
        unread = tokens[-n:-1] + stream.unread(tokens[-1])
        if n > len(tokens):                        # it has been open since before the first of them
            self.unread = self.unread + unread
        else:                                      # together: Ctrl-C may come between any two lines
            self.state, self.unread = self.last[-n][1], unread


@contextlib.contextmanager
def session(cfg: SessionConfig) -> Iterator[Session]:
    """The model with load_state's state; what it remembers at last goes to save_state.

    Whatever reads our output may end early, as `head` does: then that is the end,
    without a word, and what was read by then is kept. Raises ValueError, before
    anything is read, where save_state would replace what is no state, and where
    load_state is not of one text.
    """
    device = pick_device(cfg.device)
    if cfg.save_state:
        check_place([Path(cfg.save_state)], is_state, "--save_state")
    model, enc = load_model(cfg.ckpt, device).eval(), load_tokenizer(cfg.ckpt)
    state, unread = load_state(cfg.load_state, model, enc.name) if cfg.load_state else (None, [])
    if state and (texts := len(tensors(state)[0])) != 1:
        raise ValueError(f"--load_state {cfg.load_state} remembers {texts} texts, and goes on with one: save "
                         "one of them alone, with lib.states.select")
    dtype = None if cfg.dtype == "float32" else DTYPES[cfg.dtype]
    before = expand(state) if state else None
    here = Session(Decoder(model, dtype), enc, before, unread, bool(cfg.save_state))
    try:
        yield here
    except OSError as e:                                           # of stdout: nothing else is written here
        kept = cfg.save_state and here.state is not before
        hush(e if kept else None)
        if cfg.save_state and not kept:
            raise ValueError(f"nothing was saved to {cfg.save_state}: whatever reads the output ended before "
                             "the text began") from None
        if not kept and not isinstance(e, BrokenPipeError):
            raise
    if cfg.save_state:
        save_state(cfg.save_state, model, compress(here.state, cfg.state_dtype), enc.name, here.unread)


def first_tokens(text: str, here: Session, ckpt: str) -> list[int]:
    """What the model reads: the text, behind what is unread or a document's opening.

    After all that was read, and with nothing to continue, another document begins.
    Raises ValueError where the tokenizer has tokens that the model does not know.
    """
    start, vocab_size = opening(here.enc), here.decoder.cfg.vocab_size
    ids = (here.unread if here.state else start) + here.enc.encode_ordinary(text) or start
    if max(ids) >= vocab_size:
        raise ValueError(f"the prompt has token {max(ids)}, the model's vocabulary ends at {vocab_size - 1}: "
                         f"meta.json in {ckpt} names another tokenizer ({here.enc.name}) than the model was "
                         "trained with")
    return ids


def room(here: Session, prompt: int, where: str = "") -> float:
    """How many tokens fit behind a prompt of so many tokens.

    Raises ValueError where the prompt itself does not fit.
    """
    limit, start = here.decoder.cfg.longest, here.state.position if here.state else 0
    if limit is None:
        return math.inf
    if start + prompt > limit:
        advice = f", or begin without the {start} of --load_state" if start else ""
        raise ValueError(f"the prompt{where} ends at position {start + prompt}, the model has learned "
                         f"{limit}: shorten it{advice}")
    return limit - start - prompt + 1


def read_only(prompt: list[int], here: Session) -> None:
    """Read a prompt but its last token, to be read when there is something to say.

    Behind a state it may be empty: then all stays as it is.
    """
    if len(prompt) > 1:
        tokens = torch.tensor([prompt[:-1]], device=here.decoder.device)
        _, here.state = process(here.decoder.model, tokens, here.state)
        print(memory_line([here.state], here.decoder.cfg), file=sys.stderr)
    if here.state is None:
        raise ValueError("--max_tokens 0 with an empty prompt: there is nothing to read and to remember; "
                         "give a prompt")
    here.unread = prompt[-1:] or here.unread


def report(times: list[float], read_tokens: int, states: list[State], cfg: ModelConfig, B: int) -> None:
    """Speed and memory of B texts, to stderr. times: of the start and every token."""
    n = len(times) - 2
    line = f"prefill {read_tokens} tokens, {read_tokens / (times[1] - times[0]):,.0f} tokens/s"
    if n:
        line += f"; decode {B} x {n} tokens, {B * n / (times[-1] - times[1]):,.0f} tokens/s"
    print(line, memory_line(states, cfg, B), sep="\n", file=sys.stderr)
