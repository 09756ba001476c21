"""Direct preference optimisation: the loss by hand, and the way it moves."""

import math

import pytest
import torch

import lib.preference
from common import T, padded, random_batch, shake, tiny_model
from common_distill import assert_sum_of_rows
from data.loader import Batch, Loader
from distill import StudentConfig, make_student
from lib.preference import dpo_loss, sequence_logp
from lib.scores import cross_entropy


def test_sequence_logp_is_the_log_probability_of_the_targets():
    model, (batch, rows) = tiny_model(), padded([5, 16])
    for logp, row in zip(sequence_logp(model, batch)[0], rows):
        assert logp.item() == pytest.approx(-cross_entropy(model(row.x)[0], row).item(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_dpo_is_ln_2_where_policy_is_reference_and_hinge_1(smoothing):
    model, batch = tiny_model(mixer="r"), random_batch(6)
    for kind, expected in (("sigmoid", 3 * math.log(2)), ("hinge", 3.0)):
        terms, _ = dpo_loss(model, batch, reference=model, kind=kind, smoothing=smoothing)
        assert terms["loss"].item() == pytest.approx(expected, rel=1e-6)


def soft(x: float) -> float:
    """-log sigmoid(x)"""
    return math.log(1 + math.exp(-x))


def test_dpo_by_hand(monkeypatch):
    """Two pairs: log-ratios of policy to reference 1 and -1, then -3 and 0.

    beta 1/2 makes the margins d = 1 and d = -3/2.
    """
    monkeypatch.setattr(lib.preference, "sequence_logp", lambda model, batch, state: (model, None))
    policy, reference = torch.tensor([-4.0, -9.0, -6.0, -5.0]), torch.tensor([-5.0, -6.0, -5.0, -5.0])
    batch, e = random_batch(4), 0.1
    smoothed = (1 - e) * soft(1) + e * soft(-1) + (1 - e) * soft(-1.5) + e * soft(1.5)
    for kind, smoothing, expected in (
        ("sigmoid", 0.0, soft(1) + soft(-1.5)),
        ("hinge", 0.0, 0 + 2.5),
        ("sigmoid", e, smoothed),
        ("hinge", e, e * 2 + (1 - e) * 2.5),
    ):
        terms, _ = dpo_loss(policy, batch, reference=reference, beta=0.5, kind=kind, smoothing=smoothing)
        assert terms["loss"].item() == pytest.approx(expected, rel=1e-5), (kind, smoothing)
        assert (terms["accuracy"].item(), terms["margin"].item()) == (1, -0.5)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
def test_a_padded_batch_has_the_losses_and_gradients_of_its_pairs_alone(kind):
    """The first half is chosen, the second rejected: pairs are rows (0, 2), (1, 3)."""
    teacher, student = tiny_model(), make_student(tiny_model(), StudentConfig())
    shake(student, 0.05)
    batch, rows = padded([5, 16, 9, 12])
    pairs = []
    for pair in ([0, 2], [1, 3]):
        n = max(rows[i].x.shape[1] for i in pair)
        pairs.append(Batch(*(z[pair, :n] for z in (batch.x, batch.y, batch.mask))))

    def value(batch) -> torch.Tensor:
        return dpo_loss(student, batch, reference=teacher, beta=0.3, kind=kind, smoothing=0.2)[0]["loss"]

    assert_sum_of_rows(value, batch, pairs, student)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
def test_one_dpo_step_raises_the_chosen_and_lowers_the_rejected_log_probability(kind, tiny):
    policy, reference = tiny_model(mixer="r"), tiny_model(mixer="r")
    (batch,), pairs = Loader(tiny.dpo, "train", 8, T).step(0)
    assert pairs == 8
    before = sequence_logp(policy, batch)[0].detach()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-2)
    (dpo_loss(policy, batch, reference=reference, kind=kind)[0]["loss"] / pairs).backward()
    optimizer.step()
    chosen, rejected = (sequence_logp(policy, batch)[0] - before).chunk(2)
    assert chosen.mean() > 0 > rejected.mean()
    after, at_first = (
        dpo_loss(model, batch, reference=reference, kind=kind)[0]["loss"] for model in (policy, reference)
    )
    assert after < at_first
