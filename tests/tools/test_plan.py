"""Sizes on paper: parameters against the paper's formula and the released models,
memory against what a small run takes.
"""

import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from common import REPO, T, one_line, random_batch, tiny_model
from config import apply, load_preset
from data.loader import Batch
from lib.folders import on_paper, save_model
from lib.hybrid import describe, remembered_bytes, unit
from lib.muon import Muon
from lib.shard import checkpoint_blocks
from lib.states import nbytes
from model import LM, ModelConfig
from tools.plan import activation_floats, main, plan, training_bytes
from train import FitConfig, Step, TrainConfig, cross_entropy_loss, forward_backward, param_groups


def preset(name: str) -> TrainConfig:
    return apply(TrainConfig(), load_preset(str(REPO / "config" / f"{name}.toml")))


@pytest.mark.parametrize(
    "name, released", [("rwkv7-3b", 2_947_735_040), ("rwkv7-1b5", 1_527_404_544), ("rwkv7-124m", None)]
)
def test_the_presets_count_what_the_papers_formula_and_the_released_models_have(name, released):
    """arXiv 2503.14456, appendix:

    2 D V + 4 D + L D (12 D + 2 (d_w + d_a + d_v + d_g) + 19) - (2 D d_v + D).
    """
    cfg = preset(name).model
    D, V, L, (w, a, v, g) = cfg.n_embd, cfg.vocab_size, cfg.n_layer, map(cfg.rank, "wavg")
    n = on_paper(cfg).n_params()
    assert n == 2 * D * V + 4 * D + L * D * (12 * D + 2 * (w + a + v + g) + 19) - (2 * D * v + D)
    assert released in (None, n)
    assert all(p.is_meta for p in on_paper(cfg).parameters())


@pytest.mark.parametrize("name", ["rwkv7-3b", "rwkv7-1b5", "rwkv7-124m"])
def test_a_preset_prints_its_plan(name, capsys):
    main([str(REPO / "config" / f"{name}.toml"), "--gpus", "8"])
    cfg, said = preset(name), capsys.readouterr().out
    P = on_paper(cfg.model).n_params()
    # two last x, and heads of 64 x 64
    state = cfg.model.n_layer * 4 * (2 * cfg.model.n_embd + cfg.model.n_embd * 64)
    for number in (
        f"{P:,} parameters",
        f"{state / 1e6:.2f} MB",
        f"{8 * P / 1e9:.2f} GB",
        "per GPU of 8",
        f"{8 * cfg.fit.batch_size * cfg.fit.accum * cfg.model.block_size:,} tokens",
    ):
        assert number in said, (number, said)


@pytest.mark.parametrize("name", ["rwkv7-3b", "rwkv7-1b5", "rwkv7-124m"])
def test_the_manuals_row_of_a_preset_is_its_plan_for_8_gpus(name):
    cfg, fit = preset(name).model, preset(name).fit
    B, T = fit.batch_size, fit.bptt_chunk or cfg.block_size
    parts = training_bytes(cfg, B, T, 8)

    def gb(*names):  # each part stands in one column
        return f"{sum(parts.pop(n) for n in names) / 1e9:.2f} GB"

    together = f"{sum(parts.values()) / 1e9:.2f} GB"
    cells = [
        f"`{name}`",
        f"{on_paper(cfg).n_params():,}",
        unit(remembered_bytes(cfg, 1)),
        gb("weights", "gradients", "optimizer", "DDP's buckets"),
        f"{gb('activations')}, {B} x {T} tokens",
        gb("logits' gradient"),
        together,
    ]
    assert not parts and f"| {' | '.join(cells)} |" in (REPO / "docs" / "manual.md").read_text(
        encoding="utf-8"
    ), cells


def test_the_manuals_rows_of_the_7b_preset_are_its_plan_and_fit_80_gb_in_parts_alone():
    cfg = preset("qwen2-7b")
    manual = (REPO / "docs" / "manual.md").read_text(encoding="utf-8")
    for shard, first in ((False, "with DDP"), (True, "`--shard`")):
        how = {"shard": shard, "checkpointed": cfg.run.checkpoint_blocks, "teacher": True}
        parts = training_bytes(cfg.model, cfg.fit.batch_size, cfg.model.block_size, 8, **how)
        owned = parts["weights"] + parts["gradients"] + parts["optimizer"]
        more = parts["gathered" if shard else "DDP's buckets"]
        rest = [parts["teacher"], parts["activations"], parts["logits' gradient"], sum(parts.values())]
        cells = [f"{n / 1e9:.2f} GB" for n in (owned, more, *rest)]
        assert f"| {' | '.join([first, *cells])} |" in manual, cells
        assert (sum(parts.values()) < 80e9) == shard


def test_parts_fall_with_the_number_of_gpus_and_what_is_gathered_does_not():
    cfg = ModelConfig(mixer="ra", n_layer=4)
    two, eight = (training_bytes(cfg, 1, 256, n, shard=True, teacher=True) for n in (2, 8))
    for name in ("weights", "gradients", "optimizer"):
        assert two[name] == 4 * eight[name] == training_bytes(cfg, 1, 256)[name] / 2
    assert two["gathered"] == eight["gathered"] > 0 and two["teacher"] > eight["teacher"]


@pytest.mark.parametrize("ffn", ["gelu", "gelu_exact", "swiglu", "relu2", "channelmix"])
@pytest.mark.parametrize(
    "mixer",
    [
        {"mixer": "a"},
        {"mixer": "a", "n_kv_head": 1, "head_size": 24},
        {"mixer": "r"},
        {"mixer": "r", "rwkv_size": 64},
        {"mixer": "ra"},
        {"mixer": "ar"},
        {"mixer": "raa", "n_layer": 5},
    ],
    ids=str,
)
def test_remembered_bytes_are_those_of_a_state(mixer, ffn):
    """Oracle: the state of a model that has read T tokens."""
    model = tiny_model(**mixer, ffn=ffn)
    for T in (1, 2, 37):
        with torch.no_grad():
            _, state = model(torch.zeros(1, T, dtype=torch.long))
            assert remembered_bytes(model.cfg, T) == nbytes(state)


def test_a_gpu_holds_as_much_however_many_there_are_but_for_ddps_buckets():
    cfg = ModelConfig(mixer="r")
    one, two, many = (training_bytes(cfg, 4, 256, n) for n in (1, 2, 1000))
    assert (
        two == many
        and sum(two.values()) - sum(one.values()) == 4 * on_paper(cfg).n_params() == one["weights"]
    )
    assert training_bytes(cfg, 8, 256)["activations"] == 2 * one["activations"]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"positions": "learned", "ffn": "gelu"},
        {"n_kv_head": 2},
        {"mixer": "r", "ffn": "channelmix"},
        {"mixer": "r", "gate": False},
        {"mixer": "r", "bonus": False},
        {"mixer": "r", "group_norm": False},
        {"mixer": "r", "token_shift": False},
        {"mixer": "r", "rwkv_rope": True},
        {"mixer": "raa", "qk_norm": True},
        {"mixer": "arr", "norm": "rmsnorm", "ffn": "swiglu"},
        {"mixer": "r", "rwkv_size": 256},
        {"mixer": "ara"},
        {"mixer": "r", "rwkv_head_size": 64},
    ],
    ids=str,
)
def test_the_activations_formula_is_what_autograd_saves(shape):
    """Oracle: each storage but the weights' that autograd packs in a forward pass."""
    B, T = 2, 128
    model = LM(
        ModelConfig(
            **{"n_embd": 128, "n_layer": 3, "n_head": 4, "rwkv_head_size": 32, "block_size": T} | shape
        )
    )
    weights, seen, alive = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def note(x):
        alive.append(x)  # so that no address is used twice
        if x.untyped_storage().data_ptr() not in weights:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    tokens = torch.randint(257, (B, T))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        F.cross_entropy(model(tokens)[0].flatten(0, 1), tokens.flatten())
    assert 4 * B * T * activation_floats(model.cfg, T) == pytest.approx(sum(seen.values()), rel=0.02)


def two_steps(cfg: ModelConfig, B: int, checkpointed: bool) -> None:
    """The second step has moments, its second micro-batch gradients too."""
    model = LM(cfg)
    if checkpointed:
        checkpoint_blocks(model)
    optimizer = torch.optim.AdamW(param_groups(model, FitConfig()), lr=1e-4, fused=True)
    loader = SimpleNamespace(W=1, carried=lambda step: [None, None], carry=lambda micro, state: None)
    for step in range(2):
        tokens = torch.randint(cfg.vocab_size, (2, B, cfg.block_size + 1))
        batches = [Batch(x[:, :-1], x[:, 1:], torch.ones(B, cfg.block_size)) for x in tokens]
        forward_backward(
            Step(model, cross_entropy_loss),
            batches,
            2 * B * cfg.block_size,
            loader,
            step,
            torch.device("cpu"),
        )
        optimizer.step()
        optimizer.zero_grad()


def highest(call, trace: Path) -> int:
    """The most bytes that tensors held at once, as torch's allocator reports them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    return max(accumulate(e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])))


@pytest.mark.parametrize(
    "shape, B, checkpointed",
    [
        ({"mixer": "r", "ffn": "channelmix"}, 2, False),
        ({"mixer": "a"}, 8, False),
        ({"mixer": "rraa"}, 3, False),
        ({"mixer": "rraa"}, 6, True),
    ],
    ids=str,
)
def test_the_memory_formula_is_within_15_percent_of_a_measured_step(shape, B, checkpointed, tmp_path):
    """Two steps of two micro-batches.

    Counted are tensors, not pages: no load decides it.
    """
    cfg = ModelConfig(**{"n_layer": 4, "n_embd": 256, "n_head": 4, "rwkv_head_size": 64} | shape)
    small = replace(cfg, n_layer=4, n_embd=64, block_size=16)
    two_steps(small, 1, checkpointed)  # what a first time makes is no step's
    measured = highest(lambda: two_steps(cfg, B, checkpointed), tmp_path / "trace.json")
    formula = sum(training_bytes(cfg, B, 256, checkpointed=checkpointed).values())
    assert formula > 1.2e8 and formula == pytest.approx(measured, rel=0.15), (formula, measured)


@pytest.mark.parametrize("shape", [{"mixer": "ra"}, {"mixer": "r", "ffn": "channelmix"}, {"tied": True}])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_optimizers_bytes_are_those_of_its_state(kind, shape):
    model = tiny_model(**shape)
    optimizer = Muon(param_groups(model, FitConfig(optimizer=kind)))
    model(random_batch().x)[0].square().mean().backward()
    optimizer.step()
    kept = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    for n, shard in ((1, False), (2, False), (2, True)):
        parts = training_bytes(model.cfg, 2, T, n, shard, muon=kind == "muon")
        assert parts["optimizer"] == nbytes(tuple(kept)) / (n if shard else 1)


def test_the_plan_has_the_optimizer_that_is_asked_for(capsys):
    main(["--mixer", "r", "--optimizer", "muon"])
    cfg = ModelConfig(mixer="r")
    assert plan(cfg, 8, 1, 256, 1, muon=True) in capsys.readouterr().out
    assert plan(cfg, 8, 1, 256, 1, muon=True) != plan(cfg, 8, 1, 256, 1)


def test_the_plan_refuses_what_train_refuses_beside_a_model_folder(tmp_path):
    save_model(tiny_model(), tmp_path, {"tokenizer": "bytes"})
    for flags, says in ((["--n_layer", "9"], "omit flags that describe another"),
                        (["--mixer", "r"], "omit flags that describe another"),
                        (["--bptt_truncate"], "bptt_truncate: attention")):
        with pytest.raises(ValueError, match=says) as e:
            main(["--init", str(tmp_path), *flags])
        one_line(e.value)


def test_the_plan_of_a_model_folder_and_of_pieces(tmp_path, capsys):
    model = tiny_model(mixer="ra")
    save_model(model, tmp_path, {"tokenizer": "bytes"})
    main(["--init", str(tmp_path), "--gpus", "1"])
    assert f"{model.n_params():,} parameters" in capsys.readouterr().out
    main(["--mixer", "all", "--block_size", "4096", "--bptt_chunk", "512", "--gpus", "1"])
    said = capsys.readouterr().out
    assert "8 x 512 tokens at once" in said and "32,768 tokens" in said
    cfg = ModelConfig(mixer="r", block_size=4096)
    assert (
        plan(cfg, 8, 1, 512, 1) in said and describe(cfg, 4096) in said and "0 bytes" in describe(cfg, 4096)
    )


def test_bad_plans_end_in_one_line():
    for flags, says in (
        (["--gpus", "0"], "at least 1"),
        (["--gpus", "-2"], "at least 1"),
        (["--gpus", "many"], "gpus"),
        (["--gpus", "1.5"], "gpus"),
        (["config/none.toml", "--gpus", "1"], "there are"),
        (["--gpus", "1", "--init", "out/none"], "no model at"),
        ([str(REPO / "config" / "rwkv7-3b.toml"), "--mixer", "ra", "--n_head", "3", "--gpus", "8"],
         "not divisible by n_head"),
        (["--gpus", "1", "--block_size", "0"], "block_size = 0"),
        (["--gpus", "1", "--vocab_size", "0"], "vocab_size = 0"),
    ):
        with pytest.raises(ValueError, match=says) as e:
            main(flags)
        one_line(e.value)


@pytest.mark.parametrize("mixer", ["a", "r"])
def test_the_smallest_model_has_a_plan(mixer, capsys):
    main(
        [
            "--mixer",
            mixer,
            "--gpus",
            "1",
            "--vocab_size",
            "1",
            "--block_size",
            "1",
            "--batch_size",
            "1",
            "--n_layer",
            "1",
            "--n_embd",
            "32",
            "--n_head",
            "1",
        ]
    )
    assert "a step reads 1 tokens" in capsys.readouterr().out
