"""Hugging Face folders: each kind gives the logits of transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from common_convert import COMMON, GROUPED, KINDS, LLAMA3, bring, edit, original, refused, relative, text
from data.tokenizer import load_tokenizer


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
