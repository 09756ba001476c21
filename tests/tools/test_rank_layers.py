"""Which layer is costliest to replace, and the proposal made of it."""

import json
from dataclasses import replace

import pytest
import torch

from common import T, one_line, random_batch, tiny_model
from common_distill import META, loop, rerun
from data.loader import Loader
from distill import StudentConfig, align_loss, make_student, wrap
from lib.folders import save_model
from lib.runs import RunConfig
from lib.scores import compare
from tools.rank_layers import RankConfig, propose, rank_layers, replacement_costs


def test_a_layers_cost_is_the_kl_of_a_model_with_that_layer_replaced(tiny):
    """Layer 0 alone, with its own v_first: the number is the literal hybrid first:1's.

    A mixer that gives nothing costs what removing the attention does.
    """
    teacher = tiny_model(n_layer=3, ffn="gelu").eval().requires_grad_(False)
    student = make_student(teacher, StudentConfig())
    with torch.no_grad():
        for p in student.blocks[2].att.parameters():
            p.zero_()
    val = Loader(tiny.text, "val", 4, T)
    rows = replacement_costs(student, teacher, val, 640)
    assert [row["kl"] for row in rows] == sorted((row["kl"] for row in rows), reverse=True)
    kl = {row["layer"]: row["kl"] for row in rows}
    assert kl.keys() == {0, 1, 2}

    hybrid = make_student(teacher, StudentConfig(mixer="first:1"))
    hybrid.blocks[0].att.load_state_dict(student.blocks[0].att.state_dict())
    assert kl[0] == pytest.approx(compare(teacher, hybrid.eval(), val, 640)["kl"], rel=1e-5)

    without = tiny_model(n_layer=3, ffn="gelu").eval()
    with torch.no_grad():
        without.blocks[2].att.o_proj.weight.zero_()
    assert kl[2] == pytest.approx(compare(teacher, without, val, 640)["kl"], rel=1e-5)
    again = wrap(student, teacher)
    assert all(block.att.teacher is not None for block in again.blocks)
    assert align_loss(again, random_batch())[0]["loss"].isfinite()


def test_the_proposal_keeps_the_costliest_layers():
    rows = [{"layer": i, "kl": kl} for i, kl in ((2, 0.9), (0, 0.5), (3, 0.2), (1, 0.1))]
    assert [propose(rows, keep)["mixer"] for keep in range(4)] == ["rrrr", "rrar", "arar", "araa"]
    assert propose(rows, 2)["attention"] == [0, 2]


def test_it_writes_what_it_proposes_and_the_flag_makes_that_student(tiny, tmp_path, capsys):
    teacher, out = tiny_model(n_layer=3), tmp_path / "out"
    save_model(teacher, tmp_path / "teacher", META)
    cfg = RankConfig(
        teacher=str(tmp_path / "teacher"),
        data=tiny.text,
        keep=2,
        eval_tokens=256,
        align=loop(3, eval_every=None),
        run=RunConfig(out=str(out), device="cpu"),
    )
    ranking = rank_layers(cfg)
    printed = capsys.readouterr().out
    assert json.loads((out / "ranking" / "ranking.json").read_text()) == ranking
    assert f"--mixer {ranking['mixer']}" in printed and "RWKV-7" in printed and len(ranking["layers"]) == 3
    assert ranking["mixer"].count("a") == 2
    assert make_student(teacher, StudentConfig(mixer=ranking["mixer"])).cfg.mixers == ranking["mixer"]
    # a later run of the three stages has its folder to itself
    assert not (out / "model.safetensors").exists()
    assert rank_layers(rerun(cfg, resume=True)) == ranking
    elsewhere = rerun(cfg, out=str(tmp_path / "other"))
    for change, says in (
        ({"keep": 3}, "keep = 3"),
        ({"keep": -1}, "keep = -1"),
        ({"student": StudentConfig(mixer="ra")}, "omit --mixer"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            rank_layers(replace(elsewhere, **change))
        one_line(error.value)
    assert not (tmp_path / "other").exists()
