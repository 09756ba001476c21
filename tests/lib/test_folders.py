"""Model folders: what is saved is what is loaded, and damage is named."""

import errno
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import random_batch, tiny_model
from common_model import GPT, RWKV, VARIANTS, every_variant, lively, one_line_error, text
from lib.folders import (check_start, checksum_of_config, expected_shapes, load_model, save_model,
                         stored_shapes)
from model import LM, ModelConfig
from train import TrainConfig


@every_variant
def test_save_and_load_is_bit_equal(cfg, tmp_path):
    model = lively(cfg)
    save_model(model, tmp_path / "new" / "m", {"tokenizer": "bytes"})
    loaded = load_model(tmp_path / "new" / "m")
    assert loaded.cfg == cfg and json.loads((tmp_path / "new" / "m" / "meta.json").read_text()) == {
        "tokenizer": "bytes"
    }
    assert sorted(p.name for p in (tmp_path / "new" / "m").iterdir()) == [
        "config.json",
        "meta.json",
        "model.safetensors",
    ]
    a, b = model.state_dict(), loaded.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)
    assert (loaded.head.weight is loaded.emb.weight) == cfg.tied
    assert ("head.weight" in load_file(tmp_path / "new" / "m" / "model.safetensors")) != cfg.tied
    assert torch.equal(model(text())[0], loaded(text())[0])


def test_a_configs_checksum_is_the_same_whatever_the_defaults_are_today():
    """Numbers of models that were saved when the default was three layers of 96."""
    small = ModelConfig(n_layer=3, n_embd=96, n_head=3, rwkv_head_size=32)
    assert checksum_of_config(small) == 3497375731
    assert checksum_of_config(replace(small, n_layer=2, n_embd=128, n_head=2)) == 1499386381


def test_saving_over_a_model_replaces_it(tmp_path):
    save_model(lively(RWKV), tmp_path, {})
    save_model(second := lively(GPT, seed=5), tmp_path, {})
    assert torch.equal(load_model(tmp_path)(text())[0], second(text())[0])


@torch.no_grad()
def test_a_model_without_what_its_switches_leave_out_computes_the_same_when_loaded(tmp_path):
    """Nine tensors of zeros a mixer stand in no file, and are zeros again."""
    model = lively(replace(RWKV, gate=False, token_shift=False, bonus=False))
    save_model(model, tmp_path, {})
    stored, loaded = load_file(tmp_path / "model.safetensors"), load_model(tmp_path)
    buffers = dict(loaded.named_buffers())
    assert stored.keys() == {name for name, _ in model.named_parameters()}
    assert len(buffers) == 9 * 3 and not buffers.keys() & stored.keys()
    assert all(zeros.device.type == "cpu" and not zeros.any() for zeros in buffers.values())
    assert model.n_params() == loaded.n_params() == sum(weight.numel() for weight in stored.values())
    assert torch.equal(model(text())[0], loaded(text())[0])


# ------------------------------------------------------------------------------------------
# Folders of before


def test_an_older_config_without_the_newer_settings_is_read(tmp_path):
    new = {"rope_scaling", "rope_factor", "rope_low", "rope_high", "rope_original", "qk_norm", "o_bias"}
    save_model(model := lively(VARIANTS["gpt2"]), tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key not in new})
    )
    assert new < set(config) and torch.equal(load_model(tmp_path)(text())[0], model(text())[0])


PATTERNS = {
    "ra": "rara",
    "rrra": "rrra",
    "alternate": "rara",
    "1,2": "arra",
    "auto:64": "rrrr",
    "all": "rrrr",
    "first:2": "rraa",
    "0,2": "rara",
    "last:1": "aaar",
}


@pytest.mark.parametrize("pattern, letters", PATTERNS.items())
def test_a_pattern_in_an_older_config_is_read_as_its_letters(pattern, letters, tmp_path):
    model = tiny_model(n_layer=4, mixer=letters)
    save_model(model, tmp_path, {"tokenizer": "bytes"})
    edit_config(mixer=pattern)(tmp_path)
    loaded, x = load_model(tmp_path), random_batch().x
    assert loaded.cfg.mixers == letters and torch.equal(loaded(x)[0], model(x)[0])
    save_model(loaded, tmp_path / "again", {"tokenizer": "bytes"})
    assert set(json.loads((tmp_path / "again" / "config.json").read_text())["mixer"]) <= {"a", "r"}


@pytest.mark.parametrize("letters", ["r", "ra", "rrra"])
def test_a_model_folder_keeps_its_letters(letters, tmp_path):
    save_model(tiny_model(n_layer=4, mixer=letters), tmp_path, {"tokenizer": "bytes"})
    assert json.loads((tmp_path / "config.json").read_text())["mixer"] == letters
    assert load_model(tmp_path).cfg.mixer == letters


def test_a_pattern_that_is_none_is_refused(tmp_path):
    save_model(LM(RWKV), tmp_path, {})
    edit_config(mixer="most:3")(tmp_path)
    one_line_error(lambda: load_model(tmp_path), "mixer = 'most:3'", "first:K")


# ------------------------------------------------------------------------------------------
# Damage


def edit_config(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def cut(name, share):
    def edit(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return edit


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


DAMAGE = {
    "weights cut in half": (cut("model.safetensors", 0.5), "damaged"),
    "weights cut in the header": (cut("model.safetensors", 0.01), "damaged"),
    "weights empty": (write("model.safetensors", b""), "damaged"),
    "weights garbage": (write("model.safetensors", bytes(range(256)) * 40), "damaged"),
    "weights a pickle": (
        lambda folder: torch.save({"emb.weight": torch.zeros(2)}, folder / "model.safetensors"),
        "damaged",
    ),
    "weights missing": (
        lambda folder: os.remove(folder / "model.safetensors"),
        "model.safetensors is missing",
    ),
    "config missing": (lambda folder: os.remove(folder / "config.json"), "config.json is missing"),
    "config empty": (write("config.json", b""), "damaged"),
    "config an empty dict": (write("config.json", b"{}"), "does not fit"),
    "config null": (write("config.json", b"null"), "damaged"),
    "config a list": (write("config.json", b"[1, 2]"), "damaged"),
    "config an empty list": (write("config.json", b"[]"), "damaged"),
    "config cut": (cut("config.json", 0.7), "damaged"),
    "config garbage": (write("config.json", b"\xff\xfe\x00{}"), "damaged"),
    "unknown key": (edit_config(n_hed=4), "unknown keys: n_hed"),
    "a number as text": (edit_config(n_layer="3"), "damaged"),
    "a broken size": (edit_config(n_layer=2.5), "damaged"),
    "a value out of range": (edit_config(n_layer=0), "n_layer = 0"),
    "other layers": (edit_config(n_layer=2), "blocks.2"),
    "other width": (edit_config(n_embd=48), "expected"),
    "tensor missing": (edit_tensors(lambda t: t.pop("blocks.1.att.w0")), "blocks.1.att.w0 is missing"),
    "tensor too many": (
        edit_tensors(lambda t: t.update(extra=torch.zeros(2))),
        "extra is (2,), expected none",
    ),
    "tensor of another shape": (
        edit_tensors(lambda t: t.update({"ln_out.bias": torch.zeros(31)})),
        "ln_out.bias is (31,), expected (32,)",
    ),
    "no tensors": (edit_tensors(lambda t: t.clear()), "missing"),
    "NaN": (edit_tensors(lambda t: t["ln_out.bias"][3:4].fill_(float("nan"))), "ln_out.bias"),
    "infinite": (edit_tensors(lambda t: t["head.weight"][:1].fill_(float("-inf"))), "head.weight"),
    "null": (edit_config(mixer=None), "mixer = None: expected str"),
    "another type": (edit_config(tied=1), "tied = 1: expected bool"),
    "infinity": (edit_config(vocab_size=float("inf")), "vocab_size = inf"),
    "not a number": (edit_config(rope_theta=float("nan")), "rope_theta = nan"),
    "a list": (edit_config(n_embd=[3] * 10_000), "n_embd = [3"),
    "an integer of 400 digits": (edit_config(n_embd=10**399), "at most 64 bits"),
    "one where a float stands": (edit_config(rope_theta=10**399), "damaged"),
    "one of 5,000 digits": (write("config.json", b'{"n_embd": 1' + b"0" * 5000 + b"}"), "damaged"),
    "nested 100,000 deep": (write("config.json", b'{"n_embd": ' + b"[" * 100_000), "damaged"),
    "a billion layers": (edit_config(n_layer=10**9), "n_layer = 1000000000 layers some are missing"),
    "more layers than tensors": (edit_config(n_layer=100, mixer="auto:99"), "100 layers some are missing"),
    "absurd width": (edit_config(n_embd=2**50, rwkv_size=2**50), "config.json"),
    "absurd vocabulary": (edit_config(vocab_size=2**50), "emb.weight"),
    "a header of a terabyte": (write("model.safetensors", b"\0\0\0\0\0\1\0\0{}"), "header claims"),
    "a header of 100 MB": (write("model.safetensors", (10**8).to_bytes(8, "little") + b" " * 99), "claims"),
}


@pytest.mark.parametrize("damage, says", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_folder_gives_one_line_that_names_it(damage, says, tmp_path):
    save_model(LM(RWKV), tmp_path, {})
    damage(tmp_path)
    one_line_error(lambda: load_model(tmp_path), str(tmp_path) if "n_layer = 0" not in says else "", says)


def test_a_tied_folder_without_its_embedding_is_refused(tmp_path):
    save_model(LM(VARIANTS["gpt2"]), tmp_path, {})
    edit_tensors(lambda t: t.pop("emb.weight"))(tmp_path)
    one_line_error(lambda: load_model(tmp_path), "emb.weight is missing")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_the_system_says_of_a_file_is_told(name, tmp_path, monkeypatch):
    """A folder, a pipe without a writer, and a file that may not be read, are there."""
    save_model(LM(RWKV), tmp_path, {})
    os.rename(tmp_path / name, tmp_path / "kept")
    for make in (os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        make(tmp_path / name)
        one_line_error(lambda: load_model(tmp_path), f"{tmp_path / name} can't be read", "no regular file")
        os.rename(tmp_path / name, tmp_path / f"other {len(os.listdir(tmp_path))}")
    os.rename(tmp_path / "kept", tmp_path / name)

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    one_line_error(lambda: load_model(tmp_path), "config.json can't be read (Permission denied)")


@every_variant
@pytest.mark.parametrize("mixer", [None, "a", "r", "ra", "arra", "aarr", "rraa"])
def test_shapes_are_those_of_the_model_without_building_all_of_it(cfg, mixer):
    cfg = replace(cfg, mixer=mixer or cfg.mixer, n_layer=7)
    shapes, built = expected_shapes(cfg), stored_shapes(LM(cfg))
    assert shapes == built and list(shapes) == list(built)


def test_a_model_is_not_built_before_its_file_is_known_to_fill_it(tmp_path, monkeypatch):
    """Of 300 tensors, 37 layers could be; two are built to see that they are not."""
    layers = []
    monkeypatch.setattr("lib.folders.LM", lambda cfg: layers.append(cfg.n_layer) or LM(cfg))
    save_file({f"blocks.{i}.x": torch.zeros(1) for i in range(300)}, tmp_path / "model.safetensors")
    for n_layer, says in ((37, "blocks.0"), (38, "some are missing"), (10**15, "some are missing")):
        (tmp_path / "config.json").write_text(json.dumps({"n_layer": n_layer, "n_embd": 3 * 2**22}))
        one_line_error(lambda: load_model(tmp_path), says)
    assert layers == [2]


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    one_line_error(lambda: load_model(tmp_path / "nothing"), "nothing", "config.json is missing")
    (tmp_path / "file").write_text("x")
    one_line_error(lambda: load_model(tmp_path / "file"), "file")


@pytest.mark.parametrize("settings, needs, given", [
    ({"rope_factor": 4.0}, "rope_factor = 4.0: without --rope_scaling linear or llama3",
     {"rope_scaling": "linear"}),
    ({"rope_scaling": "linear", "rope_original": 64}, "rope_original = 64: without --rope_scaling llama3",
     {"rope_scaling": "llama3"}),
    ({"gate": False}, "gate = False: without --mixer with an r", {"mixer": "ar"}),
    ({"rwkv_rope": True}, "rwkv_rope = True: without --mixer with an r", {"mixer": "r"}),
])
def test_a_setting_that_would_do_nothing_is_refused_and_taken_with_what_it_needs(settings, needs, given):
    """It did nothing, without a word. A model that is there is taken as it is."""
    idle = TrainConfig(model=ModelConfig(**settings))
    with pytest.raises(ValueError, match=needs) as error:
        check_start(idle, idle.shape)
    assert "\n" not in str(error.value)
    whole = TrainConfig(model=ModelConfig(**settings | given))
    check_start(whole, whole.shape)
    check_start(TrainConfig(init="out/gpt"), idle.shape)
