"""A chat with an instruct model, in its own template.

    python -m tools.chat --ckpt out/chat        reads a message a line, answers each

One state hears it all: it goes on from answer to answer, and nothing is read twice.
Ctrl-C ends the chat and, with --save_state, keeps it. What it is not: a server.
"""

import sys
from collections.abc import Iterator
from typing import Annotated

from config import at_least, cli, run, settings
import torch
from tyro.conf import OmitArgPrefixes

from data.chat import encode_turns, texts_that_end
from data.tokenizer import TextStream, read_prompt, stops
from lib.session import Session, SessionConfig, check_stop, hush, session
from lib.state_file import compress, expand
from lib.states import memory_line
from sample import Sampling, generate

LONGEST = 2**20                                  # characters of a line, and one more


@settings
class ChatConfig:
    prompt: str = ""                             # the first message, or FILE:path
    max_tokens: int = at_least(1, 300, below=2**31)   # per answer
    stop: tuple[str, ...] = ()                   # texts that end an answer, beside the template's: --stop A B
    seed: int = at_least(0, 1337, below=2**63)
    how: Annotated[Sampling, OmitArgPrefixes] = Sampling(temperature=0.8)
    session: Annotated[SessionConfig, OmitArgPrefixes] = SessionConfig()

    def __post_init__(self):
        check_stop(self.stop)


def chat(cfg: ChatConfig, first: str, here: Session) -> None:
    """Answer `first`, if it isn't blank, and each line of stdin; Ctrl-C ends it.

    Leaves in `here` what was said.
    """
    if not getattr(here.enc, "chat", None):
        raise ValueError(f"{cfg.session.ckpt} has no chat template that frames each message: take an "
                         "instruct model, or sample.py to continue a text")
    generator = torch.Generator(here.decoder.device).manual_seed(cfg.seed)
    here.state = here.state and compress(here.state, cfg.session.state_dtype)      # while it waits
    try:
        for message in messages(first):
            if not answer(message, cfg, here, generator):
                break
    except KeyboardInterrupt:                              # as people leave a chat: what was said is kept
        print(file=sys.stderr)
    except OSError as e:                                   # of stdout or stdin: what was said is kept
        if not (cfg.session.save_state and here.state):
            raise
        hush(e)
    if here.state:
        print(memory_line([here.state], here.decoder.cfg), file=sys.stderr)
    elif cfg.session.save_state:
        raise ValueError("--save_state: nothing was said, so there is nothing to save")


def answer(message: str, cfg: ChatConfig, here: Session, generator: torch.Generator) -> bool:
    """Print a message's answer as it comes; False if the conversation has no room."""
    enc, stop, limit = here.enc, stops(here.enc), here.decoder.cfg.longest
    _, end, between = enc.chat["assistant"]
    closing, after_end = (enc.encode(text, allowed_special="all") for text in (end + between, between))
    ids, _ = encode_turns(enc, [("user", message)], opens=here.state is None, reply=True)
    prompt, n = here.unread + ids, cfg.max_tokens
    if limit is not None:
        n = min(n, limit + 1 - len(prompt) - (here.state.position if here.state else 0))
    if n < 1:
        print(f"the conversation is longer than the {limit} positions that the model has learned: begin a "
              "new one", file=sys.stderr)
        return False
    tokens = torch.tensor([prompt], device=here.decoder.device)
    stream = TextStream(enc, stop, (*texts_that_end(enc, stop), *cfg.stop))
    state = here.state and expand(here.state)
    lead = enc.chat.get("lead", "")
    for tokens, after in generate(here.decoder, tokens, n, state=state, stop=stop,
                                  generator=generator, **vars(cfg.how)):
        token = tokens.item()
        # whatever ends the answer, the next message follows a whole one
        here.state, here.unread = after, stream.unread(token) + closing
        text = stream(token)
        print(text.removeprefix(lead), end="", flush=True)
        lead = "" if text else lead
        if stream.ended:
            here.unread = stream.unread(token) + (after_end if stream.by == end else closing)
            break
    print(stream(None), flush=True)
    here.state = compress(here.state, cfg.session.state_dtype)
    return True


def messages(first: str) -> Iterator[str]:
    """The first one, if it isn't empty, then the lines of stdin that aren't blank.

    A person at a terminal is asked for each.
    """
    if first.strip():
        yield first
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline(LONGEST)
        if not line:
            return
        if len(line) == LONGEST:
            print(f"a message of {LONGEST:,} characters or more ends the chat: send a shorter one",
                  file=sys.stderr)
            return
        if line.strip():
            yield line.rstrip("\n")


def main(argv: list[str] | None = None) -> None:
    cfg = cli(ChatConfig, argv)
    first = read_prompt(cfg.prompt)                        # before a large model is loaded
    with session(cfg.session) as here:
        chat(cfg, first, here)


if __name__ == "__main__":
    run(main, output=True)
