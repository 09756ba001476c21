"""What fits into a state: recall and length, shown for attention, RWKV-7 and hybrids of both, flattering or not.

    python recall.py                                                     all three; offline, some minutes on two CPU cores
    python recall.py --tasks pairs --pairs 4,8,16                        no model needed: trains its own
    python recall.py --tasks passkey,length --teacher out/teacher --student out/rwkv --data data/pydoc --lengths 8

    pairs     multi-query associative recall (arXiv 2312.04927): a tiny GPT learns to answer (k1 v1) (k2 v2) ... k2? k1? ...,
              is distilled into students of several --mixer patterns, and all are asked again, by number of pairs. A pair is
              one token: where it is two, a GPT must first learn to look at the token before, which took it too long here
    passkey   a number stands somewhere in a long text and is asked for at its end: by depth and length
    length    loss against position, up to `lengths` times the length of training

A state of H heads of N x N can keep about N different keys a head apart; attention keeps every key, at the price of a memory
that grows. What it is not: a leaderboard. Small models fail the passkey for lack of skill, not of memory; so beside the exact
answers stands how many nats per token the number costs, with it in the text and without: what is remembered at all shows there.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tiktoken
import torch

from config import cli, run
from data.loader import Loader
from data.prepare import ensure_prepared
from data.tokenizer import load_tokenizer, opening
from distill import DistillConfig, StudentConfig, distill
from evaluate import cross_entropy, same_tokenizer
from model import LM, ModelConfig, load_model
from train import FitConfig, TrainConfig, setup, train

KEYS, VALUES = 32, 7  # bytes 0 ... 31 ask for a key, 32 ... 255 are the pairs of one with a value: all fits into the tokenizer `bytes`


@dataclass(frozen=True)
class RecallConfig:
    """What to ask. None means off."""

    tasks: str = "pairs,passkey,length"
    out: str = "out/recall"           # recall.json, recall.md, recall.png, and the models of `pairs`
    device: str = "auto"
    seed: int = 0
    # pairs
    pairs: str = "4,8,16,32"          # how many pairs a sequence has; each equally often in training
    mixers: str = "all first:1 last:1"  # the students
    examples: int = 20000             # training sequences
    asked: int = 200                  # held-out sequences for each number of pairs
    model: ModelConfig = ModelConfig(n_layer=2, n_embd=64, n_head=4, block_size=96)
    teacher_fit: FitConfig = FitConfig(max_steps=400, batch_size=32, learning_rate=5e-3, weight_decay=0.0, save_every=None, eval_every=None)
    align: FitConfig = FitConfig(max_steps=150, batch_size=32, learning_rate=5e-3, save_every=None, eval_every=None)
    distil: FitConfig = FitConfig(max_steps=200, batch_size=32, learning_rate=1e-3, rwkv_lr_multiplier=2.0, weight_decay=0.0, save_every=None,
                                  eval_every=None)
    # passkey and length
    teacher: str = "out/teacher"
    student: str | None = "out/rwkv"  # None = the teacher alone
    data: str = "data/pydoc"          # the text: held-out half
    lengths: int = 8                  # up to so many times the teacher's block_size, doubling
    depths: int = 3                   # places of the passkey, from the text's start to its end
    repeat: int = 16                  # different numbers and texts for each place and length
    max_tokens: int | None = 65536    # of the held-out half, for `length`

    def __post_init__(self):
        unknown = set(self.tasks.split(",")) - {"pairs", "passkey", "length"}
        if unknown:
            raise ValueError(f"tasks = {self.tasks!r}: name some of pairs,passkey,length")
        for name, least in (("examples", 1), ("asked", 1), ("lengths", 1), ("depths", 2), ("repeat", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: it must be at least {least}")
        if any(not n.isdecimal() or not 1 <= int(n) <= KEYS for n in self.pairs.split(",")):
            raise ValueError(f"pairs = {self.pairs!r}: write numbers from 1 to {KEYS}, the number of different keys, with commas")
        if "pairs" in self.tasks and 3 * max(self.n_pairs) > self.model.block_size:
            raise ValueError(f"{max(self.n_pairs)} pairs, asked once each, take {3 * max(self.n_pairs)} tokens, but model.block_size = "
                             f"{self.model.block_size}: ask for fewer, or raise it")
        for mixer in self.mixers.split():
            replace(self.model, mixer=mixer)  # raises for a pattern that does not fit

    @property
    def n_pairs(self) -> list[int]:
        return [int(n) for n in self.pairs.split(",")]


# ---------------------------------------------------------------------------------------------------------------------
# Pairs: multi-query associative recall

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


def run_pairs(cfg: RecallConfig, out: Path) -> dict:
    """Teach a GPT to recall, distil it into every pattern of cfg.mixers, ask all: {"pairs", "models": {name: {...}}}."""
    data, teacher = out / "pairs", out / "pairs-teacher"
    write_pairs(data, cfg)
    train(TrainConfig(data=str(data), out=str(teacher), overwrite=True, device=cfg.device, seed=cfg.seed, model=cfg.model, fit=cfg.teacher_fit))
    folders = {"teacher": teacher}
    for mixer in cfg.mixers.split():
        folders[mixer] = out / f"pairs-{mixer.replace(':', '-').replace(',', '-')}"
        distill(DistillConfig(teacher=str(teacher), data=str(data), out=str(folders[mixer]), stages="align,distil", align=cfg.align, distil=cfg.distil,
                              student=StudentConfig(mixer=mixer), overwrite=True, device=cfg.device, seed=cfg.seed, eval_tokens=4096))
    models = {}
    for name, folder in folders.items():
        model = load_model(folder).eval()
        models[name] = {"mixers": model.cfg.mixers, "accuracy": [pairs_accuracy(model, n, cfg.asked, cfg.seed) for n in cfg.n_pairs],
                        "bytes": [model(torch.zeros(1, 3 * n, dtype=torch.long))[1].nbytes() for n in cfg.n_pairs]}
    return {"pairs": cfg.n_pairs, "chance": 1 / VALUES, "models": models}


# ---------------------------------------------------------------------------------------------------------------------
# Passkey: a number in a long text

TOLD, ASKED = " The pass key is {key}. Remember it: {key} is the pass key. ", " What is the pass key? The pass key is "


@torch.no_grad()
def passkey_scores(model: LM, prompts: list[list[int]], answers: list[list[int]]) -> list[dict[str, float]]:
    """For each prompt, whether greedy reading gives its answer (exact) and the answer's mean nats per token.

    They are read side by side where lengths allow, in pieces of 512 tokens.
    """
    if len({len(x) for x in prompts}) > 1 or len({len(x) for x in answers}) > 1:
        return [row for prompt, answer in zip(prompts, answers) for row in passkey_scores(model, [prompt], [answer])]
    device, n, state = next(model.parameters()).device, len(prompts[0]), None
    tokens = torch.tensor([prompt + answer for prompt, answer in zip(prompts, answers)], device=device)
    for piece in tokens[:, : n - 1].split(512, 1):
        _, state = model.hidden(piece, state)
    logp, target = model(tokens[:, n - 1 : -1], state)[0].float().log_softmax(-1), tokens[:, n:]      # (B, answer, V), (B, answer)
    exact, nats = (logp.argmax(-1) == target).all(1), -logp.gather(-1, target[..., None]).mean((1, 2))
    return [{"exact": e, "nats": x} for e, x in zip(exact.float().tolist(), nats.tolist())]


def passkey(model: LM, enc: tiktoken.Encoding, text: np.ndarray, T: int, depths: int, repeat: int, seed: int) -> list[dict]:
    """Per depth (0 = at the start ... 1 = just before the question), over `repeat` numbers and stretches of the tokens `text`: exact, nats,
    and nats_without, what the same answers cost where the text does not have the number. Raises ValueError for too short a T or text."""
    rng, ask = random.Random(seed), enc.encode_ordinary(ASKED)
    cases = []
    for _ in range(repeat):
        key = str(rng.randrange(10000, 100000))
        told, answer = enc.encode_ordinary(TOLD.format(key=key)), enc.encode_ordinary(key)
        room = T - len(opening(enc)) - len(told) - len(ask) - len(answer)
        if room < 0:
            raise ValueError(f"a passkey text of {T} tokens has no room for telling and asking, {T - room} tokens: start from a larger block_size")
        if len(text) < room + len(told):
            raise ValueError(f"the held-out text has {len(text)} tokens, a passkey text of {T} needs {room + len(told)}: lower --lengths, or give more data")
        start = rng.randrange(len(text) - room - len(told) + 1)
        cases.append((told, answer, text[start : start + room + len(told)].tolist(), room))
    answers = [answer for _, answer, _, _ in cases]
    mean = lambda rows, key: sum(row[key] for row in rows) / len(rows)  # noqa: E731
    without = passkey_scores(model, [opening(enc) + filler + ask for _, _, filler, _ in cases], answers)
    result = []
    for depth in np.linspace(0, 1, depths):
        cut = lambda room: round(float(depth) * room)  # noqa: E731, B023
        rows = passkey_scores(model, [opening(enc) + f[: cut(n)] + told + f[cut(n) : n] + ask for told, _, f, n in cases], answers)
        result.append({"T": T, "depth": float(depth), "exact": mean(rows, "exact"), "nats": mean(rows, "nats"), "nats_without": mean(without, "nats")})
    return result


def run_passkey(cfg: RecallConfig, models: dict[str, LM], T: int) -> dict:
    """{model: rows of passkey, for T, 2T, ... cfg.lengths T}; attention with learned positions ends where these end."""
    val, enc = Loader(cfg.data, "val", 1, T), load_tokenizer(cfg.data)
    return {name: [row for n in lengths(model, T, cfg.lengths) for row in passkey(model, enc, val.tokens, n, cfg.depths, cfg.repeat, cfg.seed)]
            for name, model in models.items()}


def lengths(model: LM, T: int, most: int) -> list[int]:
    """T, 2T, 4T, ... up to most T, as far as the model's learned positions go."""
    found = [T * 2**i for i in range(most.bit_length()) if 2**i <= most]
    return [n for n in found if model.cfg.positions != "learned" or "a" not in model.cfg.mixers or n <= model.cfg.block_size]


# ---------------------------------------------------------------------------------------------------------------------
# Length: loss against position

@torch.no_grad()
def run_length(cfg: RecallConfig, models: dict[str, LM], T: int) -> dict:
    """Mean loss in nats per token within each stretch of T positions, reading cfg.lengths T tokens at once: {"T", "models": {name: [...]}}.

    All models read the same windows. Attention with learned positions ends where these end, every model where the text does.
    """
    result = {}
    for name, model in models.items():
        n, device = lengths(model, T, cfg.lengths)[-1] // T, next(model.parameters()).device
        sums = torch.zeros(2, n, dtype=torch.float64)                                                # losses and targets
        for batch in Loader(cfg.data, "val", 1, cfg.lengths * T).windows(cfg.max_tokens):
            state = None
            for i, piece in enumerate(batch.to(device).split(T)[:n]):
                logits, state = model(piece.x, state)
                sums[:, i] += torch.stack([cross_entropy(logits, piece), piece.mask.sum()]).double().cpu()
        losses, counts = sums
        result[name] = [loss for loss, count in zip((losses / counts.clamp(min=1)).tolist(), counts) if count]
    return {"T": T, "models": result}


# ---------------------------------------------------------------------------------------------------------------------
# The report

def as_markdown(report: dict) -> str:
    """The results as tables for people."""
    lines = []
    if "pairs" in report:
        ns, models = report["pairs"]["pairs"], report["pairs"]["models"]
        lines += ["| answers right, by number of pairs | layers | " + " | ".join(map(str, ns)) + f" | bytes at {ns[-1]} |",
                  "|---|---|" + "---:|" * (len(ns) + 1)]
        lines += [f"| {name} | {m['mixers']} | " + " | ".join(f"{x:.1%}" for x in m["accuracy"]) + f" | {m['bytes'][-1]:,} |" for name, m in models.items()]
        lines += ["", f"Guessing gives {report['pairs']['chance']:.1%}.", ""]
    for name, rows in report.get("passkey", {}).items():
        depths = sorted({row["depth"] for row in rows})
        lines += [f"| {name}: passkey, nats per token (exact) | not told | " + " | ".join(f"depth {d:.2f}" for d in depths) + " |",
                  "|---|---:|" + "---:|" * len(depths)]
        for T in sorted({row["T"] for row in rows}):
            mine = [row for row in rows if row["T"] == T]
            lines.append(f"| {T:,} tokens | {mine[0]['nats_without']:.2f} | " + " | ".join(f"{r['nats']:.2f} ({r['exact']:.0%})" for r in mine) + " |")
        lines.append("")
    if "length" in report:
        T, models = report["length"]["T"], report["length"]["models"]
        most = max(map(len, models.values()))
        lines += ["| loss at positions up to | " + " | ".join(f"{(i + 1) * T:,}" for i in range(most)) + " |", "|---|" + "---:|" * most]
        lines += [f"| {name} | " + " | ".join([f"{x:.4f}" for x in losses] + ["-"] * (most - len(losses))) + " |" for name, losses in models.items()]
    return "\n".join(lines).rstrip() + "\n"


def plot(report: dict, path: Path) -> None:
    """One panel for each task; for the passkey the nats by length, mean over the depths. Does nothing but say so without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib, and run again")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (axes,) = plt.subplots(1, len(report), figsize=(4.2 * len(report), 3.2), constrained_layout=True, squeeze=False)
    for ax, (task, result) in zip(axes, report.items()):
        if task == "pairs":
            for name, m in result["models"].items():
                ax.plot(result["pairs"], m["accuracy"], "o-", ms=3, label=name)
            ax.set(title="recall of pairs", xlabel="pairs", ylabel="right", xscale="log", ylim=(0, 1.05))
        elif task == "passkey":
            for name, rows in result.items():
                Ts = sorted({row["T"] for row in rows})
                for key, style in (("nats", "o-"), ("nats_without", "o:")):
                    means = [np.mean([row[key] for row in rows if row["T"] == T]) for T in Ts]
                    ax.plot(Ts, means, style, ms=3, label=name + (", not told" if key == "nats_without" else ""))
            ax.set(title="passkey", xlabel="length", ylabel="nats per token", xscale="log")
        else:
            for name, losses in result["models"].items():
                ax.plot([(i + 0.5) * result["T"] for i in range(len(losses))], losses, "o-", ms=3, label=name)
            ax.set(title="loss by position", xlabel="position", ylabel="nats per token")
        ax.legend(fontsize=7)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(argv: list[str] | None = None) -> None:
    cfg = cli(RecallConfig, argv)
    tasks, out, report = cfg.tasks.split(","), Path(cfg.out), {}
    _, world, device = setup(cfg.device)
    if world > 1:
        raise ValueError("recall.py runs on one process: start it with python, not torchrun")
    if tasks != ["pairs"]:  # what can be wrong is found before minutes are spent
        ensure_prepared(cfg.data)
        folders = {"teacher": cfg.teacher, **({"student": cfg.student} if cfg.student else {})}
        models = {name: load_model(folder, device).eval() for name, folder in folders.items()}
        T = models["teacher"].cfg.block_size
        val = Loader(cfg.data, "val", 1, T)
        if val.kind != "text":
            raise ValueError(f"{cfg.data} holds {val.kind} examples: passkey and length read text")
        same_tokenizer(val, *folders.values())
    out.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        report[task] = run_pairs(cfg, out) if task == "pairs" else {"passkey": run_passkey, "length": run_length}[task](cfg, models, T)
    (out / "recall.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "recall.md").write_text(as_markdown(report), encoding="utf-8")
    plot(report, out / "recall.png")
    print(as_markdown(report) + f"{out}: recall.json, recall.md, recall.png")


if __name__ == "__main__":
    run(main)
