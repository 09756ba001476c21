"""Where the student begins: what is copied and what not, decays by rule, and what a
look at the teacher gives.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from common import T, one_line, random_batch, shake, state_dict, tiny_model
from common_distill import META
from distill import StudentConfig, align_loss, make_student, wrap
from lib.folders import save_model
from lib.report import layer_errors
from lib.start import LeastSquares, attention_io, lookback


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


def test_the_gates_columns_get_different_gradients():
    """With equal rows in g2, all columns of g1 would learn the same for ever."""
    teacher, batch = tiny_model(), random_batch()
    model = wrap(make_student(teacher, StudentConfig()), teacher)
    align_loss(model, batch)[0]["loss"].backward()
    for block in model.blocks:
        columns = F.normalize(block.att.student.g1.grad.double(), dim=0).T  # (rank, C)
        distances = torch.cdist(columns, columns).fill_diagonal_(1)
        assert columns.norm(dim=1).min() > 0.99 and distances.min() > 0.01


# ------------------------------------------------------------------------------------------
# Another student's mixers

def test_a_student_takes_the_mixers_of_one_after_stage_1(tmp_path):
    """Those of its RWKV-7 layers and nothing else; the first has no value residual."""
    teacher = tiny_model(n_layer=3)
    aligned = make_student(teacher, StudentConfig())
    shake(aligned, 0.1)
    save_model(aligned, tmp_path, META)
    student = make_student(teacher, StudentConfig(mixer="arr", aligned=str(tmp_path)))
    given, own = aligned.state_dict(), teacher.state_dict()
    for name, p in student.state_dict().items():
        mixer = name.startswith(("blocks.1.att.", "blocks.2.att."))
        assert torch.equal(p, (given if mixer else own).get(name, torch.zeros_like(p))), name
    assert not StudentConfig(decay="lookback", calibrate=True, aligned=str(tmp_path)).looks


def test_mixers_that_cannot_be_taken_are_one_line(tmp_path):
    teacher = tiny_model(n_layer=3)
    save_model(make_student(teacher, StudentConfig(mixer="rar")), tmp_path, META)
    for change, line in (({"mixer": "arr"}, "its layer 1 is attention"), ({"gate": False}, "no student of"),
                         ({"rwkv_rope": True}, "no student of")):
        with pytest.raises(ValueError, match=f"aligned = .*{line}") as error:
            make_student(teacher, StudentConfig(**{"mixer": "rar"} | change, aligned=str(tmp_path)))
        one_line(error.value)


# ------------------------------------------------------------------------------------------
# Decay


def memory(mixer) -> torch.Tensor:
    """How many tokens each channel remembers, (heads, N): n with e^w = 1 - 1/n."""
    w = -math.exp(-0.5) * torch.sigmoid(mixer.w0.detach().double())
    return 1 / -torch.expm1(w.view(mixer.H, mixer.N))


def test_spread_decay_gives_half_lives_from_two_tokens_to_the_block():
    """e^w = 1 - 1/n with n from 2 to block_size, evenly in log n.

    The fastest is as near as RWKV-7's bound lets it.
    """
    student = make_student(tiny_model(block_size=512), StudentConfig())
    expected = torch.tensor([2 * 256 ** (i / 15) for i in range(16)], dtype=torch.float64)
    for block in student.blocks:
        n = memory(block.att)
        torch.testing.assert_close(n[:, 1:], expected[1:].expand(2, 15), rtol=1e-3, atol=0)
        assert (n[:, 0] >= 2).all() and (n[:, 0] < expected[1]).all()


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 1, "qk_norm": True}, {"positions": "none"}], ids=str)
def test_lookback_is_the_mean_distance_that_attention_looks(changes):
    att, x = tiny_model(**changes).blocks[0].att, torch.randn(3, T, 32)
    q, k, _ = att.qkv(x, 0)
    scores = q @ k.expand_as(q).mT / 16**0.5
    p = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)  # (B, H, T, T)
    distance = (torch.arange(T)[:, None] - torch.arange(T)).float()
    mean = (p * distance).sum(-1).mean((0, 2))
    torch.testing.assert_close(lookback(att, x), mean, rtol=1e-4, atol=1e-4)
    att.q_proj.weight.zero_()  # all tokens alike: t / 2 back from position t
    if "qk_norm" not in changes:
        torch.testing.assert_close(lookback(att, x), torch.full((2,), (T - 1) / 4))


@torch.no_grad()
def test_heads_that_look_further_back_remember_longer():
    teacher, tokens = tiny_model(positions="none"), random_batch(4).x
    block = teacher.blocks[0]
    _, far = block.att.q_proj.weight.chunk(2)
    far.zero_()  # looks everywhere alike: 2 d + 1 = (T + 1) / 2 tokens
    n = memory(make_student(teacher, StudentConfig(decay="lookback"), tokens).blocks[0].att)
    assert n[1, -1].item() == pytest.approx((T + 1) / 2, rel=1e-3) and n.min() >= 2
    back = lookback(block.att, block.ln1(block.ln0(teacher.emb(tokens))))
    assert n[0, -1].item() == pytest.approx(max(2 * back[0].item() + 1, 2.5), rel=1e-3)


# ------------------------------------------------------------------------------------------
# Output


@torch.no_grad()
def test_the_output_map_is_that_of_least_squares():
    """Told in two pieces. Reading nothing it stays as it was; its bias always does."""
    torch.manual_seed(0)
    m, wish, y = torch.nn.Linear(12, 8), torch.nn.Linear(12, 8), torch.randn(2, 100, 12)
    wish.bias.copy_(m.bias)
    noisy = wish(y) + torch.randn(2, 100, 8)
    for target, rtol in ((wish(y), 0.02), (noisy, 0.02)):
        mine = copy.deepcopy(m)
        fit = LeastSquares(mine)
        for row, t in zip(y.split(1), target.split(1)):
            with fit.listening(t):
                mine(row)
        mine(torch.full((1, 1, 12), 1e6))                          # nobody listens
        fit.solve()
        solution = torch.linalg.lstsq(y.flatten(0, 1), (target - m.bias).flatten(0, 1)).solution.T
        torch.testing.assert_close(mine.weight, solution, rtol=rtol, atol=0.01)
        assert torch.equal(mine.bias, m.bias)
    mine = copy.deepcopy(m)
    fit = LeastSquares(mine)
    with fit.listening(torch.ones(1, 5, 8)):
        mine(torch.zeros(1, 5, 12))
    fit.solve()
    assert torch.equal(mine.weight, m.weight)


def test_calibration_brings_every_mixer_nearer_to_its_attention():
    teacher, batch = tiny_model(n_layer=3, bias=True, n_kv_head=1), random_batch(4)
    for mixer in ("r", "ra"):
        students = []
        for calibrate in (False, True):
            torch.manual_seed(0)
            students.append(make_student(teacher, StudentConfig(mixer=mixer, calibrate=calibrate), batch.x))
        plain, near = students
        before, after = (layer_errors(teacher, student, batch) for student in (plain, near))
        assert len(after) == near.cfg.mixers.count("r")
        assert all(b["error"] < a["error"] and b["error"] < 1 for a, b in zip(before, after))
        changed = {
            name for name, p in plain.state_dict().items() if not torch.equal(p, near.state_dict()[name])
        }
        replaced = [i for i, letter in enumerate(near.cfg.mixers) if letter == "r"]
        assert changed == {f"blocks.{i}.att.output.weight" for i in replaced}


@torch.no_grad()
def test_what_goes_through_attention_is_seen_and_the_hooks_are_gone():
    model, batch = tiny_model(n_layer=3), random_batch()
    io = attention_io(model, batch.x)
    assert list(io) == [0, 1, 2]
    x = model.blocks[0].ln1(model.blocks[0].ln0(model.emb(batch.x)))
    assert torch.equal(io[0][0], x) and torch.equal(io[0][1], model.blocks[0].att(x, None, None)[0])
    assert not any(block.att._forward_hooks for block in model.blocks)
