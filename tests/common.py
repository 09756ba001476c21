"""What several test files share: a tiny prepared text, tiny models, and ways to look
into a run's folder.
"""

import json
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.loader import Batch
from data.prepare import prepare
from model import LM, ModelConfig

REPO = Path(__file__).resolve().parent.parent
T = 16
TINY = ["--n_embd", "32", "--n_layer", "2", "--n_head", "2", "--block_size", str(T), "--rwkv_head_size", "16"]


def make_data(folder: Path, characters: int = 30000) -> SimpleNamespace:
    """Prepared text, sft and dpo folders.

    Answers differ in length, so that ranks get unequal numbers of targets.
    """
    prose = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))[:characters]
    (folder / "text.txt").write_text(prose, encoding="utf-8")
    words = [w for w in dict.fromkeys(prose.split()) if w.isalpha()][:240]
    pairs = [(a, b + " " + a * (i % 3)) for i, (a, b) in enumerate(zip(words[::2], words[1::2]))]
    (folder / "sft.jsonl").write_text(
        "".join(json.dumps({"prompt": p[:6], "response": r}) + "\n" for p, r in pairs)
    )
    (folder / "dpo.jsonl").write_text(
        "".join(
            json.dumps({"prompt": p[:6], "chosen": r, "rejected": r[::-1] + "?"}) + "\n" for p, r in pairs
        )
    )
    for name, source in (("text", "text.txt"), ("sft", "sft.jsonl"), ("dpo", "dpo.jsonl")):
        prepare(folder / source, folder / name)
    return SimpleNamespace(**{name: str(folder / name) for name in ("text", "sft", "dpo")})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimpleNamespace:
    return make_data(tmp_path_factory.mktemp("data"))


def tiny_model(seed: int = 0, std: float = 0.3, **changes) -> LM:
    """A model of width 32 with heads of 16 whose weights are large enough for every
    part to matter.
    """
    torch.manual_seed(seed)
    model = LM(
        ModelConfig(
            **{"n_embd": 32, "n_layer": 2, "n_head": 2, "rwkv_head_size": 16, "block_size": T} | changes
        )
    )
    shake(model, std)
    return model


@torch.no_grad()
def shake(model: torch.nn.Module, std: float) -> None:
    """Add noise to every parameter, so that no value (0, 1, ...) hides what it does."""
    for p in model.parameters():
        p.add_(std / max(1, p.shape[-1] if p.ndim == 2 else 1) ** 0.5 * torch.randn_like(p))


def random_batch(B: int = 3, length: int = T, vocab: int = 257, seed: int = 0) -> Batch:
    tokens = torch.randint(0, vocab, (B, length + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(B, length))


def padded(lengths: list[int], first: int = 2, seed: int = 0) -> tuple[Batch, list[Batch]]:
    """A batch of rows of these lengths, padded on the right, and each row alone.

    Targets begin at position `first`.
    """
    rows = [random_batch(1, n, seed=seed + i) for i, n in enumerate(lengths)]
    for row in rows:
        row.mask[:, :first] = 0
    width = max(lengths)
    fill = lambda x, value: torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value)  # noqa: E731
    return (
        Batch(
            *(
                torch.cat([fill(x, v) for x in xs])
                for xs, v in zip(zip(*((r.x, r.y, r.mask) for r in rows)), (256, 256, 0))
            )
        ),
        rows,
    )


def state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def metrics(out: Path) -> list[dict]:
    """The rows of metrics.jsonl, without what the clock says."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("minutes", "tokens_per_s")} for row in rows]


def moments(checkpoint: Path) -> list[torch.Tensor]:
    """Every tensor of a checkpoint's optimizer, in order."""
    state = torch.load(checkpoint / "trainer.pt", weights_only=True)["optimizer"]["state"]
    return [value for key in sorted(state) for _, value in sorted(state[key].items())]


def newest(out: Path) -> Path:
    return sorted((Path(out) / "checkpoints").glob("step_" + "[0-9]" * 7))[-1]


def assert_same_run(a: Path, b: Path) -> None:
    """Model, optimizer moments, random state and logs are equal bit for bit."""
    assert newest(a).name == newest(b).name
    assert (Path(a) / "model.safetensors").read_bytes() == (Path(b) / "model.safetensors").read_bytes()
    ours, theirs = moments(newest(a)), moments(newest(b))
    assert len(ours) == len(theirs) > 0 and all(map(torch.equal, ours, theirs))
    assert torch.equal(*(torch.load(newest(run) / "trainer.pt", weights_only=True)["rng"] for run in (a, b)))
    assert metrics(a) == metrics(b)


def start(*args: str, say: Path | None = None, **kwargs) -> subprocess.Popen:
    """A script of ours in its own process: start("train.py", "--max_steps", "3").

    What it says goes to pipes, or to the file `say`.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    out = say.open("w") if say else subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=REPO,
        env=env,
        text=True,
        stdout=out,
        stderr=subprocess.STDOUT if say else subprocess.PIPE,
        **kwargs,
    )


def one_line(error) -> str:
    """The message of an exception as the user sees it: it must be one line."""
    text = str(error)
    assert text.strip() and "\n" not in text.strip(), text
    return text
