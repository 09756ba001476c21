"""Loaders that cannot be: sizes, damaged folders, states of other runs."""

import json

import pytest
import torch

from common_data import numbered, supervised  # noqa: F401
from data.loader import Loader


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"block_size": -3}, "block_size is -3"),
        ({"accum": 0}, "accum is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"block_size": 100}, "block_size of at most 99"),
        ({"batch_size": 89, "world_size": 9}, "801 .*smaller batch_size"),
        ({"split": "test"}, "meta.json.*'test'"),
    ],
)
def test_impossible_loaders_are_refused_with_the_remedy(tmp_path, settings, complaint):
    folder = numbered(tmp_path / "d", 100)
    with pytest.raises(ValueError, match=complaint):
        Loader(folder, **{"split": "train", "batch_size": 1, "block_size": 8, **settings})


def test_fewer_examples_than_a_global_batch_are_refused(supervised):
    n = Loader(supervised, "train", 1, 64).n
    with pytest.raises(ValueError, match=f"{n} different rows, but one step takes 100"):
        Loader(supervised, "train", 25, 64, world_size=2, accum=2)


def test_a_token_outside_the_vocabulary_is_named(tmp_path):
    folder = numbered(tmp_path / "d", 301)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "vocab_size": 257}))
    message = "token 300 outside the vocabulary of 257 in .*train.bin.*data.prepare"
    with pytest.raises(ValueError, match=message):
        list(Loader(folder, "train", 1, 300).windows())


@pytest.mark.parametrize("name", ["meta.json", "train.bin", "train.mask.bin", "train.idx.bin"])
@pytest.mark.parametrize("damage", [None, b"", b"\0", b"{}\n"])
def test_a_damaged_folder_is_named_with_the_command_that_mends_it(supervised, name, damage):
    path = supervised / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3] if damage == b"\0" else damage)
    with pytest.raises(ValueError, match=f"{name}.*python -m data.prepare") as error:
        Loader(supervised, "train", 2, 32)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------
# States of another run

def test_an_ordinary_loader_carries_nothing_and_refuses_the_states_of_a_run_that_did(supervised):
    loader = Loader(supervised, "train", 2, 32, accum=3)
    assert loader.carried(0) == loader.carried(7) == [None] * 3
    loader.carry(0, object())
    assert loader.carried(1) == [None] * 3 and loader.state_dict() is None
    for nothing in (None, []):
        loader.load_state_dict(nothing, 5, "out/step_5")
    layers = (((torch.zeros(4, 8), torch.zeros(4, 2, 8, 8), 16), None),)
    message = ("out/step_5 carries the state of 8 texts in 2 micro-batches, these settings of 0 in 0: resume "
               "with the bptt_truncate, batch_size, accum and processes that it was started with")
    with pytest.raises(ValueError) as e:
        loader.load_state_dict([(16, layers), (16, layers)], 5, "out/step_5")
    assert str(e.value) == message
