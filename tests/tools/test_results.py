"""The table over seeds."""

import json

import pytest

from common import one_line
from common_models import ROW
from tools.results import collect, main


def test_seeds_are_collected_into_median_and_range(tmp_path, capsys):
    """Also from reports that call the stage `match` by its former name."""
    for seed, (gap, name) in enumerate(((0.3, "distil"), (0.1, "match"), (0.2, "match"))):
        report = {"teacher": {"val_loss": 1.25}, "stages": [{"name": name, **ROW, "gap": gap}]}
        if seed == 0:
            report |= {"controls": {"cross-entropy only": {"name": "match", **ROW}}}
        (tmp_path / f"seed{seed}.json").write_text(json.dumps(report))
    (tmp_path / "bench.json").write_text(json.dumps([{"name": "not a report"}]))
    (tmp_path / "settings.json").write_text(json.dumps({"stages": "align,match", "teacher": "out/gpt"}))
    table = collect(tmp_path)
    assert table.startswith("Teacher: 1.2500 nats per token. 3 seeds;")
    assert "| match | 4,096 |" in table and "0.2000 (0.1000 ... 0.3000)" in table
    line = next(row for row in table.splitlines() if "cross-entropy only" in row)
    assert "0.2500" in line and "..." not in line  # one seed has no range
    main([str(tmp_path)])
    assert capsys.readouterr().out == table + "\n"
    with pytest.raises(ValueError, match="no reports"):
        collect(tmp_path / "empty")


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    for folder, words in (("", "folder is empty .*: name one, or omit it"),
                          (str(tmp_path / "none"), "no reports in .*: run make results first")):
        with pytest.raises(ValueError, match=words) as e:
            main([folder])
        one_line(e.value)


def test_a_damaged_report_is_one_line_that_names_it(tmp_path):
    good = {"teacher": {"val_loss": 1.25}, "stages": [{"name": "match", **ROW}]}
    file = tmp_path / "seed0.json"
    for text in ("{", "[" * 100000, json.dumps(good | {"stages": [{"name": "match", **ROW, "kl": None}]}),
                 json.dumps(good | {"stages": 3}), json.dumps(good | {"stages": [{"name": []}]}),
                 json.dumps(good | {"teacher": None}), json.dumps(good | {"controls": [1]})):
        file.write_text(text)
        with pytest.raises(ValueError, match="seed0.json is damaged .*: remove it and make it anew") as e:
            main([str(tmp_path)])
        one_line(e.value)
