"""Real weights: every kind of checkpoint gives its own library's logits, or one line that says why not.

Oracles: transformers, on tiny random models; gguf's writer; the PyPI package rwkv. Nothing is downloaded.
"""

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common import REPO, one_line, shake
from convert import ExportConfig, ImportConfig, export_model, import_model, main, official_names
from data.tokenizer import load_tokenizer
from model import LM, ModelConfig, load_model, save_model

hf = pytest.importorskip("transformers")

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
COMMON = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
              rms_norm_eps=1e-4, max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=None)
GPT2 = dict(vocab_size=97, n_positions=128, n_embd=48, n_layer=3, n_head=4, bos_token_id=None, eos_token_id=None)
KINDS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2, exact gelu, untied, narrow": ("GPT2", GPT2 | dict(activation_function="gelu", tie_word_embeddings=False, n_inner=70, layer_norm_epsilon=1e-3)),
    "llama": ("Llama", COMMON),
    "llama, llama3 scaling, grouped heads, other head size": ("Llama", COMMON | dict(head_dim=20, rope_parameters=LLAMA3)),
    "llama, linear scaling, biases, tied": ("Llama", COMMON | dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
                                                                   attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama, bias of attention only, one kv head": ("Llama", COMMON | dict(attention_bias=True, num_key_value_heads=1)),
    "mistral": ("Mistral", COMMON | dict(sliding_window=None, head_dim=16)),
    "mistral, window as long as the context": ("Mistral", COMMON | dict(sliding_window=128)),
    "qwen2": ("Qwen2", COMMON | dict(tie_word_embeddings=True)),
    "qwen2, untied": ("Qwen2", COMMON | dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen3": ("Qwen3", COMMON | dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3, biases": ("Qwen3", COMMON | dict(head_dim=24, attention_bias=True)),
}


def theirs(name: str, settings: dict, seed: int = 0, std: float = 0.3) -> torch.nn.Module:
    """A tiny model of transformers in which every weight matters."""
    torch.manual_seed(seed)
    model = getattr(hf, {"GPT2": "GPT2LMHeadModel"}.get(name, name + "ForCausalLM"))(getattr(hf, name + "Config")(**settings)).eval()
    shake(model, std)
    return model


def text(T: int = 100, V: int = 97) -> torch.Tensor:
    return torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def bring(path, tmp_path: Path, name: str = "ours", **settings) -> LM:
    import_model(ImportConfig(path=str(path), out=str(tmp_path / name), overwrite=True, **settings))
    return load_model(tmp_path / name)


def refused(*words: str, call=None, path=None, tmp_path=None) -> None:
    """It is refused in one line with these words, and leaves nothing behind."""
    before = sorted(tmp_path.rglob("*")) if tmp_path else []
    with pytest.raises(ValueError) as e:
        call() if call else import_model(ImportConfig(path=str(path), out=str(tmp_path / "nothing")))
    assert all(word in one_line(e.value) for word in words), (words, str(e.value))
    assert len(str(e.value)) < 500 and (not tmp_path or sorted(tmp_path.rglob("*")) == before)


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


# --- Hugging Face ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, tmp_path):
    model = theirs(*KINDS[kind])
    model.save_pretrained(tmp_path / "theirs")
    ours = bring(tmp_path / "theirs", tmp_path)
    assert relative(ours(text())[0], model(text()).logits) < 1e-4
    assert ours.cfg.tied == model.config.tie_word_embeddings and ours.cfg.block_size == 128
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["config.json", "meta.json", "model.safetensors"]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama, llama3 scaling, grouped heads, other head size", "gpt2"])
def test_shards_are_one_model(kind, tmp_path):
    model = theirs(*KINDS[kind])
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    assert relative(bring(tmp_path / "theirs", tmp_path)(text())[0], model(text()).logits) < 1e-4


@torch.no_grad()
def test_older_files_of_the_same_models_are_read(tmp_path):
    """rope_theta and rope_scaling as they stood before transformers 5; GPT-2's tensors without their prefix, with the causal masks."""
    model = theirs(*KINDS["llama, llama3 scaling, grouped heads, other head size"])
    model.save_pretrained(tmp_path / "llama")
    old = {k: v for k, v in LLAMA3.items() if k not in ("rope_type", "rope_theta")} | {"type": "llama3"}
    edit(tmp_path / "llama", rope_parameters=..., rope_theta=5000, rope_scaling=old)
    file = tmp_path / "llama" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(10)}, file)
    assert relative(bring(tmp_path / "llama", tmp_path)(text())[0], model(text()).logits) < 1e-4
    model = theirs(*KINDS["gpt2"])
    model.save_pretrained(tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "model.safetensors"
    masks = {f"h.{i}.attn.{name}": torch.ones(1, 1, 128, 128) for i in range(3) for name in ("bias", "masked_bias")}
    save_file({k.removeprefix("transformer."): v for k, v in load_file(file).items()} | masks, file)
    assert relative(bring(tmp_path / "gpt2", tmp_path)(text())[0], model(text()).logits) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_on_disk_and_rounded_once(dtype, tmp_path):
    model = theirs(*KINDS["qwen2"])
    model.save_pretrained(tmp_path / "theirs")
    ours = bring(tmp_path / "theirs", tmp_path, dtype=dtype)
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {getattr(torch, dtype)} and {p.dtype for p in ours.parameters()} == {torch.float32}
    model = model.to(getattr(torch, dtype)).float()
    assert relative(ours(text())[0], model(text()).logits) < 1e-4
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")      # a half-precision checkpoint, into float32
    assert relative(bring(tmp_path / "half", tmp_path)(text())[0], model.float()(text()).logits) < 1e-4
    model.model.norm.weight.data.fill_(1e5)
    model.save_pretrained(tmp_path / "large")
    refused("ln_out.weight", "float16", call=lambda: bring(tmp_path / "large", tmp_path, dtype="float16"))


@torch.no_grad()
def test_a_head_of_its_own_is_used_even_where_the_config_says_tied(tmp_path):
    """As transformers does: fine-tuned heads are found beside a flag from before."""
    model = theirs(*KINDS["qwen2"])
    model.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": model.lm_head.weight.clone()}, file)
    assert bring(tmp_path / "theirs", tmp_path).cfg.tied
    save_file(load_file(file) | {"lm_head.weight": 2 * model.lm_head.weight}, file)
    ours = bring(tmp_path / "theirs", tmp_path)
    assert not ours.cfg.tied and relative(ours(text())[0], 2 * model(text()).logits) < 1e-4


def test_a_tokenizer_too_large_for_the_model_is_told_and_a_killed_import_is_swept_up(tmp_path, capsys):
    theirs(*KINDS["llama"]).save_pretrained(tmp_path / "theirs")
    left = tmp_path / ".ours.999999999.partial"
    left.mkdir()
    bring(tmp_path / "theirs", tmp_path, tokenizer="bytes")
    assert not left.exists() and "tokenizer bytes has 257 tokens, the model 97" in capsys.readouterr().out


@pytest.mark.parametrize("kind, changes, words", [
    ("llama", dict(model_type="gemma2"), ["gemma2", "not supported"]),
    ("llama", dict(model_type=...), ["model_type is missing"]),
    ("llama", dict(model_type="mixtral", num_local_experts=8), ["num_local_experts = 8", "mixture of experts"]),
    ("llama", dict(rope_parameters={"rope_type": "yarn", "factor": 4.0}), ["rope scaling 'yarn'"]),
    ("llama", dict(rope_parameters=..., rope_scaling={"type": "dynamic", "factor": 4.0}), ["rope scaling 'dynamic'"]),
    ("llama", dict(rope_parameters={"full_attention": {"rope_type": "default"}}), ["the same for all layers"]),
    ("llama", dict(rope_parameters={"rope_type": "linear"}), ["factor is missing"]),
    ("llama", dict(partial_rotary_factor=0.5), ["partial_rotary_factor = 0.5"]),
    ("llama", dict(attn_logit_softcapping=30.0), ["attn_logit_softcapping", "soft-capping"]),
    ("llama", dict(quantization_config={"bits": 4}), ["quantization_config"]),
    ("llama", dict(hidden_act="gelu"), ["hidden_act = 'gelu'"]),
    ("llama", dict(hidden_size="48"), ["hidden_size is '48', expected int"]),
    ("llama", dict(hidden_size=...), ["hidden_size is missing"]),
    ("llama", dict(num_hidden_layers=10**12), ["num_hidden_layers", "damaged"]),
    ("llama", dict(num_hidden_layers=10**7), ["10000000 layers", "damaged"]),
    ("llama", dict(num_hidden_layers=4), ["9 tensors are missing", "model.layers.3"]),
    ("llama", dict(num_hidden_layers=2), ["9 tensors have no place", "model.layers.2"]),
    ("llama", dict(tie_word_embeddings="yes"), ["tie_word_embeddings"]),
    ("llama", dict(hidden_size=52), ["expected", "52"]),
    ("llama", dict(num_attention_heads=5), ["5"]),
    ("mistral", dict(sliding_window=64), ["sliding window of 64"]),
    ("mistral", dict(sliding_window=...,  max_position_embeddings=32768), ["sliding window of 4096"]),
    ("qwen2", dict(use_sliding_window=True, sliding_window=64, layer_types=...), ["sliding window of 64"]),
    ("qwen2", dict(layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=64), ["sliding_attention"]),
    ("qwen2", dict(use_sliding_window=True, sliding_window=64, layer_types=None), ["sliding window of 64"]),
    ("mistral", dict(sliding_window=64, layer_types=["full_attention"] * 3), ["sliding window of 64"]),
    ("llama", dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), ["rope_parameters and rope_scaling", "differ"]),
    ("llama", dict(rms_norm_eps=float("nan")), ["norm_eps = nan"]),
    ("qwen2", dict(layer_types=["linear_attention"] * 3), ["linear_attention"]),
    ("qwen3", dict(num_experts=64), ["mixture of experts"]),
    ("gpt2", dict(activation_function="relu"), ["activation_function = 'relu'"]),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx"]),
    ("gpt2", dict(scale_attn_weights=False), ["scale_attn_weights"]),
])
def test_what_is_not_supported_is_refused_by_name(kind, changes, words, tmp_path):
    theirs(*KINDS[kind]).save_pretrained(tmp_path / "theirs")
    edit(tmp_path / "theirs", **changes)
    refused(*words, path=tmp_path / "theirs", tmp_path=tmp_path)


def test_every_tensor_is_used_and_every_parameter_filled(tmp_path):
    theirs(*KINDS["qwen2, untied"]).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    whole = load_file(file)
    for change, words in (({"model.layers.1.self_attn.q_proj.bias": None}, ["1 tensors are missing", "layers.1.self_attn.q_proj.bias"]),
                          ({"model.extra.weight": torch.ones(2)}, ["1 tensors have no place", "model.extra.weight"]),
                          ({"model.norm.weight": torch.ones(49)}, ["ln_out.weight", "(49,)"]),
                          ({"model.norm.weight": torch.ones(48, dtype=torch.int8)}, ["ln_out.weight", "int8"]),
                          ({"model.norm.weight": torch.full((48,), float("nan"))}, ["ln_out.weight", "damaged"])):
        save_file({k: v for k, v in (whole | change).items() if v is not None}, file)
        refused(*words, path=tmp_path / "theirs", tmp_path=tmp_path)


def test_the_tokenizer_beside_the_weights_comes_along(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(["the theory of these other things, and then the rest"] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    theirs("Llama", COMMON | dict(vocab_size=280)).save_pretrained(tmp_path / "theirs")
    bpe.save(str(tmp_path / "theirs" / "tokenizer.json"))
    bring(tmp_path / "theirs", tmp_path)
    words = "then the other theory, 12 of \u00e9\u4e16"
    want = bpe.encode(words).ids
    assert load_tokenizer(tmp_path / "ours").encode_ordinary(words) == want
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    refused("tokenizer.json", path=tmp_path / "theirs", tmp_path=tmp_path)
    bring(tmp_path / "theirs", tmp_path, "again", tokenizer=str(tmp_path / "ours"))   # the weights with another model's tokenizer
    assert load_tokenizer(tmp_path / "again").encode_ordinary(words) == want


# --- GGUF --------------------------------------------------------------------------------------------


def write_gguf(file: Path, model: torch.nn.Module, arch: str, quantise=lambda name, w: None, **changes) -> None:
    """A GGUF as llama.cpp's converter lays it out, with q and k rows in pairs for llama. `quantise` names a tensor's type."""
    gguf = pytest.importorskip("gguf")
    c, writer = model.config, gguf.GGUFWriter(file, arch)
    values = {"context_length": c.max_position_embeddings, "embedding_length": c.hidden_size, "block_count": c.num_hidden_layers,
              "feed_forward_length": c.intermediate_size, "attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads,
              "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "rope.freq_base": float(c.rope_parameters["rope_theta"]),
              "rope.dimension_count": 32} | changes
    for key, value in values.items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](f"{arch}.{key}", value)
    rename = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk", "input_layernorm": "attn_norm",
              "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output", "self_attn.": "attn_", "mlp.": "ffn_", "_proj": ""}
    for name, p in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            rows = p.view(-1, 2, 16, *p.shape[1:])   # llama.cpp turns neighbours: row i of the first half stands beside row i of the second
            p = torch.stack((rows[:, 0], rows[:, 1]), 2).reshape(p.shape)
        for a, b in rename.items():
            name = name.replace(a, b)
        kind, data = quantise(name, p), p.numpy()
        if kind:
            kind = gguf.GGMLQuantizationType[kind]
            p.copy_(torch.from_numpy(np.array(gguf.dequantize(gguf.quantize(data, kind), kind))))  # so that the oracle has what the file can say
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(data))
    if c.rope_parameters["rope_type"] == "llama3":
        inv = model.model.rotary_emb.inv_freq
        writer.add_tensor("rope_freqs.weight", (5000.0 ** (-torch.arange(0, 32, 2) / 32) / inv).float().numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


WIDE = COMMON | dict(hidden_size=128, intermediate_size=96)  # heads of 32: quantised rows come in blocks of 32
QUANTISED = {"q8_0": lambda name, p: "Q8_0" if p.ndim == 2 and "attn_q" not in name and "attn_k" not in name else None,
             "q4_1": lambda name, p: "Q4_1" if p.ndim == 2 and "ffn" in name else "F16" if "token_embd" in name else None}


@torch.no_grad()
@pytest.mark.parametrize("name, arch, settings", [
    ("Llama", "llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})),
    ("Llama", "llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3 | {"original_max_position_embeddings": 8192})),
    ("Llama", "llama", dict(attention_bias=True, mlp_bias=True)),
    ("Qwen2", "qwen2", {}), ("Qwen3", "qwen3", dict(head_dim=32))], ids=["llama", "llama3 scaling, tied", "biases", "qwen2", "qwen3"])
def test_a_gguf_has_the_logits_of_its_source(name, arch, settings, tmp_path):
    model = theirs(name, WIDE | dict(max_position_embeddings=9000) | settings)
    write_gguf(tmp_path / "m.gguf", model, arch)
    assert relative(bring(tmp_path / "m.gguf", tmp_path)(text())[0], model(text()).logits) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("quantise", QUANTISED.values(), ids=QUANTISED)
def test_quantised_weights_become_what_they_stand_for(quantise, tmp_path):
    model = theirs("Llama", WIDE)
    before = model(text()).logits
    write_gguf(tmp_path / "m.gguf", model, "llama", quantise)
    assert relative(bring(tmp_path / "m.gguf", tmp_path)(text())[0], model(text()).logits) < 1e-4
    assert 1e-3 < relative(model(text()).logits, before) < 0.3   # the quantisation itself was felt


@pytest.mark.parametrize("changes, words", [
    ({"expert_count": 8}, ["expert_count = 8", "mixture of experts"]), ({"rope.scaling.type": "yarn"}, ["rope scaling 'yarn'"]),
    ({"attention.sliding_window": 64}, ["sliding window"]), ({"rope.dimension_count": 16}, ["rope.dimension_count = 16"]),
    ({"attention.key_length": 48, "rope.dimension_count": 48}, ["attn_q.weight", "(128, 128)"]),
    ({"block_count": 4}, ["9 tensors are missing", "blk.3"]), ({"block_count": "x"}, ["block_count is 'x'"])])
def test_ggufs_that_are_not_supported_are_refused_by_name(changes, words, tmp_path):
    write_gguf(tmp_path / "m.gguf", theirs("Llama", WIDE), "llama", **changes)
    refused(*words, path=tmp_path / "m.gguf", tmp_path=tmp_path)
    write_gguf(tmp_path / "g.gguf", theirs("Llama", WIDE), "gemma")
    refused("'gemma' is not supported", path=tmp_path / "g.gguf", tmp_path=tmp_path)


# --- RWKV-7 ------------------------------------------------------------------------------------------


def rwkv(N: int = 32, C: int = 96, L: int = 3, V: int = 71, **changes) -> LM:
    torch.manual_seed(0)
    cfg = dict(vocab_size=V, n_layer=L, n_embd=C, mixer="r", positions="none", ffn="channelmix", rwkv_head_size=N, block_size=4096)
    model = LM(ModelConfig(**cfg | changes))
    shake(model, 0.3)
    return model


def official():
    os.environ.update(RWKV_V7_ON="1", RWKV_CUDA_ON="0", RWKV_JIT_ON="0")
    module = pytest.importorskip("rwkv.model")
    if not hasattr(module, "RWKV_x070"):
        pytest.skip("rwkv was imported before without RWKV_V7_ON")
    return module.RWKV


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("v0", [False, True], ids=["without v0 in layer 0", "with"])
@pytest.mark.parametrize("changes", [dict(N=32), dict(N=64, C=192, L=2, V=64), dict(N=32, L=1, C=160, ffn_size=77),
                                     dict(N=64, C=64, rank_w=7, rank_a=9, rank_v=3, rank_g=21, ffn_size=100, tied=True)])
def test_the_package_rwkv_runs_an_export_with_our_logits(changes, v0, tmp_path):
    model, RWKV = rwkv(**changes), official()
    save_model(model, tmp_path / "m", {"tokenizer": "bytes"})
    out = export_model(ExportConfig(folder=str(tmp_path / "m")))
    assert out == tmp_path / "m.pth"
    if v0:
        tensors = torch.load(out, weights_only=True)
        r, A = tensors["blocks.0.att.a1"].shape
        torch.save(tensors | {"blocks.0.att.v0": torch.randn(1, 1, r), "blocks.0.att.v1": torch.randn(r, A), "blocks.0.att.v2": torch.randn(A, r)}, out)
    run = RWKV(model=str(out.with_suffix("")), strategy="cpu fp32")
    tokens = text(90, model.cfg.vocab_size)[0]
    logits, state = model(tokens[None, :40])
    other, other_state = run.forward(tokens[:40].tolist(), None)
    assert relative(logits[0, -1], other) < 1e-4
    for token in tokens[40:]:
        logits, state = model(token.view(1, 1), state)
        other, other_state = run.forward(token.item(), other_state)
    assert relative(logits[0, -1], other) < 1e-4
    back = bring(out, tmp_path)                                                     # and it comes back as it was
    assert relative(back(tokens[None])[0], model(tokens[None])[0]) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, dict(tied=True), dict(L=1), dict(rank_w=7, rank_a=9, rank_v=3, rank_g=21, ffn_size=100)])
def test_export_import_export_is_byte_equal(changes, dtype, tmp_path):
    save_model(rwkv(**changes), tmp_path / "m", {})
    first = torch.load(export_model(ExportConfig(folder=str(tmp_path / "m"), dtype=dtype)), weights_only=True)
    import_model(ImportConfig(path=str(tmp_path / "m.pth"), out=str(tmp_path / "back"), dtype=dtype, tokenizer="bytes"))
    second = torch.load(export_model(ExportConfig(folder=str(tmp_path / "back"))), weights_only=True)
    assert list(first) == list(second) == official_names(first and len({k.split(".")[1] for k in first if k.startswith("blocks")}))
    assert all(first[k].dtype == second[k].dtype == getattr(torch, dtype) and torch.equal(first[k], second[k]) for k in first)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in first.values())    # no file larger than its tensors
    assert json.loads((tmp_path / "back" / "meta.json").read_text())["tokenizer"] == "bytes"


def test_the_order_of_an_export_is_the_official_trainers():
    assert official_names(2) == """emb.weight
        blocks.0.ln1.weight blocks.0.ln1.bias blocks.0.ln2.weight blocks.0.ln2.bias blocks.0.ln0.weight blocks.0.ln0.bias
        blocks.0.att.x_r blocks.0.att.x_w blocks.0.att.x_k blocks.0.att.x_v blocks.0.att.x_a blocks.0.att.x_g
        blocks.0.att.w1 blocks.0.att.w2 blocks.0.att.w0 blocks.0.att.a1 blocks.0.att.a2 blocks.0.att.a0
        blocks.0.att.g1 blocks.0.att.g2 blocks.0.att.k_k blocks.0.att.k_a blocks.0.att.r_k
        blocks.0.att.receptance.weight blocks.0.att.key.weight blocks.0.att.value.weight blocks.0.att.output.weight
        blocks.0.att.ln_x.weight blocks.0.att.ln_x.bias blocks.0.ffn.x_k blocks.0.ffn.key.weight blocks.0.ffn.value.weight
        blocks.1.ln1.weight blocks.1.ln1.bias blocks.1.ln2.weight blocks.1.ln2.bias
        blocks.1.att.x_r blocks.1.att.x_w blocks.1.att.x_k blocks.1.att.x_v blocks.1.att.x_a blocks.1.att.x_g
        blocks.1.att.w1 blocks.1.att.w2 blocks.1.att.w0 blocks.1.att.a1 blocks.1.att.a2 blocks.1.att.a0
        blocks.1.att.v1 blocks.1.att.v2 blocks.1.att.v0 blocks.1.att.g1 blocks.1.att.g2 blocks.1.att.k_k blocks.1.att.k_a blocks.1.att.r_k
        blocks.1.att.receptance.weight blocks.1.att.key.weight blocks.1.att.value.weight blocks.1.att.output.weight
        blocks.1.att.ln_x.weight blocks.1.att.ln_x.bias blocks.1.ffn.x_k blocks.1.ffn.key.weight blocks.1.ffn.value.weight
        ln_out.weight ln_out.bias head.weight""".split()


@pytest.mark.parametrize("changes, words", [
    (dict(mixer="ra"), ["attention in layer 1"]), (dict(ffn="swiglu"), ["ffn = swiglu"]), (dict(ffn="relu2"), ["ffn = relu2"]),
    (dict(norm="rmsnorm"), ["norm = rmsnorm"]), (dict(norm_bias=False), ["norm_bias"]), (dict(norm_eps=1e-6), ["norm_eps"]), (dict(ln0=False), ["ln0"]),
    (dict(gate=False), ["gate"]), (dict(group_norm=False), ["group_norm"]), (dict(token_shift=False), ["token_shift"]), (dict(bonus=False), ["bonus"]),
    (dict(rwkv_rope=True), ["rwkv_rope"]), (dict(qk_norm=True), ["qk_norm"]), (dict(qkv_bias=True), ["qkv_bias"]), (dict(bias=True), ["bias"]),
    (dict(o_bias=True), ["output_bias"]), (dict(positions="learned"), ["learned positions"]), (dict(rwkv_size=64), ["64", "96"]),
])
def test_what_the_official_format_cannot_express_is_refused_by_name(changes, words, tmp_path):
    save_model(rwkv(**dict(n_head=3) | changes), tmp_path / "m", {})
    refused("cannot be written as an official RWKV-7", *words, call=lambda: export_model(ExportConfig(folder=str(tmp_path / "m"))), tmp_path=tmp_path)


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("what, words", [
    (lambda t: t.pop("blocks.1.att.g1"), ["1 tensors are missing: blocks.1.att.g1"]),
    (lambda t: t.pop("blocks.0.att.g1"), ["blocks.0.att.g1"]),
    (lambda t: t.pop("blocks.0.ln0.weight"), ["blocks.0.ln0.weight"]),
    (lambda t: t.pop("emb.weight"), ["emb.weight"]),
    (lambda t: t.update({"blocks.0.att.r_k": torch.zeros(3)}), ["blocks.0.att.r_k"]),
    (lambda t: t.update({"blocks.1.att.time_decay": torch.zeros(3)}), ["no place", "time_decay"]),
    (lambda t: t.update({"blocks.2.att.w1": torch.zeros(96, 5)}), ["blocks.2.att.w1", "(96, 5)"]),
    (lambda t: t.update(step=3), ["flat dict of tensors"]),
    (lambda t: t.update(code=Code()), ["more than tensors"]),
    (lambda t: [t.pop(k) for k in list(t)], ["emb.weight"]),
])
def test_pth_files_that_are_no_rwkv_7_are_refused_and_no_code_is_run(what, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = {k: v.clone() for k, v in rwkv().state_dict().items()}
    what(tensors)
    torch.save(tensors, tmp_path / "m.pth")
    refused(*words, path=tmp_path / "m.pth", tmp_path=tmp_path)
    (tmp_path / "p.pth").write_bytes(pickle.dumps(Code()))
    refused("damaged", path=tmp_path / "p.pth", tmp_path=tmp_path)
    torch.save(tensors if "code" not in tensors else {}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    refused("", path=tmp_path / "old.pth", tmp_path=tmp_path)
    assert not (tmp_path / "ran").exists()


# --- damage, memory, the command ---------------------------------------------------------------------


@pytest.mark.parametrize("source", ["model.safetensors", "config.json", "m.gguf", "m.pth"])
def test_a_damaged_file_gives_one_line(source, tmp_path):
    """Cut anywhere, or with bytes changed in the head of the file: a ValueError in one line, or a model that still is one."""
    theirs("Llama", WIDE).save_pretrained(tmp_path / "theirs")
    write_gguf(tmp_path / "m.gguf", theirs("Llama", WIDE), "llama")
    torch.save({k: v.clone() for k, v in rwkv(L=2).state_dict().items()}, tmp_path / "m.pth")
    path = tmp_path / "theirs" if source in ("model.safetensors", "config.json") else tmp_path / source
    file = path / source if path.is_dir() else path
    whole, dice = file.read_bytes(), random.Random(0)
    cuts = [whole[: int(len(whole) * share)] for share in (0, 0.001, 0.01, 0.1, 0.3, 0.7, 0.95)] + [b"\xff" * 50, whole[:-1]]
    for _ in range(25):
        bad = bytearray(whole)
        for _ in range(4):
            bad[dice.randrange(min(len(bad), 3000))] = dice.randrange(256)
        cuts.append(bytes(bad))
    stopped = 0
    for i, data in enumerate(cuts):
        file.write_bytes(data)
        try:
            import_model(ImportConfig(path=str(path), out=str(tmp_path / "out"), overwrite=True))
        except ValueError as e:
            stopped += 1
            assert len(one_line(e)) < 1000
        else:
            assert i >= 8, f"cut {i} of {source} was taken for whole"
    assert stopped >= 9 and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "../m.safetensors"}}', '{"weight_map": {"a": "none.safetensors"}}', '{"weight_map": {"a": 3}}',
                                   '{"weight_map": []}', "{}", "[]", "{"])
def test_a_bad_index_of_shards_gives_one_line(index, tmp_path):
    theirs("Llama", COMMON).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors").rename(tmp_path / "m.safetensors")
    refused("model.safetensors", path=tmp_path / "theirs", tmp_path=tmp_path)
    (tmp_path / "theirs" / "model.safetensors.index.json").write_text(index)
    refused(path=tmp_path / "theirs", tmp_path=tmp_path)


MEASURE = """
import re, sys, convert, torch, gguf
peak = lambda: 1024 * int(re.search("VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])  # ru_maxrss would begin at the parent's
torch.ones(2) @ torch.ones(2)
with torch.device("meta"):
    torch.nn.Embedding(2, 2)  # makes torch load another 150 MB of code
before = peak()
exec(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read off /proc")
@pytest.mark.parametrize("kind", ["safetensors", "gguf", "pth"])
def test_memory_stays_below_a_fifth_more_than_the_model(kind, tmp_path):
    """Import, loading and export, each in a process of its own, on a model of 100 MB and more."""
    if kind == "pth":
        with torch.device("meta"):
            shapes = LM(ModelConfig(vocab_size=4000, n_layer=8, n_embd=576, mixer="r", positions="none", ffn="channelmix", rwkv_head_size=64)).state_dict()
        torch.save({name: torch.rand(p.shape) for name, p in shapes.items()}, tmp_path / "m.pth")
    else:
        with torch.device("meta"):
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON | dict(hidden_size=512, intermediate_size=1600, num_hidden_layers=8, vocab_size=4000,
                                                                       num_attention_heads=16)))
        model.to_empty(device="cpu")
        [p.data.uniform_() for p in model.parameters()]
        model.save_pretrained(tmp_path / "m.safetensors") if kind == "safetensors" else write_gguf(tmp_path / "m.gguf", model, "llama")
        del model
    out = tmp_path / "out"

    def peak(code: str) -> float:
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
        run = subprocess.run([sys.executable, "-c", MEASURE, code], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return int(run.stdout.split()[-1])

    more = peak(f"convert.import_model(convert.ImportConfig(path='m.{kind}', out='out'))")
    size = (out / "model.safetensors").stat().st_size
    peaks = {"import": more, "load": peak("from model import load_model; m = load_model('out')")}
    if kind == "pth":
        peaks["export"] = peak("convert.export_model(convert.ExportConfig(folder='out'))")
    print(kind, {what: round(p / size, 2) for what, p in peaks.items()})
    assert size > 100e6 and max(peaks.values()) < 1.2 * size and peaks["load"] > 0.9 * size


def test_the_command_tells_what_is_wrong_and_takes_no_folder_over(tmp_path, capsys):
    theirs(*KINDS["qwen2"]).save_pretrained(tmp_path / "theirs")
    source, out = str(tmp_path / "theirs"), tmp_path / "out"
    for argv, words in (([], ["say what to do"]), (["inport"], ["say what to do"]), (["import"], ["''"]), (["import", "nothing"], ["'nothing'"]),
                        (["import", source, "--dtype", "int8"], ["dtype = 'int8'", "float32"]), (["import", source, "--out", source], ["another --out"]),
                        (["import", source, "--out", source + "/inside"], ["another --out"]), (["export"], ["name the model folder"]),
                        (["export", str(out)], ["no model at"]), (["export", str(out), "--format", "onnx"], ["'onnx'"]),
                        (["export", str(out), "--out", "x.bin"], [".pth"]), (["import", source, "--tokenizer", "none", "--out", str(out)], ["'none'"])):
        refused(*words, call=lambda: main(argv))
    main(["import", source, "--out", str(out), "--tokenizer", "bytes"])
    assert "no tokenizer" not in capsys.readouterr().out and json.loads((out / "meta.json").read_text())["tokenizer"] == "bytes"
    refused("--overwrite", call=lambda: main(["import", source, "--out", str(out)]))
    main(["import", source, "--out", str(out), "--overwrite"])
    assert "no tokenizer" in capsys.readouterr().out
    (out / "checkpoints").mkdir()
    refused("another --out", call=lambda: main(["import", source, "--out", str(out), "--overwrite"]))
    save_model(rwkv(), tmp_path / "r", {})
    main(["export", str(tmp_path / "r")])
    refused("--overwrite", call=lambda: main(["export", str(tmp_path / "r")]))
