"""Past the training length: loss by stretch of positions, and a number to remember.

    python -m tools.passkey --student out/rwkv --longest 8 --passkey 16

`--longest 8` reads up to 8 times block_size and gives the loss by position. `--passkey
16` tells 16 numbers at each of `--depths` places in texts of each length, doubling up
to there, and asks for each at the end. Small models fail that for lack of skill, not of
memory: so beside the exact answers stands how many nats per token the number costs,
with it in the text and without.
"""

import random
from pathlib import Path

from config import at_least, cli, run, settings
import numpy as np
import tiktoken
import torch

from data.loader import Loader
from data.shares import is_mixture
from data.tokenizer import load_tokenizer, opening
from lib.folders import check_vocabulary, load_model, same_tokenizer, write_json, write_text
from lib.owned import check_place, contents
from lib.processes import pick_device
from lib.report import figure
from lib.scores import loss_by_position, readable
from lib.states import process_rows
from model import LM


TOLD = " The pass key is ", ". Remember it: ", " is the pass key. "     # the key stands between
ASKED = " What is the pass key? The pass key is "
Texts = list[tuple[list[int], list[int]]]      # (prompt, answer)


# ------------------------------------------------------------------------------------------
# The two measures

def loss_by_stretch(model: LM, loader: Loader, T: int, max_tokens: int | None = None) -> list[float]:
    """Mean loss in nats per target within each stretch of T positions, as far as model
    and text reach; none where the model cannot read the first one.
    """
    reach = readable(model, loader.T) // T * T                     # whole stretches only
    if not reach:                                                  # None and 0 would mean all of the text
        return []
    losses, counts = loss_by_position(model, loader, max_tokens, T, reach).view(2, -1, T).sum(2).tolist()
    return [loss / count for loss, count in zip(losses, counts) if count]


def passkey_texts(enc: tiktoken.Encoding, text: np.ndarray, T: int, n: int, depths: int) -> Texts:
    """(prompt, answer) of T tokens: n different numbers told at each depth, then not.

    Depth is the share of the filler, a stretch of the tokens `text`, that comes first:
    from 0 to 1, just before the question. What is told and asked for are the same
    tokens, though a tokenizer may have others for a number behind a space. Raises
    ValueError for too small a T or text.
    """
    rng, start, ask, texts = random.Random(0), opening(enc), enc.encode_ordinary(ASKED), []
    before, between_keys, after = map(enc.encode_ordinary, TOLD)
    for key in rng.sample(range(10000, 100000), n):
        answer = enc.encode_ordinary(str(key))
        told = before + answer + between_keys + answer + after
        between = T - len(start + ask + answer)                    # tokens from the start to the question
        room = between - len(told)
        if room < 0:
            raise ValueError(f"a passkey text of {T} tokens has no room for telling and asking, {T - room} "
                             "tokens: raise --block_size")
        if len(text) < between:
            raise ValueError(f"the held-out text has {len(text)} tokens, a passkey text of {T} needs "
                             f"{between}: lower --longest, or give more data")
        at = rng.randrange(len(text) - between + 1)
        filler = text[at : at + between].tolist()
        cuts = [round(depth * room) for depth in np.linspace(0, 1, depths)]
        for middle in [*(filler[:cut] + told + filler[cut:room] for cut in cuts), filler]:
            texts.append((start + middle + ask, answer))
    return texts


@torch.no_grad()
def answer_scores(model: LM, texts: Texts, batch_size: int) -> list[tuple[float, float]]:
    """For each text whether greedy decoding gives the answer (1 or 0), and the answer's
    nats per token.
    """
    device, scores = next(model.parameters()).device, []
    for i in range(0, len(texts), batch_size):
        prompts = [torch.tensor(prompt[:-1], device=device) for prompt, _ in texts[i : i + batch_size]]
        _, states = process_rows(model, prompts)
        for (prompt, answer), state in zip(texts[i:], states):
            logits, _ = model(torch.tensor([prompt[-1:] + answer[:-1]], device=device), state)
            logp = logits[0].float().log_softmax(-1)                              # (answer, V)
            target = torch.tensor(answer, device=device)                          # (answer,)
            exact = (logp.argmax(-1) == target).all().float().item()
            scores.append((exact, -logp.gather(-1, target[:, None]).mean().item()))
    return scores


def passkey(model: LM, texts: Texts, depths: int, batch_size: int) -> dict:
    """By depth, the share of exact answers and the nats per token; and the nats where
    nothing was told.
    """
    scores = np.reshape(answer_scores(model, texts, batch_size), (-1, depths + 1, 2))
    exact, nats = scores.mean(0).T.tolist()
    return {"exact": exact[:-1], "nats": nats[:-1], "nats_without": nats[-1]}


# ------------------------------------------------------------------------------------------
# For people

def as_markdown(report: dict) -> str:
    lines = length_table(report["length"]) if "length" in report else []
    lines += passkey_table(report["passkey"]) if "passkey" in report else []
    return "\n".join(lines).lstrip("\n") + "\n"


def length_table(length: dict) -> list[str]:
    """A row for each model, a column for each stretch of positions."""
    T, models = length["T"], length["models"]
    columns = max(map(len, models.values()))
    ends = " | ".join(f"{(i + 1) * T:,}" for i in range(columns))
    lines = ["", f"| loss at positions up to | {ends} |", "|---|" + "---:|" * columns]
    for name, losses in models.items():
        cells = [f"{x:.4f}" for x in losses] + ["-"] * (columns - len(losses))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def passkey_table(passkey: dict) -> list[str]:
    """A row for each model and length, a column for each depth."""
    depths = passkey["depths"]
    titles = " | ".join(f"depth {d:.2f}" for d in depths)
    lines = ["", f"| passkey, nats per token (exact) | tokens | not told | {titles} |",
             "|---|---:|---:|" + "---:|" * len(depths)]
    for name, rows in passkey["models"].items():
        for row in rows:
            cells = [f"{x:.2f} ({e:.0%})" for x, e in zip(row["nats"], row["exact"])]
            lines.append(f"| {name} | {row['T']:,} | {row['nats_without']:.2f} | " + " | ".join(cells) + " |")
    return lines


def plot(report: dict, path: Path) -> None:
    """Loss by stretch, and passkey nats with the number in the text and without."""
    with figure(path, len(report)) as panels:
        if panels is None:
            return
        panels = iter(panels)
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
                without = [row["nats_without"] for row in rows]
                ax.plot(lengths, without, "o:", ms=3, color=line.get_color(), label=f"{who}, not told")
            ax.set(title="passkey, mean over depths", xlabel="tokens", ylabel="nats per token")


# ------------------------------------------------------------------------------------------
# As a script

@settings
class PasskeyConfig:
    teacher: str = "out/teacher"
    student: str | None = "out/rwkv"               # None = the teacher alone
    data: str = "data/pydoc"
    batch_size: int = at_least(1, 16, below=2**20)
    block_size: int | None = at_least(1, None, below=2**31)      # None = the teacher's
    max_tokens: int | None = at_least(1, None)     # of the held-out text, for the loss; None = all
    longest: int | None = at_least(1, 8, below=2**16)            # up to so many times block_size; None = off
    passkey: int | None = at_least(1, 16, below=90001)           # different numbers; None = off
    depths: int = at_least(2, 3, below=101)        # places to tell the number, from the start to the end
    device: str = "auto"
    out: str | None = None                         # folder for passkey.json, .md and .png; None = print only

    def __post_init__(self):
        if self.longest is None and self.passkey is None:
            raise ValueError("--longest and --passkey are both off: there is nothing to measure")
        if self.out and Path(self.out).is_file():  # before all the measuring, not after it
            raise ValueError(f"--out {self.out} is a file: name a folder")


def measure(cfg: PasskeyConfig) -> dict:
    """{"length": ..., "passkey": ...}, whichever is asked for, of all models."""
    device = pick_device(cfg.device)
    folders = {"teacher": cfg.teacher} | ({"student": cfg.student} if cfg.student else {})
    models = {name: load_model(folder, device).eval() for name, folder in folders.items()}
    teacher, T = models["teacher"], cfg.block_size or models["teacher"].cfg.block_size
    if is_mixture(cfg.data):
        raise ValueError(f"{cfg.data} is a mixture: --longest and --passkey read one folder")
    val = Loader(cfg.data, "val", cfg.batch_size, T)
    check_vocabulary(teacher, models.get("student", teacher), val)
    same_tokenizer(val, *folders.values())
    if val.kind != "text":
        raise ValueError(f"{cfg.data} holds {val.kind} examples: --longest and --passkey read text")
    stretches = max(readable(model, (cfg.longest or 1) * T) for model in models.values()) // T
    if not stretches:
        raise ValueError(f"block_size = {T}: {cfg.teacher} has learned {teacher.cfg.longest} positions: "
                         "lower it")
    lengths = [T * 2**i for i in range(stretches.bit_length())] if cfg.passkey else []
    enc = load_tokenizer(cfg.data)
    texts = {n: passkey_texts(enc, val.tokens, n, cfg.passkey, cfg.depths) for n in lengths}    # may raise

    report = {}
    if cfg.longest:
        text = Loader(cfg.data, "val", cfg.batch_size, stretches * T)      # the same windows for all models
        losses = {name: loss_by_stretch(model, text, T, cfg.max_tokens) for name, model in models.items()}
        report["length"] = {"T": T, "models": losses}
    if cfg.passkey:
        scores = {name: [{"T": n} | passkey(model, texts[n], cfg.depths, cfg.batch_size)
                         for n in lengths if readable(model, n) == n] for name, model in models.items()}
        report["passkey"] = {"depths": np.linspace(0, 1, cfg.depths).tolist(), "models": scores}
    return report


def is_passkey(file: Path) -> bool:
    return bool({"length", "passkey"} & contents(file).keys())


def main(argv: list[str] | None = None) -> None:
    cfg = cli(PasskeyConfig, argv)
    files = [Path(cfg.out) / f"passkey.{kind}" for kind in ("json", "md", "png")] if cfg.out else []
    if files:                                      # before all the measuring, not after it
        check_place(files, is_passkey, "--out")
    report = measure(cfg)
    text = as_markdown(report)
    if files:
        write_json(files[0], report)
        write_text(files[1], text)
        plot(report, files[2])
    print(text)


if __name__ == "__main__":
    run(main)
