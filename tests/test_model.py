"""The model: recurrent = parallel, official RWKV-7 = ours, GPT-2, Llama and Qwen2 = ours, and folders that tell what is wrong.

Oracles: the PyPI package rwkv (RWKV-7's own inference code), transformers, the official trainer's formulas for initial
values written out again here, and hand-counted sizes.
"""

import json
import math
import os
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from model import LM, ModelConfig, State, load_model, rope_frequencies, save_model

GPT = ModelConfig(vocab_size=50, block_size=64, n_layer=3, n_embd=32, n_head=4, rwkv_head_size=16, ln0=False)
RWKV = replace(GPT, mixer="r", ffn="channelmix", positions="none", ln0=True)  # the official RWKV-7

VARIANTS = {
    "gpt": GPT,
    "gpt2": replace(GPT, positions="learned", ffn="gelu", bias=True, qkv_bias=True, tied=True),
    "llama": replace(GPT, positions="rope", ffn="swiglu", norm="rmsnorm", n_kv_head=2),
    "qwen2, one kv head": replace(GPT, ffn="swiglu", norm="rmsnorm", n_kv_head=1, qkv_bias=True, rope_theta=1e6, tied=True),
    "qwen3, llama3's rope": replace(GPT, ffn="swiglu", norm="rmsnorm", n_kv_head=2, head_size=12, qk_norm=True, rope_scaling="llama3", rope_factor=8.0,
                                    rope_original=32),
    "linear rope, bias of o alone, exact gelu": replace(GPT, ffn="gelu_exact", rope_scaling="linear", rope_factor=3.0, o_bias=True),
    "no positions, free head size": replace(GPT, positions="none", head_size=12, norm_bias=False, ln0=True),
    "attention with channelmix": replace(GPT, ffn="channelmix"),
    "rwkv7": RWKV,
    "rwkv7, one head": replace(RWKV, rwkv_head_size=32, n_layer=1),
    "rwkv7, wider than the model": replace(RWKV, rwkv_size=64, rank_w=4, rank_a=5, rank_v=6, rank_g=7),
    "no gate": replace(RWKV, gate=False),
    "no group norm": replace(RWKV, group_norm=False),
    "no token shift": replace(RWKV, token_shift=False),
    "no bonus": replace(RWKV, bonus=False),
    "rwkv with rope": replace(RWKV, rwkv_rope=True),
    "rwkv with norms and linear rope": replace(RWKV, rwkv_rope=True, qk_norm=True, rope_scaling="linear", rope_factor=2.0, o_bias=True),
    "rwkv in llama's clothes": replace(GPT, mixer="r", ffn="swiglu", norm="rmsnorm", gate=False, group_norm=False, token_shift=False,
                                       bonus=False, rwkv_rope=True, qkv_bias=True, bias=True, tied=True),
    "rwkv in gpt2's clothes": replace(GPT, mixer="r", ffn="gelu", positions="learned", bias=True, qkv_bias=True),
    "hybrid ar": replace(GPT, mixer="ar"),
    "hybrid ra": replace(GPT, mixer="ra", ffn="swiglu", norm="rmsnorm", n_kv_head=2),
    "hybrid arr, learned": replace(GPT, mixer="arr", positions="learned", ffn="channelmix"),
}
every_variant = pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS.keys())


# --- helpers --------------------------------------------------------------------------------------


@torch.no_grad()
def lively(cfg: ModelConfig, seed=0) -> LM:
    """A model whose every parameter matters: the initial values have zeros that would hide mistakes."""
    torch.manual_seed(seed)
    model = LM(cfg)
    for name, p in model.named_parameters():
        scale = 1.0 if name in ("emb.weight", "pos.weight") else 0.6 / p.shape[-1] ** 0.5 if name.endswith("weight") and p.ndim == 2 else 0.2
        p.add_(scale * torch.randn_like(p))
    return model


def text(T=45, B=2, V=50, seed=1):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def in_pieces(model, tokens, pieces, state=None):
    logits = []
    for part in tokens.split(pieces, 1):
        out, state = model(part, state)
        logits.append(out)
    return torch.cat(logits, 1), state


def relative(out, ref):
    return ((out.double() - ref.double()).norm() / ref.double().norm()).item()


def tensors(state):
    """All tensors of a state, in order."""
    if isinstance(state, State):
        state = state.layers
    return [state] if isinstance(state, torch.Tensor) else [t for s in state for t in tensors(s)] if isinstance(state, tuple) else []


def one_line_error(call, *parts):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    for part in parts:
        assert part in message, (part, message)


# --- recurrent = parallel ----------------------------------------------------------------------------


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
        assert relative(changed[:, :33], whole[:, :33]) < 1e-6 and relative(changed[:, 33:], whole[:, 33:]) > 0.01
        assert relative(model(tokens[1:])[0], whole[1:]) < 2e-5


@every_variant
def test_every_parameter_has_a_gradient(cfg):
    model, tokens = lively(cfg), text()
    F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize("cfg", [VARIANTS["llama"], RWKV, VARIANTS["rwkv in llama's clothes"]], ids=["llama", "rwkv", "rwkv in llama's clothes"])
def test_gradients_are_those_of_finite_differences(cfg):
    """One random direction per parameter; float64, but decay and removal key are float32 inside, hence the wide step."""
    model, tokens, h = lively(replace(cfg, n_layer=2)).double(), text(20), 1e-3
    loss = lambda: F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())  # noqa: E731
    loss().backward()
    for name, p in model.named_parameters():
        with torch.no_grad():
            direction = p.grad / p.grad.norm() + torch.randn_like(p) / p.numel() ** 0.5
            slope = (p.grad * direction).sum().item()
            p.add_(h * direction)
            up = loss().item()
            p.sub_(2 * h * direction)
            down = loss().item()
            p.add_(h * direction)
        assert abs((up - down) / (2 * h) - slope) < 1e-3 * abs(slope) + 1e-5, name


@pytest.mark.parametrize("cfg", [GPT, RWKV, VARIANTS["hybrid ar"]], ids=["gpt", "rwkv", "hybrid"])
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
    for T in (1, 10, 60):
        tokens = text(T, B=1)
        assert rwkv(tokens)[1].nbytes() == 3 * 4 * (2 * 32 + 2 * 16 * 16)       # layers, float32, (two last x, H N N)
        assert gpt(tokens)[1].nbytes() == 3 * 4 * (2 * 2 * T * 8)               # layers, float32, (k and v, 2 heads, T, N)
        assert hybrid(tokens)[1].nbytes() == 4 * (2 * 4 * T * 8) + 4 * (32 + 2 * 16 * 16)


def test_the_memory_that_an_rwkv_state_holds_is_what_it_says():
    """A view of the last token would keep the whole text's activations alive, and be saved with them."""
    _, state = lively(RWKV)(text(60, B=1))
    assert sum(t.untyped_storage().nbytes() for t in tensors(state)) == state.nbytes()


# --- the value residual ----------------------------------------------------------------------------


@pytest.mark.parametrize("mixer, first", [("r", 0), ("arr", 1), ("rar", 0), ("aar", 2)])
def test_v_first_comes_from_the_first_rwkv_layer_wherever_it_is(mixer, first):
    model = LM(replace(RWKV, mixer=mixer))
    names = {i: {n for n, _ in b.att.named_parameters()} for i, b in enumerate(model.blocks)}
    for i, letter in enumerate(model.cfg.mixers):
        assert ("v0" in names[i]) == (letter == "r" and i != first)


@pytest.mark.parametrize("mixer, first", [("r", 0), ("arr", 1), ("rar", 0)])
def test_gradient_reaches_the_first_value_projection_through_v_first(mixer, first):
    model = lively(replace(RWKV, mixer=mixer))
    with torch.no_grad():
        model.blocks[first].att.output.weight.zero_()  # now its value can act through later layers' v_first alone
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


# --- what the switches switch off ------------------------------------------------------------------


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
def test_rope_in_rwkv_turns_with_the_position_and_keeps_norms():
    x = torch.randn(1, 20, 32)
    plain, turned = lively(RWKV).blocks[0].att, lively(replace(RWKV, rwkv_rope=True)).blocks[0].att
    turned.load_state_dict(plain.state_dict())
    assert relative(turned(x[:, :1], None, None)[0], plain(x[:, :1], None, None)[0]) < 1e-6     # position 0 is not turned
    assert relative(turned(x, None, None)[0], plain(x, None, None)[0]) > 1e-3


# --- official RWKV-7: names, shapes, initial values, logits ------------------------------------------


def official_shapes(cfg):
    """The official trainer's parameter list, written out (layer 0 has no value residual)."""
    C, V, N = cfg.n_embd, cfg.vocab_size, cfg.rwkv_head_size
    D = {kind: max(32, 32 * round(m * C**0.5 / 32)) for kind, m in (("w", 2.5), ("a", 2.5), ("v", 1.7), ("g", 5.0))}
    shapes = {"emb.weight": (V, C), "head.weight": (V, C), "ln_out.weight": (C,), "ln_out.bias": (C,),
              "blocks.0.ln0.weight": (C,), "blocks.0.ln0.bias": (C,)}
    for i in range(cfg.n_layer):
        b = f"blocks.{i}."
        shapes |= {b + f"{ln}.{p}": (C,) for ln in ("ln1", "ln2", "att.ln_x") for p in ("weight", "bias")}
        shapes |= {b + "att." + x: (1, 1, C) for x in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a")}
        shapes |= {b + f"att.{m}.weight": (C, C) for m in ("receptance", "key", "value", "output")}
        shapes |= {b + "att.r_k": (C // N, N)}
        for kind in "wavg" if i else "wag":
            shapes |= {b + f"att.{kind}1": (C, D[kind]), b + f"att.{kind}2": (D[kind], C)}
        shapes |= {b + "att.v0": (1, 1, C)} if i else {}
        shapes |= {b + "ffn.x_k": (1, 1, C), b + "ffn.key.weight": (4 * C, C), b + "ffn.value.weight": (C, 4 * C)}
    return shapes


@pytest.mark.parametrize("C, N, L", [(32, 16, 3), (128, 64, 1), (192, 64, 2)])
def test_state_dict_is_the_official_one(C, N, L):
    cfg = replace(RWKV, n_embd=C, rwkv_head_size=N, n_layer=L)
    assert {n: tuple(p.shape) for n, p in LM(cfg).state_dict().items()} == official_shapes(cfg)


def test_ranks_follow_the_official_rule():
    ranks = lambda C: tuple(replace(RWKV, n_embd=C).rank(kind) for kind in "wavg")  # noqa: E731
    assert ranks(768) == (64, 64, 32, 128) and ranks(32) == (32, 32, 32, 32) and ranks(1024) == (64, 64, 64, 160)


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
    expected = {"ln_out.weight": np.ones(C), "ln_out.bias": np.zeros(C), "blocks.0.ln0.weight": np.ones(C), "blocks.0.ln0.bias": np.zeros(C)}
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
        gains |= {att + "receptance.weight": 1.0, att + "value.weight": 1.0, att + "key.weight": 0.1, b + "ffn.key.weight": 2.0}  # 2 = sqrt(4C / C)

    assert expected.keys() | gains.keys() | {"emb.weight"} == got.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name].reshape(value.shape), value, rtol=0, atol=3e-6, err_msg=name)
    for name, gain in gains.items():
        W = got[name] if got[name].shape[0] <= got[name].shape[1] else got[name].T
        np.testing.assert_allclose(W @ W.T, gain**2 * np.eye(len(W)), rtol=0, atol=3e-6 * gain**2 + 1e-7, err_msg=name)
    emb = got["emb.weight"]
    assert abs(emb).max() <= 1e-4 and abs(emb.std() / (1e-4 / math.sqrt(3)) - 1) < 0.05 and abs(emb.mean()) < 5e-6


def test_the_decay_of_a_new_model_lies_within_the_official_bound():
    w = -math.exp(-0.5) * torch.sigmoid(LM(RWKV).blocks[0].att.w0)
    assert w.max() < 0 and w.exp().min() > 0.5452


def test_initial_values_of_a_gpt_are_gpt2_s():
    """Normal with deviation 0.02, maps into the stream by sqrt(2 layers) smaller, biases 0, norms 1."""
    model = LM(replace(GPT, n_embd=128, n_layer=2, vocab_size=500, positions="learned", ffn="gelu", bias=True, qkv_bias=True))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p) if ".ln" in "." + name and name.endswith("weight") else torch.zeros_like(p)), name
        else:
            std = 0.02 / 2 if name.endswith(("o_proj.weight", "ffn.value.weight")) else 0.02
            assert abs(p.std() / std - 1) < 0.05 and abs(p.mean()) < 4 * std / p.numel() ** 0.5, name


@every_variant
def test_every_bias_begins_at_zero_and_every_norm_at_one(cfg):
    for name, p in LM(cfg).named_parameters():
        if name.endswith(".bias"):
            assert not p.any(), name
        elif p.ndim == 1 and "ln_x" not in name:
            assert (p == 1).all(), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # theirs: torch.jit.script
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
    model, tokens = lively(replace(RWKV, n_embd=128, rwkv_head_size=N, n_layer=L, vocab_size=70)), text(40, B=1, V=70)
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


# --- GPT-2, Llama, Qwen2 ------------------------------------------------------------------------------


def test_logits_are_gpt2_s():
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3)).eval()
    for p in theirs.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    source = {name.removeprefix("transformer."): p for name, p in theirs.state_dict().items()}
    weights = {"emb.weight": source["wte.weight"], "head.weight": source["wte.weight"], "pos.weight": source["wpe.weight"],
               "ln_out.weight": source["ln_f.weight"], "ln_out.bias": source["ln_f.bias"]}
    turn = lambda z: z.T if z.ndim == 2 else z  # noqa: E731   Conv1D keeps its weight as (in, out)
    for i in range(3):
        for p in ("weight", "bias"):
            for ours, name in (("ln1", "ln_1"), ("ln2", "ln_2"), ("att.o_proj", "attn.c_proj"), ("ffn.key", "mlp.c_fc"), ("ffn.value", "mlp.c_proj")):
                weights[f"blocks.{i}.{ours}.{p}"] = turn(source[f"h.{i}.{name}.{p}"])
            for ours, part in zip("qkv", turn(source[f"h.{i}.attn.c_attn.{p}"]).chunk(3)):
                weights[f"blocks.{i}.att.{ours}_proj.{p}"] = part
    model = LM(VARIANTS["gpt2"])
    model.load_state_dict(weights)
    with torch.no_grad():
        assert relative(model(text(64))[0], theirs(text(64)).logits) < 1e-5


@pytest.mark.parametrize("kind, kv, tied", [("Llama", 4, False), ("Llama", 2, True), ("Qwen2", 1, True)])
def test_logits_are_llama_s_and_qwen2_s(kind, kv, tied):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = getattr(hf, kind + "ForCausalLM")(getattr(hf, kind + "Config")(
        vocab_size=50, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=kv,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, tie_word_embeddings=tied)).eval()
    for p in theirs.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    names = {"model.embed_tokens": "emb", "lm_head": "head", "model.norm": "ln_out", "model.layers": "blocks", "input_layernorm": "ln1",
             "post_attention_layernorm": "ln2", "self_attn": "att", "mlp.gate_proj": "ffn.gate", "mlp.up_proj": "ffn.key", "mlp.down_proj": "ffn.value"}
    weights = {}
    for name, p in theirs.state_dict().items():
        for hf_name, ours in names.items():
            name = name.replace(hf_name, ours)
        weights[name] = p
    model = LM(replace(GPT, ffn="swiglu", ffn_size=96, norm="rmsnorm", norm_eps=1e-6, rope_theta=5000.0, n_kv_head=kv, qkv_bias=kind == "Qwen2", tied=tied))
    model.load_state_dict(weights)
    with torch.no_grad():
        assert relative(model(text(60))[0], theirs(text(60)).logits) < 1e-5


def test_llama3_scaling_slows_the_slow_pairs_and_leaves_the_fast_ones():
    """Pairs with more than 4 turns within 32 tokens stay, with fewer than 1 turn 8 times slower; in between is in between."""
    cfg = replace(GPT, head_size=64, rope_theta=1e4, rope_factor=8.0, rope_original=32)
    plain, scaled = (rope_frequencies(replace(cfg, rope_scaling=how), 64, "cpu") for how in ("default", "llama3"))
    turns, slower = plain * 32 / (2 * math.pi), plain / scaled
    assert (slower[turns > 4] == 1).all() and torch.allclose(slower[turns < 1], torch.tensor(8.0)) and (slower.diff() >= -1e-5).all()
    assert ((turns > 4).any() and (turns < 1).any() and ((slower > 1.01) & (slower < 7.9)).any())
    torch.testing.assert_close(rope_frequencies(replace(cfg, rope_scaling="linear"), 64, "cpu"), plain / 8)


def test_an_older_config_without_the_newer_settings_is_read(tmp_path):
    new = {"rope_scaling", "rope_factor", "rope_low", "rope_high", "rope_original", "qk_norm", "o_bias"}
    save_model(model := lively(VARIANTS["gpt2"]), tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in new}))
    assert new < set(config) and torch.equal(load_model(tmp_path)(text())[0], model(text())[0])


@torch.no_grad()
def test_norms_divide_by_the_root_of_the_variance_plus_eps():
    x = 0.01 * torch.randn(5, 32) + 0.02
    layer, rms = LM(replace(GPT, norm_eps=1e-3)).ln_out, LM(replace(GPT, norm="rmsnorm", norm_eps=1e-3)).ln_out
    layer.weight.fill_(2)
    layer.bias.fill_(3)
    rms.weight.fill_(2)
    torch.testing.assert_close(layer(x), 2 * (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-3).sqrt() + 3)
    torch.testing.assert_close(rms(x), 2 * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt())
    assert LM(RWKV).blocks[0].att.ln_x.eps == 64e-5 and LM(RWKV).ln_out.eps == 1e-5


# --- precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [VARIANTS["llama"], RWKV, VARIANTS["rwkv with rope"], VARIANTS["hybrid ar"]], ids=["llama", "rwkv", "rope", "hybrid"])
def test_bfloat16_weights_and_autocast_give_nearly_the_same_logits_and_keep_the_state_in_float32(cfg):
    model, tokens = lively(cfg), text(40)
    with torch.no_grad():
        ref, _ = model(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            mixed, state = model(tokens)
            again, _ = in_pieces(model, tokens, (33, 1, 6))
        low, low_state = model.bfloat16()(tokens)
    assert relative(mixed, ref) < 0.05 and relative(again, ref) < 0.05 and relative(low, ref) < 0.1
    for layers in (state.layers, low_state.layers):
        assert all(att[1].dtype == torch.float32 for att, _ in layers if len(att) == 3)


def test_training_under_autocast_has_nearly_the_same_gradients():
    model, tokens = lively(RWKV), text(40)

    def gradients(enabled):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    assert relative(gradients(True), gradients(False)) < 0.05


# --- folders -----------------------------------------------------------------------------------------


@every_variant
def test_save_and_load_is_bit_equal(cfg, tmp_path):
    model = lively(cfg)
    save_model(model, tmp_path / "new" / "m", {"tokenizer": "bytes"})
    loaded = load_model(tmp_path / "new" / "m")
    assert loaded.cfg == cfg and json.loads((tmp_path / "new" / "m" / "meta.json").read_text()) == {"tokenizer": "bytes"}
    assert sorted(p.name for p in (tmp_path / "new" / "m").iterdir()) == ["config.json", "meta.json", "model.safetensors"]
    a, b = model.state_dict(), loaded.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)
    assert (loaded.head.weight is loaded.emb.weight) == cfg.tied
    assert ("head.weight" in load_file(tmp_path / "new" / "m" / "model.safetensors")) != cfg.tied
    assert torch.equal(model(text())[0], loaded(text())[0])


def test_saving_over_a_model_replaces_it(tmp_path):
    save_model(lively(RWKV), tmp_path, {})
    save_model(second := lively(GPT, seed=5), tmp_path, {})
    assert torch.equal(load_model(tmp_path)(text())[0], second(text())[0])


def edit_config(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return edit


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return edit


def cut(name, share):
    def edit(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])
    return edit


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


DAMAGE = {
    "weights cut in half": (cut("model.safetensors", 0.5), "damaged"),
    "weights cut in the header": (cut("model.safetensors", 0.01), "damaged"),
    "weights empty": (write("model.safetensors", b""), "damaged"),
    "weights garbage": (write("model.safetensors", bytes(range(256)) * 40), "damaged"),
    "weights a pickle": (lambda folder: torch.save({"emb.weight": torch.zeros(2)}, folder / "model.safetensors"), "damaged"),
    "weights missing": (lambda folder: os.remove(folder / "model.safetensors"), "model.safetensors is missing"),
    "config missing": (lambda folder: os.remove(folder / "config.json"), "config.json is missing"),
    "config empty": (write("config.json", b""), "damaged"),
    "config an empty dict": (write("config.json", b"{}"), "does not fit"),
    "config null": (write("config.json", b"null"), "damaged"),
    "config a list": (write("config.json", b"[1, 2]"), "damaged"),
    "config an empty list": (write("config.json", b"[]"), "damaged"),
    "config cut": (cut("config.json", 0.7), "damaged"),
    "config garbage": (write("config.json", b"\xff\xfe\x00{}"), "damaged"),
    "unknown key": (edit_config(n_hed=4), "unknown keys: n_hed"),
    "a number as text": (edit_config(n_layer="3"), "damaged"),
    "a broken size": (edit_config(n_layer=2.5), "damaged"),
    "a value out of range": (edit_config(n_layer=0), "n_layer = 0"),
    "other layers": (edit_config(n_layer=2), "blocks.2"),
    "other width": (edit_config(n_embd=48), "expected"),
    "tensor missing": (edit_tensors(lambda t: t.pop("blocks.1.att.w0")), "blocks.1.att.w0 is missing"),
    "tensor too many": (edit_tensors(lambda t: t.update(extra=torch.zeros(2))), "extra is (2,), expected none"),
    "tensor of another shape": (edit_tensors(lambda t: t.update({"ln_out.bias": torch.zeros(31)})), "ln_out.bias is (31,), expected (32,)"),
    "no tensors": (edit_tensors(lambda t: t.clear()), "missing"),
}


@pytest.mark.parametrize("damage, says", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_folder_gives_one_line_that_names_it(damage, says, tmp_path):
    save_model(LM(RWKV), tmp_path, {})
    damage(tmp_path)
    one_line_error(lambda: load_model(tmp_path), str(tmp_path) if "n_layer = 0" not in says else "", says)


def test_a_tied_folder_without_its_embedding_is_refused(tmp_path):
    save_model(LM(VARIANTS["gpt2"]), tmp_path, {})
    edit_tensors(lambda t: t.pop("emb.weight"))(tmp_path)
    one_line_error(lambda: load_model(tmp_path), "emb.weight is missing")


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    one_line_error(lambda: load_model(tmp_path / "nothing"), "nothing", "config.json is missing")
    (tmp_path / "file").write_text("x")
    one_line_error(lambda: load_model(tmp_path / "file"), "file")


# --- what a user can get wrong ------------------------------------------------------------------------


@pytest.mark.parametrize("says, changes", [
    ("n_embd = 30 is not divisible by n_head = 4", dict(n_embd=30)),
    ("n_head = 4 is not a multiple of n_kv_head = 3", dict(n_kv_head=3)),
    ("n_head = 4 is not a multiple of n_kv_head = 8", dict(n_kv_head=8)),
    ("mixer = ''", dict(mixer="")),
    ("mixer = 'ax'", dict(mixer="ax")),
    ("mixer = 'aaaa'", dict(mixer="aaaa")),
    ("mixer = 'R'", dict(mixer="R")),
    ("head size 3 must be even", dict(n_embd=12)),
    ("head size 7 must be even", dict(head_size=7)),
    ("must be even", dict(mixer="r", rwkv_rope=True, n_embd=30, rwkv_head_size=15)),
    ("32 is not divisible by rwkv_head_size = 24", dict(mixer="r", rwkv_head_size=24)),
    ("40 is not divisible by rwkv_head_size = 16", dict(mixer="ar", rwkv_size=40)),
    ("positions = 'alibi': choose one of rope, learned, none", dict(positions="alibi")),
    ("norm = 'batchnorm': choose one of", dict(norm="batchnorm")),
    ("ffn = 'relu': choose one of", dict(ffn="relu")),
    ("rope_scaling = 'yarn': choose one of default, linear, llama3", dict(rope_scaling="yarn")),
    ("rope_factor = 0", dict(rope_factor=0.0)),
    ("rope_theta = -1", dict(rope_theta=-1.0)),
    ("rope_low = 4.0, rope_high = 4.0", dict(rope_low=4.0)),
])
def test_a_config_that_cannot_be_gives_one_line(says, changes):
    one_line_error(lambda: replace(GPT, **changes), says)


def test_every_size_must_be_positive():
    sizes = [f.name for f in fields(ModelConfig) if "int" in str(f.type)]
    assert {"vocab_size", "block_size", "n_layer", "n_embd", "n_head", "n_kv_head", "head_size", "rwkv_head_size", "rwkv_size", "rank_g",
            "ffn_size"} <= set(sizes)
    for name in sizes:
        for value in (0, -1, -64):
            one_line_error(lambda: replace(GPT, **{name: value}), f"{name} = {value}: it must be at least 1")


def test_attention_s_rules_do_not_bind_a_model_without_attention():
    replace(RWKV, n_head=5, n_kv_head=3)
    replace(GPT, rwkv_head_size=24)


def test_mixer_letters_repeat_over_the_layers():
    assert [replace(GPT, mixer=m, n_layer=5).mixers for m in ("a", "ar", "rra", "rrrra")] == ["aaaaa", "arara", "rrarr", "rrrra"]


@pytest.mark.parametrize("cfg", [GPT, RWKV], ids=["gpt", "rwkv"])
@pytest.mark.parametrize("bad", [50, 999, -1, -50])
def test_a_token_outside_the_vocabulary_is_named(cfg, bad):
    tokens = text(10)
    tokens[1, 4] = bad
    one_line_error(lambda: LM(cfg)(tokens), f"token {bad} is outside the vocabulary of 50", "tokenizer")


def test_attention_refuses_text_beyond_its_learned_positions_at_once_and_step_by_step():
    for mixer in ("a", "ra"):
        model = LM(replace(GPT, positions="learned", mixer=mixer))
        _, state = model(text(64))
        one_line_error(lambda: model(text(65)), "65", "64 learned positions")
        one_line_error(lambda: model(text(1), state), "65", "64 learned positions")


@torch.no_grad()
def test_a_pure_rnn_with_learned_positions_reads_on_beyond_them():
    model, tokens = lively(VARIANTS["rwkv in gpt2's clothes"]), text(150)
    whole, state = model(tokens)
    assert whole.isfinite().all() and state.position == 150
    assert relative(in_pieces(model, tokens, (60, 1, 1, 1, 1, 1, 1, 84))[0], whole) < 2e-5


@torch.no_grad()
def test_rope_and_no_positions_have_no_limit():
    for cfg in (GPT, RWKV):
        assert lively(cfg)(text(100))[0].isfinite().all()  # block_size is 64
