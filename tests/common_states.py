"""Models of every kind and equality of states, for the tests of states."""

import torch

from common import tiny_model
from common_sample import MODELS, drawn, talker, tokens  # noqa: F401   (shared with the tests of generating)
from lib.states import tensors
from model import State

ALL = MODELS | {
    "RWKV with rope": {"mixer": "r", "rwkv_rope": True},
    "RWKV, learned positions": {"mixer": "r", "positions": "learned", "block_size": 64},
}


def model_of(name: str):
    return tiny_model(std=0.5, **ALL[name]).eval()


def close(a: State, b: State) -> None:
    assert a.position == b.position
    for x, y in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def same(a: State, b: State) -> bool:
    return a.position == b.position and all(map(torch.equal, tensors(a), tensors(b)))
