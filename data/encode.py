"""Examples to rows of tokens, by this process or by several, in the order they came.

Workers are told the tokenizer's name and get a batch of examples each, in turn, by a
pipe of its own. So the bytes that come back are the same for any number of them, and
memory does not grow with the source. A pipe ends with the process at its other end: who
is killed, at any moment, is noticed there.
"""

import signal
from collections import deque
from collections.abc import Iterator
from itertools import cycle
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
import tiktoken

from data.chat import Turns, encode_turns
from data.records import Example
from data.tokenizer import get_tokenizer, opening

BATCH = 2**18   # characters that go to a worker at once


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
    pool = [Worker(tokenizer, dtype) for _ in range(workers)]
    waiting: deque[tuple[list[tuple], Worker]] = deque()
    try:
        for batch, worker in zip(batches(examples), cycle(pool)):      # read while all are at work
            if len(waiting) == workers:
                given, first = waiting.popleft()                       # of this very worker
                yield given, first.take()
            worker.give([item[-1] for item in batch])
            waiting.append((batch, worker))
        for batch, worker in waiting:
            yield batch, worker.take()
    finally:
        for worker in pool:
            worker.end()


class Worker:
    """Another process that encodes, one batch at a time."""

    def __init__(self, tokenizer: str, dtype: np.dtype):
        spawn = get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_work, args=(theirs, tokenizer, dtype), daemon=True)
        resource_tracker.ensure_running()  # which would let interrupts through again
        # never hears Ctrl-C, not even while it starts: we hear it, and end it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self.process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()                     # now it ends with the process

    def give(self, examples: list[Example]) -> None:
        try:
            self.pipe.send(examples)
        except OSError:
            raise self.killed() from None

    def take(self) -> Rows:
        try:
            rows = self.pipe.recv()
        except (EOFError, OSError):
            raise self.killed() from None
        if isinstance(rows, Exception):
            raise rows
        return rows

    def killed(self) -> ValueError:
        return ValueError("a worker was killed, perhaps for want of memory: try fewer --workers")

    def end(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


# ------------------------------------------------------------------------------------------
# In a worker

def _work(pipe: Connection, tokenizer: str, dtype: np.dtype) -> None:
    """Encode what comes, until the other end is closed."""
    enc = None
    while True:
        try:
            examples = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            enc = enc or get_tokenizer(tokenizer)
            rows = encode_batch(examples, enc, dtype)
        except Exception as error:                     # it is the first process's to say
            rows = error
        try:
            pipe.send(rows)
        except OSError:
            return


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
