"""Settings: defaults < preset file < flags, and nothing else. They check themselves.

    python train.py config/shakespeare-cpu.toml --batch_size 8 --compile=False

A script's settings are a frozen dataclass, made by `settings`. A preset is a TOML file
with some of its fields, nested dataclasses as tables. `cli` puts the three together and
refuses what it does not know; `run` ends a script with one line instead of a traceback.

The room's law: settings and presets; it imports nothing of ours, and everybody may
import it.
"""

import contextlib
import difflib
import io
import math
import re
import signal
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin, get_type_hints

import tyro


def settings(cls: type) -> type:
    """A frozen dataclass whose every instance is checked.

    Choices are a `Literal`, ranges an `at_least(...)`, floats are finite, and what
    concerns several fields stands in the class's own __post_init__, which runs last. A
    class that extends another's settings has its checks as well.
    """
    cls.relations = cls.__dict__.get("__post_init__", lambda self: None)
    cls.__post_init__ = check
    return dataclass(frozen=True)(cls)


def check(self) -> None:
    """What every instance of a settings class goes through."""
    hints = get_type_hints(type(self))
    for f in fields(self):
        check_field(f.name, getattr(self, f.name), hints[f.name], f.metadata)
    for cls in reversed(type(self).__mro__):
        cls.__dict__.get("relations", lambda self: None)(self)


def at_least(least: float, default, below: float = math.inf):
    """A setting in least <= value < below."""
    return field(default=default, metadata={"least": least, "below": below})


def check_field(name: str, value, hint, limits: dict) -> None:
    """Raises ValueError for a value outside its choices or its range.

    None, where allowed, is neither.
    """
    if value is None or is_dataclass(value):
        return
    choices = choices_of(hint)
    if choices and value not in choices:
        raise ValueError(f"{name} = {value!r}: choose one of {', '.join(choices)}")
    if limits and not limits["least"] <= value < limits["below"]:              # "not": NaN is in no range
        upper = f" and below {limits['below']}" if limits["below"] < math.inf else ""
        raise ValueError(f"{name} = {value}: it must be a number of at least {limits['least']}{upper}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} = {value}: it must be a finite number")


def choices_of(hint) -> tuple[str, ...]:
    """The options of a Literal, also inside `Literal[...] | None`."""
    parts = (hint, *get_args(hint))
    return tuple(option for part in parts if get_origin(part) is Literal for option in get_args(part))


def cli(cls: type, argv: list[str] | None = None):
    """A `cls` from its defaults, an optional first argument PRESET.toml, and flags.

    Flags are --name value or --name=value. Raises ValueError, in one line, for what is
    wrong.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    default = cls()
    if argv and argv[0].endswith(".toml"):
        default = apply(default, load_preset(argv.pop(0)))
    # tyro writes switches as --name and --no-name; people who know nanoGPT write
    # --name=True
    for end, prefix in (("=True", "--"), ("=False", "--no-")):
        argv = [
            prefix + a[2:].removesuffix(end) if a.startswith("--") and a.endswith(end) else a for a in argv
        ]
    description = sys.modules[cls.__module__].__doc__.split("\n")[0]
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(cls, args=argv, default=default, description=description)
    except SystemExit as e:
        if not e.code:                                                        # --help
            raise
        raise ValueError(without_frame(box.getvalue()) + "; --help lists all settings") from None


def without_frame(message: str) -> str:
    """tyro's complaint in one line: its title, its box and its advice removed."""
    text = message.partition("\n")[2].partition("For full helptext")[0]
    return " ".join(re.sub("[╭╮╰╯│─├┤|]|-{4,}", " ", text).split())


def load_preset(path: str) -> dict:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        presets = ", ".join(sorted(str(p) for p in Path(__file__).parent.glob("*.toml")))
        raise ValueError(f"no preset {path}: there are {presets}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not TOML: {e}") from None


def apply(default, values: dict, where: str = ""):
    """The dataclass `default` with `values` in it.

    What has no prefix as a flag needs no table either: out = "..." for run.out. Raises
    ValueError for a key that it does not have, or a value of another type.
    """
    hints, homes = get_type_hints(type(default)), flat_settings(default)
    changed = {}
    for key, value in values.items():
        if key in homes:
            home = homes[key]
            changed[home] = apply(changed.get(home, getattr(default, home)), {key: value}, where)
            continue
        if key not in hints:
            raise ValueError(f"unknown setting {where}{key}: {nearest(key, hints)}")
        current = changed.get(key, getattr(default, key))
        if is_dataclass(current) and isinstance(value, dict):
            changed[key] = apply(current, value, f"{where}{key}.")
        else:
            changed[key] = as_type(value, hints[key], f"{where}{key}")
    return replace(default, **changed)


def flat_settings(default) -> dict[str, str]:
    """Each setting that flags have without its prefix, and the field that holds it."""
    homes = {}
    for name, hint in get_type_hints(type(default), include_extras=True).items():
        if tyro.conf.OmitArgPrefixes in getattr(hint, "__metadata__", ()):
            homes |= {f.name: name for f in fields(getattr(default, name))}
    return {key: home for key, home in homes.items() if not hasattr(default, key)}


def nearest(key: str, names) -> str:
    close = difflib.get_close_matches(key, names, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"


def as_type(value, hint, name: str):
    """A preset's value as the field's type; an integer is a float where one is wanted.
    """
    kinds = {type(option) for option in choices_of(hint)} or set(get_args(hint)) or {hint}
    if float in kinds and int not in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        wanted = " or ".join(sorted(kind.__name__ for kind in kinds - {NoneType}))
        raise ValueError(f"{name} = {value!r}: expected {wanted}")
    return value


def run(main: Callable[[], None]) -> None:
    """Run a script's main; what a user or the disk got wrong ends in one line on stderr
    and status 1.
    """
    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(str(e).split())}")
    except KeyboardInterrupt as e:
        if not e.args:                                     # else train.fit has said what it saved
            print("interrupted; what was saved stays, and --resume goes on from there "
                  "where the script has it", file=sys.stderr)
        sys.exit(130)
