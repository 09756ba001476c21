"""Rules side by side: patterns, one student for equal ones, rows that add up."""

import json
import shutil
from dataclasses import replace

import pytest

import tools.hybrids
from common import one_line, tiny_model
from common_distill import META, flags, job, loop, teacher  # noqa: F401   (fixtures)
from distill import StudentConfig, distill
from lib.folders import save_model, write_sealed
from lib.home import read_settings
from lib.hybrid import letters, remembered_bytes
from tools.hybrids import HybridsConfig, as_markdown, by_place, main
from tools.recall import RecallConfig, write_pairs


def test_rules_of_place():
    rules = ("uniform", "first", "last")
    patterns = {rule: [letters(4, by_place(rule, 4, n)) for n in range(5)] for rule in rules}
    assert patterns["uniform"] == ["rrrr", "rrra", "rara", "aara", "aaaa"]
    assert patterns["first"] == ["rrrr", "arrr", "aarr", "aaar", "aaaa"]
    assert patterns["last"] == ["rrrr", "rrra", "rraa", "raaa", "aaaa"]


def test_a_row_for_each_rule_and_number_and_equal_patterns_are_one(job, tmp_path, monkeypatch, capsys):
    cfg, out = job("out", stages="align,match", align=loop(2), match=loop(2)), tmp_path / "out"
    made, real = [], tools.hybrids.distill
    monkeypatch.setattr(tools.hybrids, "distill",
                        lambda cfg: made.append((cfg.stages, cfg.student.mixer)) or real(cfg))
    main(flags(cfg))
    report = json.loads((out / "hybrids.json").read_text())
    assert sorted(made) == [("align", "r"), *(("match", mixer) for mixer in ("ar", "ra", "rr"))]
    assert [(row["rule"], row["kept"]) for row in report["rows"]] == [
        (rule, n) for rule in ("restore", "replace", "uniform", "first", "last") for n in (0, 1)]
    for row in report["rows"]:
        assert row["mixer"].count("a") == row["kept"] and row["kl"] >= 0 and "recall" not in row
    by_rule = {row["rule"]: row for row in report["rows"] if row["kept"]}
    assert by_rule["uniform"] == by_rule["last"] | {"rule": "uniform"}
    shape = tiny_model().cfg
    assert report["teacher"]["bytes"] == remembered_bytes(shape, shape.block_size)
    for row in by_rule.values():                          # all share the one stage 1
        assert row["align"]["tokens"] == 2 * 2 * 16 and row["match"]["minutes"] > 0
    assert as_markdown(report) in capsys.readouterr().out
    assert (out / "hybrids.svg").stat().st_size > 1000
    made.clear()
    main([*flags(cfg), "--memory_of", "1000"])            # reads the students back
    again = json.loads((out / "hybrids.json").read_text())
    assert [row | {"bytes": 0} for row in again["rows"]] == [row | {"bytes": 0} for row in report["rows"]]
    assert again["teacher"]["bytes"] == remembered_bytes(shape, 1000)


def test_on_pairs_the_students_and_the_teacher_are_asked(job, tmp_path, capsys):
    write_pairs(tmp_path / "pairs", RecallConfig(pairs="2,4", examples=600, asked=64))
    save_model(tiny_model(block_size=16), tmp_path / "teacher", META)
    cfg = job("out", stages="align,match", data=str(tmp_path / "pairs"), align=loop(2), match=loop(2),
              teacher=str(tmp_path / "teacher"))
    main([*flags(cfg), "--rules", "last", "--kept", "0,1", "--pairs", "4"])
    report = json.loads((tmp_path / "out" / "hybrids.json").read_text())
    assert all(0 <= row["recall"] <= 1 for row in [*report["rows"], report["teacher"]])
    assert "answers right of 4 pairs" in capsys.readouterr().out


def test_more_pairs_than_the_teacher_has_positions_for_are_refused_before_anything_trains(job, tmp_path):
    write_pairs(tmp_path / "pairs", RecallConfig(pairs="2", examples=40, asked=8))
    save_model(tiny_model(positions="learned"), tmp_path / "teacher", META)
    cfg = job("out", stages="align,match", data=str(tmp_path / "pairs"), teacher=str(tmp_path / "teacher"))
    with pytest.raises(ValueError, match="pairs = 6: .* take 18 tokens, .* learned 16 positions") as error:
        main([*flags(cfg), "--pairs", "6"])
    one_line(error.value)
    assert not (tmp_path / "out" / "everywhere").exists()


def test_students_stand_on_one_stage_1_and_may_be_taken_further(job, tmp_path, capsys):
    cfg = job("out", stages="align,match", align=loop(2), match=loop(2))
    words = [*flags(cfg), "--rules", "last", "--kept", "0"]
    main(words)
    report = json.loads((tmp_path / "out" / "hybrids.json").read_text())
    before = (tmp_path / "out" / "everywhere" / "align" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="align.max_steps = 2, not 3: repeat it") as error:
        main([*words, "--align.max_steps", "3"])
    one_line(error.value)
    assert (tmp_path / "out" / "everywhere" / "align" / "model.safetensors").read_bytes() == before
    row = StudentConfig(mixer="rr", decay="lookback", calibrate=True,
                        aligned=str(tmp_path / "out" / "everywhere" / "align"))
    further = job("out/rr", stages="match,finish", align=loop(2), match=loop(2), student=row)
    distill(replace(further, run=replace(further.run, resume=True)))
    main(words)
    again = json.loads((tmp_path / "out" / "hybrids.json").read_text())
    assert again["rows"] == report["rows"]
    with pytest.raises(ValueError, match="overwrite") as error:
        main([*words, "--overwrite"])
    one_line(error.value)


def test_students_with_a_stage_1_of_their_own(job, tmp_path, capsys):
    """Byte for byte what distill.py makes of the pattern, and told as such."""
    cfg, out = job("out", stages="align,match", align=loop(2), match=loop(2)), tmp_path / "out"
    words = [*flags(cfg), "--rules", "first", "--kept", "0,1"]
    main([*words, "--own_steps", "3"])
    report = json.loads((out / "hybrids.json").read_text())
    assert [row["align"]["tokens"] for row in report["rows"]] == [3 * 2 * 16] * 2
    student = StudentConfig(mixer="ar", decay="lookback", calibrate=True)
    distill(job("alone", stages="align,match", align=loop(3), match=loop(2), student=student))
    for stage in ("align", "match"):
        mine, its = (folder / stage / "model.safetensors" for folder in (tmp_path / "alone", out / "ar"))
        assert mine.read_bytes() == its.read_bytes()
    assert not (out / "everywhere").exists()              # no rule asked for it
    table = as_markdown(report)
    assert "| ar | align |" in table and "| rr | align |" in table and "| all |" not in table
    for other, message in ((["--own_steps", "4"], "own_steps = 3, not 4"), ([], "own_steps = 3, not None")):
        with pytest.raises(ValueError, match=message) as error:
            main([*words, *other])
        one_line(error.value)
    shutil.rmtree(out / "ar")
    (out / "ar").mkdir()                                  # killed before its stage 1 began
    settings = read_settings(out / "rr" / "settings.json") | {"mixer": "ar"}
    write_sealed(out / "ar" / "settings.json", settings)
    main([*words, "--own_steps", "3"])                    # reads the other student back
    again = json.loads((out / "hybrids.json").read_text())["rows"]
    assert again[0] == report["rows"][0] and again[1]["kl"] == report["rows"][1]["kl"]


def test_what_cannot_be_compared_is_one_line(job, tmp_path):
    for change in ({"rules": "best"}, {"rules": ""}, {"rules": "first,first"}, {"kept": "x"},
                   {"kept": "1,,2"}, {"kept": "9" * 5000}, {"pairs": 0}, {"pairs": 33}):
        with pytest.raises(ValueError, match=next(iter(change))) as error:
            HybridsConfig(**change)
        one_line(error.value)
    cfg = job("out", stages="align,match")
    with pytest.raises(ValueError, match="kept = 2"):
        main([*flags(cfg), "--kept", "2"])
    with pytest.raises(ValueError, match="omit --mixer"):
        main([*flags(cfg), "--mixer", "ra"])
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "hybrids.json").write_text("{}")
    with pytest.raises(ValueError, match="this command did not write it"):
        main(flags(cfg))
