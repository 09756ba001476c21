"""Sequences in pieces: the gradients are those of the whole, the memory is that of a piece, and a carried state is never lost.

The oracle is ordinary backpropagation. It is compared parameter by parameter, ||a - b|| / ||b|| <= 1e-5 in float32.
"""

import json
import os
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import bptt
import distill
from bptt import backward_in_pieces, pack, unpack
from common import T, TINY, assert_same_run, metrics, moments, newest, one_line, padded, random_batch, tiny_model
from data.loader import Batch, Loader
from distill import StudentConfig, distil_loss, dpo_loss, make_student, mean_terms, wrap
from evaluate import compare, cross_entropy, mean_loss
from model import LM, State, tensors, tree_map
from test_distill import job, loop, teacher  # noqa: F401   (fixtures)
from test_train import META, QUIET, Killed
from train import FitConfig, Step, TrainConfig, cross_entropy_loss, fit, main, param_groups, train

MODELS = {"rwkv": {"mixer": "r", "ffn": "channelmix"}, "attention": {"mixer": "a", "n_kv_head": 1}, "learned": {"mixer": "a", "positions": "learned"},
          "hybrid": {"mixer": "ar", "n_layer": 3}, "rwkv first": {"mixer": "rra", "n_layer": 3, "ffn": "channelmix"},
          "rotated": {"mixer": "r", "rwkv_rope": True, "gate": False, "tied": True}}


def gradients(model: LM) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def both_ways(model: LM, batch: Batch, loss_fn, n: int | None, state=None):
    """Gradients and terms by ordinary backpropagation and in pieces of n tokens."""
    with bptt.mixed_precision(batch):
        whole, _ = loss_fn(model, batch, state)
    whole["loss"].backward()
    want = gradients(model)
    terms, after = backward_in_pieces(Step(model, loss_fn), batch, state, n, 1.0, True)
    return want, gradients(model), whole, terms, after


def assert_equal_gradients(got: dict, want: dict, rel: float = 1e-5) -> None:
    assert got.keys() == want.keys() and any(g.abs().max() > 1e-3 for g in want.values())
    for name, g in want.items():
        assert (got[name] - g).norm() <= rel * g.norm(), (name, ((got[name] - g).norm() / g.norm()).item())


# ---------------------------------------------------------------------------------------------------------------------
# Exact

@pytest.mark.parametrize("n", [1, 7, 20, 40, 100])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_in_pieces_are_those_of_ordinary_backpropagation(kind, n):
    model, batch = tiny_model(block_size=40, **MODELS[kind]), random_batch(2, 40)
    want, got, whole, terms, after = both_ways(model, batch, cross_entropy_loss, n)
    assert_equal_gradients(got, want)
    assert terms["loss"].item() == pytest.approx(whole["loss"].item(), rel=1e-5) and after.position == 40
    for a, b in zip(tensors(after), tensors(model(batch.x)[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_without_the_gradient_of_the_state_they_are_others(monkeypatch):
    """The test above would notice: the state at the borders is worth more than rounding."""
    model, batch = tiny_model(mixer="r"), random_batch(2, 40)
    with monkeypatch.context() as patch:
        patch.setattr(bptt, "tensors", lambda state: [])
        want, cut, *_ = both_ways(model, batch, cross_entropy_loss, 10)
    assert (cut["blocks.0.att.value.weight"] - want["blocks.0.att.value.weight"]).norm() > 0.01 * want["blocks.0.att.value.weight"].norm()


@pytest.mark.parametrize("student", ["r", "ar"])
@pytest.mark.parametrize("kind", ["forward", "adaptive"])
def test_stage_2_in_pieces_with_its_heads_in_chunks_of_their_own(student, kind):
    """The teacher reads piece by piece too, from a cache of its own; a mask ends rows early; what is frozen stays so."""
    teacher = tiny_model().requires_grad_(False)
    model = wrap(make_student(teacher, StudentConfig(mixer=student)), None)
    distill.set_training(model, lambda name: "emb" not in name)
    batch, _ = padded([9, 40, 27])
    how = dict(teacher=teacher, kind=kind, kl_weight=1.0, ce_weight=0.3, kl_chunk=11)
    want, got, whole, terms, _ = both_ways(model, batch, partial(distil_loss, **how), 12)
    assert_equal_gradients(got, want)
    assert {key: x.item() for key, x in terms.items()} == pytest.approx({key: x.item() for key, x in whole.items()}, rel=1e-5)
    assert all(p.grad is None for p in teacher.parameters()) and model.emb.weight.grad is None


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
def test_preferences_in_pieces_though_their_loss_is_no_sum_over_tokens(kind):
    """One pair has all of its targets in the first piece, one in the last, and one has none: it is padding."""
    reference, model = tiny_model().requires_grad_(False), tiny_model(1, mixer="ra")
    batch, _ = padded([40, 9, 30, 33, 12, 30])
    batch.mask[0, :30] = batch.mask[3, :30] = batch.mask[2] = batch.mask[5] = 0
    how = dict(reference=reference, beta=0.3, kind=kind, smoothing=0.2)
    want, got, whole, terms, _ = both_ways(model, batch, partial(dpo_loss, **how), 12)
    assert_equal_gradients(got, want)
    assert {key: x.item() for key, x in terms.items()} == pytest.approx({key: x.item() for key, x in whole.items()}, rel=1e-5, abs=1e-6)


def test_in_mixed_precision_every_parameter_gets_its_gradient(monkeypatch):
    """Autocast keeps its copies of the weights for a while: those of the way there have no gradient."""
    model, batch = tiny_model(mixer="ra"), random_batch(2, 40)
    monkeypatch.setattr(bptt, "mixed_precision", lambda batch: torch.autocast("cpu", torch.bfloat16))
    want, got, *_ = both_ways(model, batch, cross_entropy_loss, 10)
    assert_equal_gradients(got, want, 0.05)


def test_a_state_goes_in_front_and_no_gradient_into_it():
    """From the state after the first half, the second half's gradients are those with that state as a constant."""
    model, batch = tiny_model(mixer="r"), random_batch(2, 40)
    first, second = batch.split(20)
    state = tree_map(torch.Tensor.detach, model(first.x)[1])
    kept = [s.clone() for s in tensors(state)]
    want, got, *_ = both_ways(model, second, cross_entropy_loss, 7, state)
    assert_equal_gradients(got, want)
    assert all(map(torch.equal, tensors(state), kept)) and not any(s.requires_grad for s in tensors(state))


def test_a_batch_splits_into_pieces_and_none_leaves_it_whole():
    batch, _ = padded([9, 20, 14])
    assert batch.split(None) == [batch]
    for n in (1, 6, 20, 100):
        pieces = batch.split(n)
        assert [piece.x.shape[1] for piece in pieces] == [min(n, 20 - at) for at in range(0, 20, n)]
        assert all(torch.equal(torch.cat([getattr(piece, z) for piece in pieces], 1), getattr(batch, z)) for z in ("x", "y", "mask"))


# ---------------------------------------------------------------------------------------------------------------------
# At constant memory

class Kept:
    """Bytes that wait for a backward pass, by torch's own hooks around all that is saved; what is saved twice counts once."""

    def __init__(self):
        self.now = self.most = 0
        self.counted: dict[int, int] = {}

    def pack(self, x):
        key = x.untyped_storage().data_ptr()
        box = [x]
        self.add(key, x.untyped_storage().nbytes())
        holder = type("Holder", (), {})()
        holder.box = box
        weakref.finalize(holder, self.drop, key, x.untyped_storage().nbytes())
        return holder

    def add(self, key, n):
        self.counted[key] = self.counted.get(key, 0) + 1
        self.now += n if self.counted[key] == 1 else 0
        self.most = max(self.most, self.now)

    def drop(self, key, n):
        self.counted[key] -= 1
        self.now -= 0 if self.counted[key] else n


def most_kept(model: LM, length: int, n: int | None) -> int:
    kept = Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda holder: holder.box[0]):
        backward_in_pieces(Step(model, cross_entropy_loss), random_batch(1, length), None, n, 1.0, True)
    assert kept.now == 0
    return kept.most


def test_what_waits_for_the_backward_pass_is_one_piece_however_long_the_sequence():
    model = tiny_model(mixer="r", ffn="channelmix")
    assert most_kept(model, 1024, 32) <= 1.02 * most_kept(model, 128, 32) < 0.4 * most_kept(model, 128, None) < 0.1 * most_kept(model, 1024, None)


def test_the_borders_of_attention_share_one_cache():
    """Between the two ways, the borders' keys and values are views of the last ones: linear memory, not quadratic."""
    model, seen = tiny_model(mixer="ra"), []

    def spy(model, piece, state, with_loss):
        if with_loss and state is not None:
            seen.append(state.layers[1][0][0].untyped_storage().data_ptr())
        return cross_entropy_loss(model, piece, state, with_loss)

    backward_in_pieces(Step(model, spy), random_batch(1, 40), None, 8, 1.0, True)
    assert len(seen) == 4 and len(set(seen)) == 1


@torch.no_grad()
def test_what_is_measured_on_held_out_text_in_pieces_is_what_is_measured_at_once(tiny):
    teacher, model = tiny_model(block_size=64), tiny_model(1, mixer="ra", block_size=64)
    loader = Loader(tiny.text, "val", 4, 64)
    assert mean_loss(model, loader, 2000, 10) == pytest.approx(mean_loss(model, loader, 2000), rel=1e-6)
    ours, theirs = (compare(teacher, model, loader, 2000, chunk) for chunk in (10, None))
    by_position = [side.pop("by_position") for side in (ours, theirs)]
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert all(by_position[0][who] == pytest.approx(by_position[1][who], rel=1e-4) for who in ("teacher", "student"))
    for data, loss_fn in (("sft", cross_entropy_loss), ("text", partial(distil_loss, teacher=teacher)), ("dpo", partial(dpo_loss, reference=teacher))):
        held_out = Loader(getattr(tiny, data), "val", 4, 64)
        ours, theirs = (mean_terms(loss_fn, model, held_out, 500, chunk) for chunk in (7, None))
        assert ours == pytest.approx(theirs, rel=1e-5), data


# ---------------------------------------------------------------------------------------------------------------------
# In the loop

def run_fit(out: Path, data: str, cfg: FitConfig, model: LM, loss_fn=cross_entropy_loss, length: int = T) -> dict:
    out.mkdir(exist_ok=True)
    loader = Loader(data, "train", cfg.batch_size, length, 0, 0, 1, cfg.accum, cfg.bptt_truncate)
    return fit(model, loss_fn, loader, cfg, out, model, META)


@pytest.mark.parametrize("kind", ["text", "sft"])
def test_a_step_in_pieces_with_accumulation_is_the_plain_step(tmp_path, tiny, kind):
    """exp_avg after one step is a tenth of the gradient; examples are padded, and their lengths no multiples of the piece's."""
    for name, chunk, B, accum in (("plain", None, 4, 1), ("pieces", 5, 2, 2)):
        cfg = FitConfig(max_steps=1, batch_size=B, accum=accum, clip=None, bptt_chunk=chunk, **QUIET)
        run_fit(tmp_path / name, getattr(tiny, kind), cfg, tiny_model(mixer="ra"), length=20)
    for a, b in zip(moments(newest(tmp_path / "pieces")), moments(newest(tmp_path / "plain")), strict=True):
        assert (a - b).norm() <= 2e-5 * b.norm()
    ours, theirs = (metrics(tmp_path / name)[0] for name in ("pieces", "plain"))
    assert ours == pytest.approx(theirs, rel=1e-5)


def two_ranks(rank: int, store: str, jobs: list) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for cfg in jobs:
        train(cfg) if isinstance(cfg, TrainConfig) else distill.distill(cfg)
    dist.destroy_process_group()


def test_two_processes_in_pieces_are_one_process_with_whole_sequences(tmp_path, tiny, job):
    """For RWKV-7 and a hybrid from scratch, and in stages 2 and 3, where v_first is gathered once per piece and pass.

    And with the state carried over: the checkpoint of two processes has the rows of both, and one process goes on from it.
    """
    def scratch(name: str, mixer: str, B: int, accum: int, chunk: int | None, steps: int = 1, truncate: bool = False, **changes) -> TrainConfig:
        model = replace(tiny_model(mixer=mixer, n_layer=3).cfg, block_size=20)
        loop = FitConfig(max_steps=steps, batch_size=B, accum=accum, clip=None, bptt_chunk=chunk, bptt_truncate=truncate, eps=1.0, schedule="constant", **QUIET)
        return TrainConfig(data=tiny.text, out=str(tmp_path / name), device="cpu", eval_tokens=100, model=model, fit=loop, **changes)

    def stages(name: str, which: str, B: int, accum: int, chunk: int | None, data: str):
        one = loop(1, B, accum=accum, clip=None, eps=1.0, bptt_chunk=chunk)
        return job(name, stages=which, eval_tokens=60, distil=one, finish=one, kl_kind="adaptive", ce_weight=0.5, finish_data=data,
                   student=StudentConfig(mixer="ra"), block_size=20)

    jobs = [scratch("two-r", "r", 2, 2, 6), scratch("two-ra", "ra", 2, 2, 6), scratch("two-carried", "r", 2, 2, 6, 3, True),
            stages("two-sft", "distil,finish", 2, 2, 6, tiny.sft), stages("two-dpo", "finish", 2, 2, 6, tiny.dpo)]
    context = torch.multiprocessing.spawn(two_ranks, (str(tmp_path / "store"), jobs), nprocs=2, join=False)
    pairs = []
    for name in ("r", "ra"):
        train(scratch(f"one-{name}", name, 8, 1, None))
        pairs.append((f"two-{name}", f"one-{name}", 1e-5))
    train(scratch("one-carried", "r", 4, 2, None, 3, True))
    pairs.append(("two-carried", "one-carried", 1e-4))
    for name, which in (("sft", "distil,finish"), ("dpo", "finish")):
        distill.distill(stages(f"one-{name}", which, 8, 1, None, getattr(tiny, name)))
        pairs += [(f"two-{name}/{stage}", f"one-{name}/{stage}", 1e-5) for stage in which.split(",")]
    while not context.join():
        pass
    for two, one, rel in pairs:
        for a, b in zip(moments(newest(tmp_path / two)), moments(newest(tmp_path / one)), strict=True):
            assert (a - b).norm() <= rel * b.norm() + 1e-9, (two, a.shape, ((a - b).norm() / b.norm()).item())

    theirs, ours = (torch.load(newest(tmp_path / name) / "trainer.pt", weights_only=True)["states"] for name in ("two-carried", "one-carried"))
    assert len(theirs) == 2 and all(position == 60 for position, _ in theirs)
    for a, b in zip(tensors(tuple(theirs)), tensors(tuple(ours)), strict=True):
        assert a.shape[0] == 4 and torch.allclose(a, b, rtol=1e-3, atol=1e-5)
    train(scratch("two-carried", "r", 4, 2, 6, 5, True, resume=True))
    train(scratch("one-carried", "r", 4, 2, None, 5, True, resume=True))
    for a, b in zip(metrics(tmp_path / "two-carried"), metrics(tmp_path / "one-carried"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# The state carried from step to step

def numbers(folder: Path, n: int) -> str:
    """Prepared text whose tokens are 0, 1, 2, ..."""
    import numpy as np
    folder.mkdir()
    for half in ("train", "val"):
        np.arange(n, dtype=np.uint16).tofile(folder / f"{half}.bin")
    meta = {"kind": "text", "tokenizer": "bytes", "vocab_size": 65536, "dtype": "uint16", "tokens": {"train": n, "val": n}, "source": "numbers"}
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


@pytest.mark.parametrize("n", [5 * 8 * 4 + 1, 1000, 4 * 8 + 9])
def test_streams_go_on_where_they_ended_until_all_of_them_begin_anew(tmp_path, n):
    loader = Loader(numbers(tmp_path / "d", n), "train", 2, 8, 3, accum=2, streams=True)
    epoch = loader.n // 4
    before = None
    for i in range(4 * epoch):
        x = torch.stack([batch.x for batch in loader.step(i)[0]])                     # (accum, B, T)
        assert torch.equal(x, x[..., :1] + torch.arange(8))
        assert loader.begins(i) == (i % epoch == 0)
        if not loader.begins(i):
            assert torch.equal(x[..., 0], before + 8)
        before = x[..., 0]
    seen = [torch.cat([batch.x.flatten() for i in range(e * epoch, (e + 1) * epoch) for batch in loader.step(i)[0]]) for e in range(4)]
    assert all(len(x.unique()) == len(x) == epoch * 4 * 8 for x in seen)               # an epoch reads nothing twice
    assert epoch == 1 and n < 50 or any(not torch.equal(seen[0], x) for x in seen[1:])


def test_streams_of_two_ranks_are_those_of_one_and_any_step_can_be_asked_for(tmp_path):
    folder = numbers(tmp_path / "d", 1000)
    one = Loader(folder, "train", 4, 8, 1, accum=2, streams=True)
    two = [Loader(folder, "train", 2, 8, 1, rank, 2, 2, streams=True) for rank in (0, 1)]
    for i in (40, 3, 15, 0, 14):
        for micro, batch in enumerate(one.step(i)[0]):
            assert torch.equal(batch.x, torch.cat([rank.step(i)[0][micro].x for rank in two]))
        assert one.begins(i) == two[0].begins(i) == two[1].begins(i)


def test_a_carried_state_makes_steps_one_reading_of_the_text(tmp_path, tiny):
    """Nothing is learnt (rate 0): the losses of the steps are those of the streams read at once. Without carrying they are higher or lower."""
    model = tiny_model(mixer="r", ffn="channelmix")
    cfg = FitConfig(max_steps=5, batch_size=2, accum=2, learning_rate=0.0, weight_decay=0.0, bptt_truncate=True, bptt_chunk=5, **QUIET)
    run_fit(tmp_path / "run", tiny.text, cfg, model)
    loader = Loader(tiny.text, "train", 2, T, accum=2, streams=True)
    steps = [loader.step(i)[0] for i in range(5)]
    want = torch.zeros(5)
    for micro in range(2):
        x, y = (torch.cat([getattr(step[micro], name) for step in steps], 1) for name in "xy")
        loss = torch.nn.functional.cross_entropy(model(x)[0].transpose(1, 2), y, reduction="none")      # (2, 5 T)
        want += loss.detach().unflatten(1, (5, T)).mean((0, 2)) / 2
    rows = [row["loss"] for row in metrics(tmp_path / "run")]
    assert rows == pytest.approx(want.tolist(), rel=1e-5)
    alone = torch.stack([sum(cross_entropy(model(b.x)[0], b) for b in step) / (4 * T) for step in steps])
    assert (alone[1:] - want[1:]).abs().min() > 1e-4


def test_the_gradient_ends_at_the_step_and_not_at_the_piece(tmp_path, tiny):
    """Two steps with the state carried, in pieces: the second's gradient is that of its T tokens with the state before them as a constant."""
    kept = {}
    for chunk in (None, 5):
        model = tiny_model(mixer="r")
        cfg = FitConfig(max_steps=2, batch_size=2, learning_rate=0.0, weight_decay=0.0, clip=None, beta1=0.0, bptt_truncate=True, bptt_chunk=chunk, **QUIET)
        run_fit(tmp_path / str(chunk), tiny.text, cfg, model)
        kept[chunk] = moments(newest(tmp_path / str(chunk)))[::3]                        # exp_avg: without momentum, the gradient
    loader = Loader(tiny.text, "train", 2, T, streams=True)
    first, second = (loader.step(i)[0][0] for i in range(2))
    state = tree_map(torch.Tensor.detach, model(first.x)[1])
    (cross_entropy(model(second.x, state)[0], second) / second.mask.sum()).backward()
    want = [p.grad for group in param_groups(model, cfg) for p in group["params"]]
    for found in kept.values():
        for a, b in zip(found, want, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


def test_a_run_with_a_carried_state_that_dies_and_resumes_equals_one_that_never_stopped_bit_for_bit(tmp_path, tiny):
    cfg = FitConfig(max_steps=7, batch_size=2, accum=2, bptt_truncate=True, bptt_chunk=6, **QUIET | {"save_every": 3})
    run_fit(tmp_path / "whole", tiny.text, cfg, tiny_model(mixer="r", std=0.05))
    calls = []

    def dies(*args):
        calls.append(1)
        if len(calls) == 50:  # in step 5: a step is two micro-batches of two pieces there and three back
            raise Killed
        return cross_entropy_loss(*args)

    with pytest.raises(Killed):
        run_fit(tmp_path / "broken", tiny.text, cfg, tiny_model(mixer="r", std=0.05), dies)
    assert newest(tmp_path / "broken").name == "step_0000003"
    run_fit(tmp_path / "broken", tiny.text, cfg, tiny_model(5, mixer="r", std=0.05))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    ours, theirs = (torch.load(newest(tmp_path / name) / "trainer.pt", weights_only=True)["states"] for name in ("whole", "broken"))
    assert len(ours) == 2 and all(map(torch.equal, tensors(tuple(ours)), tensors(tuple(theirs))))


def test_packed_states_are_plain_and_come_back(tmp_path):
    state = tiny_model(mixer="r", ffn="channelmix")(random_batch(4, 9).x)[1]
    torch.save(pack([tree_map(torch.Tensor.detach, state)]), tmp_path / "s.pt")
    packed = torch.load(tmp_path / "s.pt", weights_only=True)
    parts = [unpack(packed, 2, rank, torch.device("cpu"))[0] for rank in (0, 1)]
    assert all(isinstance(part, State) and part.position == 9 for part in parts)
    for whole, a, b in zip(tensors(state), *map(tensors, parts), strict=True):
        assert torch.equal(whole, torch.cat((a, b)))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

def test_what_cannot_be_is_refused_in_one_line(tmp_path, tiny, job):
    flags = ["--data", tiny.text, *TINY, "--device", "cpu", "--out", str(tmp_path / "out"), "--bptt_truncate"]
    for args, word in ((flags, "--mixer r alone"), ([*flags, "--mixer", "ra"], "--mixer r alone"),
                       ([*flags, "--mixer", "r", "--bptt_chunk", "0"], "bptt_chunk = 0"), ([*flags, "--mixer", "r", "--data", tiny.sft], "are for text"),
                       ([*flags, "--mixer", "r", "--batch_size", "2000"], "different rows")):
        with pytest.raises(ValueError, match=word) as error:
            main(args)
        one_line(error.value)
    for change, word in (({"align": loop(1, bptt_chunk=4)}, "align.bptt_chunk = 4"), ({"distil": loop(1, bptt_truncate=True)}, "for train.py")):
        with pytest.raises(ValueError, match=word) as error:
            job("no", **change)
        one_line(error.value)


def test_resuming_with_another_number_of_streams_is_refused_in_one_line(tmp_path, tiny):
    cfg = FitConfig(max_steps=2, batch_size=2, bptt_truncate=True, **QUIET)
    run_fit(tmp_path / "run", tiny.text, cfg, tiny_model(mixer="r"))
    run_fit(tmp_path / "plain", tiny.text, replace(cfg, bptt_truncate=False), tiny_model(mixer="r"))
    for name, change in (("run", {"batch_size": 4}), ("run", {"bptt_truncate": False}), ("run", {"accum": 2, "batch_size": 1}), ("plain", {})):
        with pytest.raises(ValueError, match="carries the state of") as error:
            run_fit(tmp_path / name, tiny.text, replace(cfg, max_steps=3, **change), tiny_model(mixer="r"))
        one_line(error.value)
