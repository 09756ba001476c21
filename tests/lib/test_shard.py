"""Sharding: two processes with a part of every tensor are two with DDP, and one.

All runs of the two processes are made once, side by side with those of one.
"""

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common import REPO, metrics, newest, one_line, random_batch, start, tiny_model
from common_shard import (LARGE, STEPS, STUDENTS, T, half_done, run_config, scratch, stages,
                          write_inputs)
from distill import distill
from lib.folders import load_model
from lib.runs import Run
from lib.shard import OPTIMIZER, checkpoint_blocks
from tools.plan import training_bytes
from train import cross_entropy_loss, train


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The folder with all runs.

    The two processes are started as on two machines, by a launcher for each.
    """
    root = tmp_path_factory.mktemp("shard")
    write_inputs(root)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1",
              f"--master_port={port}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), str(REPO / "tests")]))
        nodes = [start(*launch, f"--node_rank={i}", "tests/common_shard.py", root, say=root / f"node{i}.txt")
                 for i in (0, 1)]
    train(scratch(root, "one", 8, 1))
    for kind in STUDENTS:
        distill(stages(root, f"one-{kind}", kind, 4))
    for i, node in enumerate(nodes):
        assert node.wait(timeout=600) == 0, (root / f"node{i}.txt").read_text()
    return root


def assert_same_losses(one: Path, other: Path) -> None:
    """Twenty steps' losses are equal to 1e-5, and the weights nearly."""
    rows = list(zip(metrics(one), metrics(other), strict=True))
    assert len(rows) == STEPS and [a["step"] for a, _ in rows] == list(range(1, STEPS + 1))
    for a, b in rows:
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-6), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert rows[0][0]["loss"] > 1.001 * rows[-1][0]["loss"] or "match" in str(one)      # something was learnt
    a, b = (load_model(folder).state_dict() for folder in (one, other))
    for name in a:
        assert (a[name] - b[name]).norm() <= 1e-3 * a[name].norm() + 1e-5, name


def test_two_processes_in_parts_train_attention_as_one(root):
    """They accumulate two micro-batches, where one process reads all at once."""
    assert_same_losses(root / "one", root / "shard")


@pytest.mark.parametrize("stage", ["align", "match", "finish"])
@pytest.mark.parametrize("kind", STUDENTS)
def test_two_processes_in_parts_distil_as_one(root, kind, stage):
    """The hybrid's blocks are run again going back; each reads a stage by pieces."""
    assert_same_losses(root / f"one-{kind}" / stage, root / f"shard-{kind}" / stage)
    files = [root / f"{how}-{kind}" / "report.json" for how in ("one", "shard")]
    reports = [json.loads(file.read_text()) for file in files]
    assert reports[0]["gap"] == pytest.approx(reports[1]["gap"], abs=1e-4)
    assert reports[0]["layers"][0]["error"] == pytest.approx(reports[1]["layers"][0]["error"], rel=1e-2)


def test_two_processes_in_parts_are_two_with_ddp(root):
    assert_same_losses(root / "ddp", root / "shard")
    for kind in STUDENTS:
        for stage in ("align", "match", "finish"):
            assert_same_losses(root / f"ddp-{kind}" / stage, root / f"shard-{kind}" / stage)


# ------------------------------------------------------------------------------------------
# Folders and checkpoints

def test_a_run_in_parts_goes_on_as_if_it_had_not_stopped(root):
    """Weights, moments and log are equal bit for bit."""
    a, b = root / "shard", root / "again"
    for name in ("model.safetensors", OPTIMIZER):
        assert (newest(a) / name).read_bytes() == (newest(b) / name).read_bytes()
    assert metrics(a) == metrics(b)
    assert (newest(a) / OPTIMIZER).stat().st_size > (newest(a) / "model.safetensors").stat().st_size


def test_a_run_in_parts_goes_on_in_one_process_and_one_of_ddp_in_parts(root):
    """The same rows a step are the same batches: losses are equal to 1e-5."""
    train(scratch(root, "one-goes-on", 2, 4, resume=True))
    assert_same_losses(root / "shard", root / "one-goes-on")
    assert_same_losses(root / "ddp", root / "shard-goes-on")
    half_done(root / "shard", root / "refused")
    with pytest.raises(ValueError, match="processes = 8, not 4") as e:
        train(scratch(root, "refused", 2, 2, resume=True))
    one_line(e.value)


def test_a_damaged_optimizer_in_parts_is_refused(root, tmp_path):
    half_done(root / "shard", tmp_path / "run")
    file = newest(tmp_path / "run") / OPTIMIZER
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    run = run_config(tmp_path, "run", resume=True)
    cfg = replace(scratch(root, "run", 8, 1), run=run)
    with pytest.raises(ValueError, match="is damaged") as e:
        train(cfg)
    one_line(e.value)


def test_models_in_parts_have_the_weights_of_whole_ones(root):
    """Read from a folder, new ones, and students that looked at their teacher."""
    for rank in (0, 1):
        checks = json.loads((root / f"rank{rank}.json").read_text())
        assert checks["folder"] and checks["new"] and checks["student"] < 1e-4, checks


def test_what_each_process_holds_is_half(root):
    """Oracle of the plan: bytes counted in both processes after two steps."""
    parts = training_bytes(LARGE, 1, T, 2, shard=True)
    for rank in (0, 1):
        checks = json.loads((root / f"rank{rank}.json").read_text())
        for name, n in checks["bytes"].items():
            assert n == pytest.approx(parts[name], rel=0.15), (rank, name)


# ------------------------------------------------------------------------------------------
# Blocks that are run again, two machines, refusals

@pytest.mark.parametrize("mixer", ["r", "ra", "a"])
def test_blocks_that_are_run_again_give_the_same_gradients(mixer):
    """v_first stays in the graph: the first layer's value learns from the last's."""
    gradients, kept = [], []
    for again in (False, True):
        model, saved = tiny_model(mixer=mixer, n_layer=3), []
        if again:
            checkpoint_blocks(model)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x):
            losses, _ = cross_entropy_loss(model, random_batch())
        kept.append(sum(saved))
        losses["loss"].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients)) and kept[1] < kept[0] / 3


def test_two_machines_are_two_launchers(root):
    """On each the process is the first of its machine, and only rank 0 speaks."""
    said = [(root / f"node{i}.txt").read_text() for i in (0, 1)]
    assert said[0].count("held-out loss") > 4 and "held-out loss" not in said[1]
    assert "2 x cpu" in said[0]


def test_what_cannot_be_sharded_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="torchrun --nproc_per_node=N, or omit --shard") as e:
        Run(run_config(tmp_path, "run", shard=True), 0)
    one_line(e.value)
    with pytest.raises(ValueError, match="omit one") as e:
        run_config(tmp_path, "run", shard=True, compile=True)
    one_line(e.value)
