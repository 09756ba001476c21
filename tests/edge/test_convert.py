"""Checkpoints that are not supported, damaged or malicious: one line that names why."""

import json
import os
import pickle
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import one_line
from common_convert import COMMON, GPT2, KINDS, WIDE, edit, nanogpt, original, refused, rwkv, write_gguf
from lib.folders import save_model
from tools.convert import ExportConfig, ImportConfig, export_model, import_model, main

WINDOWED = dict(use_sliding_window=True, sliding_window=64, max_window_layers=0)
MIXED_LAYERS = ["full_attention", "sliding_attention", "full_attention"]


# ------------------------------------------------------------------------------------------
# Hugging Face

@pytest.mark.parametrize("kind, changes, words", [
    ("llama", dict(model_type="gemma2"), ["gemma2", "not supported"]),
    ("llama", dict(model_type=...), ["model_type is missing"]),
    ("llama", dict(model_type="mixtral", num_local_experts=8),
     ["num_local_experts = 8", "mixture of experts"]),
    ("llama", dict(rope_parameters={"rope_type": "yarn", "factor": 4.0}), ["rope scaling 'yarn'"]),
    ("llama", dict(rope_parameters=..., rope_scaling={"type": "dynamic", "factor": 4.0}),
     ["rope scaling 'dynamic'"]),
    ("llama", dict(rope_parameters={"full_attention": {"rope_type": "default"}}),
     ["the same for all layers"]),
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
    ("mistral", dict(sliding_window=..., max_position_embeddings=32768), ["sliding window of 4096"]),
    ("qwen2", dict(WINDOWED, layer_types=...), ["sliding window of 64"]),
    ("qwen2", dict(layer_types=MIXED_LAYERS, sliding_window=64), ["sliding_attention"]),
    ("qwen2", dict(WINDOWED, layer_types=None), ["sliding window of 64"]),
    ("mistral", dict(sliding_window=64, layer_types=["full_attention"] * 3), ["sliding window of 64"]),
    ("llama", dict(rope_scaling={"rope_type": "linear", "factor": 2.0}),
     ["rope_parameters and rope_scaling", "differ"]),
    ("llama", dict(rope_theta=1e6), ["rope_theta is 10000.0 and 1000000.0", "leave one"]),
    ("llama", dict(rope_scaling={"factor": 8.0}), ["rope_type is missing beside factor = 8.0"]),
    ("llama", dict(rope_scaling={"type": "linear", "rope_type": "llama3", "factor": 2.0}),
     ["rope scaling 'linear or llama3'"]),
    ("llama", dict(rms_norm_eps=float("nan")), ["norm_eps = nan"]),
    ("qwen2", dict(layer_types=["linear_attention"] * 3), ["linear_attention"]),
    ("qwen3", dict(num_experts=64), ["mixture of experts"]),
    ("gpt2", dict(activation_function="relu"), ["activation_function = 'relu'"]),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx"]),
    ("gpt2", dict(scale_attn_weights=False), ["scale_attn_weights"]),
])
def test_what_is_not_supported_is_refused_by_name(kind, changes, words, tmp_path):
    original(*KINDS[kind]).save_pretrained(tmp_path / "original")
    edit(tmp_path / "original", **changes)
    refused(*words, path=tmp_path / "original", tmp_path=tmp_path)


def test_every_tensor_is_used_and_every_parameter_filled(tmp_path):
    original(*KINDS["qwen2, untied"]).save_pretrained(tmp_path / "original")
    file = tmp_path / "original" / "model.safetensors"
    whole = load_file(file)
    bias, norm = "model.layers.1.self_attn.q_proj.bias", "model.norm.weight"
    for name, value, words in (
        (bias, None, ["1 tensors are missing", "layers.1.self_attn.q_proj.bias"]),
        ("model.extra.weight", torch.ones(2), ["1 tensors have no place", "model.extra.weight"]),
        (norm, torch.ones(49), ["ln_out.weight", "(49,)"]),
        (norm, torch.ones(48, dtype=torch.int8), ["ln_out.weight", "int8"]),
        (norm, torch.full((48,), float("nan")), ["ln_out.weight", "damaged"]),
    ):
        save_file({k: v for k, v in (whole | {name: value}).items() if v is not None}, file)
        refused(*words, path=tmp_path / "original", tmp_path=tmp_path)


def test_a_head_of_a_type_that_is_not_supported_is_named_beside_a_tied_embedding(tmp_path):
    model, folder = original("Llama", COMMON | dict(tie_word_embeddings=True)), tmp_path / "original"
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    head = model.lm_head.weight.data.to(torch.float8_e4m3fn)
    save_file(load_file(file) | {"lm_head.weight": head}, file)
    refused("head.weight", "float8", path=folder, tmp_path=tmp_path)
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"dtype":"F8_E4M3","shape":[97,48]', b'"dtype":"F6_E2M3","shape":[97,64]'))
    refused("lm_head.weight", path=folder, tmp_path=tmp_path)

    gpt = nanogpt(original("GPT2", GPT2))
    gpt["model"]["lm_head.weight"] = gpt["model"]["lm_head.weight"].to(torch.float8_e4m3fn)
    torch.save(gpt, tmp_path / "ckpt.pt")
    refused("head.weight", "float8", path=tmp_path / "ckpt.pt", tmp_path=tmp_path)


@pytest.mark.parametrize("index", [
    '{"weight_map": {"a": "../m.safetensors"}}',
    '{"weight_map": {"a": "none.safetensors"}}',
    '{"weight_map": {"a": 3}}',
    '{"weight_map": []}',
    "{}",
    "[]",
    "{",
])
def test_a_bad_index_of_shards_gives_one_line(index, tmp_path):
    original("Llama", COMMON).save_pretrained(tmp_path / "original")
    (tmp_path / "original" / "model.safetensors").rename(tmp_path / "m.safetensors")
    refused("model.safetensors", path=tmp_path / "original", tmp_path=tmp_path)
    (tmp_path / "original" / "model.safetensors.index.json").write_text(index)
    refused(path=tmp_path / "original", tmp_path=tmp_path)


# ------------------------------------------------------------------------------------------
# GGUF

@pytest.mark.parametrize("changes, words", [
    ({"expert_count": 8}, ["expert_count = 8", "mixture of experts"]),
    ({"rope.scaling.type": "yarn"}, ["rope scaling 'yarn'"]),
    ({"attention.sliding_window": 64}, ["sliding window"]),
    ({"rope.dimension_count": 16}, ["rope.dimension_count = 16"]),
    ({"attention.key_length": 48, "rope.dimension_count": 48}, ["attn_q.weight", "(128, 128)"]),
    ({"block_count": 4}, ["9 tensors are missing", "blk.3"]),
    ({"block_count": "x"}, ["block_count is 'x'"]),
])
def test_ggufs_that_are_not_supported_are_refused_by_name(changes, words, tmp_path):
    write_gguf(tmp_path / "m.gguf", original("Llama", WIDE), "llama", **changes)
    refused(*words, path=tmp_path / "m.gguf", tmp_path=tmp_path)
    write_gguf(tmp_path / "g.gguf", original("Llama", WIDE), "gemma")
    refused("'gemma' is not supported", path=tmp_path / "g.gguf", tmp_path=tmp_path)


# ------------------------------------------------------------------------------------------
# RWKV-7

@pytest.mark.parametrize("changes, words", [
    (dict(mixer="ra"), ["attention in layer 1"]),
    (dict(ffn="swiglu"), ["ffn = swiglu"]),
    (dict(ffn="relu2"), ["ffn = relu2"]),
    (dict(norm="rmsnorm"), ["norm = rmsnorm"]),
    (dict(norm_bias=False), ["norm_bias"]),
    (dict(norm_eps=1e-6), ["norm_eps"]),
    (dict(ln0=False), ["ln0"]),
    (dict(gate=False), ["gate"]),
    (dict(group_norm=False), ["group_norm"]),
    (dict(token_shift=False), ["token_shift"]),
    (dict(bonus=False), ["bonus"]),
    (dict(rwkv_rope=True), ["rwkv_rope"]),
    (dict(qk_norm=True), ["qk_norm"]),
    (dict(qkv_bias=True), ["qkv_bias"]),
    (dict(bias=True), ["bias"]),
    (dict(o_bias=True), ["output_bias"]),
    (dict(positions="learned"), ["learned positions"]),
    (dict(rwkv_size=64), ["64", "96"]),
])
def test_what_the_official_format_cannot_express_is_refused_by_name(changes, words, tmp_path):
    save_model(rwkv(**dict(n_head=3) | changes), tmp_path / "m", {})
    refused("cannot be written as an official RWKV-7", *words, tmp_path=tmp_path,
            call=lambda: export_model(ExportConfig(folder=str(tmp_path / "m"))))


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
    (lambda t: t.clear(), ["emb.weight"]),
])
def test_pth_files_that_are_no_rwkv_7_are_refused_and_no_code_is_run(what, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = {k: v.clone() for k, v in rwkv().state_dict().items()}
    what(tensors)
    torch.save(tensors, tmp_path / "m.pth")
    refused(*words, path=tmp_path / "m.pth", tmp_path=tmp_path)
    (tmp_path / "p.pth").write_bytes(pickle.dumps(Code()))
    refused("damaged", path=tmp_path / "p.pth", tmp_path=tmp_path)
    old = tensors if "code" not in tensors else {}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    refused("", path=tmp_path / "old.pth", tmp_path=tmp_path)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------
# Damage, the command

def damaged(whole: bytes) -> list[bytes]:
    """Nine that are cut or nonsense, and 25 with bytes changed near the beginning."""
    dice = random.Random(0)
    shares = (0, 0.001, 0.01, 0.1, 0.3, 0.7, 0.95)
    files = [whole[: int(len(whole) * share)] for share in shares] + [b"\xff" * 50, whole[:-1]]
    for _ in range(25):
        bad = bytearray(whole)
        for _ in range(4):
            bad[dice.randrange(min(len(bad), 3000))] = dice.randrange(256)
        files.append(bytes(bad))
    return files


@pytest.mark.parametrize("source", ["model.safetensors", "config.json", "m.gguf", "m.pth"])
def test_a_damaged_file_gives_one_line(source, tmp_path):
    """Cut anywhere, or with bytes changed in the head of the file.

    That is a ValueError in one line, or a model that still is one.
    """
    original("Llama", WIDE).save_pretrained(tmp_path / "original")
    write_gguf(tmp_path / "m.gguf", original("Llama", WIDE), "llama")
    torch.save({k: v.clone() for k, v in rwkv(L=2).state_dict().items()}, tmp_path / "m.pth")
    path = tmp_path / "original" if source in ("model.safetensors", "config.json") else tmp_path / source
    file = path / source if path.is_dir() else path
    stopped = 0
    for i, data in enumerate(damaged(file.read_bytes())):
        file.write_bytes(data)
        try:
            import_model(ImportConfig(path=str(path), out=str(tmp_path / "out"), overwrite=True))
        except ValueError as e:
            stopped += 1
            assert len(one_line(e)) < 1000
        else:
            assert i >= 8, f"cut {i} of {source} was taken for whole"
    assert stopped >= 9 and not list(tmp_path.glob(".*"))


def test_the_command_tells_what_is_wrong_and_takes_no_folder_over(tmp_path, capsys):
    original(*KINDS["qwen2"]).save_pretrained(tmp_path / "original")
    source, out = str(tmp_path / "original"), tmp_path / "out"
    for argv, words in (
        ([], ["say what to do", "python -m tools.convert import"]),
        (["inport"], ["say what to do"]),
        (["import"], ["''"]),
        (["import", "nothing"], ["'nothing'"]),
        (["import", source, "--dtype", "int8"], ["dtype", "int8", "float32"]),
        (["import", source, "--out", source], ["another --out"]),
        (["import", source, "--out", source + "/inside"], ["another --out"]),
        (["export"], ["name the model folder"]),
        (["export", str(out)], ["no model at"]),
        (["export", str(out), "--format", "onnx"], ["onnx", "rwkv-pth"]),
        (["export", str(out), "--out", "x.bin"], [".pth"]),
        (["import", source, "--tokenizer", "none", "--out", str(out)], ["'none'"]),
    ):
        refused(*words, call=lambda: main(argv))
    with pytest.raises(ValueError, match="dtype = 'int8': choose one of float32, bfloat16, float16"):
        ImportConfig(path=source, dtype="int8")
    with pytest.raises(ValueError, match="format = 'onnx': choose one of rwkv-pth"):
        ExportConfig(folder=source, format="onnx")
    main(["import", source, "--out", str(out), "--tokenizer", "bytes"])
    assert "no tokenizer" not in capsys.readouterr().out
    assert json.loads((out / "meta.json").read_text())["tokenizer"] == "bytes"
    refused("--overwrite", call=lambda: main(["import", source, "--out", str(out)]))
    main(["import", source, "--out", str(out), "--overwrite"])
    assert "no tokenizer" in capsys.readouterr().out
    (out / "checkpoints").mkdir()
    refused("another --out", call=lambda: main(["import", source, "--out", str(out), "--overwrite"]))
    save_model(rwkv(), tmp_path / "r", {})
    main(["export", str(tmp_path / "r")])
    refused("--overwrite", call=lambda: main(["export", str(tmp_path / "r")]))
