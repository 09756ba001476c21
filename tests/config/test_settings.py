"""Settings: defaults < preset < flags; whatever they do not know or cannot be is
refused in one line that helps.
"""

import sys
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from tyro.conf import OmitArgPrefixes

import config
from common import one_line
from config import at_least, settings
from train import TrainConfig

# ------------------------------------------------------------------------------------------
# Defaults, preset, flags


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


@pytest.mark.parametrize(
    "form, value", [("--fast", True), ("--no-fast", False), ("--fast=True", True), ("--fast=False", False)]
)
def test_switches_are_written_as_tyro_or_as_nanogpt_has_them(form, value, tmp_path):
    assert config.cli(Settings, [preset(tmp_path, f"fast = {str(not value).lower()}"), form]).fast is value


@pytest.mark.parametrize(
    "text, says",
    [
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
    ],
)
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


# ------------------------------------------------------------------------------------------
# Settings that check themselves


@settings
class Checked:
    """One field of each kind."""

    kind: Literal["cosine", "linear"] = "cosine"
    other: Literal["a", "b"] | None = None
    count: int = at_least(1, 4)
    share: float | None = at_least(0.0, None, below=1.0)
    free: float = 0.0

    def __post_init__(self):
        if self.kind == "linear" and self.count > 8:
            raise ValueError("count is for cosine")


@settings
class Heir(Checked):
    """Its own check comes after Checked's."""

    extra: int = at_least(0, 0)

    def __post_init__(self):
        if self.extra > self.count:
            raise ValueError("extra is above count")


@pytest.mark.parametrize("cls", [Checked, Heir])
@pytest.mark.parametrize(
    "values, says",
    [
        ({"kind": "cubic"}, "kind = 'cubic': choose one of cosine, linear"),
        ({"other": "c"}, "other = 'c': choose one of a, b"),
        ({"count": 0}, "count = 0: it must be a number of at least 1"),
        ({"share": -0.1}, "share = -0.1: it must be a number of at least 0.0 and below 1.0"),
        ({"share": 1.0}, "share = 1.0: it must be a number of at least 0.0 and below 1.0"),
        ({"share": float("nan")}, "share = nan: it must be a number of at least 0.0 and below 1.0"),
        ({"free": float("nan")}, "free = nan: it must be a finite number"),
        ({"free": float("inf")}, "free = inf: it must be a finite number"),
        ({"free": -float("inf")}, "free = -inf: it must be a finite number"),
        ({"kind": "linear", "count": 9}, "count is for cosine"),
    ],
)
def test_a_value_outside_its_choices_or_range_is_refused(cls, values, says):
    with pytest.raises(ValueError) as error:
        cls(**values)
    assert one_line(error.value) == says


def test_values_at_the_ends_of_a_range_are_allowed():
    Checked(count=1, share=0.0, other="b", free=-1e300)
    Checked(share=None, other=None)


def test_a_class_has_the_checks_of_the_one_that_it_extends_before_its_own():
    with pytest.raises(ValueError, match="extra is above count"):
        Heir(extra=5)
    with pytest.raises(ValueError, match="count is for cosine"):
        Heir(kind="linear", count=9, extra=10)
    Checked()  # which knows no extra


def test_settings_do_not_change():
    with pytest.raises(FrozenInstanceError):
        Checked().count = 2


def test_flags_go_through_the_same_checks(tmp_path):
    for arguments in (["--count", "0"], [preset(tmp_path, "count = 0")]):
        with pytest.raises(ValueError, match="count = 0: it must be a number of at least 1"):
            config.cli(Checked, arguments)
    with pytest.raises(ValueError, match="kind = 'cubic': choose one of cosine, linear"):
        config.cli(Checked, [preset(tmp_path, "kind = 'cubic'")])
    assert config.cli(Checked, ["--kind", "linear", "--share", "0.5"]) == Checked("linear", share=0.5)


# ------------------------------------------------------------------------------------------
# A script's end


def test_run_ends_a_script_with_one_line_and_a_failing_status(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])

    def fail():
        raise ValueError("a message\nover two lines")

    with pytest.raises(SystemExit) as error:
        config.run(fail)
    assert one_line(error.value.code) == "train.py: a message over two lines"
