"""Which layers to leave as attention, after a short stage 1 for all of them at once.

    python -m tools.rank_layers --keep 1 --align.max_steps 100 --out out/rwkv
    python -m tools.rank_layers --by replace --keep 1 --out out/rwkv

    restore   the student with every layer replaced: put back the attention that lowers
              the KL most, then the next beside it, and so on (arXiv 2512.20569)
    replace   the teacher with one layer replaced at a time: leave those that cost most

A proposal for every number of layers that stay, up to --keep, goes to
OUT/ranking/ranking.json. Its settings are distill.py's; the student's --mixer is every
layer.
"""

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from config import at_least, cli, narrow, run as run_script, settings
from tyro.conf import Suppress

from data.mixture import open_split
from distill import DistillConfig, distill
from lib.folders import load_model, open_model, write_json
from lib.hybrid import letters
from lib.processes import joined, setup
from lib.scores import compare
from model import LM


@settings
class RankConfig(DistillConfig):
    stages: Annotated[str, Suppress] = "align"
    keep: int = at_least(0, 1)             # how many layers the proposal leaves as attention
    by: Literal["restore", "replace"] = "restore"


def rank_layers(cfg: RankConfig) -> dict:
    """What was measured and the proposals, as OUT/ranking/ranking.json holds them."""
    out = Path(cfg.run.out) / "ranking"
    if cfg.student.mixer not in ("r", "all"):
        raise ValueError(f"mixer = {cfg.student.mixer!r}: every layer is replaced once, so omit --mixer")
    n_layer = open_model(cfg.teacher)[0].cfg.n_layer
    if cfg.keep >= n_layer:
        raise ValueError(f"keep = {cfg.keep}: of {n_layer} layers 0 to {n_layer - 1} can stay attention")
    distill(narrow(cfg, DistillConfig, stages="align", run=replace(cfg.run, out=str(out))))
    ranking = propose(cfg, out / "align", cfg.by, cfg.keep)
    if setup(cfg.run.device)[0] == 0:
        write_json(out / "ranking.json", ranking)
        command = ["python", "distill.py", "--teacher", cfg.teacher, "--data", cfg.data, "--mixer",
                   ranking["mixer"]]
        print(f"{out}/ranking.json; attention stays best in {ranking['attention']}; with your other "
              "settings: " + shlex.join(command))
    return ranking


def propose(cfg: DistillConfig, aligned: Path, by: str, keep: int) -> dict:
    """Measure what a rule asks for; `aligned` is a student that keeps no attention."""
    rank, world, device = setup(cfg.run.device)
    teacher, student = (load_model(folder, device).eval() for folder in (cfg.teacher, aligned))
    val = open_split(cfg.data, "val", cfg.match.batch_size, cfg.block_size or teacher.cfg.block_size, 0, rank,
                 world)

    def score(attention: set[int]) -> dict:
        mixed = hybrid(teacher, student, attention)
        result = compare(teacher, mixed, val, cfg.eval_tokens, cfg.match.bptt_chunk)
        row = {key: result[key] for key in ("kl", "gap", "top1")}
        if rank == 0:
            line = "attention in {}: KL {kl:.4f}, top-1 {top1:.1%}"
            print(line.format(sorted(attention), **row), flush=True)
        return row

    n_layer = teacher.cfg.n_layer
    found = {"restore": restored, "replace": replaced}[by](n_layer, keep, score)
    proposals = [letters(n_layer, set(found["order"][:n])) for n in range(keep + 1)]
    return {"by": by, "keep": keep, "attention": sorted(found["order"]), "mixer": proposals[-1],
            "mixers": proposals} | found


def hybrid(teacher: LM, student: LM, attention: set[int]) -> LM:
    """The student, with its teacher's attention in the layers of `attention`.

    It is the literal hybrid: v_first is that of the first layer which stays RWKV-7.
    """
    model = LM(replace(student.cfg, mixer=letters(student.cfg.n_layer, attention)))
    model.load_state_dict(student.state_dict(), strict=False)      # all but attention's projections
    for i in attention:
        model.blocks[i].att.load_state_dict(teacher.blocks[i].att.state_dict())
    return model.to(student.emb.weight.device).eval()


# ------------------------------------------------------------------------------------------
# The two rules: which layers are left to attention first. `score` says what a set costs

def restored(n_layer: int, keep: int, score: Callable[[set[int]], dict]) -> dict:
    """Greedy: the layer whose return leaves the least KL, beside those put back."""
    order: list[int] = []
    steps = [{"attention": [], **score(set())}]
    for _ in range(keep):
        rows = {i: score({*order, i}) for i in range(n_layer) if i not in order}
        best = min(rows, key=lambda i: rows[i]["kl"])
        order.append(best)
        steps.append({"attention": sorted(order), **rows[best]})
    return {"order": order, "steps": steps}


def replaced(n_layer: int, keep: int, score: Callable[[set[int]], dict]) -> dict:
    """The costliest first, each replaced alone, as if costs added up exactly."""
    everywhere = set(range(n_layer))
    rows = [{"layer": i, **score(everywhere - {i})} for i in range(n_layer)]
    rows.sort(key=lambda row: -row["kl"])
    return {"order": [row["layer"] for row in rows][:keep], "layers": rows}


def main(argv: list[str] | None = None) -> None:
    cfg = cli(RankConfig, argv)
    with joined():
        rank_layers(cfg)


if __name__ == "__main__":
    run_script(main)
