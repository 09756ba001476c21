"""What teacher and student do, as report.json, report.md and report.png."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.loader import Batch, Loader
from lib.folders import write_json, write_whole
from lib.hybrid import remembered_bytes
from lib.runs import read_metrics
from lib.scores import averages, compare, loss_by_position, readable
from model import LM, CausalSelfAttention, TimeMixer


def unigram_loss(train: Loader, val: Loader) -> float:
    """Loss of guessing each token by its frequency in the training half (each token counted once more, so none is 0)."""
    def counts(tokens):
        return sum(np.bincount(tokens[i : i + 2**22], minlength=train.vocab_size) for i in range(0, len(tokens), 2**22))
    p = counts(train.tokens) + 1.0
    q = counts(val.tokens)
    return float(-(q * np.log(p / p.sum())).sum() / q.sum())


@torch.no_grad()
def layer_errors(teacher: LM, student: LM, batch: Batch) -> list[dict]:
    """Per replaced layer: ||t - s||^2 / ||t||^2 and the cosine of attention's and mixer's outputs on the teacher's inputs."""
    seen: dict[torch.nn.Module, tuple[Tensor, Tensor]] = {}  # what goes into each attention and comes out
    if teacher.cfg.n_embd != student.cfg.n_embd:  # another model's student: there is nothing to compare layer by layer
        return []
    pairs = [(i, t.att, s.att) for i, (t, s) in enumerate(zip(teacher.blocks, student.blocks)) if isinstance(s.att, TimeMixer)]

    def note(att, args, result):
        seen[att] = args[0], result[0]

    hooks = [att.register_forward_hook(note) for _, att, _ in pairs]
    teacher(batch.x)
    for hook in hooks:
        hook.remove()
    rows, v_first = [], None
    for i, att, mixer in pairs:
        x, t = seen[att]
        s, v_first, _ = mixer(x, v_first, None)
        if isinstance(att, CausalSelfAttention):
            rows.append({"layer": i, "error": ((t - s).square().sum() / t.square().sum()).item(), "cosine": F.cosine_similarity(t, s, dim=-1).mean().item()})
    return rows


@torch.no_grad()
def make_report(teacher: LM, student: LM | None, train: Loader, val: Loader, max_tokens: int | None = None, chunk: int | None = None) -> dict:
    """What both models do within loader.T tokens, as the dict of report.json; of the teacher alone its loss."""
    if student is None:
        losses, counts = loss_by_position(teacher, val, max_tokens, chunk)
        return {"teacher": {"val_loss": (losses.sum() / counts.sum()).item(), "params": teacher.n_params()},
                "by_position": {"teacher": averages(losses, counts)}}
    result = compare(teacher, student, val, max_tokens, chunk)
    t, s, unigram = result["teacher_loss"], result["val_loss"], unigram_loss(train, val)
    memory = {}
    for n in (val.T, 16 * val.T, 256 * val.T):  # None: more than the model can read
        memory[str(n)] = {who: remembered_bytes(m.cfg, n) if readable(m, n) == n else None for who, m in (("teacher", teacher), ("student", student))}
    return {
        "teacher": {"val_loss": t, "params": teacher.n_params()},
        "student": {"val_loss": s, "params": student.n_params()},
        "gap": s - t, "kl": result["kl"], "top1": result["top1"], "top5": result["top5"],
        "unigram_loss": unigram, "recovered": (unigram - s) / (unigram - t),
        "by_position": result["by_position"],
        "layers": layer_errors(teacher, student, next(val.windows()).to(next(student.parameters()).device)),
        "state_bytes": memory,
    }


def table_rows(report: dict) -> list[dict]:
    """The stages, then the controls, as rows of one table."""
    return report.get("stages", []) + [row | {"name": f"control: {name}"} for name, row in report.get("controls", {}).items()]


def as_markdown(report: dict) -> str:
    """The report as tables for people."""
    lines = ["| | tokens | minutes | val loss | gap | KL | top-1 |", "|---|---:|---:|---:|---:|---:|---:|",
             f"| teacher | | | {report['teacher']['val_loss']:.4f} | | | |"]
    form = "| {name} | {tokens:,} | {minutes:.1f} | {val_loss:.4f} | {gap:.4f} | {kl:.4f} | {top1:.1%} |"
    lines += [form.format(**row) for row in table_rows(report)]
    if "student" in report:
        if "stages" not in report:  # else the last of them is the student
            lines.append("| student | | | {:.4f} | {gap:.4f} | {kl:.4f} | {top1:.1%} |".format(report["student"]["val_loss"], **report))
        lines += ["", f"The student has {report['student']['params']:,} parameters, the teacher {report['teacher']['params']:,}. "
                  f"Recovered {report['recovered']:.1%} of what the teacher knows beyond token frequencies; "
                  f"the student's five best hold the teacher's choice {report['top5']:.1%} of the time.", ""]
        lines += ["| mixer | ‖t − s‖² / ‖t‖² | cosine |", "|---|---:|---:|"]
        lines += [f"| layer {row['layer']} | {row['error']:.3f} | {row['cosine']:.3f} |" for row in report["layers"]]
        lines += ["", "| tokens read | teacher's KV cache | student's state |", "|---:|---:|---:|"]
        for n, size in report["state_bytes"].items():
            lines.append(f"| {int(n):,} | " + " | ".join(f"{size[who]:,} bytes" if size[who] else "-" for who in ("teacher", "student")) + " |")
    if "length" in report:
        lines += length_table(report["length"])
    if "passkey" in report:
        lines += passkey_table(report["passkey"])
    return "\n".join(lines) + "\n"


def write_report(out: Path, report: dict, curves: dict[str, Path] | None = None) -> None:
    """report.json, report.md and, where matplotlib is installed, report.png in `out`; curves: name -> metrics.jsonl."""
    for name, text in (("report.json", json.dumps(report, indent=1) + "\n"), ("report.md", as_markdown(report))):
        (out / f"{name}.tmp").write_text(text, encoding="utf-8")
        (out / f"{name}.tmp").replace(out / name)
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib, and run again")
        return
    matplotlib.use("Agg")
    plot(out, report, {name: rows for name, path in (curves or {}).items() if (rows := read_metrics(path))})


def plot(out: Path, report: dict, curves: dict[str, list[dict]]) -> None:
    """report.png: the training loss of each stage, the loss by position, and where they were asked for loss by stretch and passkey."""
    import matplotlib.pyplot as plt
    n = len(curves) + 1 + ("length" in report) + ("passkey" in report)
    fig, (axes,) = plt.subplots(1, n, figsize=(3.6 * n, 3.2), constrained_layout=True, squeeze=False)
    panels = iter(axes)
    for (name, rows), ax in zip(curves.items(), panels):
        ax.plot([r["step"] for r in rows], [r["loss"] for r in rows], lw=0.7, alpha=0.6, label="training")
        seen = [(r["step"], r.get("val_kl", r["val_loss"])) for r in rows if "val_loss" in r]
        if seen:
            ax.plot(*zip(*seen), "o-", ms=3, label="held-out")
        ax.set(title=name, xlabel="step", ylabel="loss", yscale="log")
    ax = next(panels)
    width = max(1, len(report["by_position"]["teacher"]) // 32)
    for who, losses in report["by_position"].items():
        whole = len(losses) // width * width
        ax.plot(np.arange(width / 2, whole, width), np.reshape(losses[:whole], (-1, width)).mean(1), label=who)
    ax.set(title="loss by position", xlabel="position", ylabel="nats per token")
    if "length" in report:
        ax, T = next(panels), report["length"]["T"]
        for who, losses in report["length"]["models"].items():
            ax.plot((np.arange(len(losses)) + 0.5) * T, losses, "o-", ms=3, label=who)
        ax.set(title=f"loss by stretch of {T}", xlabel="position", ylabel="nats per token")
    if "passkey" in report:
        ax = next(panels)
        for who, rows in report["passkey"]["models"].items():
            lengths = [row["T"] for row in rows]
            line, = ax.plot(lengths, [np.mean(row["nats"]) for row in rows], "o-", ms=3, label=who)
            ax.plot(lengths, [row["nats_without"] for row in rows], "o:", ms=3, color=line.get_color(), label=f"{who}, not told")
        ax.set(title="passkey, mean over depths", xlabel="tokens", ylabel="nats per token")
    for ax in axes:
        ax.legend(fontsize=7)
    fig.savefig(out / "report.png", dpi=120)
    plt.close(fig)
