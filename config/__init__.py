"""Settings: defaults < preset file < flags, and nothing else.

    python train.py config/shakespeare-cpu.toml --batch_size 8 --compile=False

A script's settings are a frozen dataclass. A preset is a TOML file with some of its fields, nested dataclasses as tables.
`cli` puts the three together and refuses what it does not know; `run` ends a script with one line instead of a traceback.
"""

import contextlib
import difflib
import io
import re
import signal
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import tyro


def cli(cls: type, argv: list[str] | None = None):
    """A `cls` from its defaults, an optional first argument PRESET.toml, and flags (--name value, --name=value)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    default = cls()
    if argv and argv[0].endswith(".toml"):
        default = apply(default, load_preset(argv.pop(0)))
    # tyro writes switches as --name and --no-name; people who know nanoGPT write --name=True
    for end, prefix in (("=True", "--"), ("=False", "--no-")):
        argv = [prefix + a[2:].removesuffix(end) if a.startswith("--") and a.endswith(end) else a for a in argv]
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(cls, args=argv, default=default, description=sys.modules[cls.__module__].__doc__.split("\n")[0])
    except SystemExit as e:
        if not e.code:  # --help
            raise
        said = re.sub("[╭╮╰╯│─├┤|]|-{4,}", " ", box.getvalue().partition("\n")[2]).partition("For full helptext")[0]  # without frame and title
        raise ValueError(" ".join(said.split()) + "; --help lists all settings") from None


def load_preset(path: str) -> dict:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = ", ".join(sorted(str(p) for p in Path(__file__).parent.glob("*.toml")))
        raise ValueError(f"no preset {path}: there are {near}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not TOML: {e}") from None


def apply(default, values: dict, where: str = ""):
    """The dataclass `default` with `values` in it. Raises ValueError for a key it does not have, or another type."""
    types = {f.name: f.type for f in fields(default)}
    changed = {}
    for key, value in values.items():
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1)
            raise ValueError(f"unknown setting {where}{key}" + (f": did you mean {near[0]}?" if near else f": there are {', '.join(types)}"))
        old = getattr(default, key)
        if is_dataclass(old) and isinstance(value, dict):
            changed[key] = apply(old, value, f"{where}{key}.")
        elif "float" in str(types[key]) and type(value) is int:
            changed[key] = float(value)
        elif type(value).__name__ not in str(types[key]):
            raise ValueError(f"{where}{key} = {value!r}: expected {getattr(types[key], '__name__', types[key])}")
        else:
            changed[key] = value
    return replace(default, **changed)


def run(main: Callable[[], None]) -> None:
    """Run a script's main; what a user or the disk got wrong ends in one line on stderr and exit status 1."""
    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(str(e).split())}")
    except KeyboardInterrupt as e:
        if not e.args:  # train.fit has told already what it saved
            print("interrupted; what was saved stays, and --resume goes on from there where the script has it", file=sys.stderr)
        sys.exit(130)
