"""Models, tokens and a chatting model for the tests of states."""

import torch

import pytest

from common import tiny_model
from data.bpe import BYTE
from data.tokenizer import write_tokenizer
from lib.folders import save_model
from lib.states import tensors
from model import State
from sample import generate

MODELS = {
    "GPT": {},
    "GPT, learned positions": {"positions": "learned", "block_size": 64},
    "grouped heads": {"n_kv_head": 1, "ffn": "swiglu", "norm": "rmsnorm"},
    "RWKV-7": {"mixer": "r", "ffn": "channelmix"},
    "student": {"mixer": "r"},
    "hybrid": {"mixer": "ra"},
    "hybrid, attention first": {"mixer": "ar", "ffn": "channelmix"},
}


ALL = MODELS | {
    "RWKV with rope": {"mixer": "r", "rwkv_rope": True},
    "RWKV, learned positions": {"mixer": "r", "positions": "learned", "block_size": 64},
}


def tokens(B: int, T: int, vocab: int = 257, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab, (B, T), generator=torch.Generator().manual_seed(seed))


def drawn(model, prompt, n, **options) -> torch.Tensor:
    """(B, up to n) tokens."""
    return torch.stack([t for t, _ in generate(model, prompt, n, **options)], 1)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model of bytes with a chat template: <u> question </u> <a> answer </a>."""
    path = tmp_path_factory.mktemp("talker")
    save_model(tiny_model(mixer="r", ffn="channelmix", vocab_size=270), path, {})
    letters = [letter for letter, _ in sorted(BYTE.items(), key=lambda item: item[1])]
    frames = {
        "default": "<s>",
        "system": None,
        "user": ["<u>", "</u>"],
        "assistant": ["<a>", "</a>", "\n"],
        "trim": True,
    }
    write_tokenizer(
        {
            "tokens": letters,
            "split": ["(?s:.)"],
            "normalizer": None,
            "unknown": None,
            "added": {},
            "start": None,
            "end": 256,
            "stop": [256, 261],
            "special": {name: 256 + i for i, name in enumerate(("<s>", "<u>", "</u>", "<x>", "<a>", "</a>"))},
            "chat": frames,
        },
        path,
    )
    return path


def model_of(name: str):
    return tiny_model(std=0.5, **ALL[name]).eval()


def close(a: State, b: State) -> None:
    assert a.position == b.position
    for x, y in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def same(a: State, b: State) -> bool:
    return a.position == b.position and all(map(torch.equal, tensors(a), tensors(b)))
