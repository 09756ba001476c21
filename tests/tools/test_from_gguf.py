"""GGUF files: the logits of what they were written from, quantised or not."""

import pytest
import torch

from common_convert import LLAMA3, WIDE, bring, original, relative, text, write_gguf

SOURCES = {
    "llama": ("Llama", "llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})),
    "llama3 scaling, tied": ("Llama", "llama", dict(
        tie_word_embeddings=True, rope_parameters=LLAMA3 | {"original_max_position_embeddings": 8192})),
    "biases": ("Llama", "llama", dict(attention_bias=True, mlp_bias=True)),
    "qwen2": ("Qwen2", "qwen2", {}),
    "qwen3": ("Qwen3", "qwen3", dict(head_dim=32)),
}


def q8_0(name: str, p: torch.Tensor) -> str | None:
    return "Q8_0" if p.ndim == 2 and "attn_q" not in name and "attn_k" not in name else None


def q4_1(name: str, p: torch.Tensor) -> str | None:
    if p.ndim == 2 and "ffn" in name:
        return "Q4_1"
    return "F16" if "token_embd" in name else None


@torch.no_grad()
@pytest.mark.parametrize("name, arch, settings", SOURCES.values(), ids=SOURCES)
def test_a_gguf_has_the_logits_of_its_source(name, arch, settings, tmp_path):
    model = original(name, WIDE | dict(max_position_embeddings=9000) | settings)
    write_gguf(tmp_path / "m.gguf", model, arch)
    assert relative(bring(tmp_path / "m.gguf", tmp_path)(text())[0], model(text()).logits) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("quantise", [q8_0, q4_1])
def test_quantised_weights_become_what_they_stand_for(quantise, tmp_path):
    model = original("Llama", WIDE)
    before = model(text()).logits
    write_gguf(tmp_path / "m.gguf", model, "llama", quantise)
    assert relative(bring(tmp_path / "m.gguf", tmp_path)(text())[0], model(text()).logits) < 1e-4
    assert 1e-3 < relative(model(text()).logits, before) < 0.3   # the quantisation itself was felt
