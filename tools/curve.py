"""Loss against bytes: a student, and the same RWKV-7 from scratch, at several budgets.

    python -m tools.curve config/results.toml --out out/results/costly-0

Every point is a run of its own, trained to the end of its schedule: the student's
stages and the control "RWKV-7 from scratch" with a share of the steps each. OUT has the
distillation of share 1, which has run. The points go to OUT/curve, and into curve.json
and curve.svg there; what is there goes on or is read back.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from config import cli, narrow, run as run_script, settings, shown
from tyro.conf import Suppress

from data.foreign import read_json
from distill import DistillConfig, distill
from lib.folders import open_model, write_json
from lib.home import lock
from lib.processes import setup
from lib.report import figure
from lib.runs import read_metrics
from tools.controls import (SCRATCH, ControlsConfig, check_distilled, check_stages, from_scratch, place,
                            together, trained_alone)
from train import FitConfig

SCORES = ("tokens", "val_loss", "gap", "kl", "top1")


@settings
class CurveConfig(ControlsConfig):
    only: Annotated[str, Suppress] = SCRATCH
    student_shares: str = "0.25,0.5,1"         # of the steps of both stages
    scratch_shares: str = "0.5,1,2,4"          # of as many tokens

    def __post_init__(self):
        for name in ("student_shares", "scratch_shares"):
            if not shares(getattr(self, name)):
                raise ValueError(f"{name} = {shown(getattr(self, name))}: write positive numbers with commas")


def shares(text: str) -> list[float]:
    """The numbers, in ascending order; none where one is no positive number."""
    try:
        numbers = sorted(map(float, text.split(",")))
    except ValueError:
        return []
    return numbers if 0 < numbers[0] and numbers[-1] < math.inf else []


def scaled(loop: FitConfig, share: float) -> FitConfig:
    return replace(loop, max_steps=max(1, round(share * loop.max_steps)))


def curve(cfg: CurveConfig) -> dict:
    """Points of both, as OUT/curve/curve.json holds them."""
    out, shape = Path(cfg.run.out), open_model(cfg.teacher)[0].cfg
    report = read_json(out / "report.json", "distil first")
    students, scratch = [], []
    for share in shares(cfg.student_shares):
        rows = report["stages"] if share == 1 else distill(narrow(
            cfg, DistillConfig, stages="align,match", align=scaled(cfg.align, share),
            match=scaled(cfg.match, share), run=cfg.run.within(f"curve/student-{share:g}")))["stages"]
        students.append(together(rows))
    for share in shares(cfg.scratch_shares):
        run = place(cfg.run, SCRATCH) if share == 1 else cfg.run.within(f"curve/scratch-{share:g}")
        scratch.append(trained_alone(cfg, run, **from_scratch(cfg, shape, scaled(cfg.alone, share))))
    seen = [row["tokens"] for row in read_metrics(Path(cfg.teacher) / "metrics.jsonl")]
    return {"teacher": {"val_loss": report["teacher"]["val_loss"], "tokens": max(seen, default=None)},
            "student": [{key: row[key] for key in SCORES} | {"catches_up": catch_up(row["val_loss"], scratch)}
                        for row in students],
            "scratch": [{key: row[key] for key in SCORES} for row in scratch]}


def catch_up(loss: float, rows: list[dict]) -> float | None:
    """Tokens after which the rows' loss is `loss`, log-linear between two of them.

    None where it is not between any two.
    """
    for a, b in zip(rows, rows[1:]):
        if a["val_loss"] >= loss >= b["val_loss"]:
            part = (a["val_loss"] - loss) / max(a["val_loss"] - b["val_loss"], 1e-12)
            return a["tokens"] * (b["tokens"] / a["tokens"]) ** part
    return None


def as_text(points: dict) -> str:
    """The points as a table, with the tokens after which from scratch catches up."""
    lines = ["| | bytes or tokens | val loss | gap | KL | top-1 | from scratch catches up after |",
             "|---|---:|---:|---:|---:|---:|---:|"]
    names = {"student": "distilled", "scratch": "from scratch"}
    form = "| {name} | {tokens:,} | {val_loss:.4f} | {gap:.4f} | {kl:.4f} | {top1:.1%} | {late} |"
    for key, name in names.items():
        for row in points[key]:
            needed = row.get("catches_up")
            late = f"{needed:,.0f}, {needed / row['tokens']:.1f} times as many" if needed else ""
            lines.append(form.format(name=name, late=late, **row))
    return "\n".join(lines) + "\n"


def plot(points: dict, path: Path) -> None:
    """The loss of both against their tokens, beneath them the teacher's."""
    with figure(path, 1, width=5.0) as panels:
        if panels is None:
            return
        ax, teacher = panels[0], points["teacher"]
        for key, label in (("scratch", "RWKV-7 from scratch"), ("student", "RWKV-7 from the teacher")):
            ax.plot([row["tokens"] for row in points[key]], [row["val_loss"] for row in points[key]],
                    "o-", ms=4, label=label)
        cost = f" (after {teacher['tokens'] / 1e6:.3g}M)" if teacher["tokens"] else ""
        ax.axhline(teacher["val_loss"], color="grey", ls="--", lw=1, label="the teacher" + cost)
        ax.set(xscale="log", xlabel="tokens read in training", ylabel="held-out nats per token")
        read = sorted({row["tokens"] for key in ("student", "scratch") for row in points[key]})
        ax.set_xticks(read, [f"{n / 1e6:.2g}M" if n >= 1e5 else f"{n:,}" for n in read])
        ax.set_xticks([], minor=True)


def main(argv: list[str] | None = None) -> None:
    cfg = cli(CurveConfig, argv)
    if setup(cfg.run.device)[1] > 1:
        raise ValueError("tools.curve runs on one process: start it with python, not torchrun")
    check_stages(cfg)
    out = Path(cfg.run.out)
    check_distilled(cfg, out, 1)
    held = lock(out)
    points = curve(cfg)
    (out / "curve").mkdir(exist_ok=True)                   # all shares may be 1
    write_json(out / "curve" / "curve.json", points)
    plot(points, out / "curve" / "curve.svg")
    print(as_text(points) + f"{out}/curve: curve.json, curve.svg")
    held.close()


if __name__ == "__main__":
    run_script(main)
