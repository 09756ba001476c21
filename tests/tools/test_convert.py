"""The two commands: what they tell and sweep up, and how much memory they take."""

import gc
import json
import math
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from common_convert import COMMON, KINDS, bring, hf, original, refused, write_gguf
from lib.folders import load_model, open_model, stored_shapes
from model import LM, ModelConfig
from tools.convert import ExportConfig, ImportConfig, export_model, import_model


def test_a_tokenizer_too_large_for_the_model_is_told_and_a_killed_import_is_swept_up(tmp_path, capsys):
    original(*KINDS["llama"]).save_pretrained(tmp_path / "original")
    left = tmp_path / ".imported.999999999.partial"
    left.mkdir()
    bring(tmp_path / "original", tmp_path, tokenizer="bytes")
    assert not left.exists()
    assert "tokenizer bytes has 257 tokens, the model 97" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_one_file_of_a_folder_is_answered_with_the_folder(name, tmp_path):
    (tmp_path / name).write_text("{}")
    refused(name, "one file of a model: give the folder that holds", path=tmp_path / name, tmp_path=tmp_path)


# ------------------------------------------------------------------------------------------
# Memory, as the allocators count it: what was asked for, whatever load and system made
# of it

BIG = dict(hidden_size=256, intermediate_size=640, num_hidden_layers=12, vocab_size=640,
           num_attention_heads=8)


def write_source(kind: str, folder: Path) -> Path:
    """A checkpoint of 30 MB and more, of which the largest tensor is a small part."""
    path = folder / f"m.{kind}"
    torch.manual_seed(0)
    if kind == "pth":
        cfg = ModelConfig(vocab_size=640, n_layer=12, n_embd=256, mixer="r", positions="none",
                          ffn="channelmix", rwkv_head_size=64)
        torch.save(LM(cfg).state_dict(), path)
        return path
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON | BIG))
    if kind == "safetensors":
        model.save_pretrained(path)
    else:
        write_gguf(path, model, "llama")
    return path


@dataclass
class Account:
    """The most bytes at once, allocated and of mapped files; and the mappings made."""

    allocated: int = 0
    mapped: int = 0
    mappings: int = 0


def account(call: Callable, files: list[Path], trace: Path) -> Account:
    """What a call takes.

    torch reports to its profiler each allocation and each of these files that it maps,
    numpy (which reads a GGUF) and Python report theirs to tracemalloc.
    """
    call()         # what its first time imports is not its own
    gc.collect()   # nor what others left to be freed
    sizes = {file.stat().st_size for file in files}
    tracemalloc.start()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        highest = Account(allocated=tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    python, allocated, mapped = highest.allocated, 0, 0
    for event in sorted(events, key=lambda event: event["ts"]):
        size = event["args"]["Bytes"]
        if abs(size) in sizes:
            mapped += size
            highest.mappings += size > 0
        else:
            allocated += size
        highest.allocated = max(highest.allocated, python + allocated)
        highest.mapped = max(highest.mapped, mapped)
    assert events and allocated >= 0 and mapped >= 0
    return highest


@pytest.mark.parametrize("kind", ["safetensors", "gguf", "pth"])
def test_memory_stays_below_a_fifth_more_than_the_model(kind, tmp_path, monkeypatch):
    """An import has one tensor in memory, beside a .pth that is mapped as it is, and
    so has the export to a GGUF.

    Loading and export to a .pth have the model once, and one tensor more. The model's
    file is mapped anew for each tensor: one that stays mapped keeps in memory what was
    read.
    """
    monkeypatch.chdir(tmp_path)
    source, stored = write_source(kind, tmp_path), tmp_path / "out" / "model.safetensors"
    files = [stored, *source.glob("*.safetensors")] if source.is_dir() else [stored, source]
    importing = ImportConfig(path=source.name, out="out", overwrite=True)
    exporting = ExportConfig(folder="out", overwrite=True)

    more = account(lambda: import_model(importing), files, tmp_path / "trace.json")
    size, shapes = stored.stat().st_size, stored_shapes(open_model("out")[0])
    # a tensor as it is read, arranged, converted and compared with infinity; and a
    # megabyte for names and headers
    piece = 5 * 4 * max(map(math.prod, shapes.values())) + 2**20
    assert size > 30e6 and piece < size / 5
    assert more.allocated < piece and more.mapped <= max(file.stat().st_size for file in files)

    if kind == "pth":
        as_gguf = ExportConfig(folder="out", format="gguf", overwrite=True)
        more = account(lambda: export_model(as_gguf), [stored], tmp_path / "trace.json")
        assert more.allocated < piece and more.mapped <= size
    calls = [lambda: load_model("out")]
    if kind == "pth":
        calls.append(lambda: export_model(exporting))
    for call in calls:
        whole = account(call, [stored], tmp_path / "trace.json")
        assert 0.9 * size < whole.allocated < size + piece
        assert whole.mapped == size and whole.mappings >= len(shapes)
