"""The loader: every row comes once in an epoch, alike for any number of processes."""

import json

import numpy as np
import pytest
import torch

from common_data import (BYTES, EOT, examples, numbered, preference, rows, supervised,
                         write_jsonl)  # noqa: F401
from data.loader import Loader
from data.prepare import prepare
from data.spool import RECORD, Spool


def starts(loader: Loader, steps: range) -> list[int]:
    """Where the crops of these steps start, in order."""
    return [int(start) for i in steps for batch in loader.step(i)[0] for start in batch.x[:, 0]]


# ------------------------------------------------------------------------------------------
# Text

def test_targets_are_the_next_tokens(tmp_path):
    batch = Loader(numbered(tmp_path / "d", 1000), "train", 4, 16).step(5)[0][0]
    assert batch.x.shape == batch.y.shape == batch.mask.shape == (4, 16)
    assert (batch.x.dtype, batch.y.dtype, batch.mask.dtype) == (torch.int64, torch.int64, torch.float32)
    assert torch.equal(batch.x, batch.x[:, :1] + torch.arange(16)) and torch.equal(batch.y, batch.x + 1)
    assert batch.mask.all()


@pytest.mark.parametrize("length, T", [(1000, 16), (17, 16), (33, 16), (31, 16), (100, 1), (2, 1)])
def test_an_epoch_visits_every_block_once(tmp_path, length, T):
    loader = Loader(numbered(tmp_path / "d", length), "train", 1, T)
    n = loader.n
    for epoch in range(3):
        visited = sorted(starts(loader, range(epoch * n, (epoch + 1) * n)))
        assert visited == list(range(visited[0], visited[0] + n * T, T))


def test_every_offset_of_the_grid_comes_once_before_any_comes_again(tmp_path):
    loader = Loader(numbered(tmp_path / "d", 50), "train", 1, 8)
    crops = starts(loader, range(loader.n * loader.n_offsets))
    assert sorted(crops) == list(range(loader.n * 8))  # every crop that there is, once


def test_two_ranks_never_share_a_crop(tmp_path):
    folder = numbered(tmp_path / "d", 1000)
    ranks = [Loader(folder, "train", 3, 16, rank=r, world_size=2, accum=2) for r in range(2)]
    steps = range(ranks[0].n // 12)  # a whole epoch
    crops = [start for loader in ranks for start in starts(loader, steps)]
    assert len(set(crops)) == len(crops)
    for i in range(100):  # and within every step, one that ends an epoch too
        crops = starts(ranks[0], range(i, i + 1)) + starts(ranks[1], range(i, i + 1))
        assert len(set(crops)) == 12


@pytest.mark.parametrize("kind", ["text", "supervised", "preference"])
def test_two_ranks_see_the_rows_of_one_process_with_the_doubled_batch(tmp_path, request, kind):
    folder = numbered(tmp_path / "d", 500) if kind == "text" else request.getfixturevalue(kind)
    one = Loader(folder, "train", 6, 16, seed=3, accum=2)
    two = [Loader(folder, "train", 3, 16, seed=3, rank=r, world_size=2, accum=2) for r in range(2)]
    for i in range(20):
        whole, n = one.step(i)
        parts = [loader.step(i) for loader in two]
        assert [count for _, count in parts] == [n, n]
        if kind != "preference":
            assert n == sum(float(batch.mask.sum()) for batch in whole)
        for micro, batch in enumerate(whole):
            for name in ("x", "y", "mask"):
                halves = [getattr(part[micro], name) for part, _ in parts]
                if kind == "preference":  # (2B, T): chosen, then rejected
                    halves = [half.unflatten(0, (2, 3)) for half in halves]
                    assert torch.equal(torch.cat(halves, 1).flatten(0, 1), getattr(batch, name))
                else:
                    assert torch.equal(torch.cat(halves), getattr(batch, name))


def test_resuming_is_asking_for_the_next_step(tmp_path):
    folder = numbered(tmp_path / "d", 1000)
    straight, resumed, other = (Loader(folder, "train", 4, 16, seed=s) for s in (1, 1, 2))
    expected = [starts(straight, range(i, i + 1)) for i in range(40)]
    assert [starts(resumed, range(i, i + 1)) for i in range(25, 40)] == expected[25:]
    assert [starts(other, range(i, i + 1)) for i in range(40)] != expected


# ------------------------------------------------------------------------------------------
# Examples

def test_an_epoch_visits_every_example_at_most_once_and_all_that_fill_batches(supervised):
    loader = Loader(supervised, "train", 4, 64)
    for epoch in range(2):
        per_epoch = loader.n // 4
        seen = [row for i in range(per_epoch) for row in rows(loader.step(epoch * per_epoch + i)[0][0])]
        assert len(set(seen)) == len(seen) == per_epoch * 4 > loader.n - 4


def test_batches_of_examples_learn_exactly_the_responses(supervised):
    loader = Loader(supervised, "train", 4, 64)
    pairs = dict(examples(supervised, "train"))
    for i in range(10):
        batch = loader.step(i)[0][0]
        for x, y, mask in zip(batch.x, batch.y, batch.mask.bool()):
            learnt = y[mask].tolist()
            prompt = BYTES.decode(x[1 : int(mask.nonzero()[0]) + 1].tolist())
            assert learnt[-1] == EOT and BYTES.decode(learnt[:-1]) == pairs[prompt]
            assert (x[int(mask.nonzero()[-1]) + 1 :] == EOT).all()  # padding


def test_tokens_that_are_not_learnt_are_not_counted(supervised, preference):
    """As the losses have it, beside which the loss of guessing by frequency stands."""
    for folder in (supervised, preference):
        loader = Loader(folder, "train", 4, 2048)
        targets = torch.cat([batch.y[batch.mask > 0] for batch in loader.windows()])
        assert loader.counts().tolist() == torch.bincount(targets, minlength=257).tolist()
        assert loader.counts().sum() < len(loader.tokens)


def test_rows_are_padded_to_the_longest_and_no_further(supervised):
    batch = Loader(supervised, "train", 4, 64).step(0)[0][0]
    assert max(len(row) for row in rows(batch)) == batch.x.shape[1] + 1


def test_long_examples_are_cut_on_the_right_and_those_without_targets_left_out(tmp_path):
    records = [{"prompt": "p" * i, "response": "response"} for i in range(40)]
    prepare(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "out")
    loader = Loader(tmp_path / "out", "train", 1, 10)
    stored = [p for p, _ in examples(tmp_path / "out", "train")]
    assert loader.n == sum(len(p) < 10 for p in stored)  # <|endoftext|> + prompt + one token fit into 10 + 1
    for i in range(loader.n):
        batch = loader.step(i)[0][0]
        assert batch.x.shape[1] <= 10 and batch.mask.sum() > 0
    with pytest.raises(ValueError, match="no example .* block_size 1"):
        write_jsonl(tmp_path / "b.jsonl", records[5:])
        prepare(tmp_path / "b.jsonl", tmp_path / "long")
        Loader(tmp_path / "long", "train", 1, 1)


def test_preference_batches_hold_the_chosen_first(preference):
    loader = Loader(preference, "train", 3, 64)
    for i in range(8):
        (batch,), n = loader.step(i)
        texts = [BYTES.decode(y[m].tolist()[:-1]) for y, m in zip(batch.y, batch.mask.bool())]
        assert n == 3 and batch.x.shape[0] == 6
        assert all(t.startswith("good") for t in texts[:3]) and all(t.startswith("bad") for t in texts[3:])


# ------------------------------------------------------------------------------------------
# Evaluation

@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", ["text", "supervised", "preference"])
def test_windows_give_the_whole_split_once_over_ranks_of_equal_shapes(tmp_path, request, kind, world):
    folder = numbered(tmp_path / "d", 100, 77) if kind == "text" else request.getfixturevalue(kind)
    split = "val" if kind == "text" else "train"
    ranks = [list(Loader(folder, split, 2, 16, rank=r, world_size=world).windows()) for r in range(world)]
    shapes = [[batch.x.shape for batch in batches] for batches in ranks]
    assert all(s == shapes[0] for s in shapes)
    got = [row for batches in ranks for batch in batches for row in rows(batch)]
    if kind == "text":
        targets = [int(t) for bs in ranks for b in bs for t in b.y[b.mask.bool()]]
        assert sorted(targets) == list(range(1, 77))
    else:
        tokens = np.fromfile(folder / "train.bin", np.uint16)
        index = np.fromfile(folder / "train.idx.bin", np.int64)
        cut = [tuple(tokens[a:b][:17].tolist()) for a, b in zip(index[:-1], index[1:])]
        assert sorted(got) == sorted(cut)


def test_max_tokens_limits_the_evaluation_over_all_ranks(tmp_path, supervised):
    folder = numbered(tmp_path / "d", 100, 1000)
    for limit, expected in ((100, 96), (96, 96), (95, 80), (1, 16), (10**9, 999)):
        ranks = [Loader(folder, "val", 2, 16, rank=r, world_size=2).windows(limit) for r in range(2)]
        assert sum(float(b.mask.sum()) for batches in ranks for b in batches) == expected
    total = sum(float(b.mask.sum()) for b in Loader(supervised, "train", 2, 64).windows(100))
    assert 85 < total <= 100


def test_a_validation_half_smaller_than_a_block_can_still_be_evaluated(tmp_path):
    loader = Loader(numbered(tmp_path / "d", 1000, 10), "val", 8, 64)
    assert sum(float(b.mask.sum()) for b in loader.windows()) == 9
    with pytest.raises(ValueError, match="block_size of at most 9"):
        loader.step(0)


# ------------------------------------------------------------------------------------------
# More than 2^31 tokens: files with holes, that take no room

N = 2**32 + 12345


def hollow(path, n: int, dtype=np.uint16):
    """A file of n numbers, 0 but for the last 100,000, which are 1, 2, 3, ..."""
    with open(path, "wb") as file:
        file.truncate(n * np.dtype(dtype).itemsize)
    np.memmap(path, dtype, "r+")[-100_000:] = np.arange(1, 100_001) % 60_000


def test_every_token_of_a_file_beyond_2_to_the_32_can_be_read(tmp_path):
    hollow(tmp_path / "train.bin", N)
    meta = {"kind": "text", "dtype": "uint16", "vocab_size": 60000, "tokens": {"train": N}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    T = 2**16
    loader = Loader(tmp_path, "train", 2, T, seed=1)
    order = loader.permutation(loader.n, 1, 1)
    assert loader.n == N // T - 1 and order.nbytes == 8 * loader.n        # 8 bytes a block
    at = int(order.argmax())                                               # the file's last block
    crop = loader._crop(0, at)
    assert crop > 2**32 - 2 * T
    x = loader.step(at // 2)[0][0].x[at % 2]
    expected = np.arange(crop, crop + T) - (N - 100_000) + 1
    assert np.array_equal(x.numpy(), np.where(expected > 0, expected % 60_000, 0))
    starts, stops, n_targets = loader.spans()
    assert stops[-1, 0] == N and n_targets.sum() == N - 1 and starts[-1, 0] == 2**32


def test_what_lies_beyond_2_to_the_32_in_a_spool_is_copied(tmp_path):
    hollow(tmp_path / "spool.bin", N)
    (tmp_path / "spool.mask").touch()
    (tmp_path / "spool.json").write_text("{}")
    rows = [(0, 3, 0, 2, 2, 0), (0, 4, N - 100_000, N - 99_998, N - 99_998, 0), (0, 2, N - 3, N - 1, N, 0)]
    np.array(rows, RECORD).tofile(tmp_path / "spool.rows")
    spool = Spool(tmp_path, np.dtype(np.uint16), {})
    assert (spool.done, spool.position) == (3, N)
    spool.finish()
    assert spool.write(spool.order(in_val=False), "train", masked=False) == 7
    copied = np.fromfile(tmp_path / "train.bin", np.uint16)
    assert copied.tolist() == [39_998, 39_999, 40_000, 0, 0, 1, 2]
