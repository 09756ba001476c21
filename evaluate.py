"""Teacher and student side by side: how much of the teacher is left in the student, in numbers and pictures.

    python evaluate.py --teacher out/teacher --student out/rwkv --data data/pydoc

Loss of both on held-out text and the gap between them (nats per token), KL(teacher || student), how often both prefer
the same token (top-1) and the teacher's choice is among the student's five best (top-5), the recovered fraction

    recovered = (unigram loss - student loss) / (unigram loss - teacher loss)

(0: knows only how frequent each token is; 1: all the teacher knows), loss by position, and per layer how far each mixer
is from the attention it replaced, on the teacher's own inputs. What it is not: a benchmark suite.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from config import cli, run
from data.loader import Batch, Loader
from data.tokenizer import read_meta
from model import LM, CausalSelfAttention, TimeMixer, load_model


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Sum over the targets of -log p(target): logits (B, T, V) at position t are scored against the token after t."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.y.flatten(), reduction="none")
    return (loss * batch.mask.flatten()).sum()


def global_sum(x: Tensor) -> Tensor:
    """x summed over all processes."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


@torch.no_grad()
def mean_loss(model: LM, loader: Loader, max_tokens: int | None = None) -> float:
    """Mean loss in nats per target over the split; every process takes its share."""
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in loader.windows(max_tokens):
        batch = batch.to(device)
        total += torch.stack([cross_entropy(model(batch.x)[0], batch), batch.mask.sum()])
    loss, count = global_sum(total).tolist()
    return loss / max(1.0, count)


@torch.no_grad()
def compare(teacher: LM, student: LM, loader: Loader, max_tokens: int | None = None) -> dict:
    """Losses, gap, KL and agreement over the split, and both losses by position (lists of T floats)."""
    device = next(student.parameters()).device
    V, T = student.cfg.vocab_size, loader.T
    sums = torch.zeros(5, T, dtype=torch.float64, device=device)  # teacher's loss, student's, KL, top-1, top-5; by position
    count = torch.zeros(T, dtype=torch.float64, device=device)
    for batch in loader.windows(max_tokens):
        batch = batch.to(device)
        t = teacher(batch.x)[0][..., :V].float().log_softmax(-1)                            # (B, T, V)
        s = student(batch.x)[0].float().log_softmax(-1)
        target = batch.y[..., None]
        best = t.argmax(-1, keepdim=True)
        top5 = s.topk(min(5, V), -1).indices
        rows = torch.stack([-t.gather(-1, target)[..., 0], -s.gather(-1, target)[..., 0], (t.exp() * (t - s)).sum(-1),
                            (top5[..., :1] == best).any(-1).float(), (top5 == best).any(-1).float()])  # (5, B, T)
        n = batch.x.shape[1]
        sums[:, :n] += (rows * batch.mask).sum(1)
        count[:n] += batch.mask.sum(0)
    sums, count = global_sum(sums), global_sum(count)
    teacher_loss, student_loss, kl, top1, top5 = (sums.sum(1) / count.sum().clamp(min=1)).tolist()
    reached = int(count.nonzero().max()) + 1 if count.any() else 0  # a short text has no late positions
    by_position = (sums[:2] / count.clamp(min=1))[:, :reached].tolist()
    return {"teacher_loss": teacher_loss, "val_loss": student_loss, "gap": student_loss - teacher_loss, "kl": kl, "top1": top1, "top5": top5,
            "by_position": {"teacher": by_position[0], "student": by_position[1]}}


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
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    if teacher.cfg.n_embd != student.cfg.n_embd:  # another model's student: there is nothing to compare layer by layer
        return []
    pairs = [(i, t.att, s.att) for i, (t, s) in enumerate(zip(teacher.blocks, student.blocks)) if isinstance(s.att, TimeMixer)]

    def note(i: int) -> Callable:
        def hook(module, args, result):
            inputs[i], outputs[i] = args[0], result[0]
        return hook

    hooks = [att.register_forward_hook(note(i)) for i, att, _ in pairs]
    teacher(batch.x)
    for hook in hooks:
        hook.remove()
    rows, v_first = [], None
    for i, att, mixer in pairs:
        s, v_first, _ = mixer(inputs[i], v_first, None)
        t = outputs[i]
        if isinstance(att, CausalSelfAttention):
            rows.append({"layer": i, "error": ((t - s).square().sum() / t.square().sum()).item(), "cosine": F.cosine_similarity(t, s, dim=-1).mean().item()})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The report

def state_bytes(model: LM, n: int) -> int:
    """Bytes that the model remembers after n tokens, batch 1: what one token takes, and n - 1 times what the second adds."""
    device = next(model.parameters()).device
    one, two = (model(torch.zeros(1, T, dtype=torch.long, device=device))[1].nbytes() for T in (1, 2))
    return one + (n - 1) * (two - one)


@torch.no_grad()
def make_report(teacher: LM, student: LM, train: Loader, val: Loader, max_tokens: int | None = None) -> dict:
    """Everything this file measures, as the dict of report.json."""
    result = compare(teacher, student, val, max_tokens)
    t, s, unigram = result["teacher_loss"], result["val_loss"], unigram_loss(train, val)
    memory = {str(n): {"teacher": state_bytes(teacher, n), "student": state_bytes(student, n)} for n in (val.T, 16 * val.T, 256 * val.T)}
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
    lines += ["", f"The student has {report['student']['params']:,} parameters, the teacher {report['teacher']['params']:,}. "
              f"Recovered {report['recovered']:.1%} of what the teacher knows beyond token frequencies; "
              f"the student's five best hold the teacher's choice {report['top5']:.1%} of the time.", ""]
    lines += ["| mixer | ‖t − s‖² / ‖t‖² | cosine |", "|---|---:|---:|"]
    lines += [f"| layer {row['layer']} | {row['error']:.3f} | {row['cosine']:.3f} |" for row in report["layers"]]
    lines += ["", "| tokens read | teacher's KV cache | student's state |", "|---:|---:|---:|"]
    lines += [f"| {int(n):,} | {m['teacher']:,} bytes | {m['student']:,} bytes |" for n, m in report["state_bytes"].items()]
    return "\n".join(lines) + "\n"


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, without what a killed run may have left half written."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def write_report(out: Path, report: dict, curves: dict[str, Path] | None = None) -> None:
    """report.json, report.md and, where matplotlib is installed, report.png in `out`; curves: name -> metrics.jsonl."""
    for name, text in (("report.json", json.dumps(report, indent=1) + "\n"), ("report.md", as_markdown(report))):
        (out / f"{name}.tmp").write_text(text)
        (out / f"{name}.tmp").replace(out / name)
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib, and run again")
        return
    matplotlib.use("Agg")
    plot(out, report, {name: rows for name, path in (curves or {}).items() if (rows := read_metrics(path))})


def plot(out: Path, report: dict, curves: dict[str, list[dict]]) -> None:
    """report.png: the training loss of each stage, and both models' loss by position."""
    import matplotlib.pyplot as plt
    fig, (axes,) = plt.subplots(1, len(curves) + 1, figsize=(3.6 * (len(curves) + 1), 3.2), constrained_layout=True, squeeze=False)
    for ax, (name, rows) in zip(axes, curves.items()):
        ax.plot([r["step"] for r in rows], [r["loss"] for r in rows], lw=0.7, alpha=0.6, label="training")
        seen = [(r["step"], r.get("val_kl", r["val_loss"])) for r in rows if "val_loss" in r]
        if seen:
            ax.plot(*zip(*seen), "o-", ms=3, label="held-out")
        ax.set(title=name, xlabel="step", ylabel="loss", yscale="log")
        ax.legend(fontsize=7)
    width = max(1, len(report["by_position"]["teacher"]) // 32)
    for who, losses in report["by_position"].items():
        n = len(losses) // width * width
        axes[-1].plot(np.arange(width / 2, n, width), np.reshape(losses[:n], (-1, width)).mean(1), label=who)
    axes[-1].set(title="loss by position", xlabel="position", ylabel="nats per token")
    axes[-1].legend(fontsize=7)
    fig.savefig(out / "report.png", dpi=120)
    plt.close(fig)


def collect(folder: Path) -> str:
    """A table over the reports of several seeds (*.json in `folder`): per stage and control the median, and the range."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    reports = [report for report in reports if report.get("stages")]
    if not reports:
        raise ValueError(f"no reports in {folder}: run make results first")
    rows: dict[str, list[dict]] = {}
    for report in reports:
        for row in table_rows(report):
            rows.setdefault(row["name"], []).append(row)

    def cell(values: list[float], form: str) -> str:
        low, middle, high = (format(f(values), form) for f in (min, np.median, max))
        return middle if len(values) == 1 else f"{middle} ({low} ... {high})"

    teacher = reports[0]["teacher"]["val_loss"]
    lines = [f"Teacher: {teacher:.4f} nats per token. {len(reports)} seeds; median (least ... most).", "",
             "| | tokens | val loss | gap | KL | top-1 |", "|---|---:|---:|---:|---:|---:|"]
    for name, group in rows.items():
        cells = [cell([row[key] for row in group], form) for key, form in (("val_loss", ".4f"), ("gap", ".4f"), ("kl", ".4f"), ("top1", ".1%"))]
        lines.append(f"| {name} | {group[0]['tokens']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def check_vocabulary(teacher: LM, student: LM, loader: Loader) -> None:
    """Raises ValueError where data, student and teacher do not have the same tokens."""
    if loader.vocab_size > student.cfg.vocab_size:
        raise ValueError(f"{loader.folder} has {loader.vocab_size} tokens, the student {student.cfg.vocab_size}: "
                         "prepare the data with the model's tokenizer")
    if teacher.cfg.vocab_size < student.cfg.vocab_size:
        raise ValueError(f"the teacher has {teacher.cfg.vocab_size} tokens, fewer than the student's {student.cfg.vocab_size}: it cannot teach them; "
                         "choose a teacher with the same tokenizer")


def same_tokenizer(loader: Loader, *folders: str | Path) -> None:
    """Raises ValueError where a model folder was made for another tokenizer than the loader's."""
    for folder in folders:
        theirs, ours = read_meta(folder).get("tokenizer"), loader.meta["tokenizer"]
        if theirs != ours:
            raise ValueError(f"{folder} reads {theirs} tokens, {loader.folder} holds {ours}: "
                             f"prepare the data again with the model's tokenizer, --tokenizer {folder}")


@dataclass(frozen=True)
class EvaluateConfig:
    teacher: str = "out/teacher"
    student: str | None = "out/rwkv"  # None = only the teacher's loss
    data: str = "data/pydoc"
    batch_size: int = 16
    block_size: int | None = None     # None = the teacher's
    max_tokens: int | None = None     # of the held-out half; None = all
    out: str | None = None            # folder for report.json, .md and .png; None = print only
    collect: str | None = None        # instead: a table over the report.json files of several seeds in this folder


def main(argv: list[str] | None = None) -> None:
    cfg = cli(EvaluateConfig, argv)
    if cfg.collect:
        print(collect(Path(cfg.collect)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_model(cfg.teacher, device).eval()
    student = load_model(cfg.student, device).eval() if cfg.student else teacher
    train, val = (Loader(cfg.data, half, cfg.batch_size, cfg.block_size or teacher.cfg.block_size) for half in ("train", "val"))
    check_vocabulary(teacher, student, val)
    same_tokenizer(val, cfg.teacher, cfg.student or cfg.teacher)
    if not cfg.student:
        print(f"{cfg.teacher}: {mean_loss(teacher, val, cfg.max_tokens):.4f} nats per token on the held-out half of {cfg.data}, {val.T} tokens at a time")
        return
    report = make_report(teacher, student, train, val, cfg.max_tokens)
    print(as_markdown(report))
    if cfg.out:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        write_report(Path(cfg.out), report)


if __name__ == "__main__":
    run(main)
