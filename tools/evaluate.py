"""Teacher and student side by side: how much of the teacher is left in the student, in numbers and pictures.

    python evaluate.py --teacher out/teacher --student out/rwkv --data data/pydoc
    python evaluate.py --teacher out/teacher --student out/rwkv --longest 8 --passkey 16 --out out/report

Loss of both on held-out text and the gap between them (nats per token), KL(teacher || student), how often both prefer
the same token (top-1) and the teacher's choice is among the student's five best (top-5), the recovered fraction

    recovered = (unigram loss - student loss) / (unigram loss - teacher loss)

(0: knows only how frequent each token is; 1: all the teacher knows), loss by position, and per layer how far each mixer
is from the attention it replaced, on the teacher's own inputs. `--longest 8` adds the loss by position up to 8 times
block_size, `--passkey 16` hides 16 numbers in long texts and asks for each at the end, by depth and length. Small models fail
that for lack of skill, not of memory: so beside the exact answers stands how many nats per token the number costs, with it
in the text and without. What it is not: a benchmark suite (associative recall: recall.py).
"""

import contextlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from config import cli, run
from data.loader import Batch, Loader
from data.tokenizer import load_tokenizer, opening, read_meta
from model import LM, CausalSelfAttention, TimeMixer, load_model, remembered_bytes
from state import process_rows


def token_losses(logits: Tensor, batch: Batch) -> Tensor:
    """-log p(target) (B, T), 0 where masked: logits (B, T, V) at position t are scored against the token after t."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.y.flatten(), reduction="none")
    return loss.view_as(batch.mask) * batch.mask


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Sum over the targets of -log p(target)."""
    return token_losses(logits, batch).sum()


def global_sum(x: Tensor) -> Tensor:
    """x summed over all processes."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


@torch.no_grad()
def loss_by_position(model: LM, loader: Loader, max_tokens: int | None = None, chunk: int | None = None, reach: int | None = None) -> Tensor:
    """Summed losses and number of targets at each position, (2, T), over the split; every process takes its share.

    Windows are read `chunk` tokens at a time, of each no more than the first `reach`; None = all.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(2, loader.T, dtype=torch.float64, device=device)
    for batch in loader.windows(max_tokens):
        state = None
        for piece in batch.to(device).split(reach)[0].split(chunk):
            logits, state = model(piece.x, state)
            here = slice(state.position - piece.x.shape[1], state.position)
            sums[:, here] += torch.stack([token_losses(logits, piece).sum(0), piece.mask.sum(0)])
    return global_sum(sums)


def mean_loss(model: LM, loader: Loader, max_tokens: int | None = None, chunk: int | None = None) -> float:
    """Mean loss in nats per target over the split, read `chunk` tokens at a time; every process takes its share."""
    loss, count = loss_by_position(model, loader, max_tokens, chunk).sum(1).tolist()
    return loss / max(1.0, count)


def averages(sums: Tensor, count: Tensor) -> list:
    """sums / count at each position, up to the last that has a target: a short text has no late positions."""
    reached = int(count.nonzero().max()) + 1 if count.any() else 0
    return (sums / count.clamp(min=1))[..., :reached].tolist()


@torch.no_grad()
def compare(teacher: LM, student: LM, loader: Loader, max_tokens: int | None = None, chunk: int | None = None) -> dict:
    """Losses, gap, KL and agreement over the split, and both losses by position (lists of T floats); read `chunk` tokens at a time."""
    device = next(student.parameters()).device
    V, T = student.cfg.vocab_size, loader.T
    sums = torch.zeros(5, T, dtype=torch.float64, device=device)  # teacher's loss, student's, KL, top-1, top-5; by position
    count = torch.zeros(T, dtype=torch.float64, device=device)
    for batch in loader.windows(max_tokens):
        theirs, ours = None, None
        for piece in batch.to(device).split(chunk):
            t, theirs = teacher(piece.x, theirs)
            s, ours = student(piece.x, ours)
            t, s = t[..., :V].float().log_softmax(-1), s.float().log_softmax(-1)            # (B, T, V)
            target = piece.y[..., None]
            best = t.argmax(-1, keepdim=True)
            top5 = s.topk(min(5, V), -1).indices
            rows = torch.stack([-t.gather(-1, target)[..., 0], -s.gather(-1, target)[..., 0], (t.exp() * (t - s)).sum(-1),
                                (top5[..., :1] == best).any(-1).float(), (top5 == best).any(-1).float()])  # (5, B, T)
            here = slice(ours.position - piece.x.shape[1], ours.position)
            sums[:, here] += (rows * piece.mask).sum(1)
            count[here] += piece.mask.sum(0)
    sums, count = global_sum(sums), global_sum(count)
    teacher_loss, student_loss, kl, top1, top5 = (sums.sum(1) / count.sum().clamp(min=1)).tolist()
    by_position = averages(sums[:2], count)
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


# ---------------------------------------------------------------------------------------------------------------------
# Past the length of training

TOLD, ASKED = " The pass key is {key}. Remember it: {key} is the pass key. ", " What is the pass key? The pass key is "


def readable(model: LM, n: int) -> int:
    """How many of n tokens the model can read: attention with learned positions ends where these end."""
    return min(n, model.cfg.longest or n)


def loss_by_stretch(model: LM, loader: Loader, T: int, max_tokens: int | None = None) -> list[float]:
    """Mean loss in nats per target within each stretch of T positions of the loader's windows, as far as model and text reach."""
    reach = readable(model, loader.T) // T * T  # whole stretches only
    losses, counts = loss_by_position(model, loader, max_tokens, T, reach).view(2, -1, T).sum(2).tolist()
    return [loss / count for loss, count in zip(losses, counts) if count]


def passkey_texts(enc: tiktoken.Encoding, text: np.ndarray, T: int, n: int, depths: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer), together T tokens: for each of n different numbers of five digits, told at each depth, then not told.

    Depth is the share of the filler, a stretch of the tokens `text`, that comes first: from 0 to 1, just before the question.
    Raises ValueError for too small a T or too short a text.
    """
    rng, start, ask, texts = random.Random(0), opening(enc), enc.encode_ordinary(ASKED), []
    for key in rng.sample(range(10000, 100000), n):
        told, answer = enc.encode_ordinary(TOLD.format(key=key)), enc.encode_ordinary(str(key))
        between = T - len(start + ask + answer)  # tokens from the start to the question
        room = between - len(told)
        if room < 0:
            raise ValueError(f"a passkey text of {T} tokens has no room for telling and asking, {T - room} tokens: raise --block_size")
        if len(text) < between:
            raise ValueError(f"the held-out text has {len(text)} tokens, a passkey text of {T} needs {between}: lower --longest, or give more data")
        at = rng.randrange(len(text) - between + 1)
        filler = text[at : at + between].tolist()
        cuts = [round(depth * room) for depth in np.linspace(0, 1, depths)]
        for middle in [*(filler[:cut] + told + filler[cut:room] for cut in cuts), filler]:
            texts.append((start + middle + ask, answer))
    return texts


@torch.no_grad()
def answer_scores(model: LM, texts: list[tuple[list[int], list[int]]], batch_size: int) -> list[tuple[float, float]]:
    """For each (prompt, answer), whether greedy decoding gives the answer (1 or 0), and the answer's mean nats per token."""
    device, scores = next(model.parameters()).device, []
    for i in range(0, len(texts), batch_size):
        _, states = process_rows(model, [torch.tensor(prompt[:-1], device=device) for prompt, _ in texts[i : i + batch_size]])
        for (prompt, answer), state in zip(texts[i:], states):
            logits, _ = model(torch.tensor([prompt[-1:] + answer[:-1]], device=device), state)
            logp, target = logits[0].float().log_softmax(-1), torch.tensor(answer, device=device)     # (answer, V), (answer,)
            scores.append(((logp.argmax(-1) == target).all().float().item(), -logp.gather(-1, target[:, None]).mean().item()))
    return scores


def passkey(model: LM, texts: list[tuple[list[int], list[int]]], depths: int, batch_size: int) -> dict:
    """Of passkey_texts, by depth: the share of exact answers and the mean nats per token; and the nats where nothing was told."""
    exact, nats = np.reshape(answer_scores(model, texts, batch_size), (-1, depths + 1, 2)).mean(0).T.tolist()
    return {"exact": exact[:-1], "nats": nats[:-1], "nats_without": nats[-1]}


# ---------------------------------------------------------------------------------------------------------------------
# The report

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


def length_table(length: dict) -> list[str]:
    """A row for each model, a column for each stretch of positions."""
    T, models = length["T"], length["models"]
    most = max(map(len, models.values()))
    lines = ["", "| loss at positions up to | " + " | ".join(f"{(i + 1) * T:,}" for i in range(most)) + " |", "|---|" + "---:|" * most]
    return lines + [f"| {name} | " + " | ".join([f"{x:.4f}" for x in losses] + ["-"] * (most - len(losses))) + " |" for name, losses in models.items()]


def passkey_table(passkey: dict) -> list[str]:
    """A row for each model and length, a column for each depth."""
    depths = passkey["depths"]
    lines = ["", "| passkey, nats per token (exact) | tokens | not told | " + " | ".join(f"depth {d:.2f}" for d in depths) + " |",
             "|---|---:|---:|" + "---:|" * len(depths)]
    for name, rows in passkey["models"].items():
        for row in rows:
            cells = [f"{x:.2f} ({e:.0%})" for x, e in zip(row["nats"], row["exact"])]
            lines.append(f"| {name} | {row['T']:,} | {row['nats_without']:.2f} | " + " | ".join(cells) + " |")
    return lines


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
    student: str | None = "out/rwkv"  # None = the teacher alone
    data: str = "data/pydoc"
    batch_size: int = 16
    block_size: int | None = None     # None = the teacher's
    max_tokens: int | None = None     # of the held-out half; None = all
    longest: int | None = None        # read on, up to so many times block_size: loss by position, and the passkey's lengths (doubling); None = off
    passkey: int | None = None        # ask for so many different numbers at each depth and length; None = off
    depths: int = 3                   # places where the passkey is told, from the text's start to its end
    out: str | None = None            # folder for report.json, .md and .png; None = print only
    collect: str | None = None        # instead: a table over the report.json files of several seeds in this folder

    def __post_init__(self):
        for name, least, most in (("longest", 1, 65536), ("passkey", 1, 90000), ("depths", 2, 100), ("batch_size", 1, 2**20), ("block_size", 1, 2**31),
                                  ("max_tokens", 1, 2**62)):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} = {value}: it must be from {least} to {most}")
        for name in ("student", "out", "collect"):
            if getattr(self, name) == "":  # an unset "$FOLDER" in the shell
                raise ValueError(f"--{name} is empty: name a folder, or omit it")
        if self.out and Path(self.out).is_file():  # found out before all the measuring
            raise ValueError(f"--out {self.out} is a file: name a folder")


def main(argv: list[str] | None = None) -> None:
    cfg = cli(EvaluateConfig, argv)
    if cfg.collect:
        print(collect(Path(cfg.collect)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {name: load_model(folder, device).eval() for name, folder in (("teacher", cfg.teacher), ("student", cfg.student)) if folder}
    teacher, student, T = models["teacher"], models.get("student"), cfg.block_size or models["teacher"].cfg.block_size
    train, val = (Loader(cfg.data, half, cfg.batch_size, T) for half in ("train", "val"))
    check_vocabulary(teacher, student or teacher, val)
    same_tokenizer(val, cfg.teacher, cfg.student or cfg.teacher)
    if (cfg.longest or cfg.passkey) and val.kind != "text":
        raise ValueError(f"{cfg.data} holds {val.kind} examples: --longest and --passkey read text")
    stretches = max(readable(model, (cfg.longest or 1) * T) for model in models.values()) // T
    lengths = [T * 2**i for i in range(stretches.bit_length())] if cfg.passkey else []
    texts = {n: passkey_texts(load_tokenizer(cfg.data), val.tokens, n, cfg.passkey, cfg.depths) for n in lengths}  # raises before minutes are spent

    report = make_report(teacher, student, train, val, cfg.max_tokens)
    if cfg.longest:
        long = Loader(cfg.data, "val", cfg.batch_size, stretches * T)  # the same windows for all models
        report["length"] = {"T": T, "models": {name: loss_by_stretch(model, long, T, cfg.max_tokens) for name, model in models.items()}}
    if cfg.passkey:
        scores = {name: [{"T": n, **passkey(model, texts[n], cfg.depths, cfg.batch_size)} for n in lengths if readable(model, n) == n]
                  for name, model in models.items()}
        report["passkey"] = {"depths": np.linspace(0, 1, cfg.depths).tolist(), "models": scores}
    if not student:
        print(f"{cfg.teacher}: {report['teacher']['val_loss']:.4f} nats per token on the held-out half of {cfg.data}, {T} tokens at a time")
    if student or cfg.longest or cfg.passkey:
        print(as_markdown(report))
    if cfg.out:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        write_report(Path(cfg.out), report)


if __name__ == "__main__":
    run(main)
