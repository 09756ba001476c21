"""The model, in the order of model.py: attention, RWKV-7, the whole, its shape.

The oracle is the PyPI package rwkv, RWKV-7's own inference code. Names, shapes and
initial values of the official trainer: tests/edge/test_official.py.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from common_model import GPT, RWKV, every_variant, in_pieces, lively, relative, text
from lib.states import nbytes, tensors
from model import LM, rope_frequencies

# ------------------------------------------------------------------------------------------
# Attention


def test_llama3_scaling_slows_the_slow_pairs_and_leaves_the_fast_ones():
    """More than 4 turns in 32 tokens: as they were; fewer than 1: 8 times slower."""
    cfg = replace(GPT, head_size=64, rope_theta=1e4, rope_factor=8.0, rope_original=32)
    plain, scaled = (
        rope_frequencies(replace(cfg, rope_scaling=how), 64, "cpu") for how in ("default", "llama3")
    )
    turns, slower = plain * 32 / (2 * math.pi), plain / scaled
    assert (slower[turns > 4] == 1).all() and torch.allclose(slower[turns < 1], torch.tensor(8.0))
    assert (slower.diff() >= -1e-5).all()
    assert (turns > 4).any() and (turns < 1).any() and ((slower > 1.01) & (slower < 7.9)).any()
    torch.testing.assert_close(rope_frequencies(replace(cfg, rope_scaling="linear"), 64, "cpu"), plain / 8)


# ------------------------------------------------------------------------------------------
# RWKV-7


@torch.no_grad()
def test_rope_in_rwkv_turns_with_the_position_and_keeps_norms():
    x = torch.randn(1, 20, 32)
    plain, turned = lively(RWKV).blocks[0].att, lively(replace(RWKV, rwkv_rope=True)).blocks[0].att
    turned.load_state_dict(plain.state_dict())
    # position 0 is not turned
    assert relative(turned(x[:, :1], None, None)[0], plain(x[:, :1], None, None)[0]) < 1e-6
    assert relative(turned(x, None, None)[0], plain(x, None, None)[0]) > 1e-3


@pytest.mark.parametrize("mixer, first", [("r", 0), ("arr", 1), ("rar", 0), ("aar", 2)])
def test_v_first_comes_from_the_first_rwkv_layer_wherever_it_is(mixer, first):
    model = LM(replace(RWKV, mixer=mixer))
    names = {i: {n for n, _ in b.att.named_parameters()} for i, b in enumerate(model.blocks)}
    for i, letter in enumerate(model.cfg.mixers):
        assert ("v0" in names[i]) == (letter == "r" and i != first)


@pytest.mark.parametrize("mixer, first", [("r", 0), ("arr", 1), ("rar", 0)])
def test_gradient_reaches_the_first_value_projection_through_v_first(mixer, first):
    model = lively(replace(RWKV, mixer=mixer))
    with torch.no_grad():  # now its value can act through later layers' v_first alone
        model.blocks[first].att.output.weight.zero_()
    model(text())[0].square().mean().backward()
    assert model.blocks[first].att.value.weight.grad.norm() > 0
    assert not model.blocks[first].att.receptance.weight.grad.any()


def test_v_first_is_never_changed_in_place():
    model, x = lively(RWKV), torch.randn(2, 20, 32)
    _, v_first, _ = model.blocks[0].att(x, None, None)
    kept = v_first.clone()
    _, passed, _ = model.blocks[1].att(x, v_first, None)
    assert passed is v_first and torch.equal(v_first, kept)
    attention = LM(GPT).blocks[0].att
    assert attention(x, v_first, None)[1] is v_first and torch.equal(v_first, kept)


@torch.no_grad()
def test_group_norm_takes_the_scale_of_the_values_away():
    x = torch.randn(2, 20, 32)
    for group_norm, factor in ((True, 1.0), (False, 3.0)):
        att = lively(replace(RWKV, group_norm=group_norm, bonus=False)).blocks[0].att
        if group_norm:
            att.ln_x.bias.zero_()
            att.ln_x.eps = 0.0
        before = att(x, None, None)[0]
        att.value.weight.mul_(3)
        assert relative(att(x, None, None)[0], factor * before) < 1e-4


@torch.no_grad()
def test_a_switch_turned_off_is_its_neutral_value():
    """No bonus: r_k = 0. No token shift: x_* = 0. No gate: g = sigmoid(0) g2 = 1."""

    def neutral(model, what):
        for block in model.blocks:
            if what == "bonus":
                block.att.r_k.zero_()
            elif what == "token_shift":
                [getattr(block.att, "x_" + c).zero_() for c in "rwkvag"]
            else:
                block.att.g1.zero_()
                block.att.g2.fill_(2 / len(block.att.g2))

    for what in ("bonus", "token_shift", "gate"):
        model, off = lively(RWKV), LM(replace(RWKV, **{what: False}))
        neutral(model, what)
        off.load_state_dict({n: p for n, p in model.state_dict().items() if n in off.state_dict()})
        assert relative(off(text())[0], model(text())[0]) < 1e-5, what


def test_what_a_switch_leaves_out_is_neither_trained_nor_saved():
    model = LM(replace(RWKV, gate=False, token_shift=False, bonus=False))
    left_out = {"x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "r_k", "g1", "g2"}
    for block in model.blocks:
        mixer = dict(block.att.named_buffers())
        assert mixer.keys() == left_out and not any(zeros.any() for zeros in mixer.values())
        assert not left_out & {name for name, _ in block.att.named_parameters()}
        assert not left_out & block.att.state_dict().keys()


# ------------------------------------------------------------------------------------------
# The whole model


@every_variant
def test_tokens_one_by_one_and_in_pieces_give_the_logits_of_the_whole(cfg):
    model, tokens = lively(cfg), text()
    with torch.no_grad():
        whole, end = model(tokens)
        assert whole.shape == (2, 45, 50) and whole.std() > 0.1
        for pieces in (1, (1, 44), (44, 1), (7, 1, 20, 17), (16, 29)):
            logits, state = in_pieces(model, tokens, pieces)
            assert relative(logits, whole) < 2e-5, pieces
            assert state.position == end.position == 45
            assert all(relative(a, b) < 2e-5 for a, b in zip(tensors(state), tensors(end), strict=True))


@every_variant
def test_a_state_is_a_value_that_may_be_used_twice(cfg):
    model, prompt, a, b = lively(cfg), text(20), text(18, seed=2), text(1, seed=3)
    with torch.no_grad():
        _, state = model(prompt)
        kept = [t.clone() for t in tensors(state)]
        first, _ = model(a, state)
        model(b, state)
        second, _ = model(a, state)
    assert torch.equal(first, second)
    assert state.position == 20 and all(map(torch.equal, tensors(state), kept))


@every_variant
def test_no_token_sees_a_later_one_and_no_row_another(cfg):
    model, tokens = lively(cfg), text()
    with torch.no_grad():
        whole, _ = model(tokens)
        other = torch.cat((tokens[:, :33], (tokens[:, 33:] + 1) % 50), 1)
        changed, _ = model(other)
        assert relative(changed[:, :33], whole[:, :33]) < 1e-6
        assert relative(changed[:, 33:], whole[:, 33:]) > 0.01
        assert relative(model(tokens[1:])[0], whole[1:]) < 2e-5


@every_variant
def test_every_parameter_has_a_gradient(cfg):
    model, tokens = lively(cfg), text()
    F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize("cfg", [GPT, RWKV, replace(GPT, mixer="ar")], ids=["gpt", "rwkv", "hybrid"])
def test_gradients_flow_through_the_state(cfg):
    model, tokens = lively(cfg), text()

    def gradients(pieces):
        model.zero_grad()
        in_pieces(model, tokens, pieces)[0].square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    whole, split = gradients(45), gradients((13, 32))
    assert all(relative(split[name], whole[name]) < 1e-4 for name in whole)


def test_bytes_of_state_are_constant_for_rwkv_and_grow_for_a_gpt():
    rwkv, gpt, hybrid = LM(RWKV), LM(replace(GPT, n_kv_head=2)), LM(replace(GPT, mixer="ar", n_layer=2))
    for T in (1, 10, 60):  # layers, float32, (two last x, H N N) or (k and v, 2 heads, T, N)
        tokens = text(T, B=1)
        assert nbytes(rwkv(tokens)[1]) == 3 * 4 * (2 * 32 + 2 * 16 * 16)
        assert nbytes(gpt(tokens)[1]) == 3 * 4 * (2 * 2 * T * 8)
        assert nbytes(hybrid(tokens)[1]) == 4 * (2 * 4 * T * 8) + 4 * (32 + 2 * 16 * 16)


# ------------------------------------------------------------------------------------------
# Its shape


def test_mixer_letters_repeat_over_the_layers():
    letters = {"a": "aaaaa", "ar": "arara", "rra": "rrarr", "rrrra": "rrrra"}
    assert {m: replace(GPT, mixer=m, n_layer=5).mixers for m in letters} == letters


def test_ranks_follow_the_official_rule():
    official = {768: (64, 64, 32, 128), 32: (32, 32, 32, 32), 1024: (64, 64, 64, 160)}
    for C, ranks in official.items():
        assert tuple(replace(RWKV, n_embd=C).rank(kind) for kind in "wavg") == ranks


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its torch.jit.script
@pytest.mark.parametrize("N", [32, 64])
@pytest.mark.parametrize("L", [1, 3])
def test_logits_and_state_are_those_of_the_official_package(N, L, tmp_path, monkeypatch):
    pytest.importorskip("rwkv")
    monkeypatch.setenv("RWKV_V7_ON", "1")
    monkeypatch.setenv("RWKV_CUDA_ON", "0")
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    official = pytest.importorskip("rwkv.model")
    if not hasattr(official, "RWKV_x070"):
        pytest.skip("rwkv was imported before without RWKV_V7_ON")
    model = lively(replace(RWKV, n_embd=128, rwkv_head_size=N, n_layer=L, vocab_size=70))
    tokens = text(40, B=1, V=70)
    torch.save({n: p.detach().clone() for n, p in model.state_dict().items()}, tmp_path / "m.pth")
    theirs = official.RWKV(model=str(tmp_path / "m"), strategy="cpu fp32")
    with torch.no_grad():
        logits, state = model(tokens)
    ref, ref_state = theirs.forward(tokens[0].tolist(), None, full_output=True)
    assert relative(logits[0], ref) < 1e-5
    for i, ((last, S, _), ffn_last) in enumerate(state.layers):
        assert relative(last[0], ref_state[3 * i]) < 1e-5
        assert relative(S[0], ref_state[3 * i + 1]) < 1e-5
        assert relative(ffn_last[0], ref_state[3 * i + 2]) < 1e-5
    next_ref, _ = theirs.forward(7, ref_state)
    assert relative(model(torch.tensor([[7]]), state)[0][0, 0], next_ref) < 1e-5
