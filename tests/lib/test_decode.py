"""lib/decode.py: the decoder is the model, one token at a time.

And both are the PyPI package rwkv, RWKV-7's own inference code.
"""

import pytest
import torch

from common import one_line, tiny_model
from common_sample import tokens
from lib import decode
from lib.decode import Decoder
from lib.processes import using_threads
from lib.states import nbytes, tensors
from model import ModelConfig
from sample import generate
from tools.rivals import official, random_rwkv

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
    "nothing": {"gate": False, "group_norm": False, "token_shift": False, "bonus": False, "ln0": False,
                "norm_bias": False},
    "ranks": {"rank_w": 3, "rank_a": 5, "rank_v": 2, "rank_g": 9},
    "v's rank the largest": {"rank_w": 3, "rank_a": 3, "rank_v": 9, "rank_g": 5},
    "learned positions": {"positions": "learned"},
    "one layer": {"n_layer": 1},
}


@pytest.fixture
def threads_put_back():
    with using_threads(torch.get_num_threads()):
        yield


def positions(state) -> list[int]:
    """Of the whole, then of each layer."""
    return [state.position, *(att[2] for att, _ in state.layers)]


# ------------------------------------------------------------------------------------------
# The decoder is the model

def test_the_decoder_refuses_the_tokens_that_the_model_refuses():
    model = tiny_model(mixer="r").eval()
    _, state = model(tokens(1, 3))
    for token in (-1, model.cfg.vocab_size):
        for read in (Decoder(model), lambda t, state: model(t[:, None], state)):
            with pytest.raises(IndexError, match="out of range"):
                read(torch.tensor([token]), state)


@pytest.mark.parametrize("B", (1, 3))
@pytest.mark.parametrize("name", SWITCHES)
def test_the_decoder_is_the_model(name, B, monkeypatch):
    """Logits and states of 20 single tokens, past the end of learned positions.

    In float64 throughout.
    """
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)   # with which LM computes decay and removal key
    model = tiny_model(**{"mixer": "r"} | SWITCHES[name]).double().eval()
    decoder, text = Decoder(model), tokens(B, 30)
    assert decoder.layers is not None
    with torch.no_grad():
        _, state = model(text[:, :10])
        model_state = state
        for t in text[:, 10:].unbind(1):
            logits, state = decoder(t, state)
            expected, model_state = model(t[:, None], model_state)
            torch.testing.assert_close(logits, expected[:, 0], rtol=1e-10, atol=1e-10)
    assert state.position == 30 and positions(state) == positions(model_state)
    assert nbytes(state) == nbytes(model_state)
    for a, b in zip(tensors(state), tensors(model_state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


LARGE = ((256, 1, None, 1e-5), (512, 2, None, 1e-5), (512, 3, None, 1e-5), (512, 2, torch.bfloat16, 3e-2),
           (512, 3, torch.float16, 4e-3), (512, 2, torch.int8, 1e-1), (256, 1, torch.int8, 1e-1))


@pytest.mark.parametrize("C, threads, dtype, limit", LARGE)
def test_the_decoder_is_the_model_where_its_matrices_are_large(C, threads, dtype, limit, threads_put_back):
    """Also where each thread reads a part of them, in 16 bits and in 8."""
    model = random_rwkv(ModelConfig(n_layer=2, n_embd=C, mixer="r", ffn="channelmix", rwkv_head_size=64,
                                    vocab_size=1000))
    text = tokens(1, 40, 1000)
    torch.set_num_threads(threads)
    decoder = Decoder(model, dtype)
    with torch.no_grad():
        _, state = model(text[:, :20])
        expected, _ = model(text[:, 20:], state)
        for i in range(20):
            logits, state = decoder(text[:, 20 + i], state)
            assert (logits - expected[:, i]).norm() < limit * expected[:, i].norm()
    assert decoder.layers[0].ffn_key.threads == threads


@pytest.mark.parametrize("B", (1, 3))
@pytest.mark.parametrize("dtype, limit", ((torch.bfloat16, 3e-2), (torch.float16, 4e-3), (torch.int8, 1e-1),
                                          (None, 1e-5)))
def test_the_decoder_says_what_the_model_says_as_well_as_its_matrices_can(dtype, limit, B):
    """Matrices in 16 or 8 bits, all else in float32: the state too.

    Without a dtype the logits are the model's, to 1e-5.
    """
    model, text = tiny_model(mixer="r", ffn="channelmix").eval(), tokens(B, 30)
    decoder = Decoder(model, dtype)
    with torch.no_grad():
        expected, _ = model(text)
        _, state = model(text[:, :10])
        for i in range(10, 30):
            logits, state = decoder(text[:, i], state)
            assert (logits - expected[:, i]).norm() < limit * expected[:, i].norm()
    assert {x.dtype for x in tensors(state)} == {torch.float32} == {logits.dtype}
    with pytest.raises(ValueError, match="keep float32") as error:
        Decoder(tiny_model(mixer="ra"), torch.bfloat16)
    one_line(error.value)


# ------------------------------------------------------------------------------------------
# A state is a value

def test_the_decoder_leaves_a_state_as_it_was_and_the_threads_too(threads_put_back):
    model = tiny_model(mixer="r", ffn="channelmix").eval()
    with torch.no_grad():
        _, state = model(tokens(1, 9))
    decoder, state_before = Decoder(model), [x.clone() for x in tensors(state)]
    first, after = decoder(torch.tensor([5]), state)
    after_before = [x.clone() for x in tensors(after)]
    decoder(torch.tensor([6]), after)
    again, _ = decoder(torch.tensor([5]), state)
    assert torch.equal(first, again)
    assert all(map(torch.equal, state_before, tensors(state)))
    assert all(map(torch.equal, after_before, tensors(after)))
    torch.set_num_threads(2)
    decoder(torch.tensor([6]), after)
    with pytest.raises(IndexError):
        decoder(torch.tensor([999]), after)
    assert torch.get_num_threads() == 2


def replayed(step):
    """What decode.record does, without a GPU.

    Another run of the step, written over what the first one returned.
    """
    result = step()
    return lambda: torch._foreach_copy_(tensors(result), tensors(step())), result


GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("device", ("cpu", GPU))
def test_a_recorded_step_is_the_step_and_its_states_are_values(name, device, monkeypatch):
    """Batches of several sizes, two texts from one state, and the states of before."""
    model = tiny_model(**{"mixer": "r"} | SWITCHES[name]).to(device).eval()
    plain, recorded = Decoder(model), Decoder(model)
    plain.records = False
    if device == "cpu":
        monkeypatch.setattr(decode, "record", replayed)
        recorded.records = model.cfg.positions != "learned"
    for B in (1, 3, 1):
        text = tokens(B, 30).to(device)
        with torch.no_grad():
            _, start = model(text[:, :10])
        start_before, snapshots = [x.clone() for x in tensors(start)], []
        for piece in (text[:, 10:20], text[:, 20:30]):
            a = b = start
            for t in piece.unbind(1):
                expected, a = plain(t, a)
                logits, b = recorded(t, b)
                torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
            snapshots.append((b, [x.clone() for x in tensors(b)]))
            assert (recorded.recorded is not None) == recorded.records
            assert positions(a) == positions(b) == [20] * (1 + model.cfg.n_layer)
        assert all(map(torch.equal, start_before, tensors(start)))
        for state, before in snapshots:
            assert all(torch.equal(x, y) for x, y in zip(tensors(state), before, strict=True))


# ------------------------------------------------------------------------------------------
# The official package

@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("N", (32, 64))
def test_logits_are_the_official_packages_after_a_prompt_and_after_50_single_tokens(N, tmp_path):
    pytest.importorskip("rwkv")
    model = random_rwkv(ModelConfig(n_layer=3, n_embd=128, mixer="r", ffn="channelmix", rwkv_head_size=N))
    forward, text = official(model, tmp_path), tokens(1, 40)
    expected, official_state = forward(text[0].tolist(), None)
    (token, state), = generate(model, text, 1, temperature=0)
    decoder = Decoder(model)
    with torch.no_grad():
        logits = model(text)[0][0, -1]
    assert expected.std() > 0.1
    for i in range(51):
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max(), f"after {i} tokens"
        logits, state = decoder(token, state)
        expected, official_state = forward(token.tolist(), official_state)
        logits, token = logits[0], logits.argmax(-1)
