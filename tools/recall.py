"""Associative recall, shown: how many pairs attention, RWKV-7 and hybrids of both remember, flattering or not.

    python recall.py --out out/pairs                      offline, some minutes on two CPU cores; trains its own models
    python recall.py --pairs 4,8,16 --mixers "all last:1"

Multi-query associative recall (arXiv 2312.04927): a tiny GPT learns to answer (k1 v1) (k2 v2) ... k2? k1? ..., is distilled
into students of several --mixer patterns, and all are asked again, by number of pairs. A pair is one token: where it is two,
a GPT must first learn to look at the token before, which took it too long here.

A state of N x N can keep N orthogonal keys per head; attention keeps every key, at the price of a memory that grows.
What it is not: a leaderboard, or a test of models at hand (for these, loss by length and the passkey: evaluate.py).
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from config import cli, run
from distill import DistillConfig, StudentConfig, distill
from model import LM, ModelConfig, load_model, remembered_bytes
from train import FitConfig, TrainConfig, setup, train

KEYS, VALUES = 32, 7  # bytes 0 ... 31 ask for a key, 32 ... 255 are the pairs of one with a value: all fits into the tokenizer `bytes`


@dataclass(frozen=True)
class RecallConfig:
    out: str = "out/recall"           # recall.json, recall.md, recall.png, the data and the models
    device: str = "auto"
    seed: int = 0
    pairs: str = "4,8,16,32"          # how many pairs a sequence has; each equally often in training
    mixers: str = "all first:1 last:1"  # the students
    examples: int = 20000             # training sequences
    asked: int = 200                  # held-out sequences for each number of pairs
    model: ModelConfig = ModelConfig(n_layer=2, n_embd=64, n_head=4, block_size=96)
    teacher_fit: FitConfig = FitConfig(max_steps=400, batch_size=32, learning_rate=5e-3, weight_decay=0.0, save_every=None, eval_every=None)
    align: FitConfig = FitConfig(max_steps=150, batch_size=32, learning_rate=5e-3, save_every=None, eval_every=None)
    distil: FitConfig = FitConfig(max_steps=200, batch_size=32, learning_rate=1e-3, rwkv_lr_multiplier=2.0, weight_decay=0.0, save_every=None,
                                  eval_every=None)

    def __post_init__(self):
        for name, least in (("examples", 1), ("asked", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: it must be at least {least}")
        if any(not n.isdecimal() or not 1 <= int(n) <= KEYS for n in self.pairs.split(",")):
            raise ValueError(f"pairs = {self.pairs!r}: write numbers from 1 to {KEYS}, the number of different keys, with commas")
        if 3 * max(self.n_pairs) > self.model.block_size:
            raise ValueError(f"{max(self.n_pairs)} pairs, asked once each, take {3 * max(self.n_pairs)} tokens, but model.block_size = "
                             f"{self.model.block_size}: ask for fewer, or raise it")
        for mixer in self.mixers.split():
            replace(self.model, mixer=mixer)  # raises for a pattern that does not fit

    @property
    def n_pairs(self) -> list[int]:
        return [int(n) for n in self.pairs.split(",")]


# ---------------------------------------------------------------------------------------------------------------------
# The task

def pairs_sequence(n: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """A document boundary, n pairs with different keys, then each key again, in another order, followed by its pair: 3n + 1 tokens,
    and the mask (1 = is asked for) of the pairs that come again."""
    keys = rng.permutation(KEYS)[:n]
    pairs = KEYS + VALUES * keys + rng.integers(0, VALUES, n)
    again = rng.permutation(n)
    return [256, *pairs.tolist(), *np.stack([keys[again], pairs[again]], 1).flatten().tolist()], [0] * (n + 1) + [0, 1] * n


def write_pairs(folder: Path, cfg: RecallConfig) -> None:
    """A prepared data folder of such sequences, as data/prepare.py would write it."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for half, n, stream in (("train", cfg.examples, 0), ("val", max(64, cfg.asked), 1)):
        rng = np.random.default_rng([cfg.seed, stream])
        rows = [pairs_sequence(int(rng.choice(cfg.n_pairs)), rng) for _ in range(n)]
        tokens, mask = (np.array([x for row in rows for x in row[i]], t) for i, t in ((0, np.uint16), (1, np.uint8)))
        tokens.tofile(folder / f"{half}.bin")
        mask.tofile(folder / f"{half}.mask.bin")
        np.cumsum([0, *(len(row[0]) for row in rows)], dtype=np.int64).tofile(folder / f"{half}.idx.bin")
        counts[half] = len(tokens)
    meta = {"kind": "supervised", "tokenizer": "bytes", "vocab_size": 257, "dtype": "uint16", "source": "recall.py", "tokens": counts}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


@torch.no_grad()
def pairs_accuracy(model: LM, n: int, asked: int, seed: int = 0) -> float:
    """The share of values that the model puts first when asked for them, in `asked` fresh sequences of n pairs."""
    rng, right = np.random.default_rng([seed, 2]), 0
    device = next(model.parameters()).device
    for rows in np.array_split(range(asked), -(-asked // 64)):
        tokens, mask = (torch.tensor(x, device=device) for x in zip(*(pairs_sequence(n, rng) for _ in rows)))
        best = model(tokens[:, :-1])[0].argmax(-1)
        right += int(((best == tokens[:, 1:]) * mask[:, 1:]).sum())
    return right / (asked * n)


# ---------------------------------------------------------------------------------------------------------------------
# The models and their report

def recall(cfg: RecallConfig) -> dict:
    """Teach a GPT to recall, distil it into every pattern of cfg.mixers, ask all: {"pairs", "chance", "models": {name: {...}}}."""
    out = Path(cfg.out)
    data, teacher = out / "data", out / "teacher"
    write_pairs(data, cfg)
    train(TrainConfig(data=str(data), out=str(teacher), overwrite=True, device=cfg.device, seed=cfg.seed, model=cfg.model, fit=cfg.teacher_fit))
    folders = {"teacher": teacher}
    for mixer in cfg.mixers.split():
        folders[mixer] = out / mixer.replace(":", "-").replace(",", "-")
        distill(DistillConfig(teacher=str(teacher), data=str(data), out=str(folders[mixer]), stages="align,distil", align=cfg.align, distil=cfg.distil,
                              student=StudentConfig(mixer=mixer), overwrite=True, device=cfg.device, seed=cfg.seed, eval_tokens=4096))
    models = {}
    for name, folder in folders.items():
        model = load_model(folder).eval()
        models[name] = {"mixers": model.cfg.mixers, "accuracy": [pairs_accuracy(model, n, cfg.asked, cfg.seed) for n in cfg.n_pairs],
                        "bytes": [remembered_bytes(model.cfg, 3 * n) for n in cfg.n_pairs]}
    return {"pairs": cfg.n_pairs, "chance": 1 / VALUES, "models": models}


def as_markdown(report: dict) -> str:
    """The result as a table for people."""
    ns, models = report["pairs"], report["models"]
    lines = ["| answers right, by number of pairs | layers | " + " | ".join(map(str, ns)) + f" | bytes at {ns[-1]} |",
             "|---|---|" + "---:|" * (len(ns) + 1)]
    lines += [f"| {name} | {m['mixers']} | " + " | ".join(f"{x:.1%}" for x in m["accuracy"]) + f" | {m['bytes'][-1]:,} |" for name, m in models.items()]
    return "\n".join([*lines, "", f"Guessing gives {report['chance']:.1%}."]) + "\n"


def plot(report: dict, path: Path) -> None:
    """The share of right answers by number of pairs. Does nothing but say so without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib, and run again")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(4.2, 3.2), constrained_layout=True)
    for name, m in report["models"].items():
        ax.plot(report["pairs"], m["accuracy"], "o-", ms=3, label=name)
    ax.set(title="recall of pairs", xlabel="pairs", ylabel="right", xscale="log", ylim=(0, 1.05))
    ax.legend(fontsize=7)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(argv: list[str] | None = None) -> None:
    cfg = cli(RecallConfig, argv)
    if setup(cfg.device)[1] > 1:
        raise ValueError("recall.py runs on one process: start it with python, not torchrun")
    out, report = Path(cfg.out), recall(cfg)
    (out / "recall.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "recall.md").write_text(as_markdown(report), encoding="utf-8")
    plot(report, out / "recall.png")
    print(as_markdown(report) + f"{out}: recall.json, recall.md, recall.png")


if __name__ == "__main__":
    run(main)
