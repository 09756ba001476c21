"""The official RWKV-7's .pth: rwkv runs what we write; it comes back equal."""

import json
import os

import pytest
import torch

from common_convert import bring, relative, rwkv, text
from lib.folders import save_model
from tools.convert import ExportConfig, ImportConfig, export_model, import_model
from tools.rwkv_pth import official_names


def official():
    os.environ.update(RWKV_V7_ON="1", RWKV_CUDA_ON="0", RWKV_JIT_ON="0")
    module = pytest.importorskip("rwkv.model")
    if not hasattr(module, "RWKV_x070"):
        pytest.skip("rwkv was imported before without RWKV_V7_ON")
    return module.RWKV


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("v0", [False, True], ids=["without v0 in layer 0", "with"])
@pytest.mark.parametrize("changes", [
    dict(N=32),
    dict(N=64, C=192, L=2, V=64),
    dict(N=32, L=1, C=160, ffn_size=77),
    dict(N=64, C=64, rank_w=7, rank_a=9, rank_v=3, rank_g=21, ffn_size=100, tied=True),
])
def test_the_package_rwkv_runs_an_export_with_our_logits(changes, v0, tmp_path):
    model, RWKV = rwkv(**changes), official()
    save_model(model, tmp_path / "m", {"tokenizer": "bytes"})
    out = export_model(ExportConfig(folder=str(tmp_path / "m")))
    assert out == tmp_path / "m.pth"
    if v0:
        tensors = torch.load(out, weights_only=True)
        r, A = tensors["blocks.0.att.a1"].shape
        unused = {"v0": torch.randn(1, 1, r), "v1": torch.randn(r, A), "v2": torch.randn(A, r)}
        torch.save(tensors | {f"blocks.0.att.{name}": t for name, t in unused.items()}, out)
    run = RWKV(model=str(out.with_suffix("")), strategy="cpu fp32")
    tokens = text(90, model.cfg.vocab_size)[0]
    logits, state = model(tokens[None, :40])
    other, other_state = run.forward(tokens[:40].tolist(), None)
    assert relative(logits[0, -1], other) < 1e-4
    for token in tokens[40:]:
        logits, state = model(token.view(1, 1), state)
        other, other_state = run.forward(token.item(), other_state)
    assert relative(logits[0, -1], other) < 1e-4
    back = bring(out, tmp_path)  # and it comes back as it was
    assert relative(back(tokens[None])[0], model(tokens[None])[0]) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [
    {},
    dict(tied=True),
    dict(L=1),
    dict(rank_w=7, rank_a=9, rank_v=3, rank_g=21, ffn_size=100),
])
def test_export_import_export_is_byte_equal(changes, dtype, tmp_path):
    save_model(rwkv(**changes), tmp_path / "m", {})
    first = torch.load(export_model(ExportConfig(folder=str(tmp_path / "m"), dtype=dtype)), weights_only=True)
    import_model(ImportConfig(path=str(tmp_path / "m.pth"), out=str(tmp_path / "back"), dtype=dtype,
                              tokenizer="bytes"))
    second = torch.load(export_model(ExportConfig(folder=str(tmp_path / "back"))), weights_only=True)
    n_layer = len({name.split(".")[1] for name in first if name.startswith("blocks")})
    assert list(first) == list(second) == official_names(n_layer)
    for name, t in first.items():
        assert t.dtype == second[name].dtype == getattr(torch, dtype) and torch.equal(t, second[name])
        assert t.untyped_storage().nbytes() == t.nbytes      # no file larger than its tensors
    assert json.loads((tmp_path / "back" / "meta.json").read_text())["tokenizer"] == "bytes"


def test_the_order_of_an_export_is_the_official_trainers():
    assert official_names(2) == """emb.weight
        blocks.0.ln1.weight blocks.0.ln1.bias blocks.0.ln2.weight blocks.0.ln2.bias
        blocks.0.ln0.weight blocks.0.ln0.bias
        blocks.0.att.x_r blocks.0.att.x_w blocks.0.att.x_k blocks.0.att.x_v blocks.0.att.x_a blocks.0.att.x_g
        blocks.0.att.w1 blocks.0.att.w2 blocks.0.att.w0 blocks.0.att.a1 blocks.0.att.a2 blocks.0.att.a0
        blocks.0.att.g1 blocks.0.att.g2 blocks.0.att.k_k blocks.0.att.k_a blocks.0.att.r_k
        blocks.0.att.receptance.weight blocks.0.att.key.weight blocks.0.att.value.weight
        blocks.0.att.output.weight blocks.0.att.ln_x.weight blocks.0.att.ln_x.bias
        blocks.0.ffn.x_k blocks.0.ffn.key.weight blocks.0.ffn.value.weight
        blocks.1.ln1.weight blocks.1.ln1.bias blocks.1.ln2.weight blocks.1.ln2.bias
        blocks.1.att.x_r blocks.1.att.x_w blocks.1.att.x_k blocks.1.att.x_v blocks.1.att.x_a blocks.1.att.x_g
        blocks.1.att.w1 blocks.1.att.w2 blocks.1.att.w0 blocks.1.att.a1 blocks.1.att.a2 blocks.1.att.a0
        blocks.1.att.v1 blocks.1.att.v2 blocks.1.att.v0
        blocks.1.att.g1 blocks.1.att.g2 blocks.1.att.k_k blocks.1.att.k_a blocks.1.att.r_k
        blocks.1.att.receptance.weight blocks.1.att.key.weight blocks.1.att.value.weight
        blocks.1.att.output.weight blocks.1.att.ln_x.weight blocks.1.att.ln_x.bias
        blocks.1.ffn.x_k blocks.1.ffn.key.weight blocks.1.ffn.value.weight
        ln_out.weight ln_out.bias head.weight""".split()
