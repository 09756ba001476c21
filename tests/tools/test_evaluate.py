"""Teacher and student side by side, as a script."""

import json

import pytest

from common import tiny_model
from common_models import panels
from data.loader import Loader
from lib.folders import save_model
from lib.report import as_markdown
from lib.scores import compare, mean_loss
from tools.evaluate import main


@pytest.mark.parametrize("mixer", ["r", "ra"])
def test_the_script_compares(mixer, tiny, tmp_path, capsys):
    for name, changes in (("teacher", {"positions": "learned"}), ("student", {"mixer": mixer})):
        save_model(tiny_model(block_size=128, **changes), tmp_path / name, {"tokenizer": "bytes"})
    out = tmp_path / "out"
    flags = ["--teacher", tmp_path / "teacher", "--student", tmp_path / "student", "--data", tiny.text,
             "--max_tokens", 1500, "--out", out]
    main([str(x) for x in flags])
    report, printed = json.loads((out / "report.json").read_text()), capsys.readouterr().out
    assert "length" not in report and "passkey" not in report and panels(out / "report.png") == 1
    assert f"| student | | | {report['student']['val_loss']:.4f} | {report['gap']:.4f} |" in printed
    assert (out / "report.md").read_text(encoding="utf-8") == as_markdown(report)
    assert as_markdown(report) in printed
    # more than learned positions can read
    assert report["state_bytes"]["2048"]["teacher"] is None and "\n| 2,048 | - | " in printed


def test_the_teacher_alone_is_evaluated_too(tiny, tmp_path, capsys):
    save_model(tiny_model(block_size=128), tmp_path / "m", {"tokenizer": "bytes"})
    flags = ["--teacher", tmp_path / "m", "--student", "None", "--data", tiny.text, "--max_tokens", 1500]
    main([str(x) for x in flags])
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    main([str(x) for x in [*flags, "--out", tmp_path / "out"]])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert capsys.readouterr().out == line and "student" not in report
    assert panels(tmp_path / "out" / "report.png") == 1
    assert "student" not in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    model, val = tiny_model(block_size=128).eval(), Loader(tiny.text, "val", 16, 128)
    expected = compare(model, model, val, 1500)["by_position"]["teacher"]
    assert report["by_position"]["teacher"] == pytest.approx(expected, rel=1e-5)
    assert report["teacher"]["val_loss"] == mean_loss(model, val, 1500)


def test_one_model_alone_gives_its_loss(tmp_path, tiny, capsys):
    save_model(tiny_model(), tmp_path / "m", {"tokenizer": "bytes"})
    main(["--teacher", str(tmp_path / "m"), "--student", "None", "--data", tiny.text, "--block_size", "8",
          "--max_tokens", "200"])
    loss = mean_loss(tiny_model(), Loader(tiny.text, "val", 16, 8), 200)
    assert f"{loss:.4f} nats per token" in capsys.readouterr().out
