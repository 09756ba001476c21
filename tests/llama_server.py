"""llama.cpp's server on GGUF files, one after the other, in a process of its own.

From stdin, as JSON, a dict of files, each with what is asked of it: [path, request].
To stdout, last line, the answers in the same order. Where a request has `n_probs`, the
answer is the tokens generated and before each the log-probabilities of all, by id.
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
        rows = [answer(address, "/completion", request)["logprobs"][0] for request in requests]
        return {"tokens": job["tokens"], "logprobs": rows}
    request = urllib.request.Request(address + path, json.dumps(job).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        whole = json.load(reply)
    if not job.get("n_probs"):
        return whole
    return {"tokens": whole["tokens"], "logprobs": [by_id(row) for row in whole["completion_probabilities"]]}


def by_id(row: dict) -> list[float]:
    return [entry["logprob"] for entry in sorted(row["top_logprobs"], key=lambda entry: entry["id"])]


if __name__ == "__main__":
    main()
