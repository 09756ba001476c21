"""What tests of generating share: models of every kind, texts, and a chat model."""

import pytest
import torch

from common import tiny_model
from data.bpe import BYTE
from data.tokenizer import write_tokenizer
from lib.folders import save_model
from sample import generate

MODELS = {
    "GPT": {}, "GPT, learned positions": {"positions": "learned", "block_size": 64},
    "grouped heads": {"n_kv_head": 1, "ffn": "swiglu", "norm": "rmsnorm"},
    "RWKV-7": {"mixer": "r", "ffn": "channelmix"}, "student": {"mixer": "r"},
    "hybrid": {"mixer": "ra"}, "hybrid, attention first": {"mixer": "ar", "ffn": "channelmix"},
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
    special = {name: 256 + i for i, name in enumerate(("<s>", "<u>", "</u>", "<x>", "<a>", "</a>"))}
    frames = {"default": "<s>", "system": None, "user": ["<u>", "</u>"],
              "assistant": ["<a>", "</a>", "\n"], "trim": True}
    write_tokenizer({"tokens": letters, "split": ["(?s:.)"], "normalizer": None, "unknown": None,
                     "added": {}, "start": None, "end": 256, "stop": [256, 261],
                     "special": special, "chat": frames}, path)
    return path
