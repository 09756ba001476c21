"""How test_house.py reads the repository: its files, its documents, its commands."""

import ast
import contextlib
import functools
import importlib
import io
import re
import shlex
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import config
from common import REPO

FLOORS = ["config", "data kernels", "wkv", "model", "lib", "train sample", "distill", "tools"]
CHAPTERS = ["wkv.py", "model.py", "train.py", "distill.py", "sample.py"]      # in the order to read them
FOLDERS = ["data", "config", "kernels", "lib", "tools"]
TOOLS = ["demo", "evaluate", "passkey", "results", "plan", "rank_layers", "hybrids", "controls", "curve",
         "chat", "batch", "side_by_side", "look", "recall", "harness", "convert", "bench",
         "bench_memory", "bench_kernels"]
SCRIPTS = ["train", "distill", "sample", "data.prepare", *(f"tools.{name}" for name in TOOLS)]

PRODUCT = sorted(path for folder in (".", *FOLDERS) for path in (REPO / folder).glob("*.py"))
SOURCES = [*PRODUCT, REPO / "docs" / "figures.py", *sorted((REPO / "tests").rglob("*.py"))]


def short(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def read(path: str | Path) -> str:
    return (REPO / path).read_text(encoding="utf-8")


def count_lines(path: str | Path) -> int:
    return len(read(path).splitlines())


# ------------------------------------------------------------------------------------------
# Code

def module_name(path: Path) -> str:
    """lib/runs.py -> lib.runs, lib/__init__.py -> lib"""
    return short(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(source: str, modules: set[str]) -> set[str]:
    """Those of our `modules` that a source imports, wherever the import stands."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = node.module or ""
            submodules = {f"{package}.{alias.name}" for alias in node.names} & modules
            names |= submodules or {package}
    return names & modules


def prose_lines(source: str) -> set[int]:
    """Numbers of the lines that hold a docstring or nothing but a comment."""
    numbers = set()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            numbers |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            numbers.add(token.start[0])
    return numbers


RULE = "# " + "-" * 90


def too_wide(source: str, code: int = 110, prose: int = 88) -> list[str]:
    """What is wider than allowed, as `line number: its width`.

    A section's rule may be as wide as it is.
    """
    inside_prose, wide = prose_lines(source), []
    for i, line in enumerate(source.splitlines(), 1):
        limit = prose if i in inside_prose else code
        if len(line) > limit and line.strip() != RULE:
            wide.append(f"{i}: {len(line)} columns, of {limit}")
    return wide


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Every function and method with its number of lines, from `def` to its end."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.end_lineno - node.lineno + 1


def silenced_lambdas(source: str) -> list[int]:
    """Lines with a lambda and a lint code that excuses it."""
    lines = source.splitlines()
    lambdas = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Lambda)]
    return sorted({node.lineno for node in lambdas
                   if any("noqa" in line for line in lines[node.lineno - 1 : node.end_lineno])})


def defined_names(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What these statements define: functions, classes, names with a value or type."""
    names = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names[node.name] = node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return names


def defines(path: str, name: str) -> bool:
    """Whether the file has this name on its top level, or Class.name in the class."""
    if not path.endswith(".py") or not (REPO / path).is_file():
        return False
    body = ast.parse(read(path)).body
    for part in name.split("."):
        node = defined_names(body).get(part)
        if node is None:
            return False
        body = getattr(node, "body", [])
    return True


# ------------------------------------------------------------------------------------------
# Documents

def blocks(document: str, *languages: str) -> list[str]:
    """The fenced code blocks of a document in one of these languages."""
    fences = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", read(document), re.M | re.S)
    return [body for language, body in fences if language in languages]


def commands(document: str) -> list[str]:
    """Each command of a document's shell blocks.

    Where a block has lines that begin with $, the others are output.
    """
    all_lines = []
    for block in blocks(document, "sh", "bash", "shell", "console"):
        lines = block.replace("\\\n", " ").splitlines()
        prompts = [line[2:] for line in lines if line.startswith("$ ")]
        all_lines += prompts or lines
    return [line for line in all_lines if line.strip() and not line.lstrip().startswith("#")]


def section(document: str, title: str) -> str:
    """A document's text from the heading `title` to the next one of the same level."""
    match = re.search(rf"^(#+) {re.escape(title)}$", read(document), re.M)
    assert match, f"{document} has no section {title!r}"
    text = re.sub(r"^```.*?^```", "", read(document)[match.end():], flags=re.M | re.S)
    return re.split(rf"^{match[1]} ", text, maxsplit=1, flags=re.M)[0]


def table_rows(text: str) -> list[list[str]]:
    """The cells of every row of the text's tables, without their headings."""
    rows = []
    for line in text.splitlines():
        if re.fullmatch(r"\|[|:\- ]+", line):              # a rule: what stood above it is a heading
            rows.pop()
        elif line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("| ").split("|")])
    return rows


def anchor(title: str) -> str:
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


# ------------------------------------------------------------------------------------------
# Commands

class Parsed(Exception):
    """A command's flags were all understood."""


def check_line(line: str) -> None:
    """Raise unless every command of a line of shell is one that a reader can run."""
    words = shlex.split(line, comments=True)
    quoted = [word if word in ("&&", ";", "|") else shlex.quote(word) for word in words]
    for part in re.split(r" (?:&&|;|\|) ", " ".join(quoted)):
        check_command(shlex.split(part))


def check_command(words: list[str]) -> None:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program = words[0].split("/")[-1]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", read("Makefile"), re.M)
        asked = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
        assert set(asked) <= set(targets), f"no such target: {words}"
    elif program == "torchrun":
        launcher = ("--nproc", "--nnodes", "--node_rank", "--master_", "--standalone")
        rest = [word for word in words[1:] if not word.startswith(launcher)]
        check_command(["python", *rest])
    elif re.fullmatch(r"python[\d.]*", program):
        check_python(words[1:])
    else:
        assert program in ("git", "cd", "pip", ".", "source", "cat", "ls"), f"unknown program: {words}"


def check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "pytest"]:
        return
    if words[0] == "-m":
        module, args = words[1], words[2:]
    else:
        assert "/" not in words[0], f"a tool is run as python -m tools.NAME: {words}"
        module, args = words[0].removesuffix(".py"), words[1:]
    if module == "wkv":
        assert not args, f"wkv.py takes no flags: {args}"
    elif "--help" not in args:
        parse(module, args)


def parse(module: str, args: list[str]) -> None:
    """Let the script read its flags, and stop it before it does anything."""
    assert module in SCRIPTS, f"no such script: {module}"

    def stop(*args, **kwargs):
        raise Parsed

    script = importlib.import_module(module)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as stderr:
        patch.setattr(script, "cli", lambda cls, argv=None: stop(config.cli(cls, argv)))
        patch.chdir(REPO)
        with pytest.raises(Parsed):
            try:
                script.main(args)
            except (SystemExit, ValueError) as e:
                pytest.fail(f"{module} {' '.join(args)}: {e} {stderr.getvalue()}")


@functools.cache
def help_text(module: str, *words: str) -> str:
    """What `python -m module WORDS --help` prints, 80 columns wide."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as stdout:
        patch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as end:
            importlib.import_module(module).main([*words, "--help"])
    assert end.value.code in (0, None), f"{module} --help ends with {end.value.code}"
    return stdout.getvalue()


def flags(text: str) -> list[str]:
    """The settings in a help text, with underscores; --name and --no-name are one."""
    return [flag.replace("-", "_") for flag in re.findall(r"^(?:│ | {2})--([a-z][\w.-]*)", text, re.M)]


def all_flags() -> set[str]:
    """Every flag of every script, with underscores; of a switch also --no_name."""
    texts = [help_text(module) for module in SCRIPTS]
    texts += [help_text("tools.convert", kind) for kind in ("import", "export")]
    names = {name for text in texts for name in flags(text)}
    negations = re.findall(r"--([\w.-]*no-[\w-]+)", "\n".join(texts))
    return {f"--{name}" for name in names | {negation.replace("-", "_") for negation in negations}}
