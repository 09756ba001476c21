"""llama.cpp's server on GGUF files, one after the other, in a process of its own.

From stdin, as JSON, a dict of files, each with what is asked of it: [path, request].
To stdout, last line, the answers in the same order. Where a request has `n_probs`, the
answer is the tokens generated, and before each of them the ids and log-probabilities of
so many likeliest.
"""

import json
import os
import sys

from tools.rivals import ask, llama_server

SPACE = 32  # what is generated where only the probabilities matter: a whole character


def main() -> None:
    servers, answers = [], {}
    for file, questions in json.load(sys.stdin).items():
        servers.append(llama_server(file, threads=1))
        answers[file] = [answer(servers[-1].listening_address, *question) for question in questions]
    print("\n" + json.dumps(answers), flush=True)
    os._exit(0)             # a server told to end before its loop has begun would wait for ever


def answer(address: str, path: str, job: dict) -> dict:
    if path == "forced":
        requests = [job["request"] | {"prompt": job["tokens"][:n]} for n in range(1, len(job["tokens"]) + 1)]
        rows = [answer(address, "/completion", request) for request in requests]
        return {key: [row[key][0] for row in rows] for key in ("ids", "logprobs")}
    whole = ask(address + path, job)
    if not job.get("n_probs"):
        return whole
    rows = [row["top_logprobs"] for row in whole["completion_probabilities"]]
    return {"tokens": whole["tokens"], "ids": [[entry["id"] for entry in row] for row in rows],
            "logprobs": [[entry["logprob"] for entry in row] for row in rows]}


if __name__ == "__main__":
    main()
