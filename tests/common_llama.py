"""llama.cpp as an oracle: what to ask its server (llama_server.py), and its answers."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import REPO
from common_convert import relative
from llama_server import SPACE
from model import LM

GREEDY = {"temperature": 0, "cache_prompt": False, "return_tokens": True}
ASCII = 128


def ask(job: dict[Path, list]) -> list[list]:
    """Its answers to what is asked of each file."""
    if not importlib.util.find_spec("xllamacpp"):
        pytest.skip("the package xllamacpp is not installed")
    text = json.dumps({str(file): questions for file, questions in job.items()})
    command = [sys.executable, "-m", "tests.llama_server"]
    done = subprocess.run(command, cwd=REPO, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return list(json.loads(done.stdout.splitlines()[-1]).values())


def greedy(prompt: list[int], n: int, vocab: int, n_probs: int = 0) -> list:
    """n tokens, the likeliest one of ASCII each time, whole characters.

    The server leaves out the probabilities of tokens that are a part of one.
    """
    others = [[i, False] for i in range(ASCII, vocab)]
    return ["/completion", GREEDY | {"prompt": prompt, "n_predict": n, "n_probs": n_probs,
                                     "logit_bias": others, "ignore_eos": True}]


def forced(tokens: list[int], n_probs: int) -> list:
    """Log-probabilities after each token of a text."""
    request = GREEDY | {"n_predict": 1, "n_probs": n_probs, "logit_bias": [[SPACE, 1000.0]]}
    return ["forced", {"tokens": tokens, "request": request}]


@torch.no_grad()
def ours(model: LM, tokens: list[int]) -> torch.Tensor:
    """Our log-probabilities (T, V) after each token."""
    return model(torch.tensor([tokens]))[0][0].log_softmax(-1)


def difference(answer: dict, logp: torch.Tensor) -> float:
    """Of the log-probabilities in an answer and ours (T, V), relative to ours."""
    expected = logp.gather(1, torch.tensor(answer["ids"]))
    return relative(torch.tensor(answer["logprobs"]), expected)


def as_likely(logp: torch.Tensor, chosen: list[int]) -> bool:
    """Whether by our log-probabilities (T, V) each of these tokens is the likeliest of
    ASCII, or no less so than rounding may decide.
    """
    best = logp[:, :ASCII].max(-1).values
    return (best - logp[torch.arange(len(chosen)), chosen]).max().item() < 1e-4
