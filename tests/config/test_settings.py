"""Settings: defaults < preset < flags; whatever they do not know or cannot be is
refused in one line that helps.
"""

import os
import sys
import tracemalloc
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from tyro.conf import OmitArgPrefixes

import config
from common import one_line
from config import PIECE, at_least, read_text, settings
from sample import SampleConfig
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


def test_under_torchrun_the_first_process_says_what_all_of_them_read(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as silent:
        config.cli(Settings, ["--nonsense"])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="--nonsense"):
        config.cli(Settings, ["--nonsense"])
    assert silent.value.code


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
        ("limt = 1", "limt: did you mean limit"),              # which needs no table
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


def test_help_can_be_read_in_a_narrow_terminal(monkeypatch, capsys):
    """A setting of twelve columns had a letter on each line."""
    monkeypatch.setenv("COLUMNS", "12")
    with pytest.raises(SystemExit):
        config.cli(TrainConfig, ["--help"])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    assert any("0.002" in line for line in lines) and sum(len(line) == 1 for line in lines) < 10
    assert os.environ["COLUMNS"] == "12"


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


# ------------------------------------------------------------------------------------------
# Hostile values


@settings
class Nested:
    gate: bool = True
    rate: float = at_least(0.0, 1.0)


@settings
class Hostile:
    prompt: str = ""
    out: str = "out"
    init: str | None = None
    count: int = at_least(1, 3)
    free: int = 5
    fast: bool = False
    table: Nested = Nested()
    flat: Annotated[Nested, OmitArgPrefixes] = Nested()


@pytest.mark.parametrize("flags, value", [
    (["--prompt=x=True"], Hostile(prompt="x=True")),
    (["--prompt=--fast=True"], Hostile(prompt="--fast=True")),
    (["--init=a=False"], Hostile(init="a=False")),
    (["--prompt=-x"], Hostile(prompt="-x")),
    (["--prompt", ""], Hostile()),
    (["--prompt="], Hostile()),
    (["--table.gate=False"], Hostile(table=Nested(gate=False))),
    (["--table.no-gate"], Hostile(table=Nested(gate=False))),
    (["--gate=False"], Hostile(flat=Nested(gate=False))),
    (["--table.gate=False", "--table.gate=True"], Hostile()),
    (["--fast=true"], Hostile(fast=True)),
    (["--fast=false", "--fast"], Hostile(fast=True)),                         # the last counts, as everywhere
    (["--no-fast", "--fast=True"], Hostile(fast=True)),
    (["--fast=True", "--no-fast"], Hostile()),
    (["--free", "-3"], Hostile(free=-3)),
], ids=str)
def test_only_switches_are_rewritten_and_values_stay_what_they_are(flags, value):
    assert config.cli(Hostile, flags) == value


@settings
class TwoWords:
    of_two_words: Nested = Nested()
    flat: Annotated[Nested, OmitArgPrefixes] = Nested()


def test_a_refused_value_is_named_as_its_flag_is():
    """A table whose settings are flags without a prefix has a name no user knows."""
    for flags, says in ((["--rate", "-1"], "^rate = -1.0"),
                        (["--of_two_words.rate", "-1"], "^of_two_words: rate = -1.0")):
        with pytest.raises(ValueError, match=says):
            config.cli(TwoWords, flags)


@settings
class Texts:
    stop: tuple[str, ...] = ()
    ends_with: tuple[str, ...] = ("z",)


@settings
class Several:
    fast: bool = False
    flat: Annotated[Texts, OmitArgPrefixes] = Texts()
    far_off: Texts = Texts()


@pytest.mark.parametrize("flags, value", [
    (["--stop", "A", "B"], Several(flat=Texts(("A", "B")))),
    (["--stop=A", "B", "-", "-1", "--fast"], Several(True, Texts(("A", "B", "-", "-1")))),
    (["--stop", "A", "--fast", "--stop=B"], Several(True, Texts(("A", "B")))),
    (["--stop=---", "--stop=--fast", "--stop", "C=D", ""], Several(flat=Texts(("---", "--fast", "C=D", "")))),
    (["--stop"], Several()),
    (["--ends-with", "A", "--ends_with", "B"], Several(flat=Texts(ends_with=("A", "B")))),      # no default
    (["--far-off.ends-with=A", "--far_off.ends_with=B", "--stop", "C", "--far-off.stop", "D"],
     Several(flat=Texts(("C",)), far_off=Texts(("D",), ("A", "B")))),
], ids=str)
def test_a_flag_of_several_texts_may_be_repeated(flags, value):
    assert config.cli(Several, flags) == value


def test_texts_of_flags_win_over_the_presets_and_are_checked(tmp_path):
    file = preset(tmp_path, 'stop = ["x"]\n[far_off]\nstop = ["y"]\n')
    assert config.cli(Several, [file, "--stop", "A"]) == Several(flat=Texts(("A",)), far_off=Texts(("y",)))
    for flags, says in ((["--stop", "A", "--stop="], "none of them empty"),
                        (["--stop", "A", "--nonsense", "B"], "--nonsense"), (["--stop", "A", "-x"], "-x")):
        with pytest.raises(ValueError, match=says) as e:
            config.cli(SampleConfig, flags)
        one_line(e.value)


@pytest.mark.parametrize("flags, says", [
    (["--out", ""], "out is empty .out = .*.: name one, or omit it"),
    (["--out=  "], "out is empty .out = .*.: name one, or omit it"),
    (["--init="], "init is empty .init = ''.: name one"),
    (["--prompt", "-x"], "Missing value for argument '--prompt'.*--name=value"),
    (["--prompt", "a\0b"], "no name has a zero byte"),
    (["--count", "9" * 25], "count = 9{25}: it must be a number of at most 64 bits"),
    (["--count", "9" * 400], "count = 9{60}... .400 characters.: it must be a number of at most 64 bits"),
    (["--count", "9" * 5000], "--count: a number beyond all bounds"),
    (["--free", "-" + "9" * 25], "free = -9{25}: it must be a number of at most 64 bits"),
    (["--rate", "9" * 400], "rate = inf: it must be a number"),
    (["--rate", "9" * 5000], "rate = inf: it must be a number"),
    (["--no-fast=True"], "True"),
    (["--fast=yes"], "yes"),
    (["--table", "3"], "--table"),
], ids=lambda x: str(x)[:30])
def test_hostile_flags_are_one_line(flags, says):
    with pytest.raises(ValueError, match=says) as e:
        config.cli(Hostile, flags)
    assert len(one_line(e.value)) < 1200


@pytest.mark.parametrize("text, says", [
    ('out = ""', "out is empty"),
    ('out = " "', "out is empty"),
    ('prompt = "a\\u0000"', "zero byte"),
    ("count = " + "9" * 400, "count = 9{60}... .400 characters.: it must be"),
    ("count = " + "9" * 5000, "preset.toml is not TOML: Exceeds the limit"),
    ("count = 0x" + "f" * 5000, "count = a value beyond all bounds: it must be"),
    ("rate = " + "9" * 400, "rate = 9{60}... .400 characters.: expected float"),
    ("rate = nan", "rate = nan"),
    ("free = 1.0", "free = 1.0: expected int"),
    ("out = 1979-05-27", "expected str"),
    ("out = {}", "out = {}: expected str"),
    ("init = []", "init = .*: expected str"),
    ("table = 3", "table = 3: expected a table of settings"),
    ("flat = 3", "flat = 3: expected a table of settings"),
    ("out = " + "[" * 100000, "preset.toml is not TOML"),
    ("out = " + "{a=" * 100000, "preset.toml is not TOML: .*recursion"),
], ids=lambda x: str(x)[:30])
def test_hostile_presets_are_one_line(text, says, tmp_path):
    with pytest.raises(ValueError, match=says) as e:
        config.cli(Hostile, [preset(tmp_path, text)])
    assert len(one_line(e.value)) < 600


@pytest.mark.parametrize("values, says", [
    ({"out": None}, "out = None: expected str"), ({"count": None}, "count = None: expected int"),
    ({"count": 3.0}, "count = 3.0: expected int"), ({"count": True}, "count = True: expected int"),
    ({"count": "3"}, "count = '3': expected int"), ({"count": float("inf")}, "count = inf: expected int"),
    ({"fast": 1}, "fast = 1: expected bool"), ({"init": 3}, "init = 3: expected str"),
    ({"table": None}, "table = None: expected a table"), ({"table": {}}, "table = {}: expected a table"),
    ({"out": ["a"] * 999}, r"out = .*\.\.\. .4,995 characters.: expected str"),
], ids=str)
def test_values_of_a_file_have_the_fields_type(values, says):
    """As config.json of a model folder is read, key by key."""
    with pytest.raises(TypeError, match=says) as e:
        Hostile(**values)
    one_line(e.value)


def test_a_preset_that_is_a_pipe_or_endless_or_no_text_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    (tmp_path / "folder.toml").mkdir()
    for name, says in (("pipe", "is a pipe"), ("zero", "has more than"), ("bytes", "is not UTF-8")):
        with pytest.raises(ValueError, match=says) as e:
            config.cli(Hostile, [str(tmp_path / f"{name}.toml")])
        one_line(e.value)
    with pytest.raises(IsADirectoryError):
        config.cli(Hostile, [str(tmp_path / "folder.toml")])


def test_flat_settings_of_a_preset_are_checked_together_in_whatever_order_they_stand(tmp_path):
    """16 by the three heads of the default does not work, by two it does."""
    (tmp_path / "a.toml").write_text("n_embd = 16\nn_head = 2\n")
    assert config.cli(TrainConfig, [str(tmp_path / "a.toml")]).model.n_embd == 16


def test_what_a_preset_and_flags_make_together_is_checked_not_the_preset_alone(tmp_path):
    path = preset(tmp_path, "count = 9\n")
    with pytest.raises(ValueError, match="count is for cosine"):
        config.cli(Checked, [path, "--kind", "linear"])
    assert config.cli(Checked, [path, "--kind", "linear", "--count", "1"]) == Checked("linear", count=1)
    alone = preset(tmp_path, "n_embd = 16\n")
    with pytest.raises(ValueError, match="n_embd = 16 is not divisible"):
        config.cli(TrainConfig, [alone, "--n_head", "3"])
    assert config.cli(TrainConfig, [alone, "--n_head", "2"]).model.n_embd == 16


def test_a_text_of_any_size_is_read_whole_up_to_its_limit_and_takes_no_more_memory(tmp_path):
    for n in (0, 3, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE):
        (tmp_path / "a.txt").write_text("x" * n)
        assert read_text(tmp_path / "a.txt", "text", most=max(1, n)) == "x" * n
        if n:
            with pytest.raises(ValueError, match=f"more than {n - 1:,} bytes"):
                read_text(tmp_path / "a.txt", "text", most=n - 1)
    (tmp_path / "a.txt").write_text("x")
    tracemalloc.start()
    read_text(tmp_path / "a.txt", "text")
    highest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert highest < 2**20
