"""Many prompts side by side, each continued as it would be alone.

    python -m tools.batch --ckpt out/rwkv --prompts questions.txt      a prompt per line

Nothing is padded, and every token is read once: all prompts are read as far as the
shortest goes, which is done then, and the others read on.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Annotated

from config import at_least, cli, run, settings
import torch
import torch.nn.functional as F
from torch import Tensor
from tyro.conf import OmitArgPrefixes

from data.tokenizer import read_prompt
from lib.decode import Decoder
from lib.session import Ending, Session, SessionConfig, first_tokens, report, room, session
from lib.states import join, process_rows, repeat
from model import LM, State
from sample import Sampling, choose

Batches = list[tuple[list[int], State]]      # [(rows, the State that holds them side by side), ...]


@settings
class BatchConfig:
    prompts: str = ""                            # a text file with one prompt per line
    max_tokens: int = at_least(1, 300, below=2**31)   # new tokens per prompt
    seed: int = at_least(0, 1337, below=2**63)   # each prompt draws what it would draw alone
    ending: Annotated[Ending, OmitArgPrefixes] = Ending()
    how: Annotated[Sampling, OmitArgPrefixes] = Sampling(temperature=0.8)
    session: Annotated[SessionConfig, OmitArgPrefixes] = SessionConfig()

    def __post_init__(self):
        if self.session.save_state:
            raise ValueError("--save_state writes the state of one text: use sample.py for it")
        if self.session.state_dtype != "float32":
            raise ValueError(
                f"--state_dtype {self.session.state_dtype} is for the --save_state of sample.py and "
                "tools/chat.py: omit it"
            )


@torch.inference_mode()
def generate_rows(model: LM | Decoder, prompts: Sequence[Sequence[int]], n: int, *,
                  state: State | None = None, stop: tuple[int, ...] = (),
                  generators: Sequence[torch.Generator] | None = None,
                  **sampling) -> Iterator[tuple[Tensor, Batches]]:
    """Continue prompts of any lengths by up to n tokens; each gets the tokens that it
    would get alone.

    Yields (tokens (B,), batches) for each token; the batches are those of states.join:
    one entry for RWKV-7, for attention one per length. A row that has reached the last
    learned position yields -1, after one of `stop` stop[0]. Else as sample.generate.
    """
    how = Sampling(**sampling)
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    cfg, device = decoder.cfg, decoder.device
    if n < 1:
        raise ValueError(f"max_tokens = {n}: at least one new token must be asked for")
    rows = [torch.tensor(list(prompt), dtype=torch.long, device=device) for prompt in prompts]
    end = (state.position if state else 0) + max(map(len, rows), default=0)
    if cfg.longest and end > cfg.longest:
        raise ValueError(f"a prompt ends at position {end}, the model has learned {cfg.longest}: shorten it")
    logits, states = process_rows(decoder.model, rows, state)
    batches, counts = join(cfg, states), torch.zeros_like(logits)
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    full = torch.zeros_like(done)                          # at the last learned position
    for i in range(n):
        if i:
            logits, batches = step(decoder, tokens, batches, logits)
        if how.presence or how.frequency:
            logits = logits - how.presence * (counts > 0) - how.frequency * counts
        tokens = choose_rows(logits, how, generators)
        if how.presence or how.frequency:
            counts += F.one_hot(tokens, cfg.vocab_size)
        tokens = tokens.masked_fill(full, -1)
        if stop:
            tokens = torch.where(done, stop[0], tokens)
            done |= torch.isin(tokens, torch.tensor(stop, device=device))
        yield tokens, batches
        for batch, after in batches:
            full[batch] = after.position == cfg.longest
        if (done | full).all():
            return


def step(decoder: Decoder, tokens: Tensor, batches: Batches, logits: Tensor) -> tuple[Tensor, Batches]:
    """One token further, batch by batch; at the last learned position rows stay."""
    logits, further = torch.zeros_like(logits), []
    for batch, after in batches:
        if after.position != decoder.cfg.longest:
            logits[batch], after = decoder(tokens[batch], after)
        further.append((batch, after))
    return logits, further


def choose_rows(logits: Tensor, how: Sampling, generators: Sequence[torch.Generator] | None) -> Tensor:
    """One token (B,) from each row; with generators each row draws by its own."""
    options = (how.temperature, how.top_k, how.top_p)
    if generators is None:
        return choose(logits, *options)
    rows = zip(logits.split(1), generators, strict=True)
    return torch.cat([choose(row, *options, generator) for row, generator in rows])


def read_prompts(file: str) -> list[str]:
    """The lines of a file. Only a line feed ends one."""
    if not file:
        raise ValueError("--prompts is empty: name a file with one prompt on each line")
    text = read_prompt(f"FILE:{file}")
    if not text:
        raise ValueError(f"prompts = {file!r} has no line: write one prompt on each")
    return text.removesuffix("\n").split("\n")


def write_rows(cfg: BatchConfig, texts: list[str], here: Session) -> None:
    """Print every text with its continuation, when all are done. Ctrl-C ends them."""
    decoder = here.decoder
    prompts = [first_tokens(text, here, cfg.session.ckpt) for text in texts]
    lengths = list(map(len, prompts))
    room(here, max(lengths), f" in line {lengths.index(max(lengths)) + 1}")
    n = int(min(cfg.max_tokens, room(here, min(lengths))))
    generators = [torch.Generator(decoder.device).manual_seed(cfg.seed) for _ in texts]
    streams = [here.stream(cfg.ending, () if text else here.unread) for text in texts]
    times = [time.perf_counter()]
    before_all = here.state and repeat(here.state, len(texts))
    for tokens, batches in generate_rows(decoder, prompts, n, state=before_all, stop=here.ends(cfg.ending),
                                         generators=generators, **vars(cfg.how)):
        times.append(time.perf_counter())
        # -1: there was no room for another
        pieces = ["" if token == -1 else add(token) for token, add in zip(tokens.tolist(), streams)]
        texts = [text + piece for text, piece in zip(texts, pieces)]
        if all(stream.ended or token == -1 for stream, token in zip(streams, tokens.tolist())):
            break
    whole = [text + add(None) for text, add in zip(texts, streams)]
    print("\n---------------\n".join(whole), flush=True)
    report(times, sum(lengths), [state for _, state in batches], decoder.cfg, len(texts))


def main(argv: list[str] | None = None) -> None:
    cfg = cli(BatchConfig, argv)
    texts = read_prompts(cfg.prompts)                      # before a large model is loaded
    with session(cfg.session) as here:
        write_rows(cfg, texts, here)


if __name__ == "__main__":
    run(main, output=True)
