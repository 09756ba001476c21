"""Settings: defaults < preset < flags; whatever they do not know or cannot be is refused in one line that helps."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
from tyro.conf import OmitArgPrefixes

import config
from common import REPO, one_line, start
from distill import DistillConfig
from train import FitConfig, TrainConfig


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    limit: int | None = 3


@dataclass(frozen=True)
class Settings:
    name: str = "default"
    fast: bool = False
    near: Annotated[Inner, OmitArgPrefixes] = field(default_factory=Inner)
    far: Inner = Inner(rate=0.25)


def preset(folder: Path, text: str) -> str:
    (folder / "preset.toml").write_text(text)
    return str(folder / "preset.toml")


def test_flags_win_over_the_preset_which_wins_over_defaults(tmp_path):
    path = preset(tmp_path, 'name = "preset"\nfast = true\n[near]\nrate = 2\n[far]\nlimit = 7\n')
    assert config.cli(Settings, []) == Settings()
    assert config.cli(Settings, [path]) == Settings("preset", True, Inner(2.0, 3), Inner(0.25, 7))
    both = config.cli(Settings, [path, "--name", "flag", "--rate", "0.125", "--far.limit", "None"])
    assert both == Settings("flag", True, Inner(0.125, 3), Inner(0.25, None))
    assert type(config.cli(Settings, [path]).near.rate) is float


@pytest.mark.parametrize("form, value", [("--fast", True), ("--no-fast", False), ("--fast=True", True), ("--fast=False", False)])
def test_switches_are_written_as_tyro_or_as_nanogpt_has_them(form, value, tmp_path):
    assert config.cli(Settings, [preset(tmp_path, f"fast = {str(not value).lower()}"), form]).fast is value


@pytest.mark.parametrize("text, says", [
    ("nmae = 'x'", "did you mean name"),
    ("[near]\nrat = 1.0", "near.rat: did you mean rate"),
    ("zzz = 1", "there are name, fast, near, far"),
    ("name = 3", "name = 3: expected str"),
    ("fast = 'yes'", "fast = 'yes': expected bool"),
    ("near = 3", "near = 3"),
    ("[near]\nlimit = 'many'", "near.limit"),
    ("[near]\nlimit = 1.5", "near.limit"),
    ("[near]\nlimit = true", "near.limit"),
    ("name = [", "not TOML"),
])
def test_a_preset_with_an_unknown_key_or_a_wrong_value_is_refused_by_name(text, says, tmp_path):
    with pytest.raises(ValueError) as error:
        config.cli(Settings, [preset(tmp_path, text)])
    assert says in str(error.value)


def test_a_missing_preset_names_those_that_exist():
    with pytest.raises(ValueError, match="shakespeare-cpu.toml"):
        config.cli(Settings, ["config/nothing-here.toml"])


def test_an_unknown_flag_is_refused_with_the_nearest_one(capsys):
    with pytest.raises(ValueError) as error:
        config.cli(TrainConfig, ["--learning_rat", "1e-3"])
    said = str(error.value)
    assert "--learning_rat," in said and "--learning-rate" in said and "---" not in said and "\n" not in said
    assert not any(capsys.readouterr())


@pytest.mark.parametrize("path", sorted((REPO / "config").glob("*.toml")), ids=lambda p: p.name)
def test_every_preset_fits_a_script(path):
    """A preset belongs to train.py or distill.py: one of them accepts every key in it."""
    fits = []
    for cls in (TrainConfig, DistillConfig):
        try:
            fits.append(config.cli(cls, [str(path)]))
        except ValueError as e:
            assert "unknown setting" in str(e)
    assert len(fits) == 1


RATES = ["learning_rate", "learning_rate_end", "weight_decay", "weight_decay_end", "att_weight_decay", "ffn_weight_decay", "rwkv_lr_multiplier",
         "beta1", "beta2", "eps", "clip", "max_minutes", "terminate_at_loss", "save_minutes"]


@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize("name", RATES)
def test_a_rate_that_is_negative_or_not_finite_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} = "):
        FitConfig(**{name: value})


@pytest.mark.parametrize("name", ["batch_size", "accum", "keep_last", "log_every", "save_every", "eval_every", "max_tokens"])
def test_a_count_of_zero_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"^{name} = 0"):
        FitConfig(**{name: 0})


@pytest.mark.parametrize("wrong", [{"kl_weight": -1.0}, {"kl_weight": float("nan")}, {"ce_weight": float("inf")}, {"kl_weight": 0.0}, {"dpo_smoothing": 0.5},
                                   {"dpo_beta": -0.1}, {"stages": "distil,align"}, {"stages": ""}, {"stages": "align,align"}, {"kl_kind": "sideways"},
                                   {"align_kind": "l1"}, {"dpo_kind": "ipo"}])
def test_a_distillation_that_cannot_be_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DistillConfig(**wrong)


def test_run_ends_a_script_with_one_line_and_a_failing_status(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])

    def fail():
        raise ValueError("a message\nover two lines")

    with pytest.raises(SystemExit) as error:
        config.run(fail)
    assert one_line(error.value.code) == "train.py: a message over two lines"


def test_scripts_refuse_nonsense_with_its_remedy_and_a_failing_status(tmp_path):
    """From the shell: a key unknown to a preset, data that is not there, a rate below zero, heads that do not divide the width."""
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (["train.py", preset(tmp_path, "max_stepz = 3\n[fit]\n")], "unknown setting max_stepz"),
        (["distill.py", "--data", empty, "--teacher", tmp_path / "teacher", "--out", tmp_path / "out"], f"{empty}"),
        (["train.py", "--learning_rate=-1"], "learning_rate = -1.0: it must be a number of at least 0"),
        (["train.py", "--n_embd", "30", "--n_head", "4"], "n_embd = 30 is not divisible by n_head = 4: change one, or set head_size"),
    ]
    for process, (args, says) in [(start(*args), (args, says)) for args, says in cases]:  # all at once
        err = process.communicate(timeout=120)[1]
        assert process.returncode not in (0, None) and "Traceback" not in err, (args, err)
        if "╭" in err:  # what flags got wrong, tyro puts in a box
            err = " ".join(err.replace("│", " ").split())
        assert says in one_line(err), (args, err)
