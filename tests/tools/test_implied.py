"""Implied attention: it gives the operator's output back, and shows what was erased."""

import math

import pytest
import torch
import torch.nn.functional as F

import model as chapter
from common import tiny_model
from common_model import VARIANTS, every_variant, lively, relative, text
from model import MIN_LOG_DECAY
from tools.implied import (attention_map, correlations, half_lives, implied_attention, listening, mixing,
                           read, state_norms)
from wkv import wkv7


def random_inputs(T: int = 100, H: int = 2, N: int = 16, seed: int = 0) -> list[torch.Tensor]:
    """r, w, k, v, kk, a (T, H, N), a up to 2: the delta rule's whole range."""
    torch.manual_seed(seed)
    r, w, k, v, kk, a = torch.randn(6, T, H, N)
    return [r, MIN_LOG_DECAY * w.sigmoid(), k, v, F.normalize(kk, dim=-1), 2 * a.sigmoid()]


def outputs(A: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """y_t = sum_i A_ti v_i, (T, H, N)."""
    return torch.einsum("hti,ihn->thn", A.double(), v.double())


# ------------------------------------------------------------------------------------------
# The operator

@pytest.mark.parametrize("T", [1, 2, 17, 128])
def test_the_map_times_the_values_is_what_wkv7_gives(T):
    r, w, k, v, kk, a = random_inputs(T)
    y, _ = wkv7(*(x[None] for x in (r, w, k, v, kk, a)))
    A = implied_attention(*(x.double() for x in (r, w, k, kk, a)))
    assert relative(outputs(A, v), y[0]) < 1e-5
    assert torch.equal(A, A.tril())


def test_the_map_is_the_formula():
    """k_i^T G_{i+1} ... G_t r_t, with every G written out."""
    r, w, k, _, kk, a = (x.double() for x in random_inputs(T=7))
    A = implied_attention(r, w, k, kk, a)
    for h in range(2):
        G = [w[t, h].exp().diag() - torch.outer(kk[t, h], kk[t, h] * a[t, h]) for t in range(7)]
        for t in range(7):
            for i in range(t + 1):
                product = torch.eye(16, dtype=torch.float64)
                for step in G[i + 1 : t + 1]:
                    product = product @ step
                assert A[h, t, i].item() == pytest.approx((k[i, h] @ product @ r[t, h]).item(), abs=1e-12)


@pytest.mark.parametrize("rate, old", [(0.0, 1.0), (1.0, 0.0), (2.0, -1.0), (0.25, 0.75)])
def test_a_key_written_again_erases_what_it_held(rate, old):
    """Three times the same key: a value fades by 1 - a at each later one, signed."""
    e = F.one_hot(torch.zeros(3, 1, dtype=torch.long), 16).double()
    A = implied_attention(e, 0 * e, e, e, rate * torch.ones_like(e))[0]
    assert torch.allclose(A, torch.tensor([[1, 0, 0], [old, 1, 0], [old * old, old, 1]], dtype=torch.float64))


def test_norms_are_those_of_the_states():
    r, w, k, v, kk, a = random_inputs(T=20)
    norms = state_norms(*(x.double() for x in (w, k, v, kk, a)))
    for t in (1, 7, 20):
        _, S = wkv7(*(x[None, :t] for x in (r, w, k, v, kk, a)), backend="loop")
        assert norms[:, t - 1].tolist() == pytest.approx(S[0].norm(dim=(1, 2)).tolist(), rel=1e-5)


def test_after_its_half_life_a_channel_is_at_one_half():
    w = MIN_LOG_DECAY * torch.rand(30, 2, 16, dtype=torch.float64)
    lives = half_lives(w)
    assert torch.allclose((w.mean(0) * lives).exp(), torch.full_like(lives, 0.5))
    assert half_lives(torch.zeros(3, 1, 16)).isfinite().all()


# ------------------------------------------------------------------------------------------
# In a model

@every_variant
@torch.no_grad()
def test_every_layer_of_every_model_gives_its_output_back(cfg):
    """Attention's through its output map, RWKV-7's up to norm, bonus and gate."""
    model, tokens = lively(cfg).eval(), text(T=33, B=1)
    with listening(model) as seen:
        model(tokens)
    for i, block in enumerate(model.blocks):
        told = mixing(block.att, seen[i])
        assert told.letter == cfg.mixers[i]
        if told.letter == "r":
            assert relative(outputs(told.map, seen[i].inputs[3]), seen[i].y) < 1e-5
            continue
        _, _, v = block.att.qkv(seen[i].x, 0)
        y = outputs(told.map, v[0].repeat_interleave(block.att.n_head // block.att.n_kv, 0).transpose(0, 1))
        expected, _, _ = block.att(seen[i].x, None, None)
        assert relative(F.linear(y.flatten(1).float(), block.att.o_proj.weight, block.att.o_proj.bias),
                        expected[0]) < 1e-5
        assert torch.allclose(told.map.sum(-1), torch.ones(()).double())


@torch.no_grad()
def test_reading_gives_the_models_logits_and_what_its_memory_did():
    model, tokens = lively(VARIANTS["rwkv7"]).eval(), text(T=33, B=1)
    logits, layers = read(model, tokens[0].tolist())
    expected, state = model(tokens)
    assert torch.allclose(logits.float(), expected[0], atol=1e-5)
    with listening(model) as seen:
        model(tokens)
    for i, (told, (mixer_state, _)) in enumerate(zip(layers, state.layers)):
        assert torch.allclose(told.norm[:, -1].float(), mixer_state[1][0].norm(dim=(1, 2)), rtol=1e-4)
        assert told.half_lives.min() > math.log(2) / -MIN_LOG_DECAY
        assert torch.allclose(told.rate, seen[i].inputs[5].mean(-1).T)
    assert layers[0].share is None and all(told.share.shape == (2, 33) for told in layers[1:])


@torch.no_grad()
def test_the_share_of_v_first_is_what_was_mixed_in():
    """A first layer whose values are all 1, and a second whose own are all 0."""
    model, tokens = lively(VARIANTS["rwkv in llama's clothes"]).eval(), text(T=12, B=1)
    for block, value in zip(model.blocks, (1.0, 0.0, 0.0)):
        block.att.value.weight.zero_()
        block.att.value.bias.fill_(value)
    with listening(model) as seen:
        model(tokens)
    for i in (1, 2):
        share = mixing(model.blocks[i].att, seen[i]).share
        assert torch.allclose(share, seen[i].inputs[3].mean(-1).T) and 0 < share.min() < share.max() < 1


def test_listening_leaves_the_model_as_it_was():
    model, wkv7_before = tiny_model(mixer="r"), chapter.wkv7
    with pytest.raises(IndexError), listening(model):
        model(torch.tensor([[999]]))
    assert chapter.wkv7 is wkv7_before and not any(block.att._forward_hooks for block in model.blocks)


# ------------------------------------------------------------------------------------------
# Correlation

def test_correlation_is_pearsons_over_the_triangle():
    torch.manual_seed(0)
    A, B = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    i, j = torch.tril_indices(9, 9)
    expected = [torch.corrcoef(torch.stack((A[h, i, j], B[h, i, j])))[0, 1].item() for h in range(3)]
    assert correlations(A, B) == pytest.approx(expected)
    assert correlations(A, 3 * A + 1) == pytest.approx([1.0] * 3)
    assert correlations(A, -A + B.triu(1)) == pytest.approx([-1.0] * 3)
    assert correlations(A, torch.ones_like(A)) == [None] * 3
    assert correlations(A[:, :1, :1], B[:, :1, :1]) == [None] * 3


def test_attention_to_one_token_is_one():
    model = lively(VARIANTS["gpt"])
    assert attention_map(model.blocks[0].att, torch.randn(1, 1, 32)).tolist() == [[[1.0]]] * 4
