"""The benchmark measures what it says: equal sides, in turns.

Nothing here depends on how long anything takes.
"""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from common import one_line, start, tiny_model
from model import LM, ModelConfig
from tools import bench, bench_kernels, bench_memory, rivals, timing
from tools.bench import main, speeds, text_sides, train_side
from tools.bench_kernels import errors, fla_side, least_bytes
from tools.rivals import random_rwkv
from tools.timing import in_turns, operator_sides

TINY = ModelConfig(
    n_layer=2, n_embd=64, n_head=2, mixer="r", ffn="channelmix", rwkv_head_size=32, vocab_size=50
)


def test_sides_run_in_turns_and_the_median_leaves_the_first_round_out(monkeypatch):
    clock, calls, takes = [0.0], [], {"a": iter([100, 1, 5, 2]), "b": iter([9, 3, 3, 30])}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def side(name):
        calls.append(name)
        clock[0] += next(takes[name])

    assert in_turns({"a": lambda: side("a"), "b": lambda: side("b")}, 3) == {"a": 2, "b": 3}
    assert calls == ["a", "b"] * 4


def test_the_operators_sides_do_one_work_forward_and_backward():
    sides = operator_sides(2, 40, 3, 64, "cpu", torch.float32)
    loop, chunk, fast, attention = (sides[name].both() for name in ("loop", "chunk", "torch", "attention"))
    assert [len(g) for g in (loop, chunk, fast, attention)] == [6, 6, 6, 3]
    assert all(g.shape == (2, 40, 3, 64) for g in loop)
    assert all(g.shape == (2, 3, 40, 64) and g.abs().sum() > 0 for g in attention)
    for a, b in [*zip(loop, chunk), *zip(loop, fast)]:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * a.abs().max().item())


def test_a_training_side_is_a_step_down():
    model, tokens = tiny_model(mixer="r"), torch.randint(257, (2, 17))
    before = [p.detach().clone() for p in model.parameters()]
    train_side(model, tokens)()
    assert all(p.grad is None for p in model.parameters()) and not all(
        map(torch.equal, before, model.parameters())
    )


def test_the_model_to_generate_with_has_no_silent_branch():
    """Without any one of its matrices it says something else; with the official initial
    values alone half of them say nothing.
    """
    text = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(0))

    def silent(model):
        logits, found = model(text)[0], []
        for name, p in model.named_parameters():
            if p.ndim == 2:
                kept = p.clone()
                p.zero_()
                found += [name] if (model(text)[0] - logits).abs().max() < 1e-5 else []
                p.copy_(kept)
        return found

    with torch.no_grad():
        assert silent(random_rwkv(TINY)) == [] and "blocks.1.att.receptance.weight" in silent(LM(TINY))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_every_way_to_write_ends_with_the_same_logits(tmp_path):
    sides = text_sides(random_rwkv(replace(TINY, vocab_size=300)), 30, tmp_path)
    logits = {side.name: side.logits() for side in sides if side.logits}
    assert {"ours, float32", "ours, bfloat16", "ours, int8", "ours, LM"} <= logits.keys()
    for side in sides:
        assert side.write() > 0 and (side.read is None or side.read() > 0)
        if side.logits:
            assert logits[side.name].shape == (300,) and torch.equal(side.logits(), logits[side.name])
            most = {"ours, bfloat16": 3e-2, "ours, int8": 1e-1}.get(side.name, 1e-4)
            difference = (logits[side.name] - logits["ours, LM"]).norm()
            assert difference < most * logits["ours, LM"].norm(), side.name


def test_llama_cpp_reads_and_writes_what_it_is_asked_to(tmp_path):
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    model = random_rwkv(replace(TINY, rwkv_head_size=64, n_embd=64, vocab_size=300))
    ask = rivals.LlamaCpp(model, tmp_path, "float32", 1)          # it asserts how many tokens there were
    assert min(ask(5, 3)) > 0


def test_speeds_are_of_the_median_turn_and_the_extremes():
    assert speeds(6, [1.0, 3.0, 2.0]) == {"median": 3, "slowest": 2, "fastest": 6}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("installed", (True, False))
def test_the_script_prints_tables_and_writes_what_they_say(installed, tmp_path, capsys, monkeypatch):
    def missing(*_):
        raise ImportError

    if installed:
        pytest.importorskip("rwkv")
    else:
        monkeypatch.setattr(bench, "official", missing)
    monkeypatch.setattr(bench, "LlamaCpp", missing)
    monkeypatch.setattr(bench, "SHAPES", ((1, 20, 1, 3.0),))
    monkeypatch.setattr(bench, "TRAIN", ((ModelConfig(n_layer=1, n_embd=32, n_head=1), 2, 20),))
    monkeypatch.setattr(bench, "TEXT", {"tiny": (TINY, 5)})
    main(["--repeat", "1", "--device", "cpu", "--json", str(tmp_path / "new" / "b.json")])
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "new" / "b.json").read_text())
    operator, (gpt, rwkv), text = results["operator"][0], results["train"], results["text"][0]
    assert operator["than_loop"] == pytest.approx(operator["ms"]["loop"] / operator["ms"]["torch"])
    assert operator["goal"] == 3 and "(goal 3)" in out and f"{operator['ms']['attention']:.1f}" in out
    assert gpt["ratio"] == 1 and rwkv["ratio"] == pytest.approx(rwkv["tokens_per_s"] / gpt["tokens_per_s"])
    assert gpt["parameters"] == LM(bench.TRAIN[0][0]).n_params() and f"{rwkv['tokens_per_s']:,.0f}" in out
    assert text["state_bytes"] == 4 * 2 * (2 * 32 * 32 + 64 + 64)
    assert text["kv_bytes"]["65536"] == 2 * 65536 * 2 * 4 * TINY.n_embd
    rows = {row["side"]: row for row in text["sides"]}
    names = {"ours, float32", "ours, bfloat16", "ours, int8", "ours, LM"}
    names |= {"rwkv, float32"} if installed else set()
    assert rows.keys() == names and {row["threads"] for row in rows.values()} == {1}
    assert all(row["one_by_one"]["slowest"] <= row["one_by_one"]["fastest"] for row in rows.values())
    read = {name for name, row in rows.items() if "at_once" in row}
    assert read == names & {"ours, LM", "rwkv, float32"}
    assert all(row["differ"] < {"ours, bfloat16": 0.1, "ours, int8": 0.2}.get(name, 1e-4)
               for name, row in rows.items())
    absent = "xllamacpp" if installed else "rwkv, xllamacpp"
    assert out.count(f"not installed, so not compared: {absent}\n") == 1


def test_one_part_alone_and_bad_options_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", ((1, 20, 1, 3.0),))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    main(["--only", "operator", "--repeat", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "wkv7" in out and "training" not in out and "memory" not in out
    cases = [
        (main, ["--only", "speed"], "operator"),
        (main, ["--repeat", "0"], "at least 1"),
        (main, ["--device", "tpu"], "choose auto"),
        (main, ["--json", str(tmp_path)], "is a folder"),
        (main, ["--json", __file__], "this command did not write it"),
        (bench_memory.main, ["--json", "/dev/null"], "this command did not write it"),
        (bench_kernels.main, ["--device", "cpu"], "needs tensors on an NVIDIA GPU"),
    ]
    for script, args, word in cases:
        with pytest.raises(ValueError) as e:
            script(args)
        assert word in one_line(e.value)


# ------------------------------------------------------------------------------------------
# Memory against the length of the sequence


def test_every_side_of_the_memory_benchmark_is_a_training_step():
    """The same parameters in the three RWKV-7 sides; what they compute alike is for
    test_bptt.py to say.
    """
    cfg = bench_memory.MemoryConfig(layers=2, embd=32, bptt_chunk=20)
    rows = {name: bench_memory.length_side(name, 50, cfg, "cpu") for name in bench_memory.SIDES}
    assert len({rows[name]["parameters"] for name in rows if name != "GPT"}) == 1 and len(rows) == 4
    assert all(row["tokens_per_s"] > 0 and row["MB"] >= 0 for row in rows.values())


@pytest.mark.parametrize("first, runs", [(4.9, 1 + 7), (5.0, 1)])
def test_a_step_is_repeated_as_often_as_is_asked_or_not_at_all_where_it_is_slow(monkeypatch, first, runs):
    seconds = iter([first] + [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    monkeypatch.setattr(bench_memory, "stopwatch", lambda step: next(seconds))
    cfg = bench_memory.MemoryConfig(layers=1, embd=32, repeat=7)
    row = bench_memory.length_side("RWKV-7", 16, cfg, "cpu")
    assert row["seconds"] == (8.0 if runs > 1 else first) and len(list(seconds)) == 8 - runs


def test_memory_is_measured_in_processes_of_their_own_and_one_that_fails_or_is_slow_costs_no_other(
    tmp_path, capsys, monkeypatch
):
    real = bench_memory.subprocess.run

    def children(command, **kwargs):
        if "'GPT'" in command[-1] and ", 32, " in command[-1]:
            return SimpleNamespace(returncode=1, stderr="Traceback\nRuntimeError: out of memory", stdout="")
        if "checkpointed" in command[-1]:
            return SimpleNamespace(
                returncode=0,
                stderr="",
                stdout='greetings\n{"parameters": 1, "MB": 7.0, "tokens_per_s": 5.0, "seconds": 61.0}',
            )
        return (
            real(command, **kwargs)
            if "in pieces" in command[-1]
            else SimpleNamespace(
                returncode=0,
                stderr="",
                stdout='{"parameters": 1, "MB": 8.0, "tokens_per_s": 50.0, "seconds": 1.0}',
            )
        )

    monkeypatch.setattr(bench_memory.subprocess, "run", children)
    bench_memory.main(
        [
            "--device",
            "cpu",
            "--lengths",
            "64,32",
            "--bptt_chunk",
            "16",
            "--layers",
            "1",
            "--embd",
            "32",
            "--json",
            str(tmp_path / "m.json"),
        ]
    )
    first, second = json.loads((tmp_path / "m.json").read_text())["memory"]
    assert (first["T"], second["T"]) == (32, 64)
    assert first.keys() == {"T", "RWKV-7", "RWKV-7, checkpointed", "RWKV-7, in pieces"} and second.keys() == {
        "T",
        "RWKV-7",
        "RWKV-7, in pieces",
    }
    assert first["RWKV-7, in pieces"]["tokens_per_s"] > 0 and first["RWKV-7"]["MB"] == 8
    out = capsys.readouterr().out
    assert "GPT is left out from T = 32 on: RuntimeError: out of memory" in out and "training step" not in out
    for args, word in (
        (["--lengths", "1k"], "lengths = '1k'"),
        (["--lengths", "8"], "at least 16"),
        (["--embd", "33"], "embd = 33"),
        (["--limit", "inf"], "limit = inf"),
        (["--lengths", "9" * 5000], "at least 16"),
    ):
        with pytest.raises(ValueError) as e:
            bench_memory.main(args)
        assert word in one_line(e.value)


# ------------------------------------------------------------------------------------------
# The kernels' benchmark. What it says of a GPU is for a GPU to say; here are its bytes,
# its errors and its course

FLA = """
import torch

def chunk_rwkv7(r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False,
                cu_seqlens=None, cu_seqlens_cpu=None, safe_gate=False, chunk_size=None,
                disable_recompute=False, cp_context=None, lower_bound=None):
    '''S_t = diag(e^w) S + b (a^T S) + k v^T, y = S^T r, S (B, H, K, V), token by token.'''
    if chunk_size == 32:
        raise RuntimeError("out of\\nshared memory")
    r, w, k, v, a, b = (x.float() for x in (r, w, k, v, a, b))
    S, ys = (0 if initial_state is None else initial_state) + 0 * k[:, 0, ..., None] * v[:, 0, :, None], []
    for t in range(r.shape[1]):
        aS = (a[:, t, ..., None] * S).sum(-2, keepdim=True)
        S = S * w[:, t, ..., None].exp() + b[:, t, ..., None] * aS + k[:, t, ..., None] * v[:, t, :, None]
        ys.append((r[:, t, ..., None] * S).sum(-2))
    return torch.stack(ys, 1).bfloat16(), S if output_final_state else None
"""


@pytest.fixture
def fla(tmp_path):
    """A folder with a package fla that has the real one's one measured function."""
    (tmp_path / "fla" / "ops" / "rwkv7").mkdir(parents=True)
    (tmp_path / "fla" / "ops" / "rwkv7" / "__init__.py").write_text(FLA)
    return tmp_path


def test_least_traffic_at_a_head_of_64():
    assert least_bytes(64) == {"forward": 896, "both": 2816}


def test_errors_are_relative_to_the_definition_for_us_and_in_flas_terms():
    chunk = operator_sides(2, 40, 3, 16, "cpu", torch.float32)["torch"]
    assert errors(chunk).keys() == set(bench_kernels.OUTPUTS) and max(errors(chunk).values()) < 1e-5
    more = replace(chunk, run=lambda *inputs: (1.01 * chunk.run(*inputs)[0], chunk.run(*inputs)[1]))
    assert errors(more)["y"] == pytest.approx(0.01, rel=1e-3) and errors(more)["S"] < 1e-5
    exec(FLA.replace(".bfloat16()", ""), namespace := {})
    assert max(errors(fla_side(namespace["chunk_rwkv7"], chunk)).values()) < 1e-5


def test_what_is_not_written_is_not_taken_for_right():
    """Not even one number of an uncompared head: memory is NaN until written."""
    chunk = operator_sides(2, 20, 3, 16, "cpu", torch.float32)["torch"]

    def forgetful(*inputs):
        y, S = chunk.run(*inputs)
        mask = torch.ones_like(y, dtype=torch.bool)
        mask[0, 5, 1, 3] = False
        return torch.where(mask, y, torch.empty_like(y)), S

    assert all(map(math.isnan, errors(replace(chunk, run=forgetful)).values()))
    assert not torch.are_deterministic_algorithms_enabled() and torch.empty(3).shape == (3,)


def test_the_kernels_benchmark_in_the_interpreter_beside_a_stand_in_for_fla(fla, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", str(fla))
    process = start("-m", "tools.bench_kernels", "--repeat", "1", "--json", fla / "new" / "k.json")
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    results = json.loads((fla / "new" / "k.json").read_text())
    (row,) = results["kernels"].values()
    working = {name for name in bench_kernels.FLA if "32" not in name}
    assert results["copy_GB_per_s"] > 0 and row["fla_ms"].keys() == working and row["best"] in working
    assert row["sides"].keys() == {"loop", "chunk", "torch", "triton", "attention", "fla", row["best"]}
    for name in ("triton", row["best"]):
        side = row["sides"][name]
        assert max(side["errors"].values()) < 6e-3 and side["errors"].keys() == set(bench_kernels.OUTPUTS)
        for way, least in (("forward", 896), ("both", 2816)):
            assert side[f"{way}_GB_per_s"] == pytest.approx(1 * 20 * 2 * least / side[f"{way}_ms"] / 1e6)
            assert side[f"{way}_of_copy"] == pytest.approx(side[f"{way}_GB_per_s"] / results["copy_GB_per_s"])
    value, most = row["goals"]["both ms, of fla's best"]
    assert most == 0.5 and value == pytest.approx(
        row["sides"]["triton"]["both_ms"] / row["sides"][row["best"]]["both_ms"]
    )
    assert (
        "not how fast" in out
        and "fla, chunk 32 is left out: RuntimeError: out of shared memory" in out
        and "MISSED" in out
    )
    assert (fla / "new" / "k.png").exists() or "no plot" in out


def test_without_fla_a_line_says_so(capsys, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setattr(bench_kernels, "TINY_SHAPES", ())
    bench_kernels.main([])
    assert "fla (pip install fla-core==0.6.0) is left out: ModuleNotFoundError" in capsys.readouterr().out


def test_a_side_that_fails_costs_no_other_side_anything(capsys, monkeypatch):
    """Neither in running, nor in its errors; our own failure leaves out a shape, and
    the script goes on.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sides = operator_sides(1, 8, 1, 16, "cpu", torch.bfloat16)
    sides["triton"] = sides["torch"]  # which is faster here
    broken = replace(sides["loop"], exact=lambda *inputs: 1 / 0)
    failing = sides | {"loop": broken, "chunk": replace(broken, run=broken.exact)}
    monkeypatch.setattr(bench_kernels, "operator_sides", lambda *shape: failing)
    row = bench_kernels.kernel_row(1, 8, 1, None, bench_kernels.KernelsConfig(repeat=1), "cpu", 1e9)
    assert row["sides"].keys() == {"loop", "torch", "triton", "attention"} and all(
        map(math.isnan, row["sides"]["loop"]["errors"].values())
    )
    assert max(row["sides"]["triton"]["errors"].values()) < 6e-3
    out = capsys.readouterr().out
    assert (
        "chunk is left out: ZeroDivisionError" in out
        and "errors of loop is left out: ZeroDivisionError" in out
    )
