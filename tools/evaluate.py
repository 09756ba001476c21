"""Teacher and student side by side: how much of the teacher is left in the student.

    python -m tools.evaluate --teacher out/teacher --student out/rwkv --data data/pydoc

Loss of both on held-out text and the gap between them (nats per token), KL(teacher ||
student), how often both prefer the same token (top-1) and the teacher's choice is among
the student's five best (top-5), the recovered fraction

    recovered = (unigram loss - student loss) / (unigram loss - teacher loss)

(0: knows only how frequent each token is; 1: all the teacher knows), loss by position,
and per layer how far each mixer is from the attention it replaced, on the teacher's own
inputs. Past the training length: tools/passkey.py. Associative recall: tools/recall.py.
"""

from pathlib import Path

from config import at_least, cli, run, settings
from data.mixture import open_split
from lib.folders import check_vocabulary, load_model, same_tokenizer
from lib.owned import check_place, contents
from lib.processes import pick_device
from lib.report import as_markdown, make_report, write_report


@settings
class EvaluateConfig:
    teacher: str = "out/teacher"
    student: str | None = "out/rwkv"               # None = the teacher alone
    data: str = "data/pydoc"
    batch_size: int = at_least(1, 16, below=2**20)
    block_size: int | None = at_least(1, None, below=2**31)      # None = the teacher's
    max_tokens: int | None = at_least(1, None)     # of the held-out text; None = all
    device: str = "auto"
    out: str | None = None                         # folder for report.json, .md and .png; None = print only

    def __post_init__(self):
        if self.out and Path(self.out).is_file():  # before all the measuring, not after it
            raise ValueError(f"--out {self.out} is a file: name a folder")


def is_evaluation(file: Path) -> bool:
    """Whether a report is one of ours: a distillation's tells of its stages, too."""
    names = contents(file).keys()
    return {"teacher", "by_position"} <= names and "stages" not in names


def main(argv: list[str] | None = None) -> None:
    cfg = cli(EvaluateConfig, argv)
    device = pick_device(cfg.device)
    if cfg.out:                                    # before all the measuring, not after it
        files = [Path(cfg.out) / f"report.{kind}" for kind in ("json", "md", "png")]
        check_place(files, is_evaluation, "--out")
    teacher = load_model(cfg.teacher, device).eval()
    student = load_model(cfg.student, device).eval() if cfg.student else None
    T = cfg.block_size or teacher.cfg.block_size
    train, val = (open_split(cfg.data, half, cfg.batch_size, T) for half in ("train", "val"))
    check_vocabulary(teacher, student or teacher, val)
    same_tokenizer(val, cfg.teacher, cfg.student or cfg.teacher)
    report = make_report(teacher, student, train, val, cfg.max_tokens)
    if cfg.out:
        write_report(Path(cfg.out), report)
    if student:
        print(as_markdown(report))
    else:
        print(f"{cfg.teacher}: {report['teacher']['val_loss']:.4f} nats per token on the held-out text of "
              f"{cfg.data}, {T} tokens at a time")


if __name__ == "__main__":
    run(main)
