"""Hugging Face folders: each kind gives the logits of transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import shake
from common_convert import (COMMON, GROUPED, KINDS, LLAMA3, bring, edit, original, refused, relative, rwkv,
                            text)
from data.tokenizer import load_tokenizer
from lib.folders import open_model, read_config, save_model
from tools.convert import ExportConfig, export_model
from tools.huggingface_rwkv import settings_of
from tools.to_huggingface import write_tensors


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, tmp_path):
    model = original(*KINDS[kind])
    model.save_pretrained(tmp_path / "original")
    imported = bring(tmp_path / "original", tmp_path)
    assert relative(imported(text())[0], model(text()).logits) < 1e-4
    assert imported.cfg.tied == model.config.tie_word_embeddings and imported.cfg.block_size == 128
    names = sorted(p.name for p in (tmp_path / "imported").iterdir())
    assert names == ["config.json", "meta.json", "model.safetensors"]


@torch.no_grad()
@pytest.mark.parametrize("kind", [GROUPED, "gpt2"])
def test_shards_are_one_model(kind, tmp_path):
    model = original(*KINDS[kind])
    model.save_pretrained(tmp_path / "original", max_shard_size="20KB")
    assert len(list((tmp_path / "original").glob("*.safetensors"))) > 3
    assert relative(bring(tmp_path / "original", tmp_path)(text())[0], model(text()).logits) < 1e-4


@torch.no_grad()
def test_older_files_of_the_same_models_are_read(tmp_path):
    """rope_theta and rope_scaling as they stood before transformers 5.

    And GPT-2's tensors without their prefix, with the causal masks.
    """
    model = original(*KINDS[GROUPED])
    model.save_pretrained(tmp_path / "llama")
    old = {k: v for k, v in LLAMA3.items() if k not in ("rope_type", "rope_theta")} | {"type": "llama3"}
    edit(tmp_path / "llama", rope_parameters=..., rope_theta=5000, rope_scaling=old)
    file = tmp_path / "llama" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(10)}, file)
    assert relative(bring(tmp_path / "llama", tmp_path)(text())[0], model(text()).logits) < 1e-4
    model = original(*KINDS["gpt2"])
    model.save_pretrained(tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "model.safetensors"
    names = [f"h.{i}.attn.{name}" for i in range(3) for name in ("bias", "masked_bias")]
    masks = {name: torch.ones(1, 1, 128, 128) for name in names}
    save_file({k.removeprefix("transformer."): v for k, v in load_file(file).items()} | masks, file)
    assert relative(bring(tmp_path / "gpt2", tmp_path)(text())[0], model(text()).logits) < 1e-4


ELSEWHERE = ("rope_type", "rope_theta", "original_max_position_embeddings")
OLD = {key: value for key, value in LLAMA3.items() if key not in ELSEWHERE}


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    dict(rope_scaling=LLAMA3),
    dict(rope_scaling=OLD | {"type": "llama3"}, rope_theta=5000.0, original_max_position_embeddings=32),
    dict(rope_parameters={"rope_theta": 5000}, rope_scaling=LLAMA3 | {"type": "llama3"}),
    dict(rope_parameters=OLD | {"rope_type": "llama3"}, rope_theta=5000, original_max_position_embeddings=32),
    dict(rope_scaling=None, attention_dropout=0.0, sliding_window=None, quantization_config={}),
])
def test_settings_that_mean_the_same_are_the_same(changes, tmp_path):
    model = original(*KINDS[GROUPED])
    model.save_pretrained(tmp_path / "llama")
    edit(tmp_path / "llama", **changes)
    assert relative(bring(tmp_path / "llama", tmp_path)(text())[0], model(text()).logits) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e6, "factor": 1.0}),
    dict(rope_parameters=LLAMA3 | {"rope_theta": 1e6, "factor": 1}),
    dict(rope_parameters=..., rope_theta=1e6, rope_scaling={"type": "yarn", "factor": 1.0}),
    dict(rope_scaling={"type": "linear", "factor": 1.0}),
    dict(use_sliding_window=True, sliding_window=64, max_window_layers=3, layer_types=...),
    dict(use_sliding_window=False, sliding_window=64, layer_types=...),
    dict(use_sliding_window=True, sliding_window=128, max_window_layers=0, layer_types=...),
])
def test_settings_that_do_nothing_are_none(changes, tmp_path):
    """Scaling by one; windows that no layer has, or that are as long as the context."""
    model = original(*KINDS["qwen2, untied"])
    model.save_pretrained(tmp_path / "original")
    edit(tmp_path / "original", **changes)
    assert relative(bring(tmp_path / "original", tmp_path)(text())[0], model(text()).logits) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama, linear scaling, biases, tied"])
@pytest.mark.parametrize("rename", [
    lambda name: "_orig_mod." + name,
    lambda name: "module." + name,
    lambda name: "base_model.model." + name,
    lambda name: "base_model.model._orig_mod." + name,
    lambda name: name.removeprefix("model.").removeprefix("transformer."),
    lambda name: name.replace(".h.1.", ".h.1._orig_mod.").replace("layers.1.", "layers.1._orig_mod."),
])
def test_names_are_read_without_what_others_put_around_them(kind, rename, tmp_path):
    model = original(*KINDS[kind])
    model.save_pretrained(tmp_path / "original")
    file = tmp_path / "original" / "model.safetensors"
    save_file({rename(name): t for name, t in load_file(file).items()}, file)
    assert relative(bring(tmp_path / "original", tmp_path)(text())[0], model(text()).logits) < 1e-4


@torch.no_grad()
def test_a_tensor_in_two_shards_is_the_one_that_the_index_names(tmp_path):
    model, folder = original(*KINDS["llama"]), tmp_path / "original"
    model.save_pretrained(folder, max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(name for name in index.values() if name != index["model.norm.weight"])
    save_file(load_file(folder / other) | {"model.norm.weight": torch.zeros(48)}, folder / other)
    assert relative(bring(folder, tmp_path)(text())[0], model(text()).logits) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_on_disk_and_rounded_once(dtype, tmp_path):
    model = original(*KINDS["qwen2"])
    model.save_pretrained(tmp_path / "original")
    imported = bring(tmp_path / "original", tmp_path, dtype=dtype)
    stored = load_file(tmp_path / "imported" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {getattr(torch, dtype)}
    assert {p.dtype for p in imported.parameters()} == {torch.float32}
    model = model.to(getattr(torch, dtype)).float()
    assert relative(imported(text())[0], model(text()).logits) < 1e-4
    # a half-precision checkpoint, into float32
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert relative(bring(tmp_path / "half", tmp_path)(text())[0], model.float()(text()).logits) < 1e-4
    model.model.norm.weight.data.fill_(1e5)
    model.save_pretrained(tmp_path / "large")
    refused("ln_out.weight", "float16", call=lambda: bring(tmp_path / "large", tmp_path, dtype="float16"))


@torch.no_grad()
def test_a_head_of_its_own_is_used_even_where_the_config_says_tied(tmp_path):
    """As transformers does: fine-tuned heads are found beside a flag from before."""
    model = original(*KINDS["qwen2"])
    model.save_pretrained(tmp_path / "original")
    file = tmp_path / "original" / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": model.lm_head.weight.clone()}, file)
    assert bring(tmp_path / "original", tmp_path).cfg.tied
    save_file(load_file(file) | {"lm_head.weight": 2 * model.lm_head.weight}, file)
    imported = bring(tmp_path / "original", tmp_path)
    assert not imported.cfg.tied and relative(imported(text())[0], 2 * model(text()).logits) < 1e-4


def test_the_tokenizer_beside_the_weights_comes_along(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    bpe.pre_tokenizer = byte_level(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, special_tokens=["<|endoftext|>"],
                                             initial_alphabet=byte_level.alphabet(), show_progress=False)
    bpe.train_from_iterator(["the theory of these other things, and then the rest"] * 9, trainer)
    original("Llama", COMMON | dict(vocab_size=280)).save_pretrained(tmp_path / "original")
    bpe.save(str(tmp_path / "original" / "tokenizer.json"))
    bring(tmp_path / "original", tmp_path)
    words = "then the other theory, 12 of \u00e9\u4e16"
    expected = bpe.encode(words).ids
    assert load_tokenizer(tmp_path / "imported").encode_ordinary(words) == expected
    (tmp_path / "original" / "tokenizer.json").write_text("{}")
    refused("tokenizer.json", path=tmp_path / "original", tmp_path=tmp_path)
    # the weights with another model's tokenizer
    bring(tmp_path / "original", tmp_path, "again", tokenizer=str(tmp_path / "imported"))
    assert load_tokenizer(tmp_path / "again").encode_ordinary(words) == expected


# ------------------------------------------------------------------------------------------
# RWKV-7

@torch.no_grad()
@pytest.mark.parametrize("changes", [
    dict(head_dim=16, norm_eps=1e-3),
    dict(head_dim=32, attention_hidden_size=96, norm_bias=False, v_low_rank_dim=5),
    dict(num_heads=1, intermediate_size=99, num_hidden_layers=1),
], ids=str)
def test_rwkv7_of_others_has_the_logits_of_rwkv7_hf(changes, tmp_path):
    """A random model saved by that package, in shards; also as older files have it."""
    rwkv7_hf = pytest.importorskip("rwkv7_hf")
    torch.manual_seed(0)
    settings = dict(vocab_size=97, hidden_size=64, num_hidden_layers=2) | changes
    model, folder = rwkv7_hf.RWKV7ForCausalLM(rwkv7_hf.RWKV7Config(**settings)).eval(), tmp_path / "original"
    shake(model, 0.3)
    model.save_pretrained(folder, max_shard_size="60KB")
    tokens = text(40)
    imported = bring(folder, tmp_path)
    assert relative(imported(tokens)[0], model(tokens).logits) < 1e-5
    assert imported.cfg.rwkv_width == settings.get("attention_hidden_size", 64)
    for file in folder.glob("model*"):
        file.unlink()
    save_file(older(model.state_dict()), folder / "model.safetensors")
    edit(folder, intermediate_size=None, num_heads=..., num_attention_heads=None, value_dim=...)
    assert relative(bring(folder, tmp_path)(tokens)[0], imported(tokens)[0]) == 0


def older(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All shares of the token shifts in one tensor, and a value residual in layer 0."""
    mixes = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
    tensors = dict(tensors)
    for i in range(2):
        names = [f"model.layers.{i}.attn.{mix}" for mix in mixes]
        if names[0] in tensors:
            tensors[f"model.layers.{i}.attn.x_x"] = torch.cat([tensors.pop(name)[0] for name in names])
    return tensors | {"model.layers.0.attn.v_lora.lora.0.weight": torch.ones(5, 64)}


@torch.no_grad()
def test_without_a_first_norm_there_is_no_ln0(tmp_path):
    """fla's norm_first = false."""
    model = rwkv(V=97, L=2, ln0=False)
    save_model(model, tmp_path / "m", {})
    write_checkpoint(tmp_path / "m", tmp_path / "original", norm_first=False)
    assert relative(bring(tmp_path / "original", tmp_path)(text(40))[0], model(text(40))[0]) < 1e-6


def write_checkpoint(folder, out, **changes) -> None:
    """A folder of fla's, also of what --format hf refuses."""
    cfg = read_config(json.loads((folder / "config.json").read_text()), "config.json")
    out.mkdir()
    model, file = open_model(folder)
    write_tensors(model, file, "rwkv7", torch.float32, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(settings_of(cfg, "rwkv7") | changes))


@torch.no_grad()
def test_arwkv_is_read_with_what_its_code_never_uses(tmp_path):
    """x_g without a gate, layer 0's value residual; ranks are the tensors'."""
    hybrid = dict(ffn="swiglu", norm="rmsnorm", ln0=False, norm_eps=1e-6, gate=False, rank_w=7, rank_v=3)
    model = rwkv(V=97, L=2, tied=True, **hybrid)
    save_model(model, tmp_path / "m", {})
    out = export_model(ExportConfig(folder=str(tmp_path / "m"), format="hf"))
    tensors = load_file(out / "model.safetensors")
    tensors.pop("lm_head.weight")
    mixer = "model.layers.{}.self_attn.time_mixer.{}"
    tensors |= {mixer.format(i, "x_g"): torch.ones(1, 1, 96) for i in range(2)}
    tensors |= {mixer.format(0, name): torch.ones(3, 3) for name in ("v0", "v1", "v2")}
    save_file(tensors, out / "model.safetensors")
    edit(out, tie_word_embeddings=True, wkv_layers="full", wkv_has_gate=..., num_attention_heads=7)
    imported = bring(out, tmp_path)
    assert relative(imported(text(40))[0], model(text(40))[0]) == 0
    assert imported.cfg.tied and imported.cfg.rank("w") == 7
