"""What teacher and student do, as report.json, report.md and report.png."""

import contextlib
from pathlib import Path
from shlex import quote

import numpy as np
import torch
import torch.nn.functional as F

from data.foreign import read_json
from data.loader import Batch, Loader
from data.mixture import open_split
from lib.folders import write_json, write_text
from lib.hybrid import remembered_bytes
from lib.home import FORMER
from lib.runs import Run, read_metrics
from lib.scores import averages, compare, loss_by_position, readable
from lib.shard import load_like, precision_of
from lib.start import LOOK, attention_io
from model import LM, CausalSelfAttention, TimeMixer


def unigram_loss(train: Loader, val: Loader) -> float:
    """Loss of guessing each token by its frequency in the training half.

    Each token is counted once more than it occurs, so that none has probability 0.
    """
    p = train.counts() + 1.0
    q = val.counts()
    return float(-(q * np.log(p / p.sum())).sum() / q.sum())


@torch.no_grad()
def layer_errors(teacher: LM, student: LM, batch: Batch) -> list[dict]:
    """Per replaced layer ||t - s||^2 / ||t||^2 and the cosine of attention and mixer.

    Compared are their outputs where both read the teacher's inputs, over the batch's
    first LOOK tokens. Of another model's student there is nothing to compare: [].
    """
    if teacher.cfg.n_embd != student.cfg.n_embd:
        return []
    rows, v_first, tokens = [], None, batch.x[: max(1, LOOK // batch.x.shape[1]), :LOOK]
    layers = zip(attention_io(teacher, tokens).items(), teacher.blocks, student.blocks)
    for (i, (x, t)), teacher_block, student_block in layers:
        if not isinstance(student_block.att, TimeMixer):
            continue
        with precision_of(student, x):
            s, v_first, _ = student_block.att(x, v_first, None)
        if isinstance(teacher_block.att, CausalSelfAttention):
            error = (t - s).square().sum() / t.square().sum()
            cosine = F.cosine_similarity(t, s, dim=-1).mean()
            rows.append({"layer": i, "error": error.item(), "cosine": cosine.item()})
    return rows


@torch.no_grad()
def make_report(teacher: LM, student: LM | None, train: Loader, val: Loader, max_tokens: int | None = None,
                chunk: int | None = None) -> dict:
    """What both models do within loader.T tokens, as the dict of report.json; of the
    teacher alone its loss.
    """
    if student is None:
        losses, counts = loss_by_position(teacher, val, max_tokens, chunk)
        loss = (losses.sum() / counts.sum()).item()
        return {"teacher": {"val_loss": loss, "params": teacher.n_params()},
                "by_position": {"teacher": averages(losses, counts)}}
    result = compare(teacher, student, val, max_tokens, chunk)
    t, s, unigram = result["teacher_loss"], result["val_loss"], unigram_loss(train, val)
    batch = next(val.windows()).to(next(student.parameters()).device)
    return {
        "teacher": {"val_loss": t, "params": teacher.n_params()},
        "student": {"val_loss": s, "params": student.n_params()},
        "gap": s - t, "kl": result["kl"], "top1": result["top1"], "top5": result["top5"],
        "unigram_loss": unigram, "recovered": (unigram - s) / (unigram - t),
        "by_position": result["by_position"],
        "layers": layer_errors(teacher, student, batch),
        "state_bytes": {str(n): {"teacher": bytes_of(teacher, n), "student": bytes_of(student, n)}
                        for n in (val.T, 16 * val.T, 256 * val.T)},
    }


def bytes_of(model: LM, n: int) -> int | None:
    """What the model remembers of n tokens; None where it cannot read so many."""
    return remembered_bytes(model.cfg, n) if readable(model, n) == n else None


def report_stages(run: Run, teacher: LM, rows: list[dict], cfg, val: Loader) -> dict:
    """The report of a distillation: its distilled student in full, and a row per stage.

    cfg is a DistillConfig. The student described is that of `match`, where there is
    one: the last stage may teach it something else.
    """
    described = "match" if "match" in cfg.named else cfg.named[-1]
    train = open_split(cfg.data, "train", 1, val.T, 0, val.rank, val.W)
    student = load_like(teacher, run.out / described).eval()
    report = make_report(teacher, student, train, val, cfg.eval_tokens, cfg.match.bptt_chunk)
    report["student"]["stage"] = described
    report["stages"] = rows
    report |= controls_of(run.out / "report.json", rows)
    if run.rank == 0:
        curves = {"teacher": Path(cfg.teacher)} | {name: run.out / name for name in cfg.named}
        write_report(run.out, report, {name: folder / "metrics.jsonl" for name, folder in curves.items()})
        run.say(as_markdown(report),
                f"{run.out}: model, report.json, report.md, report.png. "
                f"Now: python sample.py --ckpt {quote(str(run.out))} --prompt \"The \"")
    return report


def controls_of(path: Path, rows: list[dict]) -> dict:
    """The controls in a report whose stages up to `match` are these rows: they stay."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        before = read_json(path, "")
        if upto_match(before.get("stages", [])) == upto_match(rows) and "controls" in before:
            return {"controls": before["controls"]}
    return {}


def upto_match(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["name"] != "finish"]


def table_rows(report: dict) -> list[dict]:
    """The stages, then the controls, as rows of one table."""
    controls = report.get("controls", {})
    stages = [row | {"name": FORMER.get(row["name"], row["name"])} for row in report.get("stages", [])]
    return stages + [row | {"name": f"control: {name}"} for name, row in controls.items()]


def as_markdown(report: dict) -> str:
    """The report as tables for people."""
    lines = ["| | tokens | minutes | val loss | gap | KL | top-1 |",
             "|---|---:|---:|---:|---:|---:|---:|",
             f"| teacher | | | {report['teacher']['val_loss']:.4f} | | | |"]
    form = "| {name} | {tokens:,} | {minutes:.1f} | {val_loss:.4f} | {gap:.4f} | {kl:.4f} | {top1:.1%} |"
    lines += [form.format(**row) for row in table_rows(report)]
    if "student" not in report:
        return "\n".join(lines) + "\n"
    student, teacher = report["student"], report["teacher"]
    if "stages" not in report:                                    # else the last of them is the student
        lines.append("| student | | | {val_loss:.4f} | {gap:.4f} | {kl:.4f} | {top1:.1%} |".format(
            val_loss=student["val_loss"], gap=report["gap"], kl=report["kl"], top1=report["top1"]))
    lines += ["", f"The student has {student['params']:,} parameters, the teacher {teacher['params']:,}. "
              f"Recovered {report['recovered']:.1%} of what the teacher knows beyond token frequencies; "
              f"the student's five best hold the teacher's choice {report['top5']:.1%} of the time.", ""]
    lines += ["| mixer | ‖t − s‖² / ‖t‖² | cosine |", "|---|---:|---:|"]
    lines += [
        f"| layer {row['layer']} | {row['error']:.3f} | {row['cosine']:.3f} |" for row in report["layers"]
    ]
    lines += ["", "| tokens read | teacher's KV cache | student's state |", "|---:|---:|---:|"]
    for n, size in report["state_bytes"].items():
        cells = [f"{size[who]:,} bytes" if size[who] else "-" for who in ("teacher", "student")]
        lines.append(f"| {int(n):,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------
# Files

def write_report(out: Path, report: dict, curves: dict[str, Path] | None = None) -> None:
    """report.json, report.md and, where matplotlib is installed, report.png in `out`.

    curves: name -> metrics.jsonl.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", report)
    text = as_markdown(report)
    write_text(out / "report.md", text)
    training = {name: rows for name, path in (curves or {}).items() if (rows := read_metrics(path))}
    with figure(out / "report.png", len(training) + 1) as panels:
        if panels is None:
            return
        for (name, rows), ax in zip(training.items(), panels):
            plot_training(ax, name, rows)
        plot_positions(panels[-1], report["by_position"])


@contextlib.contextmanager
def figure(path: Path, n: int, width: float = 3.6, height: float = 3.2):
    """n panels side by side, saved as `path` in the end; None without matplotlib.

    Of equal panels an .svg has equal bytes.
    """
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib, and run again")
        yield None
        return
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": path.name}
    import matplotlib.pyplot as plt
    fig, (axes,) = plt.subplots(1, n, figsize=(width * n, height), constrained_layout=True, squeeze=False)
    yield axes
    for ax in axes:
        if ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=7)
    fig.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(fig)


def plot_training(ax, name: str, rows: list[dict]) -> None:
    """The training loss of a stage, and what was measured on held-out text."""
    ax.plot([row["step"] for row in rows], [row["loss"] for row in rows], lw=0.7, alpha=0.6, label="training")
    held_out = [(row["step"], row.get("val_kl", row["val_loss"])) for row in rows if "val_loss" in row]
    if held_out:
        ax.plot(*zip(*held_out), "o-", ms=3, label="held-out")
    ax.set(title=name, xlabel="step", ylabel="loss", yscale="log")


def plot_positions(ax, by_position: dict[str, list[float]]) -> None:
    """The loss by position, averaged over a thirty-second of the positions."""
    width = max(1, len(by_position["teacher"]) // 32)
    for who, losses in by_position.items():
        whole = len(losses) // width * width
        means = np.reshape(losses[:whole], (-1, width)).mean(1)
        ax.plot(np.arange(width / 2, whole, width), means, label=who)
    ax.set(title="loss by position", xlabel="position", ylabel="nats per token")
