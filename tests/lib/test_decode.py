"""The decoder is the model, one token at a time: logits, states, threads, and CUDA's
graph by a stand-in.
"""

import pytest
import torch

import lib.decode
from common import one_line, tiny_model
from common_sample import tokens
from lib.decode import Decoder
from lib.states import nbytes, tensors
from model import ModelConfig
from sample import generate
from tools.bench import official, random_rwkv

SWITCHES = {
    "official": {"ffn": "channelmix"},
    "three layers, wide heads": {"ffn": "channelmix", "n_layer": 3, "rwkv_size": 48},
    "relu2": {},
    "gelu, biases, tied": {"ffn": "gelu", "bias": True, "qkv_bias": True, "tied": True},
    "swiglu, rmsnorm": {"ffn": "swiglu", "norm": "rmsnorm"},
    "no gate": {"gate": False},
    "no group norm": {"group_norm": False},
    "no token shift": {"token_shift": False},
    "no bonus": {"bonus": False},
    "nothing": {
        "gate": False,
        "group_norm": False,
        "token_shift": False,
        "bonus": False,
        "ln0": False,
        "norm_bias": False,
    },
    "ranks": {"rank_w": 3, "rank_a": 5, "rank_v": 2, "rank_g": 9},
    "v's rank the largest": {"rank_w": 3, "rank_a": 3, "rank_v": 9, "rank_g": 5},
    "learned positions": {"positions": "learned"},
    "one layer": {"n_layer": 1},
}


@pytest.mark.parametrize("B", (1, 3))
@pytest.mark.parametrize("name", SWITCHES)
def test_the_decoder_is_the_model(name, B, monkeypatch):
    """Logits and states of 20 single tokens, past the end of learned positions, in
    float64 throughout.
    """
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # with which LM computes decay and removal key
    model = tiny_model(**{"mixer": "r"} | SWITCHES[name]).double().eval()
    decoder, text = Decoder(model), tokens(B, 30)
    assert decoder.layers is not None
    with torch.no_grad():
        _, ours = _, theirs = model(text[:, :10])
        for t in text[:, 10:].unbind(1):
            a, ours = decoder(t, ours)
            b, theirs = model(t[:, None], theirs)
            torch.testing.assert_close(a, b[:, 0], rtol=1e-10, atol=1e-10)
    assert ours.position == theirs.position == 30 and [att[2] for att, _ in ours.layers] == [
        att[2] for att, _ in theirs.layers
    ]
    assert nbytes(ours) == nbytes(theirs)
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "C, threads, dtype, most",
    (
        (256, 1, None, 1e-5),
        (512, 2, None, 1e-5),
        (512, 3, None, 1e-5),
        (512, 2, torch.bfloat16, 3e-2),
        (512, 3, torch.float16, 4e-3),
    ),
)
def test_the_decoder_is_the_model_where_weights_are_read_by_rows(C, threads, dtype, most):
    """Also where each thread reads a part of them, and in 16 bits."""
    model = random_rwkv(
        ModelConfig(n_layer=2, n_embd=C, mixer="r", ffn="channelmix", rwkv_head_size=64, vocab_size=1000)
    )
    before, text = torch.get_num_threads(), tokens(1, 40, 1000)
    torch.set_num_threads(threads)
    try:
        decoder = Decoder(model, dtype)
        with torch.no_grad():
            _, state = model(text[:, :20])
            logits, _ = model(text[:, 20:], state)
            for i in range(20):
                ours, state = decoder(text[:, 20 + i], state)
                assert (ours - logits[:, i]).norm() < most * logits[:, i].norm()
        assert decoder.layers[0].ffn_key.parts == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("B", (1, 3))
@pytest.mark.parametrize("dtype, most", ((torch.bfloat16, 3e-2), (torch.float16, 4e-3), (None, 1e-5)))
def test_the_decoder_says_what_the_model_says_as_well_as_its_matrices_can(dtype, most, B):
    """Matrices in 16 bits, all else in float32: the state too.

    Without a dtype the logits are the model's, to 1e-5.
    """
    model, text = tiny_model(mixer="r", ffn="channelmix").eval(), tokens(B, 30)
    fast = Decoder(model, dtype)
    with torch.no_grad():
        logits, _ = model(text)
        _, state = model(text[:, :10])
        for i in range(10, 30):
            ours, state = fast(text[:, i], state)
            assert (ours - logits[:, i]).norm() < most * logits[:, i].norm()
    assert {x.dtype for x in tensors(state)} == {torch.float32} == {ours.dtype}
    with pytest.raises(ValueError, match="model.to") as e:
        Decoder(tiny_model(mixer="ra"), torch.bfloat16)
    one_line(e.value)


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def replayed(step):
    """What lib.decode.record does, without a GPU: another run of the step, written over
    what the first one returned.
    """
    result = step()
    return lambda: torch._foreach_copy_(tensors(result), tensors(step())), result


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=NEEDS_GPU)))
def test_a_recorded_step_is_the_step_and_its_states_are_values(name, device, monkeypatch):
    """Batches of several sizes, two texts that go on from one state, and the states
    that were kept.
    """
    model = tiny_model(**{"mixer": "r"} | SWITCHES[name]).to(device).eval()
    plain, fast = Decoder(model), Decoder(model)
    plain.records = False
    if device == "cpu":
        monkeypatch.setattr(lib.decode, "record", replayed)
        fast.records = model.cfg.positions != "learned"
    for B in (1, 3, 1):
        text = tokens(B, 30).to(device)
        with torch.no_grad():
            _, start = model(text[:, :10])
        kept, seen = [x.clone() for x in tensors(start)], []
        for piece in (text[:, 10:20], text[:, 20:30]):
            a = b = start
            for t in piece.unbind(1):
                (theirs, a), (ours, b) = plain(t, a), fast(t, b)
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            seen += [(b, [x.clone() for x in tensors(b)])]
            assert (fast.recorded is not None) == fast.records
            assert (
                (a.position, [att[2] for att, _ in a.layers])
                == (b.position, [att[2] for att, _ in b.layers])
                == (20, [20] * model.cfg.n_layer)
            )
        assert all(map(torch.equal, kept, tensors(start)))
        assert all(
            torch.equal(x, y) for state, before in seen for x, y in zip(tensors(state), before, strict=True)
        )


def test_the_decoder_leaves_a_state_as_it_was_and_the_threads_too():
    model = tiny_model(mixer="r", ffn="channelmix").eval()
    with torch.no_grad():
        _, state = model(tokens(1, 9))
    decoder, before = Decoder(model), [x.clone() for x in tensors(state)]
    first, after = decoder(torch.tensor([5]), state)
    kept = [x.clone() for x in tensors(after)]
    decoder(torch.tensor([6]), after)
    again, _ = decoder(torch.tensor([5]), state)
    assert (
        torch.equal(first, again)
        and all(map(torch.equal, before, tensors(state)))
        and all(map(torch.equal, kept, tensors(after)))
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        decoder(torch.tensor([6]), after)
        with pytest.raises(IndexError):
            decoder(torch.tensor([999]), after)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("N", (32, 64))
def test_logits_are_the_official_packages_after_a_prompt_and_after_50_single_tokens(N, tmp_path):
    pytest.importorskip("rwkv")
    model = random_rwkv(ModelConfig(n_layer=3, n_embd=128, mixer="r", ffn="channelmix", rwkv_head_size=N))
    forward, text = official(model, tmp_path), tokens(1, 40)
    theirs, their_state = forward(text[0].tolist(), None)
    ((token, state),) = generate(model, text, 1, temperature=0)
    decoder = Decoder(model)
    with torch.no_grad():
        ours = model(text)[0][0, -1]
    assert theirs.std() > 0.1
    for i in range(51):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), f"after {i} tokens"
        ours, state = decoder(token, state)
        theirs, their_state = forward(token.tolist(), their_state)
        ours, token = ours[0], ours.argmax(-1)
