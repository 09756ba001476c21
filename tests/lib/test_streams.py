"""State carried from step to step: streams go on where they ended, no state is lost."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import T, TINY, assert_same_run, metrics, moments, newest, one_line, random_batch, tiny_model
from common_train import QUIET, Killed, dies_at_call, job, loop, run_fit, teacher  # noqa: F401   (fixtures)
from lib.scores import cross_entropy
from lib.states import tensors, tree_map
from lib.streams import StreamLoader, pack, unpack
from model import State
from train import FitConfig, main, param_groups


def numbers(folder: Path, n: int) -> str:
    """Prepared text whose tokens are 0, 1, 2, ..."""
    folder.mkdir()
    for half in ("train", "val"):
        np.arange(n, dtype=np.uint16).tofile(folder / f"{half}.bin")
    meta = {
        "kind": "text",
        "tokenizer": "bytes",
        "vocab_size": 65536,
        "dtype": "uint16",
        "tokens": {"train": n, "val": n},
        "source": "numbers",
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


def inputs(loader: StreamLoader, i: int) -> torch.Tensor:
    """Of step i, (accum, B, T)."""
    return torch.stack([batch.x for batch in loader.step(i)[0]])


# ------------------------------------------------------------------------------------------
# Which text a step reads


@pytest.mark.parametrize("n", [5 * 8 * 4 + 1, 1000, 4 * 8 + 9])
def test_streams_go_on_where_they_ended_until_all_of_them_begin_anew(tmp_path, n):
    loader = StreamLoader(numbers(tmp_path / "d", n), "train", 2, 8, 3, accum=2)
    epoch, last = loader.n // 4, None
    for i in range(4 * epoch):
        x = inputs(loader, i)
        assert torch.equal(x, x[..., :1] + torch.arange(8))
        assert loader.begins(i) == (i % epoch == 0)
        if not loader.begins(i):
            assert torch.equal(x[..., 0], last + 8)
        last = x[..., 0]
    epochs = [
        torch.cat([inputs(loader, i).flatten() for i in range(e * epoch, (e + 1) * epoch)]) for e in range(4)
    ]
    for tokens in epochs:  # an epoch reads nothing twice
        assert len(tokens.unique()) == len(tokens) == epoch * 4 * 8
    assert epoch == 1 and n < 50 or any(not torch.equal(epochs[0], tokens) for tokens in epochs[1:])


def test_streams_of_two_ranks_are_those_of_one_and_any_step_can_be_asked_for(tmp_path):
    folder = numbers(tmp_path / "d", 1000)
    one = StreamLoader(folder, "train", 4, 8, 1, accum=2)
    two = [StreamLoader(folder, "train", 2, 8, 1, rank, 2, 2) for rank in (0, 1)]
    for i in (40, 3, 15, 0, 14):
        assert torch.equal(inputs(one, i), torch.cat([inputs(loader, i) for loader in two], 1))
        assert one.begins(i) == two[0].begins(i) == two[1].begins(i)


# ------------------------------------------------------------------------------------------
# What a step computes


def test_a_carried_state_makes_steps_one_reading_of_the_text(tmp_path, tiny):
    """Nothing is learnt (rate 0): the steps' losses are those of streams read at once.

    Without carrying they are higher or lower.
    """
    model = tiny_model(mixer="r", ffn="channelmix")
    cfg = FitConfig(
        max_steps=5,
        batch_size=2,
        accum=2,
        learning_rate=0.0,
        weight_decay=0.0,
        bptt_truncate=True,
        bptt_chunk=5,
        **QUIET,
    )
    run_fit(tmp_path / "run", tiny.text, cfg, model)
    loader = StreamLoader(tiny.text, "train", 2, T, accum=2)
    steps = [loader.step(i)[0] for i in range(5)]
    expected = torch.zeros(5)
    for micro in range(2):
        x, y = (torch.cat([getattr(step[micro], name) for step in steps], 1) for name in "xy")
        loss = F.cross_entropy(model(x)[0].transpose(1, 2), y, reduction="none")  # (2, 5 T)
        expected += loss.detach().unflatten(1, (5, T)).mean((0, 2)) / 2
    assert [row["loss"] for row in metrics(tmp_path / "run")] == pytest.approx(expected.tolist(), rel=1e-5)
    alone = torch.stack([sum(cross_entropy(model(b.x)[0], b) for b in step) / (4 * T) for step in steps])
    assert (alone[1:] - expected[1:]).abs().min() > 1e-4


def test_the_gradient_ends_at_the_step_and_not_at_the_piece(tmp_path, tiny):
    """Two steps with the state carried, in pieces.

    The second's gradient is that of its T tokens with the state before them constant.
    """
    grads = {}
    for chunk in (None, 5):
        model = tiny_model(mixer="r")
        cfg = FitConfig(
            max_steps=2,
            batch_size=2,
            learning_rate=0.0,
            weight_decay=0.0,
            clip=None,
            beta1=0.0,
            bptt_truncate=True,
            bptt_chunk=chunk,
            **QUIET,
        )
        run_fit(tmp_path / str(chunk), tiny.text, cfg, model)
        # exp_avg: without momentum, the gradient
        grads[chunk] = moments(newest(tmp_path / str(chunk)))[::3]
    loader = StreamLoader(tiny.text, "train", 2, T)
    first, second = (loader.step(i)[0][0] for i in range(2))
    state = tree_map(torch.Tensor.detach, model(first.x)[1])
    (cross_entropy(model(second.x, state)[0], second) / second.mask.sum()).backward()
    expected = [p.grad for group in param_groups(model, cfg) for p in group["params"]]
    for exp_avg in grads.values():
        for a, b in zip(exp_avg, expected, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


# ------------------------------------------------------------------------------------------
# Checkpoints


def test_a_run_with_a_carried_state_that_dies_and_resumes_equals_one_that_never_stopped_bit_for_bit(
    tmp_path, tiny
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    cfg = FitConfig(max_steps=7, batch_size=2, accum=2, bptt_truncate=True, bptt_chunk=6, **QUIET)
    run_fit(whole, tiny.text, cfg, save_every=3)
    # in step 5: a step is two micro-batches of three pieces with gradients
    with pytest.raises(Killed):
        run_fit(broken, tiny.text, cfg, loss_fn=dies_at_call(28), save_every=3)
    assert newest(broken).name == "step_0000003"
    run_fit(broken, tiny.text, cfg, tiny_model(5, mixer="r", std=0.05), save_every=3)
    assert_same_run(whole, broken)
    states = [torch.load(newest(out) / "trainer.pt", weights_only=True)["states"] for out in (whole, broken)]
    assert len(states[0]) == 2 and all(map(torch.equal, *(tensors(tuple(s)) for s in states)))


def test_packed_states_are_plain_and_come_back(tmp_path):
    state = tiny_model(mixer="r", ffn="channelmix")(random_batch(4, 9).x)[1]
    torch.save(pack([tree_map(torch.Tensor.detach, state)]), tmp_path / "s.pt")
    packed = torch.load(tmp_path / "s.pt", weights_only=True)
    parts = [unpack(packed, 2, rank)[0] for rank in (0, 1)]
    assert all(isinstance(part, State) and part.position == 9 for part in parts)
    for whole, a, b in zip(tensors(state), *map(tensors, parts), strict=True):
        assert torch.equal(whole, torch.cat((a, b)))


# ------------------------------------------------------------------------------------------
# Bad input


def test_what_cannot_be_is_refused_in_one_line(tmp_path, tiny, job):
    flags = ["--data", tiny.text, *TINY, "--device", "cpu", "--out", str(tmp_path / "out"), "--bptt_truncate"]
    for args, says in (
        (flags, "--mixer r alone"),
        ([*flags, "--mixer", "ra"], "--mixer r alone"),
        ([*flags, "--mixer", "r", "--bptt_chunk", "0"], "bptt_chunk = 0"),
        ([*flags, "--mixer", "r", "--data", tiny.sft], "are for text"),
        ([*flags, "--mixer", "r", "--batch_size", "2000"], "different rows"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            main(args)
        one_line(error.value)
    for change, says in (
        ({"align": {"bptt_chunk": 4}}, "align.bptt_chunk = 4"),
        ({"match": {"bptt_truncate": True}}, "for train.py"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            job("no", **{stage: loop(1, **options) for stage, options in change.items()})
        one_line(error.value)


def test_resuming_with_another_number_of_streams_is_refused_in_one_line(tmp_path, tiny):
    cfg = FitConfig(max_steps=2, batch_size=2, bptt_truncate=True, **QUIET)
    run_fit(tmp_path / "run", tiny.text, cfg, tiny_model(mixer="r"))
    run_fit(tmp_path / "plain", tiny.text, replace(cfg, bptt_truncate=False), tiny_model(mixer="r"))
    for name, change in (
        ("run", {"batch_size": 4}),
        ("run", {"bptt_truncate": False}),
        ("run", {"accum": 2, "batch_size": 1}),
        ("plain", {}),
    ):
        with pytest.raises(ValueError, match="carries the state of") as error:
            run_fit(tmp_path / name, tiny.text, replace(cfg, max_steps=3, **change), tiny_model(mixer="r"))
        one_line(error.value)
