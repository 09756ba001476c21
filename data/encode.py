"""Examples to rows of tokens, by this process or by several, in the order they came.

Workers are told the tokenizer's name and get examples by the batch; a few batches for
each wait at once, however long the source. What comes back is the same bytes for any
number of them. Each has a pipe of its own, of which no other process holds the ends: so
the first process hears of a worker that is killed, even amid an answer (where a
ProcessPoolExecutor waits for ever), and workers end with it, however it ends.
"""

import contextlib
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import tiktoken

from data.chat import Turns, encode_turns
from data.records import Example
from data.tokenizer import get_tokenizer, opening

BATCH = 2**18   # characters that go to a worker at once
AHEAD = 3       # batches that wait for each worker


class Rows(NamedTuple):
    """Of a batch of examples, one after the other."""

    tokens: bytes
    mask: bytes                       # 1 for learnt tokens; of texts, nothing
    lengths: list[tuple[int, ...]]    # of the rows of each example, in tokens


def batches(examples: Iterator[tuple]) -> Iterator[list[tuple]]:
    """Tuples that end in an example, about BATCH characters at once."""
    batch, size = [], 0
    for item in examples:
        batch.append(item)
        size += sum(map(len, item[-1].texts))
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(examples: Iterator[tuple], enc: tiktoken.Encoding, tokenizer: str, dtype: np.dtype,
               workers: int) -> Iterator[tuple[list[tuple], Rows]]:
    """Batches of tuples that end in an example, each with its rows.

    `enc` is what `get_tokenizer` gives for the name `tokenizer`. Raises ValueError
    where an example can't be encoded, or a worker was killed.
    """
    if workers == 1:
        for batch in batches(examples):
            yield batch, encode_batch([item[-1] for item in batch], enc, dtype)
        return
    waiting: deque[tuple[list[tuple], Future]] = deque()
    with _workers(tokenizer, dtype, workers) as submit:
        for batch in batches(examples):
            waiting.append((batch, submit([item[-1] for item in batch])))
            if len(waiting) == AHEAD * workers:
                batch, future = waiting.popleft()
                yield batch, future.result()
        while waiting:
            batch, future = waiting.popleft()
            yield batch, future.result()


@contextlib.contextmanager
def _workers(tokenizer: str, dtype: np.dtype, n: int) -> Iterator[Callable[[list[Example]], Future]]:
    """What gives a batch to one of n processes, each served by a thread."""
    context, idle, processes = get_context("spawn"), SimpleQueue(), []
    pool = ThreadPoolExecutor(n)

    def ask(examples: list[Example]) -> Rows:
        pipe = idle.get()
        try:
            pipe.send(examples)
            answer = pipe.recv()
        except (EOFError, OSError):
            raise ValueError("a worker was killed, perhaps for want of memory: try fewer --workers") from None
        finally:
            idle.put(pipe)
        if isinstance(answer, Exception):
            raise answer
        return answer

    try:
        with _without_interrupts():
            for _ in range(n):
                here, there = context.Pipe()
                idle.put(here)
                process = context.Process(target=_work, args=(there, tokenizer, dtype), daemon=True)
                process.start()
                processes.append(process)
                there.close()
        yield lambda examples: pool.submit(ask, examples)
    finally:
        for process in processes:
            process.kill()
        pool.shutdown(cancel_futures=True)
        for process in processes:
            process.join()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started here never hear Ctrl-C; we hear it, if later, and end them."""
    resource_tracker.ensure_running()               # it would let them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, tokenizer: str, dtype: np.dtype) -> None:
    """A worker: rows for batches, until the other end of the pipe is closed."""
    enc = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            examples = pipe.recv()
            try:
                enc = enc or get_tokenizer(tokenizer)
                answer = encode_batch(examples, enc, dtype)
            except Exception as error:
                answer = error
            pipe.send(answer)


# ------------------------------------------------------------------------------------------
# Rows

def encode_batch(examples: list[Example], enc: tiktoken.Encoding, dtype: np.dtype) -> Rows:
    tokens, masks, lengths = [], [], []
    for example in examples:
        rows = _text(example.texts[0], enc, dtype) if example.kind == "text" else _rows(example, enc)
        tokens += [np.asarray(ids, dtype).tobytes() for ids, _ in rows]
        masks += [mask for _, mask in rows]
        lengths.append(tuple(len(ids) for ids, _ in rows))
    return Rows(b"".join(tokens), b"".join(masks), lengths)


def _text(text: str, enc: tiktoken.Encoding, dtype: np.dtype) -> list[tuple[np.ndarray, bytes]]:
    """A document as one row, without a mask."""
    # where no token of its own opens one, a document's end is the start of the next
    start = opening(enc) if opening(enc) != [enc.eot_token] else []
    try:
        ids = np.frombuffer(text.encode(), np.uint8) if enc.name == "bytes" else enc.encode_ordinary(text)
    except UnicodeEncodeError:                      # half a character, for which tiktoken has a rule
        ids = enc.encode_ordinary(text)
    return [(np.concatenate([np.array(part, dtype) for part in (start, ids, [enc.eot_token])]), b"")]


def _rows(example: Example, enc: tiktoken.Encoding) -> list[tuple[list[int], bytes]]:
    """(tokens, mask of the learnt ones) of each row that an example is stored as."""
    if example.kind == "preference" and example.roles:
        *before, chosen, rejected = zip(example.roles, example.texts)
        rows = [_row([*before, ("assistant", answer)], enc) for _, answer in (chosen, rejected)]
        return [(ids, _last_answer(mask)) for ids, mask in rows]
    if example.roles:
        return [_row(list(zip(example.roles, example.texts)), enc)]
    prompt, *answers = example.texts
    return [_row([("user", prompt), ("assistant", answer)], enc) for answer in answers]


def _row(turns: Turns, enc: tiktoken.Encoding) -> tuple[list[int], bytes]:
    """A conversation up to its last learnt token, and its mask."""
    if getattr(enc, "chat", None):
        ids, learnt = encode_turns(enc, turns)
        mask = bytes(learnt).rstrip(b"\0")
        return ids[: len(mask)], mask
    if [role for role, _ in turns] != ["user", "assistant"]:
        roles = ", ".join(role for role, _ in turns)
        raise ValueError(f"a conversation of {roles} needs a chat template, which the tokenizer {enc.name} "
                         "does not have: use --tokenizer with the folder of a model that has one, "
                         "or records of one prompt and one response")
    prompt, answer = (enc.encode_ordinary(text) for _, text in turns)
    prompt, answer = opening(enc) + prompt, [*answer, enc.eot_token]
    return prompt + answer, bytes(len(prompt)) + b"\1" * len(answer)


def _last_answer(mask: bytes) -> bytes:
    """Of the answers that are learnt, the last."""
    start = mask.rindex(0) + 1
    return bytes(start) + mask[start:]
