"""Associative recall: how many pairs attention, RWKV-7 and hybrids of both remember,
flattering or not.

    python -m tools.recall --out out/pairs        offline, some minutes on two cores
    python -m tools.recall --pairs 4,8,16 --mixers "all last:1"

Multi-query associative recall (arXiv 2312.04927): a tiny GPT learns to answer (k1 v1)
(k2 v2) ... k2? k1? ..., is distilled into students of several --mixer patterns, and all
are asked again, by number of pairs. A pair is one token: where it is two, a GPT must
first learn to look at the token before, which took it too long here.

A state of N x N can keep N orthogonal keys per head; attention keeps every key, at the
price of a memory that grows. It trains its own models; for others, tools/passkey.py.
"""

from pathlib import Path

from config import at_least, cli, run as run_script, settings, shown
import numpy as np
import torch

from distill import DistillConfig, StudentConfig, distill
from lib.folders import fingerprint, load_model, write_json, write_text
from lib.home import lock, read_settings
from lib.hybrid import remembered_bytes
from lib.owned import check_place, contents
from lib.processes import setup
from lib.report import figure
from lib.runs import RunConfig
from lib.start import student_shape
from model import LM, ModelConfig
from train import FitConfig, TrainConfig, train

KEYS, VALUES = 32, 7   # bytes 0 ... 31 ask for a key, 32 ... 255 are the pairs of one with a value


@settings
class RecallConfig:
    out: str = "out/recall"           # recall.json, recall.md, recall.png, the data and the models
    device: str = "auto"
    seed: int = at_least(0, 0)
    resume: bool = False              # go on where one with these settings stopped; without: all anew
    pairs: str = "4,8,16,32"          # how many pairs a sequence has; each equally often in training
    mixers: str = "all first:1 last:1"     # the students
    examples: int = at_least(1, 20000, below=2**24)     # training sequences
    asked: int = at_least(1, 200, below=2**20)          # held-out sequences for each number of pairs
    model: ModelConfig = ModelConfig(n_layer=2, n_embd=64, n_head=4, block_size=96)
    teacher_fit: FitConfig = FitConfig(max_steps=400, batch_size=32, learning_rate=5e-3, weight_decay=0.0,
                                       eval_every=None)
    align: FitConfig = FitConfig(max_steps=150, batch_size=32, learning_rate=5e-3, eval_every=None)
    match: FitConfig = FitConfig(max_steps=200, batch_size=32, learning_rate=1e-3, rwkv_lr_multiplier=2.0,
                                 weight_decay=0.0, eval_every=None)

    def __post_init__(self):
        if any(not n.isdecimal() or len(n) > 9 or not 1 <= int(n) <= KEYS for n in self.pairs.split(",")):
            raise ValueError(
                f"pairs = {shown(self.pairs)}: write numbers from 1 to {KEYS}, the number of different "
                "keys, with commas"
            )
        longest = max(self.n_pairs)
        if 3 * longest > self.model.block_size:
            raise ValueError(f"{longest} pairs, asked once each, take {3 * longest} tokens, but "
                             f"model.block_size = {self.model.block_size}: ask for fewer, or raise it")
        if "r" in self.model.mixers:
            raise ValueError(f"model.mixer = {shown(self.model.mixer)}: the teacher is all attention, so "
                             "omit it")
        for mixer in self.mixers.split():
            if "r" not in student_shape(self.model, StudentConfig(mixer=mixer)).mixers:
                raise ValueError(f"mixers: {shown(mixer)} replaces no layer: put an r where RWKV-7 is to "
                                 "stand")
        DistillConfig(align=self.align, match=self.match)                  # raises for what no stage can have

    @property
    def folders(self) -> dict[str, Path]:
        """Of the models: the teacher's, and each student's by its mixer."""
        students = {mixer: mixer.replace(":", "-").replace(",", "-") for mixer in self.mixers.split()}
        return {name: Path(self.out) / folder for name, folder in ({"teacher": "teacher"} | students).items()}

    def run(self, name: str) -> RunConfig:
        """Of the model of this name: what is in its folder goes on, or is replaced, as
        is a student of an earlier teacher.
        """
        folder, teacher = self.folders[name], self.folders["teacher"]
        goes_on = self.resume and folder.exists()
        if goes_on and name != "teacher":
            taught = read_settings(folder / "settings.json").get("teacher", {})
            goes_on = taught.get("digest") == fingerprint(teacher)
        return RunConfig(out=str(folder), resume=goes_on, overwrite=not goes_on, device=self.device,
                         seed=self.seed, save_every=None)

    @property
    def n_pairs(self) -> list[int]:
        return [int(n) for n in self.pairs.split(",")]


# ------------------------------------------------------------------------------------------
# The task

def pairs_sequence(n: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """3n + 1 tokens, and the mask (1 = is asked for) of the pairs that come again.

    A document boundary, n pairs with different keys, then each key again, in another
    order, followed by its pair.
    """
    keys = rng.permutation(KEYS)[:n]
    pairs = KEYS + VALUES * keys + rng.integers(0, VALUES, n)
    again = rng.permutation(n)
    questions = np.stack([keys[again], pairs[again]], 1).flatten()
    return [256, *pairs.tolist(), *questions.tolist()], [0] * (n + 1) + [0, 1] * n


def write_pairs(folder: Path, cfg: RecallConfig) -> None:
    """A prepared data folder of such sequences, as data/prepare.py would write it."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"kind": "supervised", "tokenizer": "bytes", "vocab_size": 257, "dtype": "uint16",
            "source": "recall.py"}
    write_json(folder / "meta.json", meta)                 # first: a folder that is not whole is ours, too
    counts = {}
    for half, n, stream in (("train", cfg.examples, 0), ("val", max(64, cfg.asked), 1)):
        rng = np.random.default_rng([cfg.seed, stream])
        rows = [pairs_sequence(int(rng.choice(cfg.n_pairs)), rng) for _ in range(n)]
        tokens = np.array([token for row, _ in rows for token in row], np.uint16)
        mask = np.array([x for _, row in rows for x in row], np.uint8)
        tokens.tofile(folder / f"{half}.bin")
        mask.tofile(folder / f"{half}.mask.bin")
        lengths = [len(row) for row, _ in rows]
        np.cumsum([0, *lengths], dtype=np.int64).tofile(folder / f"{half}.idx.bin")
        counts[half] = len(tokens)
    write_json(folder / "meta.json", meta | {"tokens": counts})


@torch.no_grad()
def pairs_accuracy(model: LM, n: int, asked: int, seed: int = 0) -> float:
    """Share of values the model puts first in `asked` fresh sequences of n pairs."""
    rng, right = np.random.default_rng([seed, 2]), 0
    device = next(model.parameters()).device
    for rows in np.array_split(range(asked), -(-asked // 64)):
        sequences = [pairs_sequence(n, rng) for _ in rows]
        tokens, mask = (torch.tensor(x, device=device) for x in zip(*sequences))
        best = model(tokens[:, :-1])[0].argmax(-1)
        right += int(((best == tokens[:, 1:]) * mask[:, 1:]).sum())
    return right / (asked * n)


# ------------------------------------------------------------------------------------------
# The models and their report

def recall(cfg: RecallConfig) -> dict:
    """Teach a GPT to recall, distil it into every pattern of cfg.mixers, and ask all.

    Returns {"pairs", "chance", "models": {name: {...}}}.
    """
    out = Path(cfg.out)
    data, teacher = out / "data", cfg.folders["teacher"]
    write_pairs(data, cfg)
    train(TrainConfig(data=str(data), model=cfg.model, fit=cfg.teacher_fit, run=cfg.run("teacher")))
    for mixer in cfg.mixers.split():
        distill(DistillConfig(teacher=str(teacher), data=str(data), stages="align,match", align=cfg.align,
                              match=cfg.match, student=StudentConfig(mixer=mixer), eval_tokens=4096,
                              run=cfg.run(mixer)))
    models = {}
    for name, folder in cfg.folders.items():
        model = load_model(folder).eval()
        models[name] = {"mixers": model.cfg.mixers,
                        "accuracy": [pairs_accuracy(model, n, cfg.asked, cfg.seed) for n in cfg.n_pairs],
                        "bytes": [remembered_bytes(model.cfg, 3 * n) for n in cfg.n_pairs]}
    return {"pairs": cfg.n_pairs, "chance": 1 / VALUES, "models": models}


def as_markdown(report: dict) -> str:
    """The result as a table for people."""
    ns, models = report["pairs"], report["models"]
    titles = " | ".join(map(str, ns))
    lines = [f"| answers right, by number of pairs | layers | {titles} | bytes at {ns[-1]} |",
             "|---|---|" + "---:|" * (len(ns) + 1)]
    for name, m in models.items():
        cells = " | ".join(f"{x:.1%}" for x in m["accuracy"])
        lines.append(f"| {name} | {m['mixers']} | {cells} | {m['bytes'][-1]:,} |")
    return "\n".join([*lines, "", f"Guessing gives {report['chance']:.1%}."]) + "\n"


def plot(report: dict, path: Path) -> None:
    """The share of right answers by number of pairs.

    Does nothing but say so without matplotlib.
    """
    with figure(path, 1, width=4.2) as panels:
        if panels is None:
            return
        for name, m in report["models"].items():
            panels[0].plot(report["pairs"], m["accuracy"], "o-", ms=3, label=name)
        panels[0].set(title="recall of pairs", xlabel="pairs", ylabel="right", xscale="log", ylim=(0, 1.05))


def is_recall(meta: Path) -> bool:
    """Whether a data folder is one of ours, and so is what stands beside it."""
    return contents(meta).get("source") == "recall.py"


def main(argv: list[str] | None = None) -> None:
    cfg = cli(RecallConfig, argv)
    if setup(cfg.device)[1] > 1:
        raise ValueError("tools.recall runs on one process: start it with python, not torchrun")
    out = Path(cfg.out)
    results = [out / f"recall.{kind}" for kind in ("json", "md", "png")]
    places = [out / "data" / "meta.json", out / "data", *cfg.folders.values(), *results]
    check_place(places, is_recall, "--out")
    held = lock(out)                                       # another process may be training on the data in it
    report = recall(cfg)
    text = as_markdown(report)
    write_json(results[0], report)
    write_text(results[1], text)
    plot(report, results[2])
    print(text + f"{out}: recall.json, recall.md, recall.png")


if __name__ == "__main__":
    run_script(main)
