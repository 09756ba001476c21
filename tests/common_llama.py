"""llama.cpp as an oracle: a GGUF in its server, in a process of its own.

A job is a dict of files, each with what is asked of it, [path, JSON]; answers come back
in the same order. Where `n_probs` is asked for, an answer is the tokens generated and
the log-probabilities of all tokens, by id, before each. `forced` stands for such
questions, one after each token of a text.
"""

import importlib.util
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

SPACE = 32  # what is generated where only the probabilities matter: a whole character
GREEDY = {"temperature": 0, "cache_prompt": False, "return_tokens": True}


def ask(job: dict[str, list]) -> dict[str, list]:
    """The answers of a process that opens one file after the other."""
    if not importlib.util.find_spec("xllamacpp"):
        pytest.skip("the package xllamacpp is not installed")
    done = subprocess.run([sys.executable, __file__], input=json.dumps(job), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def generation(prompt: list[int], n: int, vocab: int) -> list:
    """n tokens, the likeliest one of ASCII each time, and probabilities before each.

    The server leaves out those of tokens that are a part of a character.
    """
    others = [[i, False] for i in range(128, vocab)]
    return ["/completion", GREEDY | {"prompt": prompt, "n_predict": n, "n_probs": vocab,
                                     "logit_bias": others, "ignore_eos": True}]


def forced(tokens: list[int], vocab: int, first: int = 1) -> list:
    """Probabilities after each token of a text, from the `first` on."""
    return ["forced", {"tokens": tokens, "vocab": vocab, "first": first}]


def read_generated(answer: dict) -> tuple[list[int], torch.Tensor]:
    """The tokens, and (T, V) log-probabilities before each."""
    return answer["tokens"], torch.tensor(answer["logprobs"])


# ------------------------------------------------------------------------------------------
# In its own process

def main() -> None:
    import xllamacpp

    answers = {}
    for file, questions in json.load(sys.stdin).items():
        params = xllamacpp.CommonParams()
        params.model.path = file
        params.n_ctx, params.n_parallel, params.warmup, params.cache_ram_mib = 1024, 1, False, 0
        params.verbosity = -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        server = xllamacpp.Server(params)
        answers[file] = [answer(server.listening_address, *question) for question in questions]
        del server
    print("\n" + json.dumps(answers), flush=True)


def answer(address: str, path: str, job: dict) -> dict:
    if path == "forced":
        tokens, V = job["tokens"], job["vocab"]
        rows = []
        for n in range(job["first"], len(tokens) + 1):
            one = GREEDY | {"prompt": tokens[:n], "n_predict": 1, "n_probs": V, "logit_bias": [[SPACE, 1000.0]]}
            rows += answer(address, "/completion", one)["logprobs"]
        return {"tokens": tokens, "logprobs": rows}
    request = urllib.request.Request(address + path, json.dumps(job).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        whole = json.load(reply)
    if "completion_probabilities" not in whole:
        return whole
    return {"tokens": whole["tokens"], "logprobs": [by_id(row) for row in whole["completion_probabilities"]]}


def by_id(row: dict) -> list[float]:
    return [entry["logprob"] for entry in sorted(row["top_logprobs"], key=lambda entry: entry["id"])]


if __name__ == "__main__":
    main()
