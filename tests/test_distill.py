"""Attention transfer: the student at its start, its losses, what each stage changes."""

import json
import math

import pytest
import torch

from common import T, metrics, padded, random_batch, shake, state_dict, tiny_model
from common_distill import job, teacher, weights  # noqa: F401   (fixtures)
from common_models import pretend
from distill import (DistillConfig, Stage, StudentConfig, VFirstHolder, align_loss, distill, divergence,
                     make_student, match_loss, open_stage, wrap)
from lib.folders import load_model
from model import LM


# ------------------------------------------------------------------------------------------
# The wrapper and v_first

def test_the_wrapper_changes_nothing_but_lets_the_teachers_output_flow_on_while_aligning():
    teacher, student, batch = tiny_model(), tiny_model(1, mixer="r"), random_batch()
    assert torch.equal(wrap(student, None)(batch.x)[0], student(batch.x)[0])
    trunk = tiny_model(1, mixer="r")
    shared = {name: p for name, p in teacher.state_dict().items() if ".att." not in name}
    trunk.load_state_dict(shared, strict=False)
    assert torch.equal(wrap(trunk, teacher)(batch.x)[0], teacher(batch.x)[0])
    assert not torch.equal(trunk(batch.x)[0], teacher(batch.x)[0])


def test_aligning_runs_nothing_above_the_last_mixer():
    """And the loss is what it is when all is run."""
    teacher, student, batch = (tiny_model(n_layer=4), tiny_model(1, n_layer=4, mixer="araa"), random_batch())
    run = []
    for i, block in enumerate(teacher.blocks):
        student.blocks[i].load_state_dict(block.state_dict(), strict=False)
        student.blocks[i].ln1.register_forward_hook(lambda *_, i=i: run.append(i))
    model = wrap(student, teacher)
    loss = align_loss(model, batch)[0]["loss"]
    assert run == [0, 1]
    wrap(student, None)(batch.x)
    assert run == [0, 1, 0, 1, 2, 3]
    x, _, _ = teacher.blocks[0](teacher.blocks[0].ln0(student.emb(batch.x)), None, None)
    x = student.blocks[1].ln1(x)
    t, s = (m(x, None, None)[0] for m in (teacher.blocks[1].att, student.blocks[1].att))
    error = (t - s).square().sum(-1) / t.square().sum(-1)
    assert loss.item() == pytest.approx((error * batch.mask).sum().item(), rel=1e-5)


def first_value(model: LM) -> torch.Tensor:
    """The value projection of the wrapped student's first RWKV layer."""
    return model.blocks[model.cfg.mixers.index("r")].att.student.value.weight


@pytest.mark.parametrize("mixer", ["rr", "arr"])
@pytest.mark.parametrize("stage", ["align", "match"])
def test_gradient_reaches_the_first_layers_value_projection_through_v_first(stage, mixer, monkeypatch):
    """Without v_first's path it is another one; finite differences agree with ours."""
    teacher, student = tiny_model(n_layer=len(mixer)), tiny_model(1, mixer=mixer, n_layer=len(mixer))
    batch = random_batch(2, 8)

    def loss(model, batch) -> torch.Tensor:
        terms, _ = align_loss(model, batch) if stage == "align" else match_loss(model, batch, teacher=teacher)
        return terms["loss"]

    def gradient() -> tuple[torch.Tensor, torch.nn.Module]:
        row = Stage(align_loss, teacher if stage == "align" else None, trains=(".att.student.",))
        model = row.model(student)
        return torch.autograd.grad(loss(model, batch), first_value(model))[0], model

    whole, model = gradient()
    with monkeypatch.context() as patch:
        patch.setattr(VFirstHolder, "write", lambda self, v: setattr(self, "state", v.detach()[None]))
        cut, _ = gradient()
    assert (whole - cut).norm() > 0.01 * whole.norm()
    # finite differences along the gradient's direction, in float64
    step, values = 1e-4 * (whole / whole.norm()).double(), []
    model.double(), teacher.double()
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x.double())           # the losses cast to float32
    wide = type(batch)(batch.x, batch.y, batch.mask.double())
    with torch.no_grad():
        for sign in (1, -1):
            first_value(model).add_(sign * step)
            values.append(loss(model, wide).item())
            first_value(model).sub_(sign * step)
    assert (values[0] - values[1]) / 2e-4 == pytest.approx(whole.norm().item(), rel=1e-3)


# ------------------------------------------------------------------------------------------
# The student at the start

@pytest.mark.parametrize("teacher", [
    {},
    {"ffn": "swiglu", "norm": "rmsnorm", "n_kv_head": 1},
    {"positions": "learned", "ffn": "gelu", "bias": True, "tied": True},
], ids=str)
def test_replacing_zero_layers_leaves_the_teachers_logits_bit_equal(teacher):
    lm, batch = tiny_model(**teacher).eval(), random_batch()
    logits = lm(batch.x)[0]
    for changes in ({}, {"untie_head": True}, {"ffn": lm.cfg.ffn}):
        student = make_student(lm, StudentConfig(mixer="a", **changes)).eval()
        for model in (student, wrap(student, None), wrap(student, lm)):
            assert torch.equal(model(batch.x)[0], logits)


@pytest.mark.parametrize("n_kv", [1, 2, 4])
def test_grouped_heads_are_repeated_as_attention_shares_them(n_kv):
    """Query head h reads key and value head h // (heads per group).

    1 / sqrt(N) goes into the receptance.
    """
    teacher = tiny_model(n_embd=64, n_head=4, n_kv_head=n_kv, qkv_bias=True, bias=True, mixer="a")
    student, N = make_student(teacher, StudentConfig()), 16
    for block, source in zip(student.blocks, teacher.blocks):
        m, t = block.att, source.att
        for h in range(4):
            g = h // (4 // n_kv)
            head, group = slice(h * N, h * N + N), slice(g * N, g * N + N)
            assert torch.equal(m.receptance.weight[head], t.q_proj.weight[head] / 4)
            assert torch.equal(m.receptance.bias[head], t.q_proj.bias[head] / 4)
            for a, b in ((m.key, t.k_proj), (m.value, t.v_proj)):
                for mine, theirs in ((a.weight, b.weight), (a.bias, b.bias)):
                    assert torch.equal(mine[head], theirs[group])
        assert torch.equal(m.output.weight, t.o_proj.weight) and torch.equal(m.output.bias, t.o_proj.bias)


@torch.no_grad()
def test_norms_of_queries_and_keys_come_along_with_the_scale_after_them():
    teacher = tiny_model(n_head=2, n_kv_head=1, head_size=24, qk_norm=True, qkv_bias=True, positions="none",
                         norm="rmsnorm")
    x = torch.randn(2, T, 32)
    mixer, att = make_student(teacher, StudentConfig()).blocks[1].att, teacher.blocks[1].att
    q, k, _ = att.qkv(x, 0)                                                           # (B, H, T, N)
    r = mixer.r_norm(mixer.receptance(x).view(2, T, 2, 24))
    key = mixer.k_norm(mixer.key(x).view(2, T, 2, 24))
    torch.testing.assert_close(r.transpose(1, 2), q / 24**0.5)
    torch.testing.assert_close(key.transpose(1, 2), k.expand(2, 2, T, 24))


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


# ------------------------------------------------------------------------------------------
# Losses

@pytest.mark.parametrize("kind", ["relative", "l2norm"])
def test_alignment_of_a_perfectly_copied_mixer_is_zero(kind):
    student, half, batch = tiny_model(mixer="r"), tiny_model(mixer="r"), random_batch()
    teacher = pretend(student)
    # l2norm's square root is kept differentiable at 0
    limit = 1e-6 / 32**0.5 * batch.mask.sum().item() * 1.01 if kind == "l2norm" else 0
    assert align_loss(wrap(student, teacher), batch, kind=kind)[0]["loss"].item() <= limit
    half.blocks[1].att = tiny_model(5, mixer="r").blocks[1].att
    assert align_loss(wrap(half, teacher), batch, kind=kind)[0]["loss"].item() > 1


def test_alignment_losses_equal_a_loop_over_layers_and_tokens():
    teacher, student = tiny_model(), make_student(tiny_model(), StudentConfig())
    shake(student, 0.05)
    batch, _ = padded([5, 11, 16])
    model = wrap(student, teacher)
    losses = {kind: align_loss(model, batch, kind=kind)[0]["loss"].item() for kind in ("relative", "l2norm")}
    expected = {"relative": 0.0, "l2norm": 0.0}
    for block in model.blocks:
        for b, i in batch.mask.nonzero().tolist():
            t, s = (y[b, i].tolist() for y in block.att.pair)
            distance = math.dist(t, s)
            expected["relative"] += distance**2 / sum(x * x for x in t) / 2
            expected["l2norm"] += distance / math.sqrt(32) / 2
    assert losses == pytest.approx(expected, rel=1e-4)


def test_kl_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p||q) = ln 2 - ln 3 / 2, the other way below.

    Adaptive: the head is one of the two tokens, half the error.
    """
    t, s = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    forward, reverse = math.log(2) - math.log(3) / 2, 0.75 * math.log(3) - math.log(2)
    assert divergence(t, s, "forward").item() == pytest.approx(math.log(4 / 3) / 2) == pytest.approx(forward)
    assert divergence(t, s, "reverse").item() == pytest.approx(reverse)
    assert divergence(t, s, "adaptive").item() == pytest.approx((forward + reverse) / 2)


# ------------------------------------------------------------------------------------------
# The stages

def test_the_three_rows_train_what_the_docstrings_table_says():
    """align: the mixers; match: everything but what is frozen; finish: everything."""
    teacher = tiny_model(n_layer=3).requires_grad_(False)
    student = make_student(teacher, StudentConfig(mixer="rar"))
    cfg, names = DistillConfig(freeze="emb,ffn"), set(state_dict(wrap(student, None)))
    mixers = {name for name in names if ".att.student." in name}
    frozen = {name for name in names if ".ffn." in name or "emb" in name}
    assert {name.split(".")[1] for name in mixers} == {"0", "2"} and frozen
    for stage, kind, expected in (("align", "text", mixers), ("match", "text", names - frozen),
                                  ("finish", "supervised", names), ("finish", "preference", names)):
        row = open_stage(stage, cfg, student, teacher, teacher, kind)
        model = row.model(student)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == expected, stage
        attention = [b.att.teacher for b in model.blocks if hasattr(b.att, "student")]
        assert attention == ([teacher.blocks[i].att for i in (0, 2)] if stage == "align" else [None, None])


def test_one_run_moves_what_its_stages_train_and_ends_in_a_model_and_a_report(job, teacher, tmp_path):
    report, out = distill(job("out", freeze="ffn,ln_out")), tmp_path / "out"
    torch.manual_seed(0)
    begin = make_student(load_model(teacher), StudentConfig()).state_dict()
    aligned, matched, finished = (weights(out / stage) for stage in ("align", "match", "finish"))
    assert begin.keys() == aligned.keys() == matched.keys()
    for name in begin:
        assert torch.equal(begin[name], aligned[name]) == (".att." not in name), name
        assert torch.equal(aligned[name], matched[name]) == (".ffn." in name or "ln_out" in name), name
        assert not torch.equal(matched[name], finished[name]), name
    original = weights(teacher)
    assert all(torch.equal(p, aligned[name]) for name, p in original.items() if ".att." not in name)
    assert [row["name"] for row in report["stages"]] == ["start", "align", "match", "finish"]
    assert json.loads((out / "report.json").read_text()) == report and report["student"]["stage"] == "match"
    assert [len(metrics(out / stage)) for stage in ("align", "match", "finish")] == [3, 3, 3]
    assert (out / "model.safetensors").read_bytes() == (out / "finish" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("freeze", ["emb", "head", "emb,head"])
def test_a_tied_head_and_its_embedding_are_frozen_as_one(freeze):
    teacher = tiny_model(tied=True).requires_grad_(False)
    student = make_student(teacher, StudentConfig())
    stage = open_stage("match", DistillConfig(freeze=freeze), student, teacher, teacher, "text")
    model = stage.model(student)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"emb.weight"} and model.head.weight is model.emb.weight
