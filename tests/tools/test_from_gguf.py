"""GGUF files: the logits of what they were written from, quantised or not, in parts."""

import json

import numpy as np
import pytest
import torch

from common_convert import LLAMA3, WIDE, bring, original, relative, rewrite_gguf, rwkv, text, write_gguf
from lib.folders import save_model
from tools.convert import ExportConfig, export_model

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
@pytest.mark.parametrize("scaling, factor", [
    ({"rope.scaling.factor": 4.0}, 4), ({"rope.scale_linear": 4.0}, 4), ({"rope.scaling.factor": 0.0}, 1),
    ({"rope.scaling.factor": 4.0, "rope.scaling.type": "none"}, 1),
])
def test_a_factor_without_a_type_is_linear_scaling(scaling, factor, tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": float(factor)}
    model = original("Llama", WIDE | dict(rope_parameters=rope))
    write_gguf(tmp_path / "m.gguf", model, "llama", **scaling)
    assert relative(bring(tmp_path / "m.gguf", tmp_path)(text())[0], model(text()).logits) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("quantise", [q8_0, q4_1])
def test_quantised_weights_become_what_they_stand_for(quantise, tmp_path):
    model = original("Llama", WIDE)
    before = model(text()).logits
    write_gguf(tmp_path / "m.gguf", model, "llama", quantise)
    assert relative(bring(tmp_path / "m.gguf", tmp_path)(text())[0], model(text()).logits) < 1e-4
    assert 1e-3 < relative(model(text()).logits, before) < 0.3   # the quantisation itself was felt


@torch.no_grad()
def test_a_model_in_parts_is_read_whichever_of_them_is_named(tmp_path):
    model = original("Llama", WIDE)
    write_gguf(tmp_path / "m.gguf", model, "llama", q8_0, tensors_per_part=10)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for part in parts:
        assert relative(bring(part, tmp_path)(text())[0], model(text()).logits) < 1e-4


PLAIN = dict(ffn="swiglu", norm="rmsnorm", ln0=False, gate=False, group_norm=False)


@pytest.mark.parametrize("kind", [{}, PLAIN], ids=["rwkv7", "arwkv7"])
def test_a_file_as_llama_cpps_converter_writes_it(kind, tmp_path):
    """It copies layer 0's value residual from a, knows another name for each model, and
    has shares of shape (1, 1, C), and small matrices in 16 bits.
    """
    model = rwkv(N=64, C=64, V=257, norm_eps=1e-6, rank_a=24, **kind)
    save_model(model, tmp_path / "m", {"tokenizer": "bytes"})
    export_model(ExportConfig(folder=str(tmp_path / "m"), format="gguf"))
    weights = {name: p.numpy() for name, p in model.state_dict().items()}
    changes = {f"blk.0.time_mix_v{i}.weight": weights[f"blocks.0.att.a{i}"].T for i in range(3)}
    changes["blk.0.time_mix_v0.weight"] = weights["blocks.0.att.a0"].flatten()
    for i in range(3):
        changes[f"blk.{i}.time_mix_a1.weight"] = weights[f"blocks.{i}.att.a1"].T.astype(np.float16)
        if not kind:
            changes[f"blk.{i}.channel_mix_lerp_k.weight"] = weights[f"blocks.{i}.ffn.x_k"]
    rewrite_gguf(tmp_path / "m.gguf", tmp_path / "theirs.gguf", tensors=changes)
    back = bring(tmp_path / "theirs.gguf", tmp_path)
    for name, p in back.state_dict().items():
        expected = weights[name].astype(np.float16) if name.endswith("att.a1") else weights[name]
        assert np.array_equal(p.numpy(), expected), name
    assert json.loads((tmp_path / "imported" / "config.json").read_text())["norm_eps"] == 1e-6
