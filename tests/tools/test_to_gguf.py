"""Exports to GGUF: llama.cpp computes and tokenizes as we do, and all comes back."""

import itertools
from pathlib import Path

import pytest
import torch

from common_convert import bring, relative, rwkv, text
from common_llama import as_likely, ask, forced, greedy, ours
from lib.folders import save_model
from model import LM
from tools.convert import ExportConfig, export_model

pytest.importorskip("gguf")
V = 257
LLAMA = dict(ffn="swiglu", norm="rmsnorm", ln0=False, norm_eps=1e-6)
ODD = dict(rank_w=24, rank_a=40, rank_v=8, rank_g=72, ffn_size=200)
SWITCHES = ("gate", "group_norm", "token_shift", "bonus")
TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2, "q8_0": 6e-2}


def student(N: int = 64, C: int = 128, **changes) -> LM:
    """A random model that is sure of what comes next."""
    model = rwkv(N=N, C=C, V=V, **changes)
    with torch.no_grad():
        model.head.weight.mul_(6)
    return model.eval()


def export(model: LM, folder: Path, name: str, tokenizer: str = "bytes", **settings) -> Path:
    save_model(model, folder / name, {"tokenizer": tokenizer})
    out = folder / f"{name}-{settings.get('dtype', '')}.gguf"
    return export_model(ExportConfig(folder=str(folder / name), format="gguf", out=str(out), **settings))


def random_text(n: int) -> list[int]:
    return text(n, V)[0].tolist()


def check_the_same(models: dict[Path, LM]) -> None:
    """Log-probabilities on a forced text and on the greedy path, and 200 tokens."""
    prompt, given = random_text(9), random_text(64)
    job = {file: [forced(given, V), greedy(prompt, 64, V, n_probs=V), greedy(prompt, 200, V)] for file in models}
    for model, (on_text, on_path, generated) in zip(models.values(), ask(job)):
        path = generated["tokens"]
        before_each = ours(model, prompt + path[:-1])[len(prompt) - 1 :]
        assert len(path) == 200 and as_likely(before_each, path) and on_path["tokens"] == path[:64]
        assert relative(torch.tensor(on_path["logprobs"]), before_each[:64]) < 1e-5
        assert relative(torch.tensor(on_text["logprobs"]), ours(model, given)) < 1e-5


# ------------------------------------------------------------------------------------------
# Models

def test_llama_shaped_students_of_all_switches_run_in_llama_cpp(tmp_path):
    models = {}
    for values in itertools.product([False, True], repeat=len(SWITCHES)):
        switches = dict(zip(SWITCHES, values))
        model = student(**LLAMA, **switches, tied=switches["gate"])
        models[export(model, tmp_path, "".join(map(str, map(int, values))))] = model
    check_the_same(models)


def test_official_students_run_in_llama_cpp_also_of_odd_ranks_and_of_narrow_heads(tmp_path):
    models = {
        "as the demo": student(N=32, C=96),
        "odd ranks": student(**ODD),
        "relu2, nothing that can be off": student(ffn="relu2", token_shift=False, bonus=False, norm_bias=False,
                                                  tied=True, norm_eps=1e-3),
        "narrow": student(N=16, C=32, L=1),
        "narrow, of a Llama": student(N=32, C=64, **LLAMA),
    }
    check_the_same({export(model, tmp_path, name): model for name, model in models.items()})


@pytest.mark.parametrize("kind", [{}, LLAMA | ODD], ids=["rwkv7", "arwkv7, odd ranks"])
def test_matrices_of_16_and_8_bits_stay_within_their_tolerances(kind, tmp_path):
    model = student(**kind)
    given = random_text(64)
    files = [export(model, tmp_path, "m", dtype=dtype) for dtype in TOLERANCES]
    sizes = [file.stat().st_size for file in files]
    assert sizes[0] > 1.5 * sizes[1] and sizes[1] == sizes[2] > sizes[3]
    answers = ask({file: [forced(given, V), greedy(given[:9], 64, V, n_probs=V)] for file in files})
    for tolerance, (on_text, on_path) in zip(TOLERANCES.values(), answers):
        assert relative(torch.tensor(on_text["logprobs"]), ours(model, given)) < tolerance
        before_each = ours(model, given[:9] + on_path["tokens"][:-1])[8:]
        assert relative(torch.tensor(on_path["logprobs"]), before_each) < tolerance
