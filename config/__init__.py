"""Settings: defaults < preset file < flags, and nothing else. They check themselves.

    python train.py config/shakespeare-cpu.toml --batch_size 8 --compile=False

A script's settings are a frozen dataclass, made by `settings`. A preset is a TOML file
with some of its fields, nested dataclasses as tables. `cli` puts the three together and
refuses what it does not know; `run` ends a script with one line instead of a traceback.

The room's law: settings and presets; it imports nothing of ours, and all may import it.
"""

from config.script import hush, run  # noqa: F401   (before all that takes long, for Ctrl-C: see there)

import contextlib
import copy
import difflib
import io
import math
import os
import re
import shutil
import stat
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import tyro


def settings(cls: type) -> type:
    """A frozen dataclass whose every instance is checked.

    Choices are a `Literal`, ranges an `at_least(...)`, floats are finite, integers have
    64 bits, and a text is empty only where its default is. What concerns several fields
    stands in the class's own __post_init__, which runs last. A class that extends
    another's settings has its checks as well.
    """
    cls.relations = cls.__dict__.get("__post_init__", lambda self: None)
    cls.__post_init__ = check
    return dataclass(frozen=True)(cls)


def narrow(cfg, cls: type, **changes):
    """The settings of a class `cls` that cfg's class extends, some of them changed."""
    return cls(**{f.name: getattr(cfg, f.name) for f in fields(cls)} | changes)


class Refusal(ValueError):
    """Why values cannot be, in a line for the user."""


def check(self) -> None:
    """What every instance of a settings class goes through."""
    hints = get_type_hints(type(self))
    try:
        for f in fields(self):
            check_field(f, getattr(self, f.name), hints[f.name])
        for cls in reversed(type(self).__mro__):
            cls.__dict__.get("relations", lambda self: None)(self)
    except ValueError as e:
        raise Refusal(*e.args) from None


def at_least(least: float, default, below: float = math.inf):
    """A setting in least <= value < below."""
    return field(default=default, metadata={"least": least, "below": below})


def check_field(f: Field, value, hint) -> None:
    """Raises TypeError for a value of another type, ValueError for one that is outside
    its choices or its range.

    An integer is a float, too. None, where allowed, is neither.
    """
    kinds = kinds_of(hint)
    numbers = {float, int} if float in kinds else set()
    paths = {Path} if str in kinds else set()
    if not isinstance(value, tuple(kinds | numbers | paths)) or isinstance(value, bool) and bool not in kinds:
        raise TypeError(f"{f.name} = {shown(value)}: expected {named(kinds)}")
    if value is None or is_dataclass(value):
        return
    choices = choices_of(hint)
    if choices and value not in choices:
        raise ValueError(f"{f.name} = {shown(value)}: choose one of {', '.join(choices)}")
    check_number(f, value) if isinstance(value, int | float) else check_text(f, str(value))


def check_number(f: Field, value: float) -> None:
    least, below = f.metadata.get("least", -(2**63)), f.metadata.get("below", math.inf)
    if f.metadata and not least <= value < below:                              # "not": NaN is in no range
        upper = f" and below {below}" if below < math.inf else ""
        raise ValueError(f"{f.name} = {shown(value)}: it must be a number of at least {least}{upper}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{f.name} = {value}: it must be a finite number")
    if abs(value) >= 2**63 and isinstance(value, int):
        raise ValueError(f"{f.name} = {shown(value)}: it must be a number of at most 64 bits")


def check_text(f: Field, value: str) -> None:
    """An unset "$OUT" of the shell is no path."""
    if not value.strip() and f.default != "":
        raise ValueError(f"{f.name} is empty ({f.name} = {value!r}): name one, or omit it")
    if "\0" in value:
        raise ValueError(f"{f.name} = {shown(value)}: no name has a zero byte in it")


def shown(value) -> str:
    """A value in a message: not a page of it, nor a number's five thousand digits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = "a value beyond all bounds"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def kinds_of(hint) -> set[type]:
    """The types of a field's values: `int | None` has int and NoneType."""
    if get_origin(hint) is Literal:
        return {type(option) for option in get_args(hint)}
    if get_origin(hint) in (Union, UnionType):
        return set().union(*map(kinds_of, get_args(hint)))
    return {get_origin(hint) or hint}


def named(kinds: set[type]) -> str:
    """Types in a user's words: a nested dataclass is a table of a preset."""
    names = {"a table of settings" if is_dataclass(kind) else kind.__name__ for kind in kinds - {NoneType}}
    return " or ".join(sorted(names))


def choices_of(hint) -> tuple[str, ...]:
    """The options of a Literal, also inside `Literal[...] | None`."""
    parts = (hint, *get_args(hint))
    return tuple(option for part in parts if get_origin(part) is Literal for option in get_args(part))


def cli(cls: type, argv: list[str] | None = None):
    """A `cls` from its defaults, an optional first argument PRESET.toml, and flags.

    Flags are --name value or --name=value. What is wrong raises a one-line ValueError.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    default = cls()
    if argv and argv[0].endswith(".toml"):
        default = apply(default, load_preset(argv.pop(0)))
    names = named_as_flags(default, bool)
    default, argv = take_texts(default, [as_switch(argument, names) for argument in argv])
    description = (sys.modules[cls.__module__].__doc__ or "").partition("\n")[0]   # none with python -OO
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box), wide_enough():
            return tyro.cli(cls, args=argv, default=default, description=description)
    except SystemExit as e:
        if not e.code or os.environ.get("RANK", "0") != "0":           # --help; under torchrun one speaks
            raise
        chain = list(causes(e))
        if ours := next((cause for cause in chain if isinstance(cause, Refusal)), None):
            words = [cause.arg for cause in chain if isinstance(getattr(cause, "arg", None), str)]
            flat = {"", *flat_settings(default).values()}                             # not in any flag
            tables = [name for name in (word.replace("-", "_") for word in words) if name not in flat]
            raise ValueError(": ".join([*tables, str(ours)])) from None                   # in one line
        raise ValueError(without_frame(box.getvalue()) + "; --help lists all settings") from None


@contextlib.contextmanager
def wide_enough() -> Iterator[None]:
    """In the block the terminal has at least 40 columns: in fewer tyro's help has a
    letter a line, and in one it never ends.
    """
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(max(40, shutil.get_terminal_size().columns))
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was raised in the handling of."""
    while error:
        yield error
        error = error.__context__


def named_as_flags(default, kind: type, prefix: str = "") -> set[str]:
    """The settings of a type, such as bool, as their flags name them: "model.gate"."""
    names = set()
    for name, hint in get_type_hints(type(default), include_extras=True).items():
        value = getattr(default, name)
        if is_dataclass(value):
            flat = tyro.conf.OmitArgPrefixes in getattr(hint, "__metadata__", ())
            names |= named_as_flags(value, kind, prefix if flat else f"{prefix}{name}.")
        elif kinds_of(hint) == {kind}:
            names.add(prefix + name)
    return names


def as_switch(argument: str, names: set[str]) -> str:
    """--name=True as tyro has it, --name, and --name=False as --no-name.

    That is how people who know nanoGPT write switches; other flags keep their values.
    """
    flag, _, value = argument.partition("=")
    name = flag[2:].replace("-", "_")
    if not flag.startswith("--") or name not in names or value.lower() not in ("true", "false"):
        return argument
    table, dot, last = name.rpartition(".")
    return f"--{name}" if value.lower() == "true" else f"--{table}{dot}no-{last}"


def take_texts(default, argv: list[str]) -> tuple:
    """`default` with the texts of flags that take several, and the other arguments.

    --stop A --stop B is --stop A B, where tyro has the last alone. So is --stop=A
    --stop=B, as texts are written that begin with a dash.
    """
    names, taken, others, texts = named_as_flags(default, tuple), {}, [], None
    for argument in argv:
        flag, equals, value = argument.partition("=")
        name = flag[2:].replace("-", "_")
        if flag.startswith("--") and name in names:
            texts = taken.setdefault(name, [])
            texts += [value] if equals else []
        elif texts is None or re.match("-+[a-zA-Z]|--$", argument):      # -1 and - are texts, as to tyro
            texts = None
            others.append(argument)
        else:
            texts.append(argument)
    for name, values in taken.items():
        for part in reversed(name.split(".")):
            values = {part: values}
        default = apply(default, values)
    return default, others


def without_frame(message: str) -> str:
    """tyro's complaint in one line: its title, its box and its advice removed."""
    text = message.partition("\n")[2].partition("For full helptext")[0]
    text = " ".join(re.sub("[╭╮╰╯│─├┤|]|-{4,}", " ", text).split())
    text = re.sub("Exceeds the limit.*increase the limit", "a number beyond all bounds", text)
    if text.startswith("Missing value"):
        text += " (one that begins with - is written --name=value)"
    return text if len(text) < 1000 else f"{text[:500]} ... {text[-400:]}"


def load_preset(path: str) -> dict:
    try:
        text = read_text(path, "preset")
    except FileNotFoundError:
        presets = ", ".join(sorted(str(p) for p in Path(__file__).parent.glob("*.toml")))
        raise ValueError(f"no preset {path}: there are {presets}") from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as e:              # also a number of 5,000 digits
        raise ValueError(f"{path} is not TOML: {str(e).partition('; use sys.')[0]}") from None


PIECE = 2**16  # bytes


def read_text(path: str | Path, what: str, most: int = 2**26) -> str:
    """What a text file holds, up to `most` bytes, without a byte order mark.

    Raises ValueError for more, for a pipe that has a name, which may never be written
    to, and for what is no UTF-8; OSError for what cannot be read.
    """
    if stat.S_ISFIFO(os.stat(path).st_mode) and not str(path).startswith("/dev/"):      # <(...) is /dev/fd/63
        raise ValueError(f"{what} {path} is a pipe: give a file")
    with open(path, "rb") as file:
        pieces = iter(partial(file.read, PIECE), b"")          # else there is a buffer of `most` bytes
        data = b"".join(islice(pieces, most // PIECE + 1))
    if len(data) > most:
        raise ValueError(f"{what} {path} has more than {most:,} bytes: give a shorter one")
    try:
        return io.StringIO(data.decode("utf-8-sig"), newline=None).read()          # "\n" ends all lines
    except UnicodeDecodeError as e:
        raise ValueError(f"{what} {path} is not UTF-8 (byte {e.start}): convert it, for example with "
                         "iconv") from None


def apply(default, values: dict, where: str = ""):
    """The dataclass `default` with `values` in it.

    What has no prefix as a flag needs no table either: out = "..." for run.out. Raises
    ValueError for a key that it does not have, or a value of another type.
    """
    hints, homes = get_type_hints(type(default)), flat_settings(default)
    changed, at_home = {}, {}
    for key, value in values.items():
        if key in homes:
            at_home.setdefault(homes[key], {})[key] = value
            continue
        if key not in hints:
            raise ValueError(f"unknown setting {where}{key}: {nearest(key, hints, homes)}")
        current = changed.get(key, getattr(default, key))
        if is_dataclass(current) and isinstance(value, dict):
            changed[key] = apply(current, value, f"{where}{key}.")
        else:
            changed[key] = as_type(value, hints[key], f"{where}{key}")
    for home, together in at_home.items():
        if twice := together.keys() & values.get(home, {}).keys():
            raise ValueError(f"{where}{min(twice)} is also in the table {where}{home}: set it once")
        changed[home] = apply(changed.get(home, getattr(default, home)), together, where)
    return with_values(default, changed, where)


def with_values(default, changed: dict, where: str):
    """dataclasses.replace that checks each value alone: flags may still make the whole
    right.
    """
    result, hints = copy.copy(default), get_type_hints(type(default))
    for f in fields(result):
        if f.name in changed:
            try:
                check_field(f, changed[f.name], hints[f.name])
            except ValueError as e:
                raise ValueError(f"{where[:-1]}: {e}" if where else str(e)) from None
            object.__setattr__(result, f.name, changed[f.name])
    return result


def flat_settings(default) -> dict[str, str]:
    """Each setting that flags have without its prefix, and the field that holds it."""
    homes = {}
    for name, hint in get_type_hints(type(default), include_extras=True).items():
        if tyro.conf.OmitArgPrefixes in getattr(hint, "__metadata__", ()):
            homes |= {f.name: name for f in fields(getattr(default, name))}
    return {key: home for key, home in homes.items() if not hasattr(default, key)}


def nearest(key: str, names, others=()) -> str:
    """What else may be meant: also one of the `others`, which are too many to list."""
    close = difflib.get_close_matches(key, [*names, *others], n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"


def as_type(value, hint, name: str):
    """A preset's value as the field's type; an integer is a float if one is wanted."""
    kinds = kinds_of(hint)
    if float in kinds and int not in kinds and type(value) is int and abs(value) < 2**63:
        return float(value)
    if tuple in kinds and type(value) is list:
        return tuple(value)
    if type(value) not in kinds:
        raise ValueError(f"{name} = {shown(value)}: expected {named(kinds)}")
    return value
