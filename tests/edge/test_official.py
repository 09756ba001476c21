"""A new RWKV-7 is the official one: names, shapes, and the official trainer's formulas
for initial values, written out again here.
"""

import math
from dataclasses import replace

import numpy as np
import pytest

from common_model import RWKV
from model import LM


def official_shapes(cfg):
    """The official trainer's parameter list; layer 0 has no value residual."""
    C, V, N = cfg.n_embd, cfg.vocab_size, cfg.rwkv_head_size
    D = {
        kind: max(32, 32 * round(m * C**0.5 / 32))
        for kind, m in (("w", 2.5), ("a", 2.5), ("v", 1.7), ("g", 5.0))
    }
    shapes = {
        "emb.weight": (V, C),
        "head.weight": (V, C),
        "ln_out.weight": (C,),
        "ln_out.bias": (C,),
        "blocks.0.ln0.weight": (C,),
        "blocks.0.ln0.bias": (C,),
    }
    for i in range(cfg.n_layer):
        b = f"blocks.{i}."
        shapes |= {b + f"{ln}.{p}": (C,) for ln in ("ln1", "ln2", "att.ln_x") for p in ("weight", "bias")}
        shapes |= {
            b + "att." + x: (1, 1, C)
            for x in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a")
        }
        shapes |= {b + f"att.{m}.weight": (C, C) for m in ("receptance", "key", "value", "output")}
        shapes |= {b + "att.r_k": (C // N, N)}
        for kind in "wavg" if i else "wag":
            shapes |= {b + f"att.{kind}1": (C, D[kind]), b + f"att.{kind}2": (D[kind], C)}
        shapes |= {b + "att.v0": (1, 1, C)} if i else {}
        shapes |= {
            b + "ffn.x_k": (1, 1, C),
            b + "ffn.key.weight": (4 * C, C),
            b + "ffn.value.weight": (C, 4 * C),
        }
    return shapes


@pytest.mark.parametrize("C, N, L", [(32, 16, 3), (128, 64, 1), (192, 64, 2)])
def test_state_dict_is_the_official_one(C, N, L):
    cfg = replace(RWKV, n_embd=C, rwkv_head_size=N, n_layer=L)
    assert {n: tuple(p.shape) for n, p in LM(cfg).state_dict().items()} == official_shapes(cfg)


@pytest.mark.parametrize("L", [1, 2, 4])
@pytest.mark.parametrize("V", [50, 300])
def test_initial_values_are_the_official_trainer_s(L, V):
    C, N = 64, 16
    model = LM(replace(RWKV, n_embd=C, rwkv_head_size=N, n_layer=L, vocab_size=V))
    got = {name: p.detach().double().numpy() for name, p in model.named_parameters()}

    n = np.arange(C)
    lin = n / (C - 1) - 0.5
    zigzag = np.array([((c % N) - (N - 1) / 2) / ((N - 1) / 2) for c in n])
    zigzag = zigzag * abs(zigzag)
    expected = {
        "ln_out.weight": np.ones(C),
        "ln_out.bias": np.zeros(C),
        "blocks.0.ln0.weight": np.ones(C),
        "blocks.0.ln0.bias": np.zeros(C),
    }
    gains = {"head.weight": 0.5 * math.sqrt(V / C) if V > C else 0.5}
    for i in range(L):
        b, att = f"blocks.{i}.", f"blocks.{i}.att."
        rho01, rho1 = (i / (L - 1) if L > 1 else 0.0), 1 - i / L
        for x, power in (("x_r", 0.2), ("x_w", 0.9), ("x_k", 0.7), ("x_v", 0.7), ("x_a", 0.9), ("x_g", 0.2)):
            expected[att + x] = 1 - (n / C) ** (power * rho1)
        expected[att + "w0"] = -6 + 6 * (n / (C - 1)) ** (1 + rho01**0.3) + 0.5 + 2.5 * zigzag
        expected[att + "a0"] = -0.19 + 0.3 * zigzag + 0.4 * lin
        expected[att + "k_k"] = 0.71 - 0.1 * lin
        expected[att + "k_a"] = np.full(C, 1.02)
        expected[att + "r_k"] = np.full((C // N, N), -0.04)
        expected[att + "output.weight"] = np.zeros((C, C))
        expected[att + "ln_x.weight"] = np.full(C, ((1 + i) / L) ** 0.7)
        expected[att + "ln_x.bias"] = np.zeros(C)
        expected[b + "ffn.x_k"] = 1 - (n / C) ** (rho1**4)
        expected[b + "ffn.value.weight"] = np.zeros((C, 4 * C))
        for ln in ("ln1", "ln2"):
            expected |= {b + ln + ".weight": np.ones(C), b + ln + ".bias": np.zeros(C)}
        if i:
            expected[att + "v0"] = 0.73 - 0.4 * lin
        for kind in "wavg" if i else "wag":
            expected[att + kind + "1"] = np.zeros_like(got[att + kind + "1"])
            gains[att + kind + "2"] = 0.1
        # of ffn.key: 2 = sqrt(4C / C)
        gains |= {
            att + "receptance.weight": 1.0,
            att + "value.weight": 1.0,
            att + "key.weight": 0.1,
            b + "ffn.key.weight": 2.0,
        }

    assert expected.keys() | gains.keys() | {"emb.weight"} == got.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name].reshape(value.shape), value, rtol=0, atol=3e-6, err_msg=name)
    for name, gain in gains.items():
        W = got[name] if got[name].shape[0] <= got[name].shape[1] else got[name].T
        np.testing.assert_allclose(
            W @ W.T, gain**2 * np.eye(len(W)), rtol=0, atol=3e-6 * gain**2 + 1e-7, err_msg=name
        )
    emb = got["emb.weight"]
    assert (
        abs(emb).max() <= 1e-4
        and abs(emb.std() / (1e-4 / math.sqrt(3)) - 1) < 0.05
        and abs(emb.mean()) < 5e-6
    )
