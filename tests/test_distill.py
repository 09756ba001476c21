"""Attention transfer: what the student starts as, what each loss is, what each stage changes, alone and on two processes."""

import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F

import data.prepare
import distill
import evaluate
from common import T, assert_same_run, metrics, moments, newest, one_line, padded, random_batch, shake, start, state_dict, tiny_model
from data.loader import Loader
from distill import (AllGather, DistillConfig, StudentConfig, VFirstHolder, align_loss, distil_loss, divergence, dpo_loss, head_scales,
                     lookback, make_student, sequence_logp, set_training, wrap)
from evaluate import cross_entropy, layer_errors
from model import LM, load_model, save_model
from test_evaluate import pretend
from train import FitConfig


# ---------------------------------------------------------------------------------------------------------------------
# v_first and the wrapper

def first_value(model: LM) -> torch.Tensor:
    att = model.blocks[model.cfg.mixers.index("r")].att
    return getattr(att, "student", att).value.weight


@pytest.mark.parametrize("mixer", ["rr", "arr"])
@pytest.mark.parametrize("stage", [1, 2])
def test_gradient_reaches_the_first_layers_value_projection_through_v_first(stage, mixer, monkeypatch):
    """The gradient without v_first's path is another one, and the one path missing is that of v_first: finite differences agree with the whole."""
    teacher = tiny_model(n_layer=len(mixer))
    student = tiny_model(1, mixer=mixer, n_layer=len(mixer))
    batch = random_batch(2, 8)

    def gradient() -> tuple[torch.Tensor, torch.nn.Module]:
        model = wrap(student, teacher if stage == 1 else None)
        set_training(model, lambda name: ".att.student." in name)
        losses, _ = align_loss(model, batch) if stage == 1 else distil_loss(model, batch, teacher=teacher)
        return torch.autograd.grad(losses["loss"], first_value(model))[0], model

    whole, model = gradient()
    with monkeypatch.context() as patch:
        patch.setattr(VFirstHolder, "write", lambda self, v: setattr(self, "state", v.detach()[None]))
        cut, _ = gradient()
    assert (whole - cut).norm() > 0.01 * whole.norm()
    # finite differences along the gradient's direction, in float64
    direction = (whole / whole.norm()).double()
    values = []
    model.double(), teacher.double()
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x.double())  # the losses cast to float32
    wide = type(batch)(batch.x, batch.y, batch.mask.double())
    for sign in (1, -1):
        with torch.no_grad():
            first_value(model).add_(sign * 1e-4 * direction)
            losses, _ = align_loss(model, wide) if stage == 1 else distil_loss(model, wide, teacher=teacher)
            values.append(losses["loss"].item())
            first_value(model).sub_(sign * 1e-4 * direction)
    assert (values[0] - values[1]) / 2e-4 == pytest.approx(whole.norm().item(), rel=1e-3)


def test_the_wrapper_changes_nothing_but_lets_the_teachers_output_flow_on_while_aligning():
    teacher, student, batch = tiny_model(), tiny_model(1, mixer="r"), random_batch()
    assert torch.equal(wrap(student, None)(batch.x)[0], student(batch.x)[0])
    trunk = tiny_model(1, mixer="r")
    trunk.load_state_dict({k: v for k, v in teacher.state_dict().items() if ".att." not in k}, strict=False)
    assert torch.equal(wrap(trunk, teacher)(batch.x)[0], teacher(batch.x)[0])
    assert not torch.equal(trunk(batch.x)[0], teacher(batch.x)[0])


# ---------------------------------------------------------------------------------------------------------------------
# The student at the start

@pytest.mark.parametrize("teacher", [{}, {"ffn": "swiglu", "norm": "rmsnorm", "n_kv_head": 1},
                                     {"positions": "learned", "ffn": "gelu", "bias": True, "tied": True}], ids=str)
def test_replacing_zero_layers_leaves_the_teachers_logits_bit_equal(teacher):
    lm, batch = tiny_model(**teacher).eval(), random_batch()
    want = lm(batch.x)[0]
    for cfg in (StudentConfig(mixer="a"), StudentConfig(mixer="a", untie_head=True), StudentConfig(mixer="a", ffn=lm.cfg.ffn)):
        student = make_student(lm, cfg).eval()
        assert torch.equal(student(batch.x)[0], want)
        assert torch.equal(wrap(student, None)(batch.x)[0], want) and torch.equal(wrap(student, lm)(batch.x)[0], want)


def test_the_students_gate_starts_at_exactly_one_and_shift_and_bonus_have_no_effect():
    teacher, x = tiny_model(), torch.randn(2, T, 32)
    for layer in (0, 1):
        v_first = torch.randn(2, T, 32)
        mixer = make_student(teacher, StudentConfig()).blocks[layer].att
        g = torch.sigmoid(x @ mixer.g1) @ mixer.g2
        torch.testing.assert_close(g, torch.ones_like(g), rtol=0, atol=1e-6)
        y = mixer(x, v_first, None)[0]
        for part in ("gate", "token_shift", "bonus"):
            without = make_student(teacher, StudentConfig(**{part: False})).blocks[layer].att
            torch.testing.assert_close(without(x, v_first, None)[0], y, rtol=1e-5, atol=1e-6, msg=part)
        shake(mixer, 0.1)
        assert (mixer(x, v_first, None)[0] - y).abs().max() > 1e-2


def test_the_gates_columns_get_different_gradients():
    """With equal rows in g2, all columns of g1 would learn the same for ever."""
    teacher, batch = tiny_model(), random_batch()
    model = wrap(make_student(teacher, StudentConfig()), teacher)
    align_loss(model, batch)[0]["loss"].backward()
    for block in model.blocks:
        columns = F.normalize(block.att.student.g1.grad.double(), dim=0).T           # (rank, C)
        distances = torch.cdist(columns, columns).fill_diagonal_(1)
        assert columns.norm(dim=1).min() > 0.99 and distances.min() > 0.01


@pytest.mark.parametrize("n_kv", [1, 2, 4])
def test_grouped_heads_are_repeated_as_attention_shares_them(n_kv):
    """Query head h reads key and value head h // (heads per group); 1 / sqrt(N) goes into the receptance."""
    teacher = tiny_model(n_embd=64, n_head=4, n_kv_head=n_kv, qkv_bias=True, bias=True, mixer="a")
    student, N = make_student(teacher, StudentConfig()), 16
    for ours, theirs in zip(student.blocks, teacher.blocks):
        m, t = ours.att, theirs.att
        for h in range(4):
            mine, group = slice(h * N, h * N + N), slice(h // (4 // n_kv) * N, h // (4 // n_kv) * N + N)
            assert torch.equal(m.receptance.weight[mine], t.q_proj.weight[mine] / 4) and torch.equal(m.receptance.bias[mine], t.q_proj.bias[mine] / 4)
            for a, b in ((m.key, t.k_proj), (m.value, t.v_proj)):
                assert torch.equal(a.weight[mine], b.weight[group]) and torch.equal(a.bias[mine], b.bias[group])
        assert torch.equal(m.output.weight, t.o_proj.weight) and torch.equal(m.output.bias, t.o_proj.bias)


def test_the_student_is_a_copy_that_shares_no_memory_with_its_teacher():
    teacher = tiny_model(tied=True, positions="learned")
    before = state_dict(teacher)
    for untie in (False, True):
        student = make_student(teacher, StudentConfig(untie_head=untie))
        for name, p in student.named_parameters():
            if ".att." not in name and "x_k" not in name:
                assert torch.equal(p, before[name]), name
        assert (student.head.weight is student.emb.weight) == (not untie)
        shake(student, 1.0)
    assert all(torch.equal(before[name], p) for name, p in teacher.state_dict().items())


def test_spread_decay_gives_half_lives_from_two_tokens_to_the_block():
    """e^w = 1 - 1/n with n from 2 to block_size, evenly in log n; the fastest is as near as RWKV-7's bound lets it."""
    student = make_student(tiny_model(block_size=512), StudentConfig())
    for block in student.blocks:
        decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(block.att.w0.double())).view(2, 16)
        n = 1 / (1 - decay)
        want = torch.tensor([2 * 256 ** (i / 15) for i in range(16)], dtype=torch.float64)
        torch.testing.assert_close(n[:, 1:], want[1:].expand(2, 15), rtol=1e-3, atol=0)
        assert (n[:, 0] >= 2).all() and (n[:, 0] < want[1]).all()


@torch.no_grad()
def test_norms_of_queries_and_keys_come_along_with_the_scale_after_them():
    teacher = tiny_model(n_head=2, n_kv_head=1, head_size=24, qk_norm=True, qkv_bias=True, positions="none", norm="rmsnorm")
    mixer, att, x = make_student(teacher, StudentConfig()).blocks[1].att, teacher.blocks[1].att, torch.randn(2, T, 32)
    q, k, _ = att.qkv(x, 0)                                                           # (B, H, T, N)
    r, key = (norm(proj(x).view(2, T, 2, 24)) for norm, proj in ((mixer.r_norm, mixer.receptance), (mixer.k_norm, mixer.key)))
    torch.testing.assert_close(r.transpose(1, 2), q / 24**0.5)
    torch.testing.assert_close(key.transpose(1, 2), k.expand(2, 2, T, 24))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 1, "qk_norm": True}, {"positions": "none"}], ids=str)
def test_lookback_is_the_mean_distance_that_attention_looks(changes):
    att, x = tiny_model(**changes).blocks[0].att, torch.randn(3, T, 32)
    q, k, _ = att.qkv(x, 0)
    scores = q @ k.expand_as(q).mT / 16**0.5
    p = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)   # (B, H, T, T)
    distance = (torch.arange(T)[:, None] - torch.arange(T)).float()
    torch.testing.assert_close(lookback(att, x), (p * distance).sum(-1).mean((0, 2)), rtol=1e-4, atol=1e-4)
    att.q_proj.weight.zero_()                                                         # all tokens alike: t / 2 back from position t
    if "qk_norm" not in changes:
        torch.testing.assert_close(lookback(att, x), torch.full((2,), (T - 1) / 4))


@torch.no_grad()
def test_heads_that_look_further_back_remember_longer():
    teacher, tokens = tiny_model(positions="none"), random_batch(4).x
    near, far = teacher.blocks[0].att.q_proj.weight.chunk(2)
    far.zero_()                                                                       # looks everywhere alike: 2 d + 1 = (T + 1) / 2 tokens
    mixer = make_student(teacher, StudentConfig(decay="lookback"), tokens).blocks[0].att
    n = 1 / -torch.expm1(-math.exp(-0.5) * torch.sigmoid(mixer.w0.view(2, 16)))
    assert n[1, -1].item() == pytest.approx((T + 1) / 2, rel=1e-3) and n.min() >= 2
    back = lookback(teacher.blocks[0].att, teacher.blocks[0].ln1(teacher.blocks[0].ln0(teacher.emb(tokens))))
    assert n[0, -1].item() == pytest.approx(max(2 * back[0].item() + 1, 2.5), rel=1e-3)


@torch.no_grad()
def test_head_scales_are_those_of_least_squares():
    y, W, c = torch.randn(200, 12), torch.randn(8, 12), torch.tensor([0.2, -1.0, 3.0])
    target = y * c.repeat_interleave(4) @ W.T
    torch.testing.assert_close(head_scales(y, W, target, 3), c, rtol=0.01, atol=0.01)
    noise = target + 5 * torch.randn_like(target)
    u = torch.stack([y[:, i : i + 4] @ W[:, i : i + 4].T for i in (0, 4, 8)]).flatten(1)
    torch.testing.assert_close(head_scales(y, W, noise, 3), torch.linalg.lstsq(u.T, noise.flatten()).solution, rtol=0.02, atol=0.02)
    torch.testing.assert_close(head_scales(torch.zeros(5, 12), W, target[:5], 3), torch.ones(3))


def test_calibration_brings_every_mixer_nearer_to_its_attention():
    teacher, batch = tiny_model(n_layer=3, bias=True, n_kv_head=1), random_batch(4)
    for mixer in ("r", "ra"):
        students = []
        for calibrate in (False, True):
            torch.manual_seed(0)
            students.append(make_student(teacher, StudentConfig(mixer=mixer, calibrate=calibrate), batch.x))
        plain, near = students
        before, after = (layer_errors(teacher, student, batch) for student in (plain, near))
        assert len(after) == near.cfg.mixers.count("r") and all(b["error"] < a["error"] and b["error"] < 1 for a, b in zip(before, after))
        changed = {name for name, p in plain.state_dict().items() if not torch.equal(p, near.state_dict()[name])} 
        assert changed == {f"blocks.{i}.att.output.weight" for i, m in enumerate(near.cfg.mixers) if m == "r"}


def test_students_that_their_teacher_does_not_allow_are_refused():
    for teacher, cfg, says in ((tiny_model(mixer="r"), StudentConfig(), "attention"), (tiny_model(ffn="gelu"), StudentConfig(ffn="swiglu"), "--ffn"),
                               (tiny_model(), StudentConfig(decay="fast"), "spread"), (tiny_model(), StudentConfig(mixer="rrr"), "n_layer")):
        with pytest.raises(ValueError, match=says) as error:
            make_student(teacher, cfg)
        one_line(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Losses

@pytest.mark.parametrize("kind", ["relative", "l2norm"])
def test_alignment_of_a_perfectly_copied_mixer_is_zero(kind):
    student, batch = tiny_model(mixer="r"), random_batch()
    teacher = pretend(student)
    eps = 1e-6 / 32**0.5 * batch.mask.sum().item() * 1.01 if kind == "l2norm" else 0  # the square root is kept differentiable at 0
    assert align_loss(wrap(student, teacher), batch, kind=kind)[0]["loss"].item() <= eps
    other = tiny_model(5, mixer="r")
    half = tiny_model(mixer="r")
    half.blocks[1].att = other.blocks[1].att
    assert align_loss(wrap(half, teacher), batch, kind=kind)[0]["loss"].item() > 1


def test_alignment_losses_equal_a_loop_over_layers_and_tokens():
    teacher, student = tiny_model(), make_student(tiny_model(), StudentConfig())
    shake(student, 0.05)
    batch, _ = padded([5, 11, 16])
    model = wrap(student, teacher)
    got = {kind: align_loss(model, batch, kind=kind)[0]["loss"].item() for kind in ("relative", "l2norm")}
    want = {"relative": 0.0, "l2norm": 0.0}
    for block in model.blocks:
        t, s = block.att.pair
        for b in range(3):
            for i in range(16):
                if batch.mask[b, i]:
                    distance = math.sqrt(sum((x - y) ** 2 for x, y in zip(t[b, i].tolist(), s[b, i].tolist())))
                    want["relative"] += distance**2 / sum(x * x for x in t[b, i].tolist()) / 2
                    want["l2norm"] += distance / math.sqrt(32) / 2
    assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("loss", ["align", "kl", "reverse", "adaptive", "ce", "dpo", "hinge"])
def test_a_padded_batch_has_the_losses_and_gradients_of_its_rows_alone(loss):
    teacher, student = tiny_model(), make_student(tiny_model(), StudentConfig())
    shake(student, 0.05)
    batch, rows = padded([5, 16, 9, 12])

    def value(batch):
        if loss == "align":
            return align_loss(wrap(student, teacher), batch)[0]["loss"]
        if loss in ("dpo", "hinge"):
            return dpo_loss(student, batch, reference=teacher, beta=0.3, kind={"dpo": "sigmoid"}.get(loss, loss), smoothing=0.2)[0]["loss"]
        kind = loss if loss in ("reverse", "adaptive") else "forward"
        how = dict(teacher=teacher, kind=kind, kl_weight=float(loss != "ce"), ce_weight=float(loss == "ce"))
        return distil_loss(wrap(student, None), batch, **how)[0]["loss"]

    if loss in ("dpo", "hinge"):  # the first half is chosen, the second rejected: rows (0, 2) and (1, 3) are the pairs
        pairs = []
        for c, r in ((0, 2), (1, 3)):
            n = max(rows[c].x.shape[1], rows[r].x.shape[1])
            pairs.append(type(batch)(*(z[[c, r], :n] for z in (batch.x, batch.y, batch.mask))))
        rows = pairs
    weights = [p for p in student.parameters()]
    together = value(batch)
    alone = sum(map(value, rows))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(x, weights, allow_unused=True) for x in (together, alone))):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


def test_kl_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p||q) = ln 2 - ln 3 / 2, KL(q||p) = 3/4 ln 3 - ln 2; adaptive: the head is one of the two, half the error."""
    t, s = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    forward, reverse = math.log(2) - math.log(3) / 2, 0.75 * math.log(3) - math.log(2)
    assert divergence(t, s, "forward").item() == pytest.approx(math.log(4 / 3) / 2) == pytest.approx(forward)
    assert divergence(t, s, "reverse").item() == pytest.approx(reverse)
    assert divergence(t, s, "adaptive").item() == pytest.approx((forward + reverse) / 2)


def test_adaptive_kl_equals_the_papers_definition_token_by_token():
    """arXiv 2404.02657: the head is the least set of the teacher's likeliest tokens with half of its mass."""
    torch.manual_seed(0)
    t, s = 3 * torch.randn(40, 12), 3 * torch.randn(40, 12)
    heads = set()
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
        want = (gap_head * forward + gap_tail * reverse) / (gap_head + gap_tail)
        assert divergence(t[i], s[i], "adaptive").item() == pytest.approx(want, rel=1e-4)
        heads.add(len(head))
    assert len(heads) > 1
    assert divergence(t, t, "adaptive").abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["forward", "reverse", "adaptive"])
def test_kl_in_chunks_of_tokens_is_plain_kl_in_value_and_gradient(kind):
    """Also: the vocabulary of a larger teacher is cut to the student's, and weights and masks apply."""
    teacher, student = tiny_model(3, vocab_size=300, n_embd=64, n_head=2), tiny_model(mixer="r")
    batch, _ = padded([5, 16, 9])
    with torch.no_grad():
        t = teacher(batch.x)[0][..., :257]
    s = student(batch.x)[0]
    p, q = t.softmax(-1), s.softmax(-1)
    forward, reverse = (p * (p.log() - q.log())).sum(-1), (q * (q.log() - p.log())).sum(-1)
    kl = {"forward": forward, "reverse": reverse, "adaptive": divergence(t, s, "adaptive")}[kind]
    ce = -s.log_softmax(-1).gather(-1, batch.y[..., None])[..., 0]
    plain = 0.7 * (kl * batch.mask).sum() + 0.2 * (ce * batch.mask).sum()
    want = torch.autograd.grad(plain, list(student.parameters()))
    for chunk in (None, 1, 7, 48, 1000):
        got, _ = distil_loss(student, batch, teacher=teacher, kind=kind, kl_weight=0.7, ce_weight=0.2, kl_chunk=chunk)
        torch.testing.assert_close(got["loss"], plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["kl"], (kl * batch.mask).sum(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["ce"], (ce * batch.mask).sum(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["teacher_ce"], -(t.log_softmax(-1).gather(-1, batch.y[..., None])[..., 0] * batch.mask).sum(), rtol=1e-5, atol=1e-5)
        for a, b in zip(torch.autograd.grad(got["loss"], list(student.parameters())), want):
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7


def test_kl_chunks_bound_the_largest_tensor_of_logits():
    """With chunks of 8 tokens, no tensor that the backward pass keeps is as large as the logits of 9 tokens."""
    teacher, student, batch = tiny_model(vocab_size=4096), tiny_model(mixer="r", vocab_size=4096), random_batch(4, T)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(0 if isinstance(x, torch.nn.Parameter) else x.numel()) or x, lambda x: x):
        distil_loss(student, batch, teacher=teacher, kl_chunk=8)
        assert max(sizes) < 9 * 4096
        sizes.clear()
        distil_loss(student, batch, teacher=teacher, kl_chunk=None)
        assert max(sizes) >= 4 * T * 4096  # the measure sees them where they are


def test_sequence_logp_is_the_log_probability_of_the_targets():
    model, (batch, rows) = tiny_model(), padded([5, 16])
    for got, row in zip(sequence_logp(model, batch)[0], rows):
        assert got.item() == pytest.approx(-cross_entropy(model(row.x)[0], row).item(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_dpo_is_ln_2_where_policy_is_reference_and_hinge_1(smoothing):
    model, batch = tiny_model(mixer="r"), random_batch(6)
    for kind, want in (("sigmoid", 3 * math.log(2)), ("hinge", 3.0)):
        assert dpo_loss(model, batch, reference=model, kind=kind, smoothing=smoothing)[0]["loss"].item() == pytest.approx(want, rel=1e-6)


def test_dpo_by_hand(monkeypatch):
    """Two pairs: policy / reference log-ratios 1 and -1, then -3 and 0; beta 1/2 makes the margins d = 1 and d = -3/2."""
    monkeypatch.setattr(distill, "sequence_logp", lambda model, batch, state: (model, None))
    policy, reference = torch.tensor([-4.0, -9.0, -6.0, -5.0]), torch.tensor([-5.0, -6.0, -5.0, -5.0])
    batch = random_batch(4)
    soft = lambda x: math.log(1 + math.exp(-x))  # noqa: E731   -log sigmoid(x)
    e = 0.1
    for kind, smoothing, want in (("sigmoid", 0.0, soft(1) + soft(-1.5)), ("hinge", 0.0, 0 + 2.5),
                                  ("sigmoid", e, (1 - e) * soft(1) + e * soft(-1) + (1 - e) * soft(-1.5) + e * soft(1.5)),
                                  ("hinge", e, e * 2 + (1 - e) * 2.5)):
        got, _ = dpo_loss(policy, batch, reference=reference, beta=0.5, kind=kind, smoothing=smoothing)
        assert got["loss"].item() == pytest.approx(want, rel=1e-5), (kind, smoothing)
        assert (got["accuracy"].item(), got["margin"].item()) == (1, -0.5)


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
    after, at_first = (dpo_loss(model, batch, reference=reference, kind=kind)[0]["loss"] for model in (policy, reference))
    assert after < at_first


# ---------------------------------------------------------------------------------------------------------------------
# The stages

def loop(max_steps: int, batch_size: int = 2, **changes) -> FitConfig:
    return FitConfig(**{"max_steps": max_steps, "batch_size": batch_size, "warmup_steps": 0, "log_every": 1, "learning_rate": 1e-3} | changes)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> str:
    """A tiny teacher's folder; nothing was learnt, which no theorem here needs."""
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    save_model(tiny_model(), folder, {"tokenizer": "bytes"})
    return str(folder)


@pytest.fixture
def job(tiny, teacher, tmp_path):
    """job(name, ...) -> the settings of a tiny distillation into tmp_path / name."""
    def make(name: str, **changes) -> DistillConfig:
        common = dict(teacher=teacher, data=tiny.text, finish_data=tiny.sft, device="cpu", eval_tokens=300, align=loop(3), distil=loop(3), finish=loop(3))
        return DistillConfig(**common | {"out": str(tmp_path / name)} | changes)
    return make


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


def test_stage_1_leaves_all_but_the_mixers_unchanged_and_stage_2_leaves_what_is_frozen(job, teacher, tmp_path):
    distill.distill(job("out", stages="align,distil", freeze="ffn,ln_out"))
    torch.manual_seed(0)
    begin = make_student(load_model(teacher), StudentConfig()).state_dict()
    aligned, distilled = weights(tmp_path / "out" / "align"), weights(tmp_path / "out" / "distil")
    assert begin.keys() == aligned.keys() == distilled.keys()
    for name in begin:
        assert torch.equal(begin[name], aligned[name]) == (".att." not in name), name
        assert torch.equal(aligned[name], distilled[name]) == (".ffn." in name or "ln_out" in name), name
    theirs = weights(teacher)
    assert all(torch.equal(theirs[name], aligned[name]) for name in theirs if ".att." not in name)


def test_a_freeze_that_names_nothing_is_refused(job):
    with pytest.raises(ValueError, match="fnn"):
        distill.distill(job("out", stages="distil", freeze="fnn"))


def test_a_damaged_stage_file_is_named_and_overwriting_keeps_the_teacher(job, tmp_path):
    one = dict(align=loop(1, 1), distil=loop(1, 1), stages="align")
    distill.distill(job("out", **one))
    (tmp_path / "out" / "align" / "stage.json").write_text("{}")
    with pytest.raises(ValueError, match="stage.json is damaged: remove it"):
        distill.distill(job("out", **one, resume=True))
    teacher = Path(job("x").teacher)
    for changes, says in (({"out": str(teacher)}, "read by this run"), ({"student": StudentConfig(mixer="a")}, "replaces no layer"),
                          ({"student": StudentConfig(mixer=f"auto:{T}")}, "or use auto:T with T above"),
                          ({"student": StudentConfig(mixer="rrrrr")}, "n_layer")):
        with pytest.raises(ValueError, match=says):
            distill.distill(replace(job("out", **one, overwrite=True), **changes))
        assert (teacher / "model.safetensors").exists() and (tmp_path / "out" / "align" / "model.safetensors").exists()


def test_layer_errors_of_unlike_models_and_of_a_hybrid_teacher():
    from evaluate import layer_errors
    assert layer_errors(tiny_model(), tiny_model(n_embd=64, mixer="r"), random_batch(2, 9)) == []
    rows = layer_errors(tiny_model(mixer="ra"), tiny_model(mixer="r"), random_batch(2, 9))
    assert [row["layer"] for row in rows] == [1]  # layer 0 is RWKV in both: it gives v_first, and no row


class Killed(Exception):
    pass


@pytest.mark.parametrize("stage, loss", [("align", "align_loss"), ("distil", "distil_loss"), ("finish", "dpo_loss")])
def test_a_stage_that_dies_and_resumes_equals_one_that_never_stopped_bit_for_bit(job, tiny, tmp_path, monkeypatch, stage, loss):
    steps = dict(align=loop(5, save_every=2), distil=loop(5, save_every=2), finish=loop(5, save_every=2), finish_data=tiny.dpo)
    distill.distill(job("whole", **steps))
    real, calls = getattr(distill, loss), []

    def dies(*args, **kwargs):
        if torch.is_grad_enabled():  # a training step, not the held-out loss
            calls.append(1)
        if len(calls) == 4:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(distill, loss, dies)
        with pytest.raises(Killed):
            distill.distill(job("broken", **steps))
    assert newest(tmp_path / "broken" / stage).name == "step_0000002"
    distill.distill(job("broken", **steps, resume=True))
    for name in ("align", "distil", "finish"):
        assert_same_run(tmp_path / "broken" / name, tmp_path / "whole" / name)
    assert (tmp_path / "broken" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    rows = metrics(tmp_path / "broken" / "finish")  # DPO's reference is the student before this stage: ln 2, and then away from it
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6) and rows[0]["margin"] == 0 and abs(rows[-1]["margin"]) > 1e-4
    ours, theirs = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("broken", "whole"))
    for report in (ours, theirs):
        for row in report["stages"]:
            del row["minutes"]
    assert [row["name"] for row in ours["stages"]] == ["start", "align", "distil", "finish"]
    assert ours == theirs  # what the clock does not touch is the same, down to the last digit


def test_a_run_killed_by_sigkill_resumes_to_what_it_would_have_been(job, tiny, teacher, tmp_path):
    flags = ["--teacher", teacher, "--data", tiny.text, "--device", "cpu", "--eval_tokens", "200", "--stages", "align,distil", "--align.max_steps", "150",
             "--align.save_every", "10", "--distil.max_steps", "2", "--align.batch_size", "2", "--distil.batch_size", "2", "--align.log_every", "5"]
    process = start("distill.py", *flags, "--out", tmp_path / "broken")
    end = time.time() + 60
    while not list((tmp_path / "broken").glob("align/checkpoints/step_00000[3-9]0")) and process.poll() is None and time.time() < end:
        time.sleep(0.005)
    process.kill()
    err = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, err  # it was still running
    distill.main([*flags, "--out", str(tmp_path / "broken"), "--resume"])
    distill.main([*flags, "--out", str(tmp_path / "whole")])
    for stage in ("align", "distil"):
        assert_same_run(tmp_path / "broken" / stage, tmp_path / "whole" / stage)


def test_the_whole_job_from_nothing_and_again_with_preferences(tiny, tmp_path, monkeypatch, capsys):
    """Data and teacher are made where missing; three stages, each nearer to the teacher; controls; every key of the report;
    resumed when it is done it trains nothing; and from the distilled student another finish, on preferences."""
    sources = {"pydoc": tiny.text, "pydoc-sft": tiny.sft, "pydoc-dpo": tiny.dpo}
    real = data.prepare.prepare
    monkeypatch.setattr(data.prepare, "prepare", lambda name, out, *rest: real(Path(sources[name] + (".txt" if name == "pydoc" else ".jsonl")), out, *rest))
    monkeypatch.chdir(tmp_path)
    small = {"n_embd": 32, "n_layer": 2, "n_head": 2, "block_size": 32}
    flags = [f"--teacher_model.{k}={v}" for k, v in small.items()]
    flags += ["--teacher_fit.max_steps", "80", "--teacher_fit.batch_size", "8", "--teacher_fit.warmup_steps", "5"]
    flags += ["--align.max_steps", "40", "--align.batch_size", "4", "--distil.max_steps", "80", "--distil.batch_size", "2"]
    flags += ["--finish.max_steps", "5", "--finish.batch_size", "4", "--eval_tokens", "1500", "--device", "cpu"]
    distill.main([*flags, "--controls"])
    said = capsys.readouterr().out
    assert "data/pydoc is missing" in said and "out/teacher is missing" in said
    out = tmp_path / "out" / "rwkv"
    report = json.loads((out / "report.json").read_text())

    assert {"teacher", "student", "stages", "gap", "kl", "top1", "recovered", "controls"} <= set(report)
    for who in ("teacher", "student"):
        assert {"val_loss", "params"} <= set(report[who])
    assert report["gap"] == report["student"]["val_loss"] - report["teacher"]["val_loss"]
    assert [row["name"] for row in report["stages"]] == ["start", "align", "distil", "finish"]
    for row in report["stages"]:
        assert {"name", "tokens", "minutes", "val_loss", "kl", "top1", "gap"} <= set(row)
    assert [row["tokens"] for row in report["stages"]] == [0, 40 * 4 * 32, 80 * 2 * 32, report["stages"][3]["tokens"]] and report["stages"][3]["tokens"] > 0
    kl = {row["name"]: row["kl"] for row in report["stages"]}
    assert kl["start"] > kl["align"] > kl["distil"] > 0
    distilled = next(row for row in report["stages"] if row["name"] == "distil")
    assert (report["kl"], report["gap"], report["top1"]) == (distilled["kl"], distilled["gap"], distilled["top1"])
    assert report["controls"] and {"RWKV-7 from scratch", "no stage 1", "no weight transfer", "cross-entropy only"} <= set(report["controls"])
    for name, row in report["controls"].items():  # each saw as many tokens as the student in stages 1 and 2 together
        assert row["tokens"] == (40 * 4 + 80 * 2) * 32 and math.isfinite(row["gap"]), name
    assert report["controls"]["RWKV-7 from scratch"]["kl"] > kl["distil"]
    assert (out / "report.md").read_text() in said and (out / "report.png").read_bytes()[:4] == b"\x89PNG"
    for folder in (out, out / "align", out / "distil", out / "finish", tmp_path / "out" / "teacher"):
        assert math.isfinite(load_model(folder)(torch.zeros(1, 3, dtype=torch.long))[0].sum().item())
    assert (out / "model.safetensors").read_bytes() == (out / "finish" / "model.safetensors").read_bytes()

    # refused without --resume; with it nothing trains, and the report is the same
    with pytest.raises(ValueError, match="--resume"):
        distill.main(flags)
    before = {p: p.read_bytes() for p in out.rglob("*.safetensors")}
    with monkeypatch.context() as patch:
        patch.setattr(distill, "fit", lambda *a, **k: pytest.fail("a stage ran again"))
        distill.main([*flags, "--resume"])
    assert {p: p.read_bytes() for p in out.rglob("*.safetensors")} == before
    again = json.loads((out / "report.json").read_text())
    assert all(again[key] == report[key] for key in again if key != "controls") and again.keys() >= report.keys() - {"controls"}

    # evaluate.py alone measures the same
    evaluate.main(["--teacher", "out/teacher", "--student", "out/rwkv/distil", "--data", "data/pydoc", "--max_tokens", "1500", "--out", "out/alone"])
    alone = json.loads((tmp_path / "out" / "alone" / "report.json").read_text())
    assert alone["gap"] == pytest.approx(report["gap"], abs=1e-6) and alone["kl"] == pytest.approx(report["kl"], rel=1e-4)

    # another finish on the same distilled student
    for path in ("finish", "report.json"):
        (out / path).rename(out / f"sft-{path}")
    distill.main([*flags, "--finish_data", "data/pydoc-dpo", "--resume"])
    rows = metrics(out / "finish")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=0.05) and {"accuracy", "margin"} <= set(rows[0])
    assert weights(out / "finish")["head.weight"].ne(weights(out / "distil")["head.weight"]).any()


# ---------------------------------------------------------------------------------------------------------------------
# Two processes

def two_ranks(rank: int, store: str, jobs: list[DistillConfig]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

    # the gather by hand: x of both ranks on both; the gradient of my x is the sum of what both ranks want of it
    x = torch.full((1, 2, 3), 1.0 + rank, requires_grad=True)
    gathered = AllGather.apply(x, None)
    assert gathered[:, 0, 0, 0].tolist() == [1.0, 2.0] and gathered.shape == (2, 1, 2, 3)
    (gathered * torch.tensor([10.0, 1.0])[:, None, None, None] * (3.0 if rank else 1.0)).sum().backward()
    assert x.grad.unique().tolist() == [[40.0], [4.0]][rank]  # (1 + 3) * 10, (1 + 3) * 1
    holder = VFirstHolder()
    holder.write(x)
    assert holder.state.shape == (2, 1, 2, 3) and torch.equal(holder.read(), x)

    for cfg in jobs:
        report = distill.distill(cfg)
        Path(f"{cfg.out}/rank{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def test_two_processes_are_one_with_the_doubled_batch_in_all_stages(job, tiny, tmp_path):
    """Eight rows a step: on one process at once; on one in two accumulated halves; on two processes in two halves each.

    SFT has unequal numbers of targets per process and half. exp_avg after one step is a tenth of the gradient, that through
    v_first included; eps = 1 makes AdamW so close to plain descent that rounding is not blown up on the way to later stages.
    """
    def cfg(name: str, B: int, accum: int, finish_data: str) -> DistillConfig:
        one = loop(1, B, accum=accum, clip=None, eps=1.0, learning_rate=0.1)
        return job(name, align=one, distil=one, finish=one, finish_data=finish_data, kl_kind="adaptive", ce_weight=0.5, eval_tokens=None)

    jobs = [cfg("two-sft", 2, 2, tiny.sft), replace(cfg("two-dpo", 2, 2, tiny.dpo), stages="distil,finish")]
    context = torch.multiprocessing.spawn(two_ranks, (str(tmp_path / "store"), jobs), nprocs=2, join=False)
    distill.distill(cfg("one-sft", 8, 1, tiny.sft))
    distill.distill(cfg("half-sft", 4, 2, tiny.sft))
    distill.distill(replace(cfg("one-dpo", 8, 1, tiny.dpo), stages="distil,finish"))
    distill.distill(replace(cfg("half-dpo", 4, 2, tiny.dpo), stages="distil,finish"))
    while not context.join():
        pass

    for kind, stages in (("sft", ("align", "distil", "finish")), ("dpo", ("finish",))):
        for stage in stages:
            want, rows = moments(newest(tmp_path / f"one-{kind}" / stage)), metrics(tmp_path / f"one-{kind}" / stage)
            for how in ("half", "two"):
                got = moments(newest(tmp_path / f"{how}-{kind}" / stage))
                for a, b in zip(got, want, strict=True):
                    assert (a - b).norm() <= 2e-4 * b.norm() + 1e-9, (how, kind, stage, a.shape)
                for a, b in zip(metrics(tmp_path / f"{how}-{kind}" / stage), rows, strict=True):
                    assert {k: v for k, v in a.items() if k != "tokens"} == pytest.approx({k: v for k, v in b.items() if k != "tokens"}, rel=1e-4)
    one = json.loads((tmp_path / "one-sft" / "report.json").read_text())
    for rank in (0, 1):  # every rank has the same, whole measurement
        two = json.loads((tmp_path / "two-sft" / f"rank{rank}.json").read_text())
        for key in ("gap", "kl", "top1", "recovered"):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5)
        for a, b in zip(two["stages"], one["stages"]):
            assert {k: a[k] for k in ("val_loss", "kl")} == pytest.approx({k: b[k] for k in ("val_loss", "kl")}, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Odd jobs and bad input

@pytest.mark.parametrize("model, student", [
    ({"n_layer": 1}, {}),
    ({}, {"mixer": "ar"}),
    ({}, {"mixer": "ra", "gate": False, "group_norm": False, "rwkv_rope": True}),
    ({"tied": True, "positions": "learned", "ffn": "gelu"}, {"untie_head": True, "token_shift": False, "bonus": False}),
    ({"block_size": 1, "n_kv_head": 1, "ffn": "swiglu", "norm": "rmsnorm"}, {"transfer": False, "decay": "official"}),
    ({"block_size": 512, "n_kv_head": 1, "qkv_bias": True, "o_bias": False, "ffn": "swiglu", "norm": "rmsnorm", "ln0": False, "tied": True},
     {"decay": "lookback", "calibrate": True, "rwkv_rope": True}),
    ({"head_size": 24, "n_kv_head": 1, "qk_norm": True, "rope_scaling": "llama3", "rope_factor": 8.0, "ffn": "swiglu", "norm": "rmsnorm"},
     {"mixer": "ar", "decay": "lookback", "calibrate": True}),
], ids=["one layer", "attention first", "bare mixers", "own head", "one token", "as qwen2, long context", "as qwen3"])
def test_odd_teachers_and_students_go_through_all_stages(job, tmp_path, model, student):
    lm = tiny_model(**model)
    save_model(lm, tmp_path / "odd", {"tokenizer": "bytes"})
    one = loop(2, 1)
    report = distill.distill(job("out", teacher=str(tmp_path / "odd"), student=StudentConfig(**student), align=one, distil=one, finish=one, eval_tokens=60,
                                 block_size=T if lm.cfg.block_size > T else None,
                                 finish_block_size=16 if lm.cfg.positions != "learned" else None, kl_kind="reverse", align_kind="l2norm"))
    assert [row["name"] for row in report["stages"]] == ["start", "align", "distil", "finish"] and math.isfinite(report["kl"])
    saved = load_model(tmp_path / "out")
    assert saved.cfg.mixers == (student.get("mixer", "r") * 2)[: lm.cfg.n_layer] and saved.cfg.tied == (lm.cfg.tied and not student.get("untie_head"))


def test_a_larger_teacher_with_more_tokens_teaches_stage_2(job, tmp_path):
    large = tiny_model(4, n_embd=64, n_layer=1, n_head=1, vocab_size=300)
    save_model(large, tmp_path / "large", {"tokenizer": "bytes"})
    distill.distill(job("out", stages="distil", logit_teacher=str(tmp_path / "large"), distil=loop(1), kl_weight=2.0, ce_weight=0.5))
    row = metrics(tmp_path / "out" / "distil")[0]  # with the held-out KL in it too, under another name
    assert row["loss"] == pytest.approx(2 * row["kl"] + 0.5 * row["ce"], rel=1e-4)
    (batch,), n = Loader(job("x").data, "train", 2, T, 1).step(0)
    assert row["teacher_ce"] == pytest.approx(cross_entropy(large(batch.x)[0][..., :257], batch).item() / n, rel=1e-4)


def test_models_and_data_of_other_tokens_are_refused(job, tmp_path):
    save_model(tiny_model(vocab_size=100), tmp_path / "small", {"tokenizer": "bytes"})
    save_model(tiny_model(vocab_size=300), tmp_path / "gpt2", {"tokenizer": "gpt2"})
    cases = [(dict(teacher=str(tmp_path / "small")), "257 tokens, the student 100"), (dict(logit_teacher=str(tmp_path / "small")), "100 tokens, fewer than"),
             (dict(teacher=str(tmp_path / "gpt2")), "gpt2"), (dict(logit_teacher=str(tmp_path / "gpt2")), "gpt2")]
    for i, (change, says) in enumerate(cases):
        with pytest.raises(ValueError, match=says) as error:
            distill.distill(job(f"out{i}", **change))
        one_line(error.value)


def test_a_damaged_teacher_or_stage_is_named(job, teacher, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty") as error:
        distill.distill(job("out", teacher=str(tmp_path / "empty")))
    one_line(error.value)
    distill.distill(job("done", stages="align"))
    file = tmp_path / "done" / "align" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="align") as error:
        distill.distill(job("done", stages="align,distil", resume=True))
    one_line(error.value)


def test_resuming_with_another_student_is_refused_in_one_line(job):
    distill.distill(job("out", stages="align"))
    with pytest.raises(ValueError, match="gate|other") as error:
        distill.distill(job("out", stages="align,distil", resume=True, student=StudentConfig(gate=False)))
    one_line(error.value)


def test_finish_alone_goes_on_from_the_stages_that_are_done(job, tiny, tmp_path):
    """Not from the raw student: the finish of a distilled folder must start where distillation ended."""
    distill.distill(job("out", stages="align,distil"))
    distill.distill(job("out", stages="finish", resume=True, finish=loop(1, learning_rate=1e-8)))
    distilled, finished = weights(tmp_path / "out" / "distil"), weights(tmp_path / "out" / "finish")
    for name in distilled:
        torch.testing.assert_close(finished[name], distilled[name], rtol=0, atol=1e-5)
