"""Controls of a distillation: the same student tokens without each of its ideas.

    python -m tools.controls config/results.toml --out out/results-0

Its settings are those of the distillation in OUT, which has run; the rows go to
OUT/controls, a folder each, and into its report. What is there goes on or is read back.
"""

from dataclasses import asdict, replace
from pathlib import Path

from config import at_least, cli, run as run_script, settings
from data.foreign import read_json
from data.loader import Loader
from distill import DistillConfig, distill
from lib.folders import load_model, open_model
from lib.home import check_same, lock
from lib.hybrid import mixer_letters
from lib.processes import joined, main_first, setup
from lib.report import as_markdown, write_report
from lib.runs import RunConfig
from lib.scores import measure
from train import FitConfig, TrainConfig, train


@settings
class ControlsConfig(DistillConfig):
    scratch_rate: float = at_least(0.0, 2e-3)      # learning rate of RWKV-7 from scratch: the teacher's


def check_stages(cfg: DistillConfig) -> None:
    """Raises ValueError for a distillation that the controls are no controls of."""
    if cfg.named[:2] != ["align", "match"]:
        raise ValueError(f"controls compare with the stages align,match, but stages = {cfg.stages!r}: add "
                         "them")


def run_controls(cfg: ControlsConfig) -> dict:
    """A row each, against the same teacher; all see as many tokens as the student."""
    sequences = sum(loop.max_steps * loop.batch_size * loop.accum for loop in (cfg.align, cfg.match))
    alone = replace(cfg.match, max_steps=sequences // (cfg.match.batch_size * cfg.match.accum))
    changes = {
        "no stage 1": {"stages": "match", "match": alone},
        "no weight transfer": {"student": replace(cfg.student, transfer=False)},
        "cross-entropy only": {"kl_weight": 0.0, "ce_weight": 1.0}}
    rows = {}
    for name, change in changes.items():
        control = replace(cfg, **{"stages": "align,match"} | change, run=in_folder(cfg.run, name))
        done = distill(control)["stages"]
        rows[name] = done[-1] | {key: sum(row[key] for row in done) for key in ("tokens", "minutes")}
    return rows | trained_alone(cfg, alone)


def trained_alone(cfg: ControlsConfig, loop: FitConfig) -> dict:
    """RWKV-7 from scratch, and the teacher trained on, each on the same tokens."""
    rank, world, device = setup(cfg.run.device)
    teacher = load_model(cfg.teacher, device).eval()
    t, N, T = teacher.cfg, teacher.cfg.att_head_size, cfg.block_size or teacher.cfg.block_size
    shape = replace(t, mixer="r", ffn="channelmix" if t.ffn == "relu2" else t.ffn, rwkv_head_size=N,
                    rwkv_size=t.n_head * N, block_size=T)
    scratch_loop = replace(loop, learning_rate=cfg.scratch_rate, rwkv_lr_multiplier=1.0)
    hows = {"RWKV-7 from scratch": {"model": shape, "fit": scratch_loop},
            "teacher trained on": {"init": cfg.teacher, "fit": loop}}
    val = Loader(cfg.data, "val", 16, T, 0, rank, world)
    rows = {}
    for name, how in hows.items():
        place = in_folder(cfg.run, name)
        done = train(TrainConfig(data=cfg.data, run=place, **how))
        scores = measure(teacher, load_model(place.out, device), val, cfg.eval_tokens, cfg.match.bptt_chunk)
        rows[name] = {"name": name, "tokens": done["tokens"], "minutes": done["minutes"]} | scores
    return rows


def in_folder(run: RunConfig, name: str) -> RunConfig:
    """The same run in OUT/controls/NAME, where an earlier one goes on."""
    folder = Path(run.out) / "controls" / name.replace(" ", "-")
    return replace(run, out=str(folder), resume=folder.exists(), overwrite=False)


def check_settings(cfg: ControlsConfig, out: Path, world: int) -> None:
    """Raises ValueError for other settings than the distillation in `out` had."""
    t = open_model(cfg.teacher)[0].cfg
    shape = replace(t, rwkv_head_size=t.att_head_size, rwkv_size=t.n_head * t.att_head_size)
    settings = asdict(replace(cfg, block_size=cfg.block_size or t.block_size))
    check_same(out, settings, world, mixer_letters(shape, cfg.student.mixer))


def add_controls(cfg: ControlsConfig) -> dict:
    """Run them, and put their rows into OUT's report."""
    check_stages(cfg)
    out = Path(cfg.run.out)
    rank, world, _ = setup(cfg.run.device)
    with main_first(rank):                 # who has just distilled writes the report, the others wait
        if not (out / "report.json").exists():
            raise ValueError(f"no report in {out}: distil first, python distill.py --out {out}")
        check_settings(cfg, out, world)
        held = lock(out) if rank == 0 else None            # nobody replaces OUT meanwhile
    controls = run_controls(cfg)
    report = read_json(out / "report.json", "distil again") | {"controls": controls}
    if rank == 0:
        curves = {"teacher": Path(cfg.teacher)} | {name: out / name for name in cfg.named}
        write_report(out, report, {name: folder / "metrics.jsonl" for name, folder in curves.items()})
        print(as_markdown(report))
        held.close()
    return report


def main(argv: list[str] | None = None) -> None:
    cfg = cli(ControlsConfig, argv)
    with joined():
        add_controls(cfg)


if __name__ == "__main__":
    run_script(main)
