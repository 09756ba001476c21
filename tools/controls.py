"""Controls of a distillation: the same student tokens without each of its ideas.

    python -m tools.controls config/results.toml --out out/results/costly-0

Its settings are those of the distillation in OUT, which has run; the rows go to
OUT/controls, a folder each, and into its report. What is there goes on or is read back.
The first is no control but a variant: a student whose heads rotate as its teacher's do,
or one whose heads do not.
"""

from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote

from config import at_least, cli, narrow, run as run_script, settings, shown

from data.foreign import read_json
from data.mixture import open_split
from distill import DistillConfig, distill
from lib.folders import load_model, open_model
from lib.home import LENGTHS, check_same, lock
from lib.processes import joined, main_first, setup
from lib.report import as_markdown, table_rows, upto_match, write_report
from lib.runs import RunConfig, read_row
from lib.scores import measure
from lib.start import student_shape
from model import ModelConfig
from tools.results import read_report
from train import FitConfig, TrainConfig, train

SCRATCH = "RWKV-7 from scratch"
CONTROLS = ("rotating heads", "no stage 1", "no weight transfer", "cross-entropy only", SCRATCH,
            SCRATCH + " by AdamW", "teacher trained on")


@settings
class ControlsConfig(DistillConfig):
    only: str = ",".join(CONTROLS)                 # those to run
    scratch_rate: float = at_least(0.0, 2e-3)      # learning rate of RWKV-7 from scratch: the teacher's

    def __post_init__(self):
        if self.run.overwrite:
            raise ValueError(f"overwrite: what is in {self.run.out} is read back; to run some of it anew, "
                             "remove its folder there")
        if set(self.asked) - set(CONTROLS):
            raise ValueError(f"only = {shown(self.only)}: name some of {','.join(CONTROLS)}")

    @property
    def asked(self) -> list[str]:
        return self.only.split(",")

    @property
    def alone(self) -> FitConfig:
        """Stage 2's loop, for as many tokens as both stages have together."""
        sequences = sum(loop.max_steps * loop.batch_size * loop.accum for loop in (self.align, self.match))
        return replace(self.match, max_steps=sequences // (self.match.batch_size * self.match.accum))


def check_stages(cfg: DistillConfig) -> None:
    """Raises ValueError for a distillation that the controls are no controls of."""
    if cfg.named[:2] != ["align", "match"]:
        raise ValueError(f"controls compare with the stages align,match, but stages = {cfg.stages!r}: add "
                         "them")
    for name, loop in (("align", cfg.align), ("match", cfg.match)):
        for limit in LENGTHS[1:]:                              # all but max_steps
            if getattr(loop, limit):
                raise ValueError(f"{name}.{limit} = {getattr(loop, limit)}: controls add up steps; distil "
                                 f"with {name}.max_steps alone")
    if cfg.student.aligned:
        raise ValueError("aligned: this student's mixers had another's stage 1, which no control has; "
                         "distil without it")


def run_controls(cfg: ControlsConfig) -> dict:
    """A row each, against the same teacher; all see as many tokens as the student."""
    changes = {
        "rotating heads": {"student": replace(cfg.student, rwkv_rope=not cfg.student.rwkv_rope)},
        "no stage 1": {"stages": "match", "match": cfg.alone},
        "no weight transfer": {"student": replace(cfg.student, transfer=False)},
        "cross-entropy only": {"kl_weight": 0.0, "ce_weight": 1.0}}
    rows = {}
    for name in filter(changes.get, cfg.asked):
        change = {"stages": "align,match"} | changes[name]
        done = distill(narrow(cfg, DistillConfig, **change, run=place(cfg.run, name)))["stages"]
        rows[name] = together(done)
    teacher = load_model(cfg.teacher).cfg
    by_adamw = replace(cfg.alone, optimizer="adamw")
    alone = {SCRATCH: from_scratch(cfg, teacher, cfg.alone),
             SCRATCH + " by AdamW": from_scratch(cfg, teacher, by_adamw),
             "teacher trained on": {"init": cfg.teacher, "fit": trained_on(cfg, teacher)}}
    for name in filter(alone.get, cfg.asked):
        rows[name] = {"name": name} | trained_alone(cfg, place(cfg.run, name), **alone[name])
    return rows


def together(stages: list[dict]) -> dict:
    """Both stages as one row: where the last one ended, and what they took together."""
    rows = upto_match(stages)
    return rows[-1] | {key: sum(row[key] for row in rows) for key in ("tokens", "minutes")}


def from_scratch(cfg: ControlsConfig, t: ModelConfig, loop: FitConfig) -> dict:
    """How a model of the student's shape learns the same without its teacher, whose
    shape is t.
    """
    shape = replace(student_shape(t, cfg.student), block_size=cfg.block_size or t.block_size)
    loop = replace(loop, learning_rate=cfg.scratch_rate, rwkv_lr_multiplier=1.0)
    return {"model": shape, "fit": loop}


def trained_on(cfg: ControlsConfig, t: ModelConfig) -> FitConfig:
    """As many tokens for the teacher, in whole sequences of its own length."""
    steps = cfg.alone.max_steps * (cfg.block_size or t.block_size) // t.block_size
    return replace(cfg.alone, max_steps=max(1, steps))


def trained_alone(cfg: ControlsConfig, run: RunConfig, **how) -> dict:
    """Train a model by train.py, and compare it with the teacher as a student is."""
    rank, world, device = setup(cfg.run.device)
    done = train(TrainConfig(data=cfg.data, run=run, **how))
    teacher, model = (load_model(folder, device).eval() for folder in (cfg.teacher, run.out))
    val = open_split(cfg.data, "val", 16, cfg.block_size or teacher.cfg.block_size, 0, rank, world)
    scores = measure(teacher, model, val, cfg.eval_tokens, cfg.match.bptt_chunk)
    return {key: done[key] for key in ("tokens", "minutes")} | scores


def place(run: RunConfig, name: str) -> RunConfig:
    return run.within("controls/" + name.replace(" ", "-"))


def check_distilled(cfg: ControlsConfig, out: Path, world: int) -> None:
    """Raises ValueError where `out` has no finished distillation of these settings."""
    path = out / "report.json"
    if not path.exists():
        raise ValueError(f"no report in {out}: distil first, python distill.py --out {quote(str(out))}")
    t = open_model(cfg.teacher)[0].cfg
    if "rotating heads" in cfg.asked and t.att_head_size % 2:
        raise ValueError(f"rotating heads: pairs of channels turn, and the heads of {cfg.teacher} have "
                         f"{t.att_head_size}: name the other controls, python -m tools.controls --only ...")
    settings = asdict(replace(cfg, block_size=cfg.block_size or t.block_size))
    check_same(out, settings, world, student_shape(t, cfg.student).mixers)
    report = read_report(path)
    told = {row["name"]: row["tokens"] for row in table_rows(report or {})}
    for name in ("align", "match"):
        row = out / name / "stage.json"
        if not row.exists() or read_row(row)["tokens"] != told.get(name):
            raise ValueError(f"{path} is not of the stage {name} as it is now: go on with python distill.py "
                             f"--resume --out {quote(str(out))}, and the same settings")


def add_controls(cfg: ControlsConfig) -> dict:
    """Run them, and put their rows into OUT's report."""
    check_stages(cfg)
    out = Path(cfg.run.out)
    rank, world, _ = setup(cfg.run.device)
    with main_first(rank):                 # who has just distilled writes the report, the others wait
        check_distilled(cfg, out, world)
        held = lock(out) if rank == 0 else None            # nobody replaces OUT meanwhile
    controls = run_controls(cfg)
    report = read_json(out / "report.json", "distil again")
    report["controls"] = report.get("controls", {}) | controls
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
