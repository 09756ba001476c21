"""Hybrids: patterns of layers, what each kind costs, what stage 1 trains, and which layer is costliest to replace."""

import json
from dataclasses import replace

import pytest
import torch

import distill
from common import T, one_line, random_batch, state_dict, tiny_model
from data.loader import Loader
from distill import DistillConfig, StudentConfig, align_loss, make_student, prepare_stage, propose, replacement_costs, wrap
from evaluate import compare
from model import ModelConfig, cache_bytes, load_model, save_model
from plan import describe, unit
from train import FitConfig


@pytest.mark.parametrize("pattern, letters", [
    ("a", "aaaaaa"), ("r", "rrrrrr"), ("ra", "rarara"), ("rra", "rrarra"), ("arrrrr", "arrrrr"), ("rraa", "rraarr"),
    ("all", "rrrrrr"), ("alternate", "rarara"), ("every:1", "rrrrrr"), ("every:2", "rarara"), ("every:4", "raaara"), ("every:6", "raaaaa"),
    ("first:1", "raaaaa"), ("first:4", "rrrraa"), ("first:6", "rrrrrr"), ("last:1", "aaaaar"), ("last:4", "aarrrr"),
    ("0,2,5", "raraar"), ("5,2", "aaraar"), ("3", "aaaraa"), ("0,0", "raaaaa"), ("auto:1", "aaaaaa"), ("auto:10000000000", "rrrrrr"),
])
def test_every_pattern_names_the_layers_that_are_rwkv(pattern, letters):
    assert ModelConfig(n_layer=6, mixer=pattern).mixers == letters


def test_the_names_agree_where_they_mean_the_same():
    for L in range(1, 9):
        letters = lambda pattern: ModelConfig(n_layer=L, mixer=pattern).mixers  # noqa: E731
        assert letters("all") == letters("r") == letters("every:1") == letters(f"first:{L}") == letters(f"last:{L}") == letters(",".join(map(str, range(L))))
        if L > 1:
            assert letters("alternate") == letters("every:2") == letters("ra")
        for K in range(1, L):
            flipped = letters(f"last:{L - K}").translate(str.maketrans("ar", "ra"))
            assert letters(f"first:{K}") == flipped  # the first K, or all but the last L - K


@pytest.mark.parametrize("shape", [{}, {"n_kv_head": 1}, {"block_size": 1024}, {"rwkv_head_size": 16, "block_size": 32}], ids=str)
def test_auto_keeps_as_many_attention_layers_as_the_memory_of_block_size_has_room_for(shape):
    cfg = ModelConfig(n_layer=12, **shape)
    room = 12 * cache_bytes(cfg, "a", cfg.block_size)
    before = 12
    for K in (1, cfg.block_size, cfg.block_size + 1, 2 * cfg.block_size, 3 * cfg.block_size, 16 * cfg.block_size, 10**7):
        letters = replace(cfg, mixer=f"auto:{K}").mixers
        a = letters.count("a")
        takes = lambda a: a * cache_bytes(cfg, "a", K) + (12 - a) * cache_bytes(cfg, "r", K)  # noqa: E731, B023
        assert a <= before
        before = a
        if K <= cfg.block_size:
            assert a == 12
        else:
            assert takes(a) <= room < takes(a + 1) and (a == 0 or letters[-1] == "a")
            gaps = [len(run) for run in letters.split("a")[:-1]]
            assert not gaps or max(gaps) - min(gaps) <= 1  # evenly spread


@pytest.mark.parametrize("pattern", ["", "rx", "rrrrrrr", "first:0", "first:7", "last:-1", "every:", "every:0", "every:x",
                                     "6", "-1", "0,", ",", "0, 2", "0-2", "auto:0", "auto", "auto:", "auto:-1", "auto:1e4", "all:2", " r", "r ", "a,r",
                                     "alternate:2", "ALL", "RA", "most:3", "1.5", "first:1:2", ":", ":2"])
def test_any_other_pattern_is_refused_in_one_line_that_says_what_there_is(pattern):
    with pytest.raises(ValueError, match="first:K") as e:
        ModelConfig(n_layer=6, mixer=pattern)
    assert repr(pattern) in one_line(e.value) and "n_layer = 6" in str(e.value)


@pytest.mark.parametrize("positions, mixer, longest", [("learned", "a", T), ("learned", "ra", T), ("learned", "all", None), ("rope", "a", None),
                                                       ("none", "ra", None)])
def test_only_attention_with_learned_positions_has_a_longest_text(positions, mixer, longest):
    model = tiny_model(positions=positions, mixer=mixer)
    assert model.cfg.longest == longest
    _, state = model(random_batch(length=longest or 2 * T).x)
    if longest:
        with pytest.raises(ValueError, match=f"position {T + 1} is beyond the {T} learned"):
            model(random_batch(length=1).x, state)


@pytest.mark.parametrize("pattern", ["ra", "rrra", "alternate", "1,2", "auto:64"])
def test_a_model_folder_keeps_its_pattern(pattern, tmp_path):
    model = tiny_model(n_layer=4, mixer=pattern)
    save_model(model, tmp_path, {"tokenizer": "bytes"})
    assert json.loads((tmp_path / "config.json").read_text())["mixer"] == pattern
    loaded, x = load_model(tmp_path), random_batch().x
    assert loaded.cfg.mixers == model.cfg.mixers and torch.equal(loaded(x)[0], model(x)[0])


@pytest.mark.parametrize("pattern", ["all", "first:2", "last:1", "1,3", "2", "every:3"])
def test_a_hybrid_with_its_first_rwkv_layer_anywhere_reads_tokens_singly_as_at_once(pattern):
    model = tiny_model(n_layer=4, mixer=pattern).double()
    x = random_batch(2, 11).x
    whole, _ = model(x)
    state, parts = None, []
    for piece in (x[:, :5], *x[:, 5:].split(1, 1)):
        y, state = model(piece, state)
        parts.append(y)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5 * whole.abs().max()  # the state is float32


def test_v_first_is_the_value_of_the_first_rwkv_layer_wherever_it_is():
    """Layers 1 and 3 are RWKV-7: what layer 3 takes as v_first is W_value x of layer 1, and attention in between hands it on."""
    model, seen = tiny_model(n_layer=4, mixer="1,3"), {}
    hooks = [block.att.register_forward_hook(lambda _, args, result, i=i: seen.update({i: (args, result)})) for i, block in enumerate(model.blocks)]
    model(random_batch().x)
    for hook in hooks:
        hook.remove()
    att, x = model.blocks[1].att, seen[1][0][0]
    last = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
    value = att.value(x + (last - x) * att.x_v)
    assert seen[0][1][1] is None and seen[1][0][1] is None and torch.allclose(seen[1][1][1], value, atol=1e-6)
    assert seen[2][1][1] is seen[1][1][1] and seen[3][0][1] is seen[1][1][1]
    assert not hasattr(att, "v0") and hasattr(model.blocks[3].att, "v0")


def numbers(text: str) -> list[int]:
    return [int(word.replace(",", "")) for word in text.split() if word.replace(",", "").isdigit()]


@pytest.mark.parametrize("n", [1, 9, 1000])
@pytest.mark.parametrize("shape", [{"mixer": "all"}, {"mixer": "a"}, {"mixer": "1,2", "n_kv_head": 1}, {"mixer": "first:1", "rwkv_size": 64},
                                   {"mixer": "all", "ffn": "channelmix"}], ids=str)
def test_describe_counts_what_a_real_model_has_and_remembers(shape, n):
    model = tiny_model(n_layer=3, **shape)
    head, *rows = describe(model.cfg, n).splitlines()
    assert model.cfg.mixers in head and numbers(head)[:2] == [3, model.n_params()]
    state = model(torch.zeros(1, n, dtype=torch.long))[1]
    assert head.partition(f"memory of {n:,} tokens: ")[2] == unit(state.nbytes()) + (", 384 bytes of it in ChannelMix" if "ffn" in shape else "")
    count = lambda s: s.nbytes if isinstance(s, torch.Tensor) else sum(map(count, s)) if isinstance(s, tuple) else 0  # noqa: E731
    layers = state.layers
    total = sum(count(layer[0]) for layer in layers)
    for row, kind in zip(rows, "ar"):
        mine = [i for i, letter in enumerate(model.cfg.mixers) if letter == kind]
        params = sum(p.numel() for i in mine for p in model.blocks[i].att.parameters())
        memory = sum(count(layers[i][0]) for i in mine)
        assert memory == len(mine) * cache_bytes(model.cfg, kind, n)
        assert numbers(row)[:2] == [len(mine), params]
        assert row.split("%")[0].endswith(f"{100 * params / model.n_params():.1f}") and row.endswith(f"{memory / total:.1%}")
    with pytest.raises(ValueError, match="at least 1"):
        describe(model.cfg, 0)


@pytest.mark.parametrize("pattern", ["first:1", "1", "0,2", "last:2"])
def test_stage_1_of_a_hybrid_moves_the_replaced_layers_and_nothing_else(pattern):
    teacher = tiny_model(n_layer=3).requires_grad_(False)
    student, batch = make_student(teacher, StudentConfig(mixer=pattern)), random_batch()
    model, loss_fn = prepare_stage("align", DistillConfig(), student, teacher, teacher, "text")
    replaced = {f"blocks.{i}.att." for i, letter in enumerate(student.cfg.mixers) if letter == "r"}
    before = state_dict(student)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        loss_fn(model, batch)[0]["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in student.state_dict().items() if not torch.equal(p, before[name])}
    assert {name[: name.index("att.") + 4] for name in moved} == replaced
    assert all(torch.equal(p, teacher.state_dict()[name]) for name, p in student.state_dict().items() if name.startswith("blocks") and ".att." in name
               and not any(name.startswith(r) for r in replaced))
    # the error is the mean over the replaced layers alone, each on the teacher's inputs
    assert len([block for block in model.blocks if hasattr(block.att, "pair")]) == len(replaced)


def test_a_layers_cost_is_the_kl_of_a_model_with_that_layer_replaced(tiny):
    """Layer 0 alone, whose v_first is its own: the ranking's number is that of the literal hybrid first:1. A mixer that
    gives nothing costs what removing the attention does."""
    teacher = tiny_model(n_layer=3, ffn="gelu").eval().requires_grad_(False)
    student = make_student(teacher, StudentConfig())
    with torch.no_grad():
        for p in student.blocks[2].att.parameters():
            p.zero_()
    val = Loader(tiny.text, "val", 4, T)
    rows = replacement_costs(student, teacher, val, 640)
    assert [row["kl"] for row in rows] == sorted((row["kl"] for row in rows), reverse=True) and {row["layer"] for row in rows} == {0, 1, 2}
    kl = {row["layer"]: row["kl"] for row in rows}

    hybrid = make_student(teacher, StudentConfig(mixer="first:1"))
    hybrid.blocks[0].att.load_state_dict(student.blocks[0].att.state_dict())
    assert kl[0] == pytest.approx(compare(teacher, hybrid.eval(), val, 640)["kl"], rel=1e-5)

    without = tiny_model(n_layer=3, ffn="gelu").eval()
    with torch.no_grad():
        without.blocks[2].att.o_proj.weight.zero_()
    assert kl[2] == pytest.approx(compare(teacher, without, val, 640)["kl"], rel=1e-5)
    again = wrap(student, teacher)
    assert all(block.att.teacher is not None for block in again.blocks) and align_loss(again, random_batch())[0]["loss"].isfinite()


def test_the_proposal_keeps_the_costliest_layers():
    rows = [{"layer": i, "kl": kl} for i, kl in ((2, 0.9), (0, 0.5), (3, 0.2), (1, 0.1))]
    assert [propose(rows, keep)["mixer"] for keep in range(4)] == ["rrrr", "rrar", "arar", "araa"]
    assert propose(rows, 2)["attention"] == [0, 2]


def test_rank_layers_as_a_script_writes_what_it_proposes_and_the_flag_makes_that_student(tiny, tmp_path, capsys):
    teacher = tiny_model(n_layer=3)
    save_model(teacher, tmp_path / "teacher", {"tokenizer": "bytes"})
    cfg = DistillConfig(teacher=str(tmp_path / "teacher"), data=tiny.text, out=str(tmp_path / "out"), rank_layers=True, keep=2, eval_tokens=256,
                        align=FitConfig(max_steps=3, batch_size=2, eval_every=None))
    ranking = distill.distill(cfg)
    said = capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "ranking" / "ranking.json").read_text()) == ranking
    assert f"--mixer {ranking['mixer']}" in said and "RWKV-7" in said and len(ranking["layers"]) == 3
    assert ranking["mixer"].count("a") == 2 and make_student(teacher, StudentConfig(mixer=ranking["mixer"])).cfg.mixers == ranking["mixer"]
    assert not (tmp_path / "out" / "model.safetensors").exists()  # a later run of the three stages has its folder to itself
    assert distill.distill(replace(cfg, resume=True)) == ranking
    for change, says in (({"keep": 3}, "keep = 3"), ({"keep": -1}, "keep = -1"), ({"student": StudentConfig(mixer="ra")}, "omit --mixer")):
        with pytest.raises(ValueError, match=says) as e:
            distill.distill(replace(cfg, out=str(tmp_path / "other"), **change))
        one_line(e.value)
