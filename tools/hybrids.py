"""What it is worth to leave some layers attention, and which: rules side by side.

    python -m tools.hybrids --teacher out/deep --out out/hybrids
    python -m tools.hybrids --teacher out/pairs/teacher --data out/pairs/data

Stage 1 is run once, for all layers. From there each rule and number of layers kept has
a student of its --mixer, taken through stage 2 and compared with the teacher:
OUT/hybrids.json, .md and .svg. With --own_steps the students start anew, with a stage 1
of their own; the one for all layers only serves the rules that measure. On the data of
tools/recall.py all are also asked for pairs. Its settings are distill.py's; students
that are there already are read back, so that an interrupted run goes on.

    restore, replace    by tools/rank_layers.py
    uniform             spread evenly, the last layer among them
    first, last         the layers nearest to the embedding, to the head
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from config import at_least, cli, narrow, run as run_script, settings, shown
import torch
from tyro.conf import OmitArgPrefixes, Suppress

from distill import DistillConfig, distill
from lib.folders import load_model, write_json, write_text
from lib.home import LENGTHS, lock, read_settings
from lib.hybrid import evenly, letters, remembered_bytes
from lib.owned import check_place, contents
from lib.processes import setup
from lib.report import figure
from lib.runs import RunConfig
from lib.scores import readable
from model import LM
from tools.rank_layers import propose
from tools.recall import is_recall as is_pairs, pairs_accuracy

RULES = ("restore", "replace", "uniform", "first", "last")
ASKED = 200            # sequences of pairs


@settings
class HybridsConfig(DistillConfig):
    stages: Annotated[str, Suppress] = "align,match"
    rules: str = ",".join(RULES)
    kept: str | None = None                # numbers of layers, with commas; None = all
    own_steps: int | None = at_least(1, None)  # of each student's own stage 1; None: all share one
    memory_of: int | None = at_least(1, None)  # tokens whose bytes are told; None = block_size
    pairs: int = at_least(1, 16, below=33)     # asked for, where the data are pairs
    run: Annotated[RunConfig, OmitArgPrefixes] = RunConfig(out="out/hybrids")

    def __post_init__(self):
        if self.run.overwrite:
            raise ValueError(f"overwrite: what is in {self.run.out} is read back; choose another --out")
        names = self.rules.split(",")
        if set(names) - set(RULES) or len(set(names)) < len(names):
            raise ValueError(f"rules = {shown(self.rules)}: name some of {','.join(RULES)}, each once")
        if any(not n.isdecimal() or len(n) > 9 for n in (self.kept or "0").split(",")):
            raise ValueError(f"kept = {shown(self.kept)}: write numbers of layers with commas")
        if self.student.mixer not in ("r", "all"):
            raise ValueError(f"mixer = {self.student.mixer!r}: the rules say which layers, so omit --mixer")


def hybrids(cfg: HybridsConfig) -> dict:
    """A row for each rule and number of layers kept; equal patterns are one student."""
    teacher = load_model(cfg.teacher, setup(cfg.run.device)[2]).eval()
    L, T = teacher.cfg.n_layer, cfg.block_size or teacher.cfg.block_size
    kept = [int(n) for n in cfg.kept.split(",")] if cfg.kept else list(range(L))
    if max(kept) >= L:
        raise ValueError(f"kept = {cfg.kept}: of {L} layers 0 to {L - 1} can stay attention")
    if has_pairs(cfg) and readable(teacher, 3 * cfg.pairs) < 3 * cfg.pairs:
        raise ValueError(f"pairs = {cfg.pairs}: asked once each they take {3 * cfg.pairs} tokens, but "
                         f"{cfg.teacher} has learned {teacher.cfg.longest} positions: lower it")
    check_length(cfg)
    n = cfg.memory_of or T
    rate = speed(teacher, cfg.match.batch_size, T)
    everywhere, align = cfg.run.within("everywhere"), {}
    if not cfg.own_steps or {"restore", "replace"} & {*cfg.rules.split(",")}:
        align = stage_rows(narrow(cfg, DistillConfig, stages="align", run=everywhere))["align"]
    cfg = replace(cfg, student=replace(cfg.student, aligned=f"{everywhere.out}/align"))
    first = {"bytes": remembered_bytes(teacher.cfg, n), "tokens_per_s": rate}
    if has_pairs(cfg):
        first["recall"] = pairs_accuracy(teacher, cfg.pairs, ASKED)
    rows, students = [], {}
    for rule in cfg.rules.split(","):
        for number, mixer in zip(kept, patterns(cfg, rule, L, kept)):
            students[mixer] = students.get(mixer) or student_row(cfg, mixer, n, align)
            rows.append({"rule": rule, "kept": number} | students[mixer])
    pairs = {"pairs": cfg.pairs} if has_pairs(cfg) else {}
    return {"n_layer": L, "memory_of": n, "own_steps": cfg.own_steps, "teacher": first, "rows": rows} | pairs


def check_length(cfg: HybridsConfig) -> None:
    """Raises ValueError for another stage 1 than the one that students stand on."""
    out = Path(cfg.run.out)
    students = {path.parent for path in out.glob("*/settings.json")} - {out / "everywhere"}
    for folder in students:
        before = read_settings(folder / "settings.json")
        aligns = (folder / "align").exists() or "align" in before.get("stages", "").split(",")
        differs("own_steps", before.get("align.max_steps") if aligns else None, cfg.own_steps, out)
    before = read_settings(out / "everywhere" / "settings.json") if students else {}
    for name in LENGTHS if before else ():
        differs(f"align.{name}", before.get(f"align.{name}"), getattr(cfg.align, name), out)


def differs(name: str, old, new, out: Path) -> None:
    """Raises ValueError where `out` was begun with another value."""
    if old != new:
        raise ValueError(f"{out} was begun with {name} = {old}, not {new}: repeat it, or choose another "
                         "--out")


def stage_rows(cfg: DistillConfig) -> dict[str, dict]:
    """Distil, or read back; the rows of the report by their names."""
    return {row["name"]: row for row in distill(cfg)["stages"]}


@torch.no_grad()
def speed(teacher: LM, B: int, T: int) -> float:
    """Tokens that the teacher reads in a second, at a batch's size; the median of 3."""
    tokens, times = torch.zeros(B, T, dtype=torch.long, device=teacher.emb.weight.device), []
    for _ in range(3):
        start = time.perf_counter()
        teacher(tokens)[0].sum().item()            # waits for a GPU
        times.append(time.perf_counter() - start)
    return B * T / sorted(times)[1]


def patterns(cfg: HybridsConfig, rule: str, L: int, kept: list[int]) -> list[str]:
    """A rule's --mixer for each number of layers that stay attention."""
    if rule not in ("restore", "replace"):
        return [letters(L, by_place(rule, L, n)) for n in kept]
    mixers = propose(cfg, Path(cfg.student.aligned), rule, max(kept))["mixers"]
    return [mixers[n] for n in kept]


def by_place(rule: str, L: int, n: int) -> set[int]:
    """The n of L layers that stay attention, chosen by where they stand."""
    if rule == "uniform":
        return evenly(L, n)
    return set(range(n)) if rule == "first" else set(range(L - n, L))


def student_row(cfg: HybridsConfig, mixer: str, n: int, align: dict) -> dict:
    """Take a pattern's student through its stages, or read it back; how it does then.

    `bytes` are what it remembers of n tokens; `align` is the stage 1 for all layers,
    where it stands on that.
    """
    rows = stage_rows(student_settings(cfg, mixer))
    match, shared = rows["match"], {key: x for key, x in align.items() if key in ("tokens", "minutes")}
    folder = Path(cfg.run.out) / mixer / "match"         # OUT/mixer itself may be further
    model = load_model(folder, setup(cfg.run.device)[2]).eval()
    row = {"mixer": mixer, "bytes": remembered_bytes(model.cfg, n)}
    row |= {key: match[key] for key in ("kl", "gap", "top1")}
    for name, stage in (("align", rows.get("align") or rows["start"] | shared), ("match", match)):
        row[name] = {key: stage[key] for key in ("tokens", "minutes", "kl", "gap", "top1")}
    return row | ({"recall": pairs_accuracy(model, cfg.pairs, ASKED)} if has_pairs(cfg) else {})


def student_settings(cfg: HybridsConfig, mixer: str) -> DistillConfig:
    """distill.py's, for a pattern's student."""
    run, student = cfg.run.within(mixer), replace(cfg.student, mixer=mixer)
    if not cfg.own_steps:
        return narrow(cfg, DistillConfig, stages="match", student=student, run=run)
    align = replace(cfg.align, max_steps=cfg.own_steps)
    return narrow(cfg, DistillConfig, student=replace(student, aligned=None), align=align, run=run)


def has_pairs(cfg: HybridsConfig) -> bool:
    return is_pairs(Path(cfg.data) / "meta.json")


# ------------------------------------------------------------------------------------------
# The report

def as_markdown(report: dict) -> str:
    """A table for each score: rules across, layers kept down."""
    rows = {(row["rule"], row["kept"]): row for row in report["rows"]}
    rules, kept = (list(dict.fromkeys(column)) for column in zip(*rows))
    tables = []
    for key, (title, form) in scores(report).items():
        lines = [f"| {title}, by layers kept | " + " | ".join(rules) + " | bytes |",
                 "|---:|" + "---:|" * (len(rules) + 1)]
        for n in kept:
            cells = [f"{rows[rule, n][key]:{form}}" for rule in rules]
            lines.append(f"| {n} | " + " | ".join(cells) + f" | {rows[rules[0], n]['bytes']:,} |")
        tables.append("\n".join(lines))
    teacher = report["teacher"]
    tables += ["\n".join(speeds(report)),
               f"Bytes are those of {report['memory_of']:,} tokens; all attention: {teacher['bytes']:,}"
               + (f", {teacher['recall']:.1%} of the answers right." if "recall" in teacher else ".")]
    return "\n\n".join(tables) + "\n"


def speeds(report: dict) -> list[str]:
    """A table of what the stages took; the teacher reads each token once."""
    lines = ["| student | stage | tokens | minutes | tokens/s | teacher's share |",
             "|---|---|---:|---:|---:|---:|"]
    took = {}
    for row in report["rows"]:
        aligned = row["mixer"] if report["own_steps"] else "all"
        took |= {(aligned, "align"): row["align"], (row["mixer"], "match"): row["match"]}
    for (student, stage), row in took.items():
        rate = row["tokens"] / max(row["minutes"] * 60, 1e-9)
        share = rate / report["teacher"]["tokens_per_s"]
        lines.append(f"| {student} | {stage} | {row['tokens']:,} | {row['minutes']:.1f} | {rate:,.0f} "
                     f"| {share:.0%} |")
    return lines


def scores(report: dict) -> dict[str, tuple[str, str]]:
    """What there is to tell: key -> title and format."""
    pairs = {"recall": (f"answers right of {report['pairs']} pairs", ".1%")} if "pairs" in report else {}
    return {"kl": ("KL", ".4f"), "gap": ("gap", ".4f"), "top1": ("top-1", ".1%")} | pairs


def plot(report: dict, path: Path) -> None:
    """KL, and recall where asked for, against layers kept and against bytes."""
    shown_scores = [key for key in scores(report) if key in ("kl", "recall")]
    with figure(path, 2 * len(shown_scores)) as panels:
        titles = {"kept": "layers kept attention", "bytes": f"bytes of {report['memory_of']:,} tokens"}
        for i, key in enumerate(shown_scores if panels is not None else []):
            for x, ax in zip(titles, panels[2 * i :]):
                for rule in dict.fromkeys(row["rule"] for row in report["rows"]):
                    points = sorted((row[x], row[key]) for row in report["rows"] if row["rule"] == rule)
                    ax.plot(*zip(*points), "o-", ms=3, label=rule)
                ax.set(xlabel=titles[x], ylabel=scores(report)[key][0],
                       yscale="log" if key == "kl" else "linear")


def main(argv: list[str] | None = None) -> None:
    cfg = cli(HybridsConfig, argv)
    if setup(cfg.run.device)[1] > 1:
        raise ValueError("tools.hybrids runs on one process: start it with python, not torchrun")
    out = Path(cfg.run.out)
    results = [out / f"hybrids.{kind}" for kind in ("json", "md", "svg")]
    check_place(results, lambda file: "rows" in contents(file), "--out")
    held = lock(out)
    report = hybrids(cfg)
    text = as_markdown(report)
    write_json(results[0], report)
    write_text(results[1], text)
    plot(report, results[2])
    print(text + f"{out}: hybrids.json, hybrids.md, hybrids.svg")


if __name__ == "__main__":
    run_script(main)
