"""Our Hugging Face folders: rwkv7-hf has our logits; what comes back is equal."""

import ast
import importlib.util
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from common_bpe import MANUAL, imported, train
from common_convert import bring, relative, rwkv, text
from data.tokenizer import get_tokenizer, save_tokenizer
from lib.folders import load_model, save_model
from tools import to_huggingface
from tools.convert import ExportConfig, export_model, main
from tools.huggingface_rwkv import arrange_here, scaled
from tools.huggingface_tokenizer import WORLD
from tools.to_huggingface import FILES, world_files

LLAMA_SHAPED = dict(ffn="swiglu", norm="rmsnorm", ln0=False, positions="rope", norm_eps=1e-6)
OFF = dict(token_shift=False, bonus=False)


def export(model, folder: Path, tokenizer: str = "bytes", **settings) -> Path:
    save_model(model, folder, {"tokenizer": tokenizer})
    return export_model(ExportConfig(folder=str(folder), format="hf", **settings))


def require_same(a: Path, b: Path) -> None:
    names = {p.name for p in a.iterdir()}
    assert names == {p.name for p in b.iterdir()} <= set(FILES)
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    dict(N=16, C=64, L=2, ffn="relu2", **OFF),
    dict(N=32, norm_eps=1e-3),
    dict(N=64, C=128, L=2, rank_w=7, rank_a=9, rank_v=3, rank_g=21, ffn_size=100),
    dict(N=128, C=128, L=2),
    dict(N=48, L=1, norm_eps=3e-6, tied=True, norm_bias=False),
], ids=str)
def test_rwkv7_hf_runs_an_export_with_our_logits(changes, tmp_path):
    RWKV7ForCausalLM = pytest.importorskip("rwkv7_hf").RWKV7ForCausalLM
    model = rwkv(V=257, **changes)
    out = export(model, tmp_path / "m")
    assert out == tmp_path / "m-hf"
    theirs, info = RWKV7ForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    tokens = text(30, 257)
    logits = model(tokens)[0]
    assert relative(theirs(tokens).logits, logits) < 1e-5
    cache, pieces = None, []
    for token in tokens.T:                                   # one by one
        step = theirs(token[:, None], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        pieces.append(step.logits)
    assert relative(torch.cat(pieces, 1), logits) < 1e-5
    greedy = theirs.generate(tokens[:, :9], max_new_tokens=40, do_sample=False, eos_token_id=None)
    ours = [token for token, _ in zip(greedy_tokens(model, tokens[:, :9]), range(40))]
    assert greedy[:, 9:].tolist() == torch.stack(ours, 1).tolist()
    assert relative(bring(out, tmp_path)(tokens)[0], logits) < 1e-6


def greedy_tokens(model, tokens):
    logits, state = model(tokens)
    while True:
        token = logits[:, -1].argmax(-1)
        yield token
        logits, state = model(token[:, None], state)


@pytest.mark.parametrize("dtype, changes", [
    ("bfloat16", dict(N=32)),
    ("float16", dict(N=128, C=128, L=2, norm_eps=3e-6, **OFF)),
    ("float32", dict(N=48, L=1, ffn="relu2", rank_v=5, norm_bias=False)),
    ("bfloat16", dict(N=32, L=2, **LLAMA_SHAPED)),
    ("float32", dict(N=48, L=2, **LLAMA_SHAPED, gate=False, tied=True)),
], ids=str)
def test_export_import_export_is_byte_equal(dtype, changes, tmp_path):
    first = export(rwkv(V=300, **changes), tmp_path / "m", dtype=dtype)
    bring(first, tmp_path, dtype=dtype)
    assert json.loads((tmp_path / "imported" / "meta.json").read_text())["tokenizer"] == "bytes"
    require_same(first, export_model(ExportConfig(folder=str(tmp_path / "imported"), format="hf")))
    if dtype != "float32":                                   # also by way of float32
        bring(first, tmp_path)
        again = ExportConfig(folder=str(tmp_path / "imported"), format="hf", dtype=dtype, overwrite=True)
        require_same(first, export_model(again))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scaling_back_and_again_changes_no_bit(dtype):
    """Every number of 16 bits; of 32, those around powers of two and at random."""
    values = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    if dtype == torch.float32:
        near = torch.tensor([1 - 2**-24, 1, 1 + 2**-23, 1 + 2**-22], dtype=torch.float64)
        values = (values.double()[:, None] * near).flatten()
    if dtype == torch.float16:
        values = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    values = values[values.isfinite()].to(dtype)
    for N, eps in itertools.product((16, 32, 48, 96, 128, 256), (1e-5, 1e-6, 3e-3)):
        s = math.sqrt(N * eps / 64e-5)
        for form, by in (("times", s), ("over", 1 / s)):
            there = scaled(values, by, dtype)
            back = arrange_here(there, form, s, there.shape).to(dtype)
            again = scaled(back, by, dtype)
            assert torch.equal(again[there.isfinite()], there[there.isfinite()])
            normal = there.isfinite() & (there.abs() > 100 * torch.finfo(dtype).tiny)
            exact = (values.double() * by)[normal]
            assert ((there[normal].double() / exact - 1).abs() <= 1.5 * torch.finfo(dtype).eps).all()


@torch.no_grad()
def test_heads_of_64_keep_every_bit_and_are_what_rwkv7_hf_converts(tmp_path):
    converter = pytest.importorskip("rwkv7_hf.converter")
    model, tokens = rwkv(N=64, C=128, L=2, V=257, rank_v=5), text(40)
    out = export(model, tmp_path / "m")
    pth = export_model(ExportConfig(folder=str(tmp_path / "m")))
    converter.main(["--input", str(pth), "--output", str(tmp_path / "theirs"), "--precision", "fp32"])
    assert relative(bring(tmp_path / "theirs", tmp_path)(tokens)[0], model(tokens)[0]) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    mine = load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(ours["model.layers.1.attn.v_proj.weight"], mine["blocks.1.att.value.weight"])
    config, theirs = (json.loads((folder / "config.json").read_text())
                      for folder in (out, tmp_path / "theirs"))
    theirs_alone = {"auto_map", "initializer_range", "rwkv7_hf_adapter_layout", "transformers_version",
                    "num_attention_heads", "attention_hidden_size", "dtype"}
    same = config.keys() & theirs.keys() - {"attn_mode", "fuse_norm"}
    assert {key for key in same if key[-9:] != "_token_id" and config[key] != theirs[key]} == set()
    assert theirs.keys() - config.keys() <= theirs_alone


@torch.no_grad()
@pytest.mark.parametrize("gate, group_norm, token_shift, bonus", [
    (True, True, True, True), (False, False, False, False), (True, False, True, False),
    (False, True, False, True),
])
def test_a_llama_shaped_student_is_rwkvinsides_hybrid(gate, group_norm, token_shift, bonus, tmp_path):
    switches = dict(gate=gate, group_norm=group_norm, token_shift=token_shift, bonus=bonus)
    model = rwkv(N=32, C=64, L=2, V=257, rank_w=7, **LLAMA_SHAPED, **switches)
    out = export(model, tmp_path / "m", dtype="float32")
    tensors, weights = load_file(out / "model.safetensors"), model.state_dict()
    mixer = "model.layers.1.self_attn.time_mixer."
    for name in ("w1", "a0", "k_k", "v2", "receptance.weight", *["g2"] * gate, *["ln_x.bias"] * group_norm):
        assert torch.equal(tensors[mixer + name], weights[f"blocks.1.att.{name}"])
    assert torch.equal(tensors["model.layers.0.mlp.up_proj.weight"], weights["blocks.0.ffn.key.weight"])
    assert (f"{mixer}x_g" in tensors) == gate and tensors[f"{mixer}x_r"].any() == token_shift
    config = json.loads((out / "config.json").read_text())
    assert (config["wkv_has_gate"], config["wkv_has_group_norm"]) == (gate, group_norm)
    assert config["architectures"] == ["RwkvHybridForCausalLM"] and config["head_size"] == 32
    assert relative(bring(out, tmp_path)(text(40, 257))[0], model(text(40, 257))[0]) == 0


def test_the_tokenizer_goes_along_and_comes_back(tmp_path):
    hf = pytest.importorskip("transformers")
    enc = imported(train(text=MANUAL[:20_000]), tmp_path / "original")
    model = rwkv(V=1510, C=32, L=1)
    save_model(model, tmp_path / "m", {})
    save_tokenizer(enc, tmp_path / "m")
    out = export_model(ExportConfig(folder=str(tmp_path / "m"), format="hf"))
    words = MANUAL[30_000:32_000]
    assert hf.AutoTokenizer.from_pretrained(out)(words).input_ids == enc.encode_ordinary(words)
    config, ends = (json.loads((out / f"{name}.json").read_text())
                    for name in ("config", "generation_config"))
    assert ends["eos_token_id"] == config["eos_token_id"] == enc.spec["stop"] == [0, 2]
    bring(out, tmp_path)
    assert get_tokenizer(str(tmp_path / "imported")).spec == enc.spec
    require_same(out, export_model(ExportConfig(folder=str(tmp_path / "imported"), format="hf")))


def test_a_model_without_a_tokenizer_has_no_tokenizer_files(tmp_path):
    save_model(rwkv(C=32, L=1), tmp_path / "m", {})
    out = export_model(ExportConfig(folder=str(tmp_path / "m"), format="hf"))
    assert {p.name for p in out.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((out / "config.json").read_text())["eos_token_id"] is None
    assert load_model(tmp_path / "m").n_params() == bring(out, tmp_path).n_params()


def test_worlds_own_file_is_written_for_it():
    """Of the package rwkv's file, every line comes back."""
    package = importlib.util.find_spec("rwkv")
    file = Path(package.submodule_search_locations[0]) / WORLD
    lines = file.read_bytes().decode().splitlines()
    tokens = [b""]
    for line in lines:
        token = ast.literal_eval(line.partition(" ")[2].rpartition(" ")[0])
        tokens.append(token.encode() if isinstance(token, str) else token)
    assert world_files(tokens, None, 65536)[WORLD].decode().splitlines() == lines


def test_the_world_vocabulary_goes_along(tmp_path, monkeypatch):
    rwkv7_hf = pytest.importorskip("rwkv7_hf")
    world = SimpleNamespace(tokens=[b"", *(bytes([i]) for i in range(256)), b"ab"], n_vocab=258,
                            chat=None)
    monkeypatch.setattr(to_huggingface, "load_tokenizer", lambda folder: world)
    save_model(rwkv(V=260, C=32, L=1), tmp_path / "m", {"tokenizer": "world-0"})
    out = export_model(ExportConfig(folder=str(tmp_path / "m"), format="hf"))
    theirs = rwkv7_hf.RWKV7Tokenizer.from_pretrained(out)
    assert theirs("ab\u00e9").input_ids == [257, 0xC3 + 1, 0xA9 + 1] and theirs.eos_token_id == 0
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 0


@pytest.mark.parametrize("changes, word", [({}, "RWKV7ForCausalLM"), (LLAMA_SHAPED, "RWKVInside")])
def test_the_command_says_what_runs_it(changes, word, tmp_path, capsys):
    model = rwkv(C=32, L=1, **changes).bfloat16()
    save_model(model, tmp_path / "m", {})
    main(["export", str(tmp_path / "m"), "--format", "hf", "--out", str(tmp_path / "a" / "hf")])
    assert word in capsys.readouterr().out
    tensors = load_file(tmp_path / "a" / "hf" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}          # as in the folder
    config = json.loads((tmp_path / "a" / "hf" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
