"""Which layers to leave as attention: what replacing each one costs.

    python -m tools.rank_layers --keep 1 --align.max_steps 100 --out out/rwkv

Stage 1 for all layers at once, then the KL with each of them replaced alone, and a
proposal: OUT/ranking/ranking.json. Its settings are distill.py's; the student's --mixer
is every layer.
"""

from dataclasses import replace
from pathlib import Path

from config import at_least, cli, run as run_script, settings
import torch

from data.loader import Loader
from distill import DistillConfig, distill, wrap
from lib.folders import load_model, open_model, write_json
from lib.processes import joined, setup
from lib.scores import compare
from model import LM


@settings
class RankConfig(DistillConfig):
    keep: int = at_least(0, 1)             # how many layers the proposal leaves as attention


def rank_layers(cfg: RankConfig) -> dict:
    """All layers' costs and the proposal, as OUT/ranking/ranking.json holds them."""
    out = Path(cfg.run.out) / "ranking"
    if cfg.student.mixer not in ("r", "all"):
        raise ValueError(f"mixer = {cfg.student.mixer!r}: every layer is replaced once, so omit --mixer")
    teacher_shape = open_model(cfg.teacher)[0].cfg
    if cfg.keep >= teacher_shape.n_layer:
        raise ValueError(f"keep = {cfg.keep}: of {teacher_shape.n_layer} layers 0 to "
                         f"{teacher_shape.n_layer - 1} can stay attention")
    distill(replace(cfg, stages="align", run=replace(cfg.run, out=str(out))))
    rank, world, device = setup(cfg.run.device)
    teacher = load_model(cfg.teacher, device).eval()
    student = load_model(out / "align", device).eval()
    T = cfg.block_size or teacher.cfg.block_size
    val = Loader(cfg.data, "val", 16, T, 0, rank, world)
    ranking = propose(replacement_costs(student, teacher, val, cfg.eval_tokens), cfg.keep)
    if rank == 0:
        write_json(out / "ranking.json", ranking)
        for row in ranking["layers"]:
            print("layer {layer}: replaced alone it costs KL {kl:.4f}, top-1 {top1:.1%}".format(**row))
        print(f"{out}/ranking.json; attention stays best in {ranking['attention']}: "
              f"python distill.py --mixer {ranking['mixer']}")
    return ranking


@torch.no_grad()
def replacement_costs(student: LM, teacher: LM, val: Loader, max_tokens: int | None) -> list[dict]:
    """KL(teacher || teacher with that mixer) for each layer, the costliest first.

    `student` has been aligned everywhere. v_first is layer 0's, as in stage 1,
    whichever layer is replaced.
    """
    model, rows = wrap(student, teacher).eval(), []
    for i, block in enumerate(model.blocks):
        block.att.teacher = None               # here the student's output flows on, elsewhere the teacher's
        result = compare(teacher, model, val, max_tokens)
        block.att.teacher = teacher.blocks[i].att
        rows.append({"layer": i} | {key: result[key] for key in ("kl", "gap", "top1")})
    return sorted(rows, key=lambda row: -row["kl"])


def propose(rows: list[dict], keep: int) -> dict:
    """Leave the `keep` costliest layers attention, as if costs added up exactly."""
    attention = sorted(row["layer"] for row in rows[:keep])
    letters = "".join("a" if i in attention else "r" for i in range(len(rows)))
    return {"layers": rows, "keep": keep, "attention": attention, "mixer": letters}


def main(argv: list[str] | None = None) -> None:
    cfg = cli(RankConfig, argv)
    with joined():
        rank_layers(cfg)


if __name__ == "__main__":
    run_script(main)
