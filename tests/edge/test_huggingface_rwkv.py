"""Hugging Face folders of RWKV-7 that are contradictory, damaged or in the way."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from common_bpe import MANUAL, imported, train
from common_convert import edit, refused, rwkv
from data.tokenizer import save_tokenizer
from lib.folders import save_model
from tools import to_huggingface
from tools.convert import ExportConfig, export_model

HYBRID = dict(ffn="swiglu", norm="rmsnorm", ln0=False)


def export(folder, **settings):
    return export_model(ExportConfig(folder=str(folder), format="hf", **settings))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder of each model_type."""
    place = tmp_path_factory.mktemp("models")
    for name, changes in (("rwkv7", {}), ("rwkv_hybrid", HYBRID)):
        save_model(rwkv(N=16, C=32, L=2, V=257, **changes), place / name, {"tokenizer": "bytes"})
        export(place / name, out=str(place / f"{name}-hf"))
    return place


@pytest.fixture
def copy(folders, tmp_path):
    """A folder of a model_type to damage: its path, its tensors."""
    def of(kind: str):
        out = shutil.copytree(folders / f"{kind}-hf", tmp_path / "hf")
        return out, load_file(out / "model.safetensors")
    return of


# ------------------------------------------------------------------------------------------
# Import

@pytest.mark.parametrize("kind, changes, words", [
    ("rwkv7", dict(model_type="rwkv6"), ["'rwkv6'", "rwkv7 and rwkv_hybrid"]),
    ("rwkv7", dict(model_type="rwkv_hybrid", hidden_act="silu"), ["mlp.up_proj.weight is missing"]),
    ("rwkv7", dict(vocab_size=...), ["vocab_size is missing"]),
    ("rwkv7", dict(hidden_size=None), ["hidden_size is missing"]),
    ("rwkv7", dict(num_hidden_layers=...), ["num_hidden_layers is missing"]),
    ("rwkv7", dict(hidden_size=64), ["hidden_size = 64", "32"]),
    ("rwkv7", dict(vocab_size=258), ["vocab_size = 258", "257"]),
    ("rwkv7", dict(num_hidden_layers=3), ["num_hidden_layers = 3", "say 2"]),
    ("rwkv7", dict(num_hidden_layers=10**7), ["num_hidden_layers = 10000000"]),
    ("rwkv7", dict(num_hidden_layers="2"), ["num_hidden_layers is '2', expected int"]),
    ("rwkv7", dict(head_dim=64), ["head_dim = 64", "say 16"]),
    ("rwkv7", dict(num_heads=3), ["num_heads = 3", "say 2"]),
    ("rwkv7", dict(intermediate_size=100), ["intermediate_size = 100", "say 128"]),
    ("rwkv7", dict(v_low_rank_dim=16), ["v_low_rank_dim = 16", "say 32"]),
    ("rwkv7", dict(gate_low_rank_dim=16), ["gate_low_rank_dim = 16"]),
    ("rwkv7", dict(value_dim=[32, 64]), ["value_dim = [32, 64]", "another width"]),
    ("rwkv7", dict(attn={"layers": [1], "num_heads": 2}),
     ["attn = {'layers': [1]", "attention in some layers"]),
    ("rwkv7", dict(hidden_act="gelu"), ["hidden_act = 'gelu'"]),
    ("rwkv7", dict(norm_eps=0), ["norm_eps = 0.0", "positive"]),
    ("rwkv7", dict(norm_eps=float("nan")), ["norm_eps = nan"]),
    ("rwkv7", dict(norm_first=False), ["pre_norm", "no place"]),
    ("rwkv7", dict(norm_bias=False), ["bias", "no place"]),
    ("rwkv7", dict(quantization_config={"bits": 4}), ["quantization_config"]),
    ("rwkv_hybrid", dict(wkv_version=6), ["wkv_version = 6", "another RWKV"]),
    ("rwkv_hybrid", dict(head_size_divisor=4), ["head_size_divisor = 4"]),
    ("rwkv_hybrid", dict(head_size=32), ["head_size = 32", "say 16"]),
    ("rwkv_hybrid", dict(wkv_has_gate=False), ["wkv_has_gate = False", "is there"]),
    ("rwkv_hybrid", dict(wkv_has_group_norm=False), ["wkv_has_group_norm = False", "is there"]),
    ("rwkv_hybrid", dict(wkv_layers=[0]), ["wkv_layers = [0]", "attention in the other layers"]),
    ("rwkv_hybrid", dict(hidden_act="relu"), ["hidden_act = 'relu'"]),
    ("rwkv_hybrid", dict(intermediate_size=97), ["intermediate_size = 97", "say 96"]),
    ("rwkv_hybrid", dict(hidden_size="32"), ["hidden_size is '32', expected int"]),
])
def test_settings_that_the_tensors_contradict_are_named(kind, changes, words, copy, tmp_path):
    folder, _ = copy(kind)
    edit(folder, **changes)
    refused(*words, path=folder, tmp_path=tmp_path)


MIXER = "model.layers.1.self_attn.time_mixer."


@pytest.mark.parametrize("kind, name, value, words", [
    ("rwkv7", "model.layers.1.attn.k_k", None, ["1 tensors are missing", "attn.k_k"]),
    ("rwkv7", "model.layers.0.attn.r_k", None, ["attn.r_k is missing"]),
    ("rwkv7", "model.layers.0.attn.r_k", torch.zeros(32), ["attn.r_k is (32,)", "matrix"]),
    ("rwkv7", "model.layers.1.attn.r_k", torch.zeros(3, 16), ["attn.r_k is (3, 16)"]),
    ("rwkv7", "model.layers.1.attn.w_lora.lora.0.weight", torch.zeros(64, 16), ["att.w1 is (16, 64)"]),
    ("rwkv7", "model.layers.1.attn.x_x", torch.zeros(6, 32), ["6 tensors have no place", "attn.x_a"]),
    ("rwkv7", "model.layers.1.attn.q_proj.weight", torch.ones(32, 32), ["1 tensors have no place", "q_proj"]),
    ("rwkv7", "model.layers.1.attn.r_proj.bias", torch.zeros(32), ["no place", "r_proj.bias"]),
    ("rwkv7", "model.layers.7.attn.k_k", torch.zeros(32), ["num_hidden_layers = 2", "say 3"]),
    ("rwkv7", "model.layers.1.attn.v_proj.weight", torch.ones(32, 32) / 0, ["infinite", "att.value"]),
    ("rwkv7", "model.layers.1.attn.k_k", torch.ones(32, dtype=torch.int32), ["att.k_k", "floating-point"]),
    ("rwkv_hybrid", MIXER + "g1", None, ["1 tensors are missing", "g1"]),
    ("rwkv_hybrid", MIXER + "v1", torch.zeros(32), ["v1 is (32,)", "matrix"]),
    ("rwkv_hybrid", MIXER + "receptance.bias", torch.zeros(32), ["no place", "receptance.bias"]),
])
def test_every_tensor_is_used_and_every_parameter_filled(kind, name, value, words, copy, tmp_path):
    folder, tensors = copy(kind)
    tensors.pop(name, None)
    save_file(tensors | ({name: value} if value is not None else {}), folder / "model.safetensors")
    refused(*words, path=folder, tmp_path=tmp_path)


def test_a_truncated_file_is_named(copy, tmp_path):
    folder, _ = copy("rwkv7")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused("model.safetensors", "damaged", path=folder, tmp_path=tmp_path)


# ------------------------------------------------------------------------------------------
# Export

@pytest.mark.parametrize("changes, words", [
    (dict(gate=False), ["gate = False"]),
    (dict(group_norm=False), ["group_norm = False"]),
    (dict(ffn="gelu"), ["ffn = gelu instead of channelmix or relu2"]),
    (dict(ln0=False), ["ln0 = False"]),
    (dict(norm_eps=0.0), ["norm_eps = 0.0"]),
    (dict(positions="learned"), ["learned positions"]),
    (dict(mixer="ra", n_head=2), ["attention in layer 1"]),
    (dict(rwkv_size=64), ["heads of 64 together in a width of 32"]),
    (dict(qkv_bias=True, o_bias=True, bias=True), ["qkv_bias = True", "output_bias = True", "; bias = True"]),
    (dict(qk_norm=True, rwkv_rope=True), ["qk_norm = True", "rwkv_rope = True"]),
    (dict(HYBRID, qkv_bias=True), ["qkv_bias = True instead of False"]),
    (dict(HYBRID, mixer="ar", n_head=2), ["attention in layer 0"]),
    (dict(HYBRID, ln0=True), ["ln0 = True instead of False"]),
])
def test_what_the_format_cannot_say_is_refused_by_name(changes, words, tmp_path):
    save_model(rwkv(N=16, C=32, L=2, V=257, **changes), tmp_path / "m", {"tokenizer": "bytes"})
    refused("cannot be written", *words, call=lambda: export(tmp_path / "m"), tmp_path=tmp_path)


def test_only_an_export_is_replaced_and_only_when_asked(folders, tmp_path):
    out = tmp_path / "hf"

    def again(**settings):
        return export(folders / "rwkv7", out=str(out), **settings)

    again()
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    refused("exists already", "--overwrite", call=again, tmp_path=tmp_path)
    (out / "model.safetensors").write_bytes(b"damaged")
    again(overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (out / "notes.txt").write_text("mine")
    refused("not (only)", "another --out", call=lambda: again(overwrite=True), tmp_path=tmp_path)
    (out / "notes.txt").unlink()
    edit(out, exported_by=...)                               # from elsewhere, with the same names
    refused("not (only)", "another --out", call=lambda: again(overwrite=True), tmp_path=tmp_path)
    assert json.loads((out / "config.json").read_text())["model_type"] == "rwkv7"


def test_no_folder_is_written_over_its_source_or_into_it(folders, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    source = folders / "rwkv7"
    for out in (source, folders, source / "hf", source / ".", tmp_path / "file", "", " ", "a\0b", "/",
                tmp_path / "link"):
        refused("out", call=lambda: export(source, out=str(out), overwrite=True), tmp_path=folders)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_damaged_model_leaves_what_was_there(folders, tmp_path):
    save_model(rwkv(N=16, C=32, L=2, V=257), tmp_path / "m", {"tokenizer": "bytes"})
    out = export(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    whole = file.read_bytes()
    before = (out / "model.safetensors").read_bytes()
    for content, word in ((whole[:-9], "damaged"), (whole[:-9] + b"123456789", "checksum")):
        file.write_bytes(content)
        refused(word, call=lambda: export(tmp_path / "m", overwrite=True), tmp_path=tmp_path)
    assert (out / "model.safetensors").read_bytes() == before


def test_a_full_disk_is_one_line(folders, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_huggingface, "write_tensors", full)
    refused("No space left", "make room", call=lambda: export(folders / "rwkv7", out=str(tmp_path / "hf")),
            tmp_path=tmp_path)


def test_values_too_large_for_a_dtype_are_named(tmp_path):
    model = rwkv(N=128, C=128, L=1, V=257)                   # times 1.4 it is more than float16 can say
    with torch.no_grad():
        model.blocks[0].att.value.weight[0, 0] = 6e4
    save_model(model, tmp_path / "m", {"tokenizer": "bytes"})
    refused("v_proj.weight", "float16", "another --dtype", tmp_path=tmp_path,
            call=lambda: export(tmp_path / "m", dtype="float16"))


def test_a_tokenizer_that_does_not_fit_is_named(tmp_path):
    model = rwkv(N=16, C=32, L=1, V=256)
    save_model(model, tmp_path / "m", {"tokenizer": "bytes"})
    refused("257 tokens", "256 rows", call=lambda: export(tmp_path / "m"), tmp_path=tmp_path)
    save_model(model, tmp_path / "m", {"tokenizer": "o200k_harmony-like"})
    refused("o200k_harmony-like", call=lambda: export(tmp_path / "m"), tmp_path=tmp_path)


def test_an_added_token_spelt_as_another_token_is_named(tmp_path):
    """As letters for bytes, the space is written as the letter that the token is."""
    enc = imported(train(text=MANUAL[:20_000]), tmp_path / "original")
    enc.spec["special"]["\u0120"] = len(enc.spec["tokens"])
    save_model(rwkv(N=16, C=32, L=1, V=1600), tmp_path / "m", {})
    save_tokenizer(enc, tmp_path / "m")
    refused("spelt as token", call=lambda: export(tmp_path / "m"), tmp_path=tmp_path)
