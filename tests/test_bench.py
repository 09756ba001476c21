"""The benchmark measures what it says: equal sides, in turns. Nothing here depends on how long anything takes."""

import json

import pytest
import torch

import bench
from bench import decode_sides, in_turns, main, operator_sides, random_rwkv, train_side
from common import one_line, tiny_model
from model import LM, ModelConfig
from sample import kv_bytes

TINY = ModelConfig(n_layer=2, n_embd=64, mixer="r", ffn="channelmix", rwkv_head_size=32, vocab_size=50)


def test_sides_run_in_turns_and_the_median_leaves_the_first_round_out(monkeypatch):
    clock, calls, takes = [0.0], [], {"a": iter([100, 1, 5, 2]), "b": iter([9, 3, 3, 30])}
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def side(name):
        calls.append(name)
        clock[0] += next(takes[name])

    assert in_turns({"a": lambda: side("a"), "b": lambda: side("b")}, 3) == {"a": 2, "b": 3}
    assert calls == ["a", "b"] * 4


def test_the_operators_sides_do_one_work_forward_and_backward():
    sides = operator_sides(2, 40, 3, 64, "cpu", torch.float32)
    loop, chunk, attention = (sides[name]() for name in ("loop", "chunk", "attention"))
    assert [len(g) for g in (loop, chunk, attention)] == [6, 6, 3] and all(g.shape == (2, 40, 3, 64) for g in loop)
    assert all(g.shape == (2, 3, 40, 64) and g.abs().sum() > 0 for g in attention)
    for a, b in zip(loop, chunk):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * a.abs().max().item())


def test_a_training_side_is_a_step_down():
    model, tokens = tiny_model(mixer="r"), torch.randint(257, (2, 17))
    before = [p.detach().clone() for p in model.parameters()]
    train_side(model, tokens)()
    assert all(p.grad is None for p in model.parameters()) and not all(map(torch.equal, before, model.parameters()))


def test_the_model_to_generate_with_has_no_silent_branch():
    """Without any one of its matrices it says something else; with the official initial values alone half of them say nothing."""
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
def test_every_way_to_decode_ends_with_the_same_logits(tmp_path):
    sides = decode_sides(random_rwkv(TINY), list(range(30)), tmp_path)
    logits = {name: side() for name, side in sides.items()}
    assert {"ours", "LM"} <= logits.keys()
    for name, side in sides.items():
        assert logits[name].shape == (50,) and torch.equal(side(), logits[name]), f"{name} is another the second time"
        torch.testing.assert_close(logits[name], logits["LM"], rtol=1e-4, atol=1e-4 * logits["LM"].abs().max().item())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("installed", (True, False))
def test_the_script_prints_tables_and_writes_what_they_say(installed, tmp_path, capsys, monkeypatch):
    def missing(*_):
        raise ImportError

    if installed:
        pytest.importorskip("rwkv")
    else:
        monkeypatch.setattr(bench, "official", missing)
    monkeypatch.setattr(bench, "SHAPES", ((1, 20, 1, 3.0),))
    monkeypatch.setattr(bench, "GPT", ModelConfig(n_layer=1, n_embd=32, n_head=1))
    monkeypatch.setattr(bench, "RWKV", ModelConfig(n_layer=1, n_embd=32, mixer="r", ffn="channelmix"))
    monkeypatch.setattr(bench, "DECODE", {"tiny": (TINY, 5)})
    main(["--repeat", "1", "--device", "cpu", "--json", str(tmp_path / "new" / "b.json")])
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "new" / "b.json").read_text())
    operator, (gpt, rwkv), decode = results["operator"][0], results["train"], results["decode"][0]
    assert operator["than_loop"] == pytest.approx(operator["ms"]["loop"] / operator["ms"]["chunk"]) and operator["goal"] == 3
    assert "(goal 3)" in out and f"{operator['ms']['attention']:.1f}" in out
    assert gpt["ratio"] == 1 and rwkv["ratio"] == pytest.approx(rwkv["tokens_per_s"] / gpt["tokens_per_s"])
    assert gpt["parameters"] == LM(bench.GPT).n_params() and f"{rwkv['tokens_per_s']:,.0f}" in out
    assert decode["state_bytes"] == 4 * 2 * (2 * 32 * 32 + 64 + 64) and decode["kv_bytes"]["65536"] == kv_bytes(TINY, 65536)
    speed = decode["tokens_per_s"]
    if installed:
        assert decode["ratio"] == pytest.approx(speed["ours"] / max(speed["rwkv"], speed["rwkv, 1 thread"])) and decode["difference"] < 1e-4
        assert "(goal 1.5)" in out
    else:
        assert speed.keys() == {"ours", "LM"} and "ratio" not in decode and out.count("rwkv is not installed") == 1


def test_one_part_alone_and_bad_options_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", ((1, 20, 1, 3.0),))
    main(["--only", "operator", "--repeat", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "wkv7" in out and "training" not in out and "memory" not in out
    for args, word in ((["--only", "speed"], "choose operator"), (["--repeat", "0"], "at least 1"), (["--device", "tpu"], "choose auto")):
        with pytest.raises(ValueError) as e:
            main(args)
        assert word in one_line(e.value)
