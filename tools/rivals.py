"""Other programs with a model's weights: the PyPI package `rwkv`, and llama.cpp.

For the benchmark (tools/bench.py), and as oracles for tests. Both are optional: without
its package, making one raises ImportError.
"""

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch

from data.tokenizer import get_tokenizer
from lib.folders import save_model
from model import LM, ModelConfig
from tools.gguf_tokenizer import tokenizer_settings
from tools.to_gguf import KINDS, open_source, write_file

BYTES = 256                     # llama.cpp's prompt has only tokens below this, the bytes
ANSWER = "seconds:"


def random_rwkv(cfg: ModelConfig) -> LM:
    """RWKV-7 with noise in the matrices whose official initial values are zero or
    nearly so: no branch is silent.
    """
    torch.manual_seed(0)
    model = LM(cfg).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim == 2 and p.abs().max() < 1e-3:
            p.normal_(std=0.1)
    return model


def official(model: LM, folder: str | Path) -> Callable:
    """The package `rwkv` on a model: forward(tokens, state) -> (logits (V,), state)."""
    os.environ.update(RWKV_V7_ON="1", RWKV_CUDA_ON="0", RWKV_JIT_ON="1")  # read while it is imported
    with contextlib.redirect_stdout(io.StringIO()):                       # it greets
        from rwkv.model import RWKV as Official

        torch.save({name: p.clone() for name, p in model.state_dict().items()}, Path(folder) / "official.pth")
        return Official(model=str(Path(folder) / "official"), strategy="cpu fp32").forward


class LlamaCpp:
    """llama.cpp (the package `xllamacpp`) on our own GGUF export, in its own process.

    In one process its threads and PyTorch's are too many for their OpenMP, which then
    makes both slower.

    Called with numbers of tokens to read and to write: the seconds that each took.
    `dtype` is that of the matrices: float32, bfloat16, float16 or q8_0. The export is
    kept in `folder`, which is for one model. At most 1,024 tokens in all.
    """

    def __init__(self, model: LM, folder: str | Path, dtype: str, threads: int):
        for package in ("gguf", "xllamacpp"):
            if importlib.util.find_spec(package) is None:
                raise ImportError(package)
        folder = Path(folder)
        file = folder / f"{dtype}.gguf"
        if not file.exists():
            if not (folder / "model.safetensors").exists():        # one for all precisions
                save_model(model, folder, {})
            tokens = tokenizer_settings(get_tokenizer("bytes"), model.cfg.vocab_size)
            write_file(file, open_source(folder)[0], KINDS[dtype], tokens)
        command = [sys.executable, "-c", "from tools.rivals import serve; serve()", str(file), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True)

    def __call__(self, read: int, write: int) -> tuple[float, float]:
        print(read, write, file=self.process.stdin, flush=True)
        for line in self.process.stdout:                   # llama.cpp may say something as well
            if line.startswith(ANSWER):
                return tuple(map(float, line.split()[1:]))
        raise RuntimeError(f"llama.cpp ended with status {self.process.wait()}")

    def __del__(self):
        if hasattr(self, "process"):
            self.process.kill()
            self.process.wait()


def serve() -> None:
    """What a LlamaCpp's process does: a server, asked over its own port."""
    server = llama_server(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        read, write = map(int, line.split())
        job = {"prompt": [7 * i % BYTES for i in range(read)], "n_predict": write + 1, "temperature": 0,
               "cache_prompt": False, "ignore_eos": True}
        took = ask(server.listening_address + "/completion", job)["timings"]
        assert (took["prompt_n"], took["predicted_n"]) == (read, write + 1), took
        # of write + 1 tokens the first came with the prompt
        print(f"\n{ANSWER} {took['prompt_ms'] / 1e3} {took['predicted_ms'] / 1e3}", flush=True)


def llama_server(file: str, threads: int):
    """llama.cpp on a GGUF file, listening as long as the object lives."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.warmup, params.cache_ram_mib = 1024, 1, False, 0
    params.verbosity = -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(params)


def ask(url: str, job: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(job).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)
