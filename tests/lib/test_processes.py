"""Several processes: the first that fails says it for all."""

import pytest
import torch
import torch.distributed as dist

import lib.processes
from common import TINY, one_line, start
from lib.processes import joined, pick_device


@pytest.fixture
def failed(monkeypatch) -> list:
    """How many processes of this run have failed, of which this one is not yet one."""
    count = []

    def fails_first() -> bool:
        count.append(1)
        return len(count) == 1

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(lib.processes, "fails_first", fails_first)
    return count


LOST = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5")


@pytest.mark.parametrize("error", [ValueError("refused"), LOST, KeyboardInterrupt(), KeyError("a fault")],
                         ids=lambda e: type(e).__name__)
def test_a_process_that_fails_after_another_is_silent(error, failed):
    failed.append(1)
    with pytest.raises(SystemExit) as e, joined():
        raise error
    assert e.value.code == 1 and e.value.__suppress_context__


def test_the_first_to_fail_says_why(failed):
    with pytest.raises(ValueError, match="^refused$"), joined():
        raise ValueError("refused")
    failed.clear()
    with pytest.raises(ValueError, match="another process .* has ended without a word") as e, joined():
        raise LOST
    one_line(e.value)
    failed.clear()
    with pytest.raises(RuntimeError, match="^shapes differ$"), joined():      # a fault of ours is not hidden
        raise RuntimeError("shapes differ")


def test_what_was_saved_on_request_is_no_failure(failed):
    with pytest.raises(KeyboardInterrupt, match="saved"), joined():
        raise KeyboardInterrupt("saved")
    with joined():
        pass
    assert not failed


def test_a_refusal_of_rank_0_is_one_line_of_two_processes(tmp_path):
    """The only other traceback is torchrun's own."""
    (tmp_path / "metrics.jsonl").touch()
    run = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *TINY,
                "--device", "cpu", "--out", tmp_path)
    err = run.communicate(timeout=600)[1]
    lines = [line for line in err.splitlines() if "train.py: " in line]
    assert run.returncode == 1 and len(lines) == 1 and "holds another run" in lines[0], err
    assert err.count("Traceback") <= 1 and "peer" not in err, err


@pytest.mark.parametrize("device, local", [("cuda:x", 0), ("cudax", 0), ("cuda:2", 0), ("cuda", 2),
                                           ("auto", 2)])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, device, local):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device = "):
        pick_device(device, local)
    assert pick_device("cuda:1", 5) == torch.device("cuda:1") and pick_device("cpu", 5).type == "cpu"
    assert pick_device("auto", 1) == torch.device("cuda:1")
