"""Which layers stay attention: two rules on known costs, and on real models."""

import json
import shlex
from dataclasses import replace

import pytest
import torch

from common import T, one_line, tiny_model
from common_distill import META, loop, rerun
from config import cli
from data.loader import Loader
from distill import DistillConfig, StudentConfig, make_student
from lib.folders import save_model
from lib.hybrid import letters
from lib.runs import RunConfig
from lib.scores import compare
from tools.rank_layers import RankConfig, hybrid, rank_layers, replaced, restored

LAYERS = 3


@pytest.fixture
def teacher():
    return tiny_model(n_layer=LAYERS, ffn="gelu", qk_norm=True).eval().requires_grad_(False)


def test_a_hybrid_has_the_teachers_attention_and_elsewhere_the_students_mixers(teacher):
    """All attention is the teacher, none the student; the first mixer gives v_first."""
    student = make_student(teacher, StudentConfig()).eval()
    with torch.no_grad():
        for block in student.blocks:
            for p in block.att.parameters():
                p.add_(torch.randn_like(p) * 0.1)
    tokens = torch.randint(0, 257, (2, T))
    assert torch.equal(hybrid(teacher, student, {0, 1, 2})(tokens)[0], teacher(tokens)[0])
    assert torch.equal(hybrid(teacher, student, set())(tokens)[0], student(tokens)[0])
    mixed = hybrid(teacher, student, {0})
    assert mixed.cfg.mixers == "arr" and mixed.blocks[1].att.first
    for key, p in mixed.blocks[0].att.state_dict().items():
        assert torch.equal(p, teacher.blocks[0].att.state_dict()[key]), key
    for i in (1, 2):
        for key, p in mixed.blocks[i].att.state_dict().items():
            assert torch.equal(p, student.blocks[i].att.state_dict()[key]), key


def costs(pairs: dict[tuple, float]):
    """A score in which a set of attention layers costs what `pairs` say."""
    return lambda attention: {"kl": pairs[tuple(sorted(attention))]}


def test_replace_leaves_the_costliest_and_restore_those_that_help_beside_each_other():
    """0 and 1 do the same work: either alone helps most, the other then no more."""
    kl = {(): 0.9, (0,): 0.3, (1,): 0.31, (2,): 0.5, (0, 1): 0.29, (0, 2): 0.05, (1, 2): 0.1, (0, 1, 2): 0.0}
    found = restored(LAYERS, 2, costs(kl))
    assert found["order"] == [0, 2] and [step["kl"] for step in found["steps"]] == [0.9, 0.3, 0.05]
    assert [step["attention"] for step in found["steps"]] == [[], [0], [0, 2]]
    assert replaced(LAYERS, 2, costs(kl))["order"] == [2, 0]          # cost alone 0.1, 0.05, 0.29
    rows = replaced(LAYERS, 1, costs(kl))["layers"]
    assert [(row["layer"], row["kl"]) for row in rows] == [(2, 0.29), (0, 0.1), (1, 0.05)]
    assert letters(4, {0, 2}) == "arar"


@pytest.mark.parametrize("by", ["restore", "replace"])
def test_it_writes_what_it_proposes_and_the_flag_makes_that_student(by, teacher, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    save_model(teacher, tmp_path / "teacher", META)
    cfg = RankConfig(teacher=str(tmp_path / "teacher"), data=tiny.text, keep=2, by=by, eval_tokens=256,
                     align=loop(3, eval_every=None), run=RunConfig(out=str(out), device="cpu"))
    ranking = rank_layers(cfg)
    printed = capsys.readouterr().out
    assert json.loads((out / "ranking" / "ranking.json").read_text()) == ranking
    command = printed.rpartition(": python distill.py ")[2]
    assert "RWKV-7" in printed
    assert cli(DistillConfig, shlex.split(command)) == DistillConfig(
        teacher=cfg.teacher, data=cfg.data, student=replace(DistillConfig().student, mixer=ranking["mixer"]))
    assert [mixer.count("a") for mixer in ranking["mixers"]] == [0, 1, 2]
    assert ranking["mixers"][-1] == ranking["mixer"]
    student = make_student(teacher, StudentConfig(mixer=ranking["mixer"]))
    assert student.cfg.mixers == ranking["mixer"]
    # a later run of the three stages has its folder to itself
    assert not (out / "model.safetensors").exists()
    assert rank_layers(rerun(cfg, resume=True)) == ranking


def test_its_numbers_are_those_of_the_literal_hybrids(teacher, tiny, tmp_path):
    save_model(teacher, tmp_path / "teacher", META)
    run = RunConfig(out=str(tmp_path / "out"), device="cpu")
    cfg = RankConfig(teacher=str(tmp_path / "teacher"), data=tiny.text, keep=1, eval_tokens=256,
                     student=StudentConfig(), align=loop(0), run=run)
    steps = rank_layers(cfg)["steps"]
    torch.manual_seed(0)
    student, val = make_student(teacher, StudentConfig()), Loader(tiny.text, "val", 16, T)
    for step in steps:
        kl = compare(teacher, hybrid(teacher, student, set(step["attention"])), val, 256)["kl"]
        assert step["kl"] == pytest.approx(kl, rel=1e-5)


def test_what_cannot_be_ranked_is_one_line(teacher, tiny, tmp_path):
    save_model(teacher, tmp_path / "teacher", META)
    run = RunConfig(out=str(tmp_path / "o"))
    cfg = RankConfig(teacher=str(tmp_path / "teacher"), data=tiny.text, run=run)
    for change, says in (({"keep": 3}, "keep = 3"), ({"keep": -1}, "keep = -1"),
                         ({"student": StudentConfig(mixer="ra")}, "omit --mixer")):
        with pytest.raises(ValueError, match=says) as error:
            rank_layers(replace(cfg, **change))
        one_line(error.value)
    assert not (tmp_path / "o").exists()
