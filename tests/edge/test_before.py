"""What the code of before wrote opens: a model folder, a state, and interrupted runs.

tests/before/ was made by the code as it stood before its layout changed, on one thread:
patterns of layers stand in its config.json, stage 2 is called distil in its folders.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save

import distill
import train
from common import REPO
from lib.folders import load_model
from lib.state_file import expand, load_state

BEFORE = REPO / "tests" / "before"
SHAPE = ["--rank_w", "4", "--rank_a", "4", "--rank_v", "4", "--rank_g", "4", "--ffn_size", "16",
         "--n_embd", "8", "--n_layer", "2", "--n_head", "1", "--rwkv_head_size", "8", "--block_size", "16"]
RUN = ["--device", "cpu", "--eval_tokens", "64", "--keep_last", "9", "--log_every", "1"]
TRAINING = ["--data", "data", "--out", "training", "--mixer", "all", "--ffn", "channelmix", *SHAPE, *RUN,
            "--max_steps", "4", "--batch_size", "2", "--save_every", "2", "--eval_every", "None"]


def loop(stage: str, rate: str, *more: str) -> list[str]:
    """The flags of a stage's loop."""
    values = {"max_steps": "4", "batch_size": "2", "eval_every": "None", "learning_rate": rate,
              "rwkv_lr_multiplier": "1", "weight_decay": "0.1", "optimizer": "adamw"}
    return [word for name, value in values.items() for word in (f"--{stage}.{name}", value)]


DISTILLATION = ["--data", "data", "--teacher", "teacher", "--out", "distillation", "--stages", "align,match",
                "--mixer", "first:1", "--ce_weight", "1", *RUN, "--save_every", "2",
                "--decay", "spread", "--no-calibrate",
                *loop("align", "5e-3"), *loop("match", "5e-4")]


@pytest.fixture
def before(tmp_path, monkeypatch) -> Path:
    """A copy of tests/before, in which the test stands."""
    shutil.copytree(BEFORE, tmp_path / "before")
    monkeypatch.chdir(tmp_path / "before")
    return tmp_path / "before"


def probe() -> str:
    """SHA-256 of what torch computes here: its last bits depend on the CPU."""
    x = torch.randn(4, 4, 16, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    z = F.layer_norm(y @ y.mT, (16,)).softmax(-1).log_softmax(-1).cumsum(-2)
    z = z + torch.sigmoid(z).exp() * torch.tanh(z) + F.normalize(z, dim=-1) + F.gelu(z)
    F.group_norm(z.flatten(0, 2), 4, eps=64e-5).square().sum().backward()
    torch.optim.AdamW([x], fused=True).step()
    return hashlib.sha256(x.detach().numpy().tobytes() + x.grad.numpy().tobytes()).hexdigest()


def assert_finished(folder: Path, name: str) -> None:
    """The model is the one of the run that never stopped, made by the code of before.

    Bit for bit, where torch itself computes the bits that it computed there; elsewhere
    within the differences that its last bits make in four small steps.
    """
    hashes = json.loads((BEFORE / "sha256.json").read_text())
    finished = load_file(BEFORE / "finished" / f"{name}.safetensors")
    model = load_file(folder / "model.safetensors")
    for weight in finished.keys() | model.keys():
        torch.testing.assert_close(model[weight], finished[weight], rtol=1e-3, atol=1e-3)
    if probe() == hashes["torch"]:
        as_before = save(load_file(folder / "model.safetensors"))      # today's has checksums in its header
        assert hashlib.sha256(as_before).hexdigest() == hashes[name]


@torch.no_grad()
def test_a_model_folder_gives_its_logits():
    model, expected = load_model(BEFORE / "model").eval(), load_file(BEFORE / "expected.safetensors")
    assert model.cfg.mixers == "ra"
    logits, _ = model(expected["text"][None])
    torch.testing.assert_close(logits[0, -2:], expected["logits"], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_state_goes_on_to_its_logits():
    """Its fingerprint is of the pattern first:1, which is letters today."""
    model, expected = load_model(BEFORE / "model").eval(), load_file(BEFORE / "expected.safetensors")
    state, unread = load_state(BEFORE / "book.state", model, "bytes")
    assert unread == [10] and state.position == len(expected["text"])
    logits, _ = model(expected["continuation"][None], expand(state))
    torch.testing.assert_close(logits[0, -2:], expected["continued"], rtol=1e-6, atol=1e-6)


def test_an_interrupted_training_resumes_to_what_it_would_have_become(before):
    train.main([*TRAINING, "--resume"])
    assert_finished(before / "training", "training")
    steps = [json.loads(row)["step"] for row in (before / "training" / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4]


def test_an_interrupted_distillation_resumes_to_what_it_would_have_become(before):
    """Stopped in stage 2, whose folder bears its name of today afterwards."""
    distill.main([*DISTILLATION, "--resume"])
    out = before / "distillation"
    assert_finished(out, "distillation")
    assert_finished(out / "match", "distillation")
    assert not (out / "distil").exists()
    assert json.loads((out / "match" / "stage.json").read_text())["name"] == "match"
    rows = json.loads((out / "report.json").read_text())["stages"]
    assert [row["name"] for row in rows] == ["start", "align", "match"]


def test_a_finished_stage_of_before_is_a_row_of_today(before, monkeypatch):
    """Its stage.json says "distil", the report match, and nothing is trained again."""
    out = before / "distillation"
    distill.main([*DISTILLATION, "--resume"])
    row = json.loads((out / "match" / "stage.json").read_text())
    del row["crc32"]
    (out / "match").rename(out / "distil")
    (out / "distil" / "stage.json").write_text(json.dumps(row | {"name": "distil"}))
    monkeypatch.setattr(distill, "train_stage", None)
    distill.main([*DISTILLATION, "--resume"])
    assert json.loads((out / "report.json").read_text())["stages"][-1] == row
    assert_finished(out, "distillation")
