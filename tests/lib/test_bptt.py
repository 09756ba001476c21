"""Sequences in pieces: the gradients are the whole's, the memory is that of a piece.

The oracle is ordinary backpropagation, parameter by parameter, in float32:
||a - b|| / ||b|| <= 1e-5.
"""

import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch

import lib.bptt
from common import metrics, moments, newest, padded, random_batch, tiny_model
from common_train import QUIET, job, loop, run_fit, teacher, two_processes  # noqa: F401   (fixtures)
from data.loader import Batch, Loader
from distill import DistillConfig, StudentConfig, Stage, distill, make_student, match_loss
from lib.bptt import backward_in_pieces
from lib.preference import dpo_loss
from lib.runs import RunConfig
from lib.scores import compare, mean_loss, mean_terms
from lib.states import tensors, tree_map
from model import LM
from train import FitConfig, Step, TrainConfig, cross_entropy_loss, train

MODELS = {
    "rwkv": {"mixer": "r", "ffn": "channelmix"},
    "attention": {"mixer": "a", "n_kv_head": 1},
    "learned": {"mixer": "a", "positions": "learned"},
    "hybrid": {"mixer": "ar", "n_layer": 3},
    "rwkv first": {"mixer": "rra", "n_layer": 3, "ffn": "channelmix"},
    "rotated": {"mixer": "r", "rwkv_rope": True, "gate": False, "tied": True},
}


def gradients(model: LM) -> dict[str, torch.Tensor]:
    """Taken out of the model."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return grads


def both_ways(model: LM, batch: Batch, loss_fn, n: int | None, state=None):
    """Gradients and terms by ordinary backpropagation and in pieces of n tokens; the
    state after them.
    """
    with lib.bptt.mixed_precision(batch.x):
        whole, _ = loss_fn(model, batch, state)
    whole["loss"].backward()
    expected = gradients(model)
    terms, after = backward_in_pieces(Step(model, loss_fn), batch, state, n, 1.0, True)
    return expected, gradients(model), whole, terms, after


def assert_equal_gradients(grads: dict, expected: dict, rel: float = 1e-5) -> None:
    assert grads.keys() == expected.keys() and any(g.abs().max() > 1e-3 for g in expected.values())
    for name, g in expected.items():
        assert (grads[name] - g).norm() <= rel * g.norm(), (
            name,
            ((grads[name] - g).norm() / g.norm()).item(),
        )


def assert_equal_terms(terms: dict, whole: dict, absolute: float | None = None) -> None:
    expected = {key: x.item() for key, x in whole.items()}
    assert {key: x.item() for key, x in terms.items()} == pytest.approx(expected, rel=1e-5, abs=absolute)


# ------------------------------------------------------------------------------------------
# Exact


@pytest.mark.parametrize("n", [1, 7, 20, 40, 100])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_in_pieces_are_those_of_ordinary_backpropagation(kind, n):
    model, batch = tiny_model(block_size=40, **MODELS[kind]), random_batch(2, 40)
    expected, grads, whole, terms, after = both_ways(model, batch, cross_entropy_loss, n)
    assert_equal_gradients(grads, expected)
    assert terms["loss"].item() == pytest.approx(whole["loss"].item(), rel=1e-5) and after.position == 40
    for a, b in zip(tensors(after), tensors(model(batch.x)[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_without_the_gradient_of_the_state_they_are_others(monkeypatch):
    """The test above would notice: the borders' state is worth more than rounding."""
    model, batch = tiny_model(mixer="r"), random_batch(2, 40)
    with monkeypatch.context() as patch:
        patch.setattr(lib.bptt, "tensors", lambda state: [])
        expected, cut, *_ = both_ways(model, batch, cross_entropy_loss, 10)
    name = "blocks.0.att.value.weight"
    assert (cut[name] - expected[name]).norm() > 0.01 * expected[name].norm()


@pytest.mark.parametrize("student", ["r", "ar"])
@pytest.mark.parametrize("kind", ["forward", "adaptive"])
def test_stage_2_in_pieces_with_its_heads_in_chunks_of_their_own(student, kind):
    """The teacher reads piece by piece too, from a cache of its own.

    A mask ends rows early; what is frozen stays so.
    """
    teacher = tiny_model().requires_grad_(False)
    loss = partial(match_loss, teacher=teacher, kind=kind, kl_weight=1.0, ce_weight=0.3, kl_chunk=11)
    model = Stage(loss, frozen=("emb",)).model(make_student(teacher, StudentConfig(mixer=student)))
    batch, _ = padded([9, 40, 27])
    expected, grads, whole, terms, _ = both_ways(model, batch, loss, 12)
    assert_equal_gradients(grads, expected)
    assert_equal_terms(terms, whole)
    assert all(p.grad is None for p in teacher.parameters()) and model.emb.weight.grad is None


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
def test_preferences_in_pieces_though_their_loss_is_no_sum_over_tokens(kind):
    """A pair has all targets in the first piece, one in the last; padding has none."""
    reference, model = tiny_model().requires_grad_(False), tiny_model(1, mixer="ra")
    batch, _ = padded([40, 9, 30, 33, 12, 30])
    batch.mask[0, :30] = batch.mask[3, :30] = batch.mask[2] = batch.mask[5] = 0
    loss = partial(dpo_loss, reference=reference, beta=0.3, kind=kind, smoothing=0.2)
    expected, grads, whole, terms, _ = both_ways(model, batch, loss, 12)
    assert_equal_gradients(grads, expected)
    assert_equal_terms(terms, whole, 1e-6)


def test_in_mixed_precision_every_parameter_gets_its_gradient(monkeypatch):
    """Autocast keeps copies of the weights: those of the way there have no gradient."""
    model, batch = tiny_model(mixer="ra"), random_batch(2, 40)
    monkeypatch.setattr(lib.bptt, "mixed_precision", lambda x: torch.autocast("cpu", torch.bfloat16))
    expected, grads, *_ = both_ways(model, batch, cross_entropy_loss, 10)
    assert_equal_gradients(grads, expected, 0.05)


def test_a_state_goes_in_front_and_no_gradient_into_it():
    """The second half's gradients are those with the first's state as a constant."""
    model, batch = tiny_model(mixer="r"), random_batch(2, 40)
    first, second = batch.split(20)
    state = tree_map(torch.Tensor.detach, model(first.x)[1])
    before = [s.clone() for s in tensors(state)]
    expected, grads, *_ = both_ways(model, second, cross_entropy_loss, 7, state)
    assert_equal_gradients(grads, expected)
    assert all(map(torch.equal, tensors(state), before)) and not any(s.requires_grad for s in tensors(state))


def test_a_batch_splits_into_pieces_and_none_leaves_it_whole():
    batch, _ = padded([9, 20, 14])
    assert batch.split(None) == [batch]
    for n in (1, 6, 20, 100):
        pieces = batch.split(n)
        assert [piece.x.shape[1] for piece in pieces] == [min(n, 20 - start) for start in range(0, 20, n)]
        for name in ("x", "y", "mask"):
            joined = torch.cat([getattr(piece, name) for piece in pieces], 1)
            assert torch.equal(joined, getattr(batch, name))


# ------------------------------------------------------------------------------------------
# At constant memory


class Waiting:
    """Bytes that wait for a backward pass, by torch's own hooks around what is saved.

    What is saved twice counts once.
    """

    def __init__(self):
        self.now = self.peak = 0
        self.counted: dict[int, int] = {}

    def pack(self, x):
        key, size = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
        self.add(key, size)
        holder = type("Holder", (), {})()
        holder.x = x  # while it lives, nobody else has this address
        weakref.finalize(holder, self.drop, key, size)
        return holder

    def add(self, key, size):
        self.counted[key] = self.counted.get(key, 0) + 1
        self.now += size if self.counted[key] == 1 else 0
        self.peak = max(self.peak, self.now)

    def drop(self, key, size):
        self.counted[key] -= 1
        self.now -= 0 if self.counted[key] else size


def peak(model: LM, length: int, n: int | None) -> int:
    waiting = Waiting()
    with torch.autograd.graph.saved_tensors_hooks(waiting.pack, lambda holder: holder.x):
        backward_in_pieces(Step(model, cross_entropy_loss), random_batch(1, length), None, n, 1.0, True)
    assert waiting.now == 0
    return waiting.peak


def test_what_waits_for_the_backward_pass_is_one_piece_however_long_the_sequence():
    model = tiny_model(mixer="r", ffn="channelmix")
    assert peak(model, 1024, 32) <= 1.02 * peak(model, 128, 32) < 0.4 * peak(model, 128, None)
    assert peak(model, 128, None) < 0.25 * peak(model, 1024, None)


def test_the_borders_of_attention_share_one_cache():
    """Between the two ways, the borders' keys and values are views of the last ones.

    That is linear memory, not quadratic.
    """
    model, addresses = tiny_model(mixer="ra"), []

    def spy(model, piece, state):
        if torch.is_grad_enabled() and state is not None:
            addresses.append(state.layers[1][0][0].untyped_storage().data_ptr())
        return cross_entropy_loss(model, piece, state)

    backward_in_pieces(Step(model, spy), random_batch(1, 40), None, 8, 1.0, True)
    assert len(addresses) == 4 and len(set(addresses)) == 1


@torch.no_grad()
def test_what_is_measured_on_held_out_text_in_pieces_is_what_is_measured_at_once(tiny):
    teacher, model = tiny_model(block_size=64), tiny_model(1, mixer="ra", block_size=64)
    loader = Loader(tiny.text, "val", 4, 64)
    assert mean_loss(model, loader, 2000, 10) == pytest.approx(mean_loss(model, loader, 2000), rel=1e-6)
    pieces, whole = (compare(teacher, model, loader, 2000, chunk) for chunk in (10, None))
    by_position = pieces.pop("by_position"), whole.pop("by_position")
    assert pieces == pytest.approx(whole, rel=1e-5)
    for who in ("teacher", "student"):
        assert by_position[0][who] == pytest.approx(by_position[1][who], rel=1e-4)
    for data, loss_fn in (
        ("sft", cross_entropy_loss),
        ("text", partial(match_loss, teacher=teacher)),
        ("dpo", partial(dpo_loss, reference=teacher)),
    ):
        held_out = Loader(getattr(tiny, data), "val", 4, 64)
        pieces, whole = (mean_terms(loss_fn, model, held_out, 500, chunk) for chunk in (7, None))
        assert pieces == pytest.approx(whole, rel=1e-5), data


# ------------------------------------------------------------------------------------------
# In the loop


@pytest.mark.parametrize("kind", ["text", "sft"])
def test_a_step_in_pieces_with_accumulation_is_the_plain_step(tmp_path, tiny, kind):
    """exp_avg after one step is a tenth of the gradient.

    Examples are padded, and their lengths no multiples of the piece's.
    """
    plain, pieces = tmp_path / "plain", tmp_path / "pieces"
    for out, chunk, B, accum in ((plain, None, 4, 1), (pieces, 5, 2, 2)):
        cfg = FitConfig(max_steps=1, batch_size=B, accum=accum, clip=None, bptt_chunk=chunk, **QUIET)
        run_fit(out, getattr(tiny, kind), cfg, tiny_model(mixer="ra"), length=20)
    for a, b in zip(moments(newest(pieces)), moments(newest(plain)), strict=True):
        assert (a - b).norm() <= 2e-5 * b.norm()
    assert metrics(pieces)[0] == pytest.approx(metrics(plain)[0], rel=1e-5)


@pytest.fixture
def scratch(tmp_path, tiny):
    """scratch(name, mixer, B, accum, chunk, steps, truncate) -> train.py's settings."""

    def make(
        name: str,
        mixer: str,
        B: int,
        accum: int,
        chunk: int | None,
        steps: int = 1,
        truncate: bool = False,
        resume: bool = False,
    ) -> TrainConfig:
        run = RunConfig(out=str(tmp_path / name), device="cpu", resume=resume, save_every=None, log_every=1)
        fit = FitConfig(
            max_steps=steps,
            batch_size=B,
            accum=accum,
            clip=None,
            bptt_chunk=chunk,
            bptt_truncate=truncate,
            eps=1.0,
            schedule="constant",
            **QUIET,
        )
        model = replace(tiny_model(mixer=mixer, n_layer=3).cfg, block_size=20)
        return TrainConfig(data=tiny.text, eval_tokens=100, model=model, fit=fit, run=run)

    return make


def test_two_processes_in_pieces_are_one_process_with_whole_sequences(tmp_path, tiny, job, scratch):
    """For RWKV-7 and a hybrid from scratch, and in stages 2 and 3.

    There v_first is gathered once per piece and pass. And with the state carried over:
    the checkpoint of two processes has the rows of both, and one goes on from it.
    """

    def stages(name: str, names: str, B: int, accum: int, chunk: int | None, data: str) -> DistillConfig:
        one = loop(1, B, accum=accum, clip=None, eps=1.0, bptt_chunk=chunk)
        return job(
            name,
            stages=names,
            eval_tokens=60,
            match=one,
            finish=one,
            kl_kind="adaptive",
            ce_weight=0.5,
            finish_data=data,
            student=StudentConfig(mixer="ra"),
            block_size=20,
        )

    context = two_processes(
        tmp_path / "store",
        [
            scratch("two-r", "r", 2, 2, 6),
            scratch("two-ra", "ra", 2, 2, 6),
            scratch("two-carried", "r", 2, 2, 6, 3, True),
            stages("two-sft", "match,finish", 2, 2, 6, tiny.sft),
            stages("two-dpo", "finish", 2, 2, 6, tiny.dpo),
        ],
    )
    train(scratch("one-r", "r", 8, 1, None))
    train(scratch("one-ra", "ra", 8, 1, None))
    train(scratch("one-carried", "r", 4, 2, None, 3, True))
    distill(stages("one-sft", "match,finish", 8, 1, None, tiny.sft))
    distill(stages("one-dpo", "finish", 8, 1, None, tiny.dpo))
    while not context.join():
        pass
    for name, rel in (
        ("r", 1e-5),
        ("ra", 1e-5),
        ("carried", 1e-4),
        ("sft/match", 1e-5),
        ("sft/finish", 1e-5),
        ("dpo/finish", 1e-5),
    ):
        one, two = (moments(newest(tmp_path / f"{n}-{name}")) for n in ("one", "two"))
        for a, b in zip(two, one, strict=True):
            assert (a - b).norm() <= rel * b.norm() + 1e-9, (
                name,
                a.shape,
                ((a - b).norm() / b.norm()).item(),
            )

    one, two = (
        torch.load(newest(tmp_path / f"{n}-carried") / "trainer.pt", weights_only=True)["states"]
        for n in ("one", "two")
    )
    assert len(two) == 2 and all(position == 60 for position, _ in two)
    for a, b in zip(tensors(tuple(two)), tensors(tuple(one)), strict=True):
        assert a.shape[0] == 4 and torch.allclose(a, b, rtol=1e-3, atol=1e-5)
    train(scratch("two-carried", "r", 4, 2, 6, 5, True, resume=True))
    train(scratch("one-carried", "r", 4, 2, None, 5, True, resume=True))
    for a, b in zip(metrics(tmp_path / "two-carried"), metrics(tmp_path / "one-carried"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
