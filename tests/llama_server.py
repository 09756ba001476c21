"""llama.cpp's server on GGUF files, one after the other, in a process of its own.

From stdin, as JSON, a dict of files, each with what is asked of it: [path, request].
To stdout, last line, the answers in the same order. Where a request has `n_probs`, the
answer is the tokens generated, and before each of them the ids and log-probabilities of
so many likeliest.
"""

import json
import sys
import urllib.request

SPACE = 32  # what is generated where only the probabilities matter: a whole character


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
        requests = [job["request"] | {"prompt": job["tokens"][:n]} for n in range(1, len(job["tokens"]) + 1)]
        rows = [answer(address, "/completion", request) for request in requests]
        return {key: [row[key][0] for row in rows] for key in ("ids", "logprobs")}
    request = urllib.request.Request(address + path, json.dumps(job).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        whole = json.load(reply)
    if not job.get("n_probs"):
        return whole
    rows = [row["top_logprobs"] for row in whole["completion_probabilities"]]
    return {"tokens": whole["tokens"], "ids": [[entry["id"] for entry in row] for row in rows],
            "logprobs": [[entry["logprob"] for entry in row] for row in rows]}


if __name__ == "__main__":
    main()
