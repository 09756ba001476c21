"""Losses of distillation: adaptive KL, heads in chunks of tokens, padded batches."""

import math

import pytest
import torch
import torch.nn.functional as F

from common import T, padded, random_batch, shake, tiny_model
from common_distill import assert_sum_of_rows
from distill import StudentConfig, align_loss, divergence, make_student, match_loss, wrap


def test_adaptive_kl_equals_the_papers_definition_token_by_token():
    """arXiv 2404.02657: the head is the least set of the teacher's likeliest tokens
    with half its mass.
    """
    torch.manual_seed(0)
    t, s = 3 * torch.randn(40, 12), 3 * torch.randn(40, 12)
    sizes = set()
    for i in range(40):
        p, q = t[i].double().softmax(-1).tolist(), s[i].double().softmax(-1).tolist()
        head, mass = set(), 0.0
        for j in sorted(range(12), key=lambda j: -p[j]):
            if mass < 0.5:
                head.add(j)
                mass += p[j]
        gap_head = sum(abs(p[j] - q[j]) for j in head)
        gap_tail = sum(abs(p[j] - q[j]) for j in range(12) if j not in head)
        forward = sum(a * math.log(a / b) for a, b in zip(p, q))
        reverse = sum(b * math.log(b / a) for a, b in zip(p, q))
        expected = (gap_head * forward + gap_tail * reverse) / (gap_head + gap_tail)
        assert divergence(t[i], s[i], "adaptive").item() == pytest.approx(expected, rel=1e-4)
        sizes.add(len(head))
    assert len(sizes) > 1
    assert divergence(t, t, "adaptive").abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["forward", "reverse", "adaptive"])
def test_kl_in_chunks_of_tokens_is_plain_kl_in_value_and_gradient(kind):
    """Also: a larger teacher's vocabulary is cut; weights and masks apply."""
    teacher, student = tiny_model(3, vocab_size=300, n_embd=64, n_head=2), tiny_model(mixer="r")
    batch, _ = padded([5, 16, 9])
    with torch.no_grad():
        t = teacher(batch.x)[0][..., :257]
    s = student(batch.x)[0]
    p, q = t.softmax(-1), s.softmax(-1)
    kl = {"forward": (p * (p.log() - q.log())).sum(-1), "reverse": (q * (q.log() - p.log())).sum(-1),
          "adaptive": divergence(t, s, "adaptive")}[kind]
    ce, teacher_ce = (F.cross_entropy(x.transpose(1, 2), batch.y, reduction="none") for x in (s, t))
    expected = {"kl": kl, "ce": ce, "teacher_ce": teacher_ce, "loss": 0.7 * kl + 0.2 * ce}
    expected = {name: (x * batch.mask).sum() for name, x in expected.items()}
    grads = torch.autograd.grad(expected["loss"], list(student.parameters()))
    for chunk in (None, 1, 7, 48, 1000):
        terms, _ = match_loss(student, batch, teacher=teacher, kind=kind, kl_weight=0.7, ce_weight=0.2,
                              kl_chunk=chunk)
        torch.testing.assert_close(terms, expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(torch.autograd.grad(terms["loss"], list(student.parameters())), grads):
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7


@pytest.mark.parametrize("kind", ["forward", "reverse", "adaptive"])
def test_kl_reads_the_rows_that_both_models_have(kind):
    """Padding rows belong to no token: one model may have more of them than another."""
    teacher, student = tiny_model(3, vocab_size=250), tiny_model(mixer="r")
    batch = random_batch(vocab=250)
    cut = tiny_model(mixer="r", vocab_size=250)
    weights = {name: p[:250] if name in ("emb.weight", "head.weight") else p
               for name, p in student.state_dict().items()}
    cut.load_state_dict(weights)
    loss, same = (match_loss(model, batch, teacher=teacher, kind=kind)[0] for model in (student, cut))
    assert torch.equal(loss["kl"], same["kl"]) and torch.equal(loss["teacher_ce"], same["teacher_ce"])
    assert loss["ce"] > same["ce"]      # the student's own loss is over all its rows


def test_kl_chunks_bound_the_largest_tensor_of_logits():
    """In chunks of 8, nothing kept for backward is as large as 9 tokens' logits."""
    teacher, student = tiny_model(vocab_size=4096), tiny_model(mixer="r", vocab_size=4096)
    batch, sizes = random_batch(4, T), []

    def note(x):
        sizes.append(0 if isinstance(x, torch.nn.Parameter) else x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        match_loss(student, batch, teacher=teacher, kl_chunk=8)
        assert max(sizes) < 9 * 4096
        sizes.clear()
        match_loss(student, batch, teacher=teacher, kl_chunk=None)
        assert max(sizes) >= 4 * T * 4096  # the measure sees them where they are


@pytest.mark.parametrize("loss", ["align", "forward", "reverse", "adaptive", "ce"])
def test_a_padded_batch_has_the_losses_and_gradients_of_its_rows_alone(loss):
    teacher, student = tiny_model(), make_student(tiny_model(), StudentConfig())
    shake(student, 0.05)

    def value(batch) -> torch.Tensor:
        if loss == "align":
            return align_loss(wrap(student, teacher), batch)[0]["loss"]
        how = {"kl_weight": 0.0, "ce_weight": 1.0} if loss == "ce" else {"kind": loss}
        return match_loss(wrap(student, None), batch, teacher=teacher, **how)[0]["loss"]

    assert_sum_of_rows(value, *padded([5, 16, 9, 12]), student)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_a_temperature_softens_both_models_and_leaves_the_gradient_its_size(kind):
    """Hinton et al., 2015: KL of logits / t, times t^2; cross-entropies stay."""
    teacher, student = tiny_model(3), tiny_model(mixer="r")
    batch, _ = padded([5, 16, 9])
    with torch.no_grad():
        t, s = teacher(batch.x)[0].double(), student(batch.x)[0].double()
    plain, _ = match_loss(student, batch, teacher=teacher, kind=kind)
    for tau in (0.5, 2.0, 30.0):
        p, q = (t / tau).softmax(-1), (s / tau).softmax(-1)
        kl = (p * (p / q).log()).sum(-1) if kind == "forward" else (q * (q / p).log()).sum(-1)
        terms, _ = match_loss(student, batch, teacher=teacher, kind=kind, temperature=tau)
        assert terms["kl"].item() == pytest.approx((kl * batch.mask).sum().item() * tau**2, rel=1e-3), tau
        assert terms["loss"] == terms["kl"] != plain["kl"]
        assert terms["ce"] == plain["ce"] and terms["teacher_ce"] == plain["teacher_ce"]
