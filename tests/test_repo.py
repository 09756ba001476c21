"""The house rules: who imports whom, how long files are, and that everything the documents say can be run."""

import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys

import pytest

import config
import data.prepare
from common import REPO

SCRIPTS = ("train", "distill", "sample", "evaluate", "recall", "convert", "bench")
DOCUMENTS = ["README.md", "docs/tutorial.md", "docs/chunking.md"]
SOURCES = sorted(p for p in REPO.glob("*.py")) + sorted(p for folder in ("data", "config", "tests") for p in (REPO / folder).glob("*.py"))


def blocks(document: str, *languages: str) -> list[str]:
    """The fenced code blocks of a document in one of these languages."""
    text = (REPO / document).read_text(encoding="utf-8")
    return [body for language, body in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.M | re.S) if language in languages]


# ---------------------------------------------------------------------------------------------------------------------
# Code

MAY_IMPORT = {
    "config": set(),
    "data": {"data"},
    "wkv_triton": set(),
    "wkv": {"wkv_triton"},
    "model": {"wkv"},
    "evaluate": {"config", "data", "model", "state", "wkv"},
    "bptt": {"data", "model"},
    "plan": {"model", "wkv"},
    "train": {"bptt", "config", "data", "model", "wkv", "evaluate", "plan"},
    "distill": {"bptt", "config", "data", "model", "wkv", "evaluate", "plan", "train"},
    "recall": {"config", "model", "train", "distill"},
    "decode": {"model"},
    "state": {"model"},
    **dict.fromkeys(("sample", "convert", "bench"), {"bptt", "config", "data", "model", "wkv", "decode", "state", "evaluate", "train", "distill"}),
}


def test_imports_form_a_dag_and_leaves_are_leaves():
    for path in SOURCES:
        if path.parent.name == "tests":
            continue
        name = path.stem if path.parent == REPO else path.parent.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            for module in (m.split(".")[0] for m in modules):
                assert module not in MAY_IMPORT or module in MAY_IMPORT[name], f"{path.relative_to(REPO)} imports {module}"
        assert name in MAY_IMPORT, f"{path.name} is in no one's plan: add it to MAY_IMPORT and to the README's table"


BUDGETS = {  # lines; about the file's present length. Whoever needs more raises the number in the same commit
    "wkv.py": 225,
    "wkv_triton.py": 400,    # out of wkv.py: Triton is not everywhere, and the definition is read without it
    "model.py": 610,         # beyond 400: official initial values and one-line refusals are both long lists; rope scaling; patterns of hybrids; trees of states
    "bptt.py": 105,
    "train.py": 585,         # beyond 330: stop conditions, exact resume and one-line errors for bad disks; a carried state
    "convert.py": 540,       # beyond 300: five formats with a line for each setting that is refused, and a file format written by hand
    "plan.py": 160,           # one term a line
    "recall.py": 165,
    "distill.py": 780,       # beyond 330: three stages with RWKVInside's options, each a switch, the controls, a look at the teacher; losses of pieces; ranks
    "evaluate.py": 450,      # beyond 180: the table over seeds; passkey and length, report and plots
    "decode.py": 260,        # taken out of sample.py: 36 operations a layer instead of 71; matrices in 16 bits; a CUDA graph
    "state.py": 250,         # of it 100 lines are the file format, which refuses what is foreign or damaged
    "sample.py": 390,        # beyond 150: four samplers, penalties, bytes that are not yet characters; chats that are kept; prompts of any lengths
    "bench.py": 590,         # beyond 180: five benchmarks, each beside its rivals, one for a GPU seen once a session, one with a process per row
    "data/loader.py": 230,   # the package beyond 300: three kinds of data, and line numbers in every complaint; streams
    "data/prepare.py": 260,
    "data/sources.py": 270,
    "data/tokenizer.py": 120,
    "data/bpe.py": 320,      # two formats of strangers' files, and a line for each thing that would give other ids
    "data/chat.py": 110,
    "config/__init__.py": 90,
}


def test_files_keep_to_their_budgets():
    for path in SOURCES:
        name = str(path.relative_to(REPO))
        if not name.startswith("tests/") and path.name != "__init__.py" or name in BUDGETS:
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= BUDGETS[name], f"{name} has {lines} lines, its budget is {BUDGETS[name]}: make it clearer, or change the budget and say why"


def test_no_line_of_code_is_longer_than_160_characters():
    long = [f"{p.relative_to(REPO)}:{i}" for p in SOURCES for i, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 160]
    assert not long, long


def test_no_file_of_the_repository_mentions_the_machine_it_was_written_on():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, capture_output=True, text=True)
    files = [REPO / name for name in listed.stdout.splitlines()] if listed.returncode == 0 else [*SOURCES, *REPO.glob("*.*"), *REPO.glob("docs/*")]
    home = re.compile("|".join(["/" + "work/", r"\.\./" + "shared", "/ro" + "ot/", r"/home/\w", r"/Users/\w"]))
    for path in files:
        if path.is_file() and path.suffix not in (".png", ".bin"):
            for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                assert not home.search(line), f"{path.relative_to(REPO)}:{i}: {line.strip()[:120]}"


# ---------------------------------------------------------------------------------------------------------------------
# Documents

class Parsed(Exception):
    """A command's flags were all understood."""


def check_command(words: list[str]) -> None:
    """Raise unless this shell command is one that a reader of the README can run."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program = words[0].split("/")[-1]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.M)
        assert all(w in targets for w in words[1:] if not w.startswith("-") and "=" not in w), f"no such target: {words}"
    elif program == "torchrun":
        rest = [w for w in words[1:] if not w.startswith("--nproc") and w not in ("--standalone",)]
        check_command(["python", *rest])
    elif re.fullmatch(r"python[\d.]*", program):
        if words[1:3] == ["-m", "pytest"]:
            return
        module, args = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
        if "--help" not in args:
            parse(module, args)
    else:
        assert program in ("git", "cd", "pip", ".", "source", "cat", "ls"), f"unknown program: {words}"


def parse(module: str, args: list[str]) -> None:
    """Let the script read its flags, and stop it before it does anything."""
    assert module in SCRIPTS or module == "data.prepare", f"no such script: {module}"

    def stop(*args, **kwargs):
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        if module == "data.prepare":
            patch.setattr(data.prepare, "prepare", stop)
            script = data.prepare
        else:
            script = __import__(module)
            patch.setattr(script, "cli", lambda cls, argv=None: stop(config.cli(cls, argv)))
        patch.chdir(REPO)
        with pytest.raises(Parsed), contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                script.main(args)
            except (SystemExit, ValueError) as e:
                pytest.fail(f"{module} {' '.join(args)}: {e} {said.getvalue()}")


def commands(document: str) -> list[str]:
    """Each command of a document's shell blocks. Where a block has lines that begin with $, the others are output."""
    found = []
    for block in blocks(document, "sh", "bash", "shell", "console"):
        lines = block.replace("\\\n", " ").splitlines()
        prompts = [line[2:] for line in lines if line.startswith("$ ")]
        found += [line for line in prompts or lines if line.strip() and not line.lstrip().startswith("#")]
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_of_the_documents_parses(document):
    found = commands(document)
    assert found or document != "README.md"
    for line in found:
        for part in re.split(r"&&|;|\|", " ".join(shlex.quote(w) if w not in ("&&", ";", "|") else w for w in shlex.split(line, comments=True))):
            check_command(shlex.split(part))


def test_the_commands_that_should_not_parse_do_not():
    for line in ("make nothing", "python train.py --nonsense 3", "python train.py config/none.toml", "python nothing.py",
                 "torchrun --nproc_per_node=2 distill.py --lr 3", "python -m data.prepare a b c"):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check_command(line.split())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_python_block_of_the_documents_runs(document, tmp_path, monkeypatch):
    """In order, in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    found, namespace = blocks(document, "python", "py"), {"__name__": "__main__"}
    assert found, f"{document} has no Python"
    for i, block in enumerate(found, 1):
        exec(compile(block, f"{document}, block {i}", "exec"), namespace)


@pytest.mark.parametrize("document", sorted(str(p.relative_to(REPO)) for p in [REPO / "README.md", *REPO.glob("docs/**/*.md")]))
def test_every_relative_link_exists(document):
    path = REPO / document
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            assert there.exists(), f"{document} links to {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.M)
                assert anchor in {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}, f"{document} links to {target}"


def test_the_readmes_table_of_files_has_every_file_and_its_length():
    """Each row: | [`name`](name) or `name` | ... | lines |. The number may be ten lines off."""
    rows = dict(re.findall(r"^\| \[?`([\w/.]+\.py)`.*\| *(\d+) *\|$", (REPO / "README.md").read_text(encoding="utf-8"), re.M))
    for path in SOURCES:
        name = str(path.relative_to(REPO))
        if not name.startswith("tests/") and name != "data/__init__.py":
            assert name in rows, f"{name} is not in the README's table"
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert abs(int(rows[name]) - lines) <= 10, f"the README says that {name} has {rows[name]} lines: it has {lines}"
    assert all((REPO / name).exists() for name in rows)


def test_the_readme_has_no_blank_left_to_fill():
    """A line of capitals and underscores alone is a place-holder."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert not re.findall(r"\b[A-Z]+_[A-Z_]+\b(?!=)", re.sub(r"`[^`]*`", "", text)) and not re.findall(r"^[A-Z]{4,}$", text, re.M)


def test_every_dependency_is_pinned_and_in_the_readmes_table():
    import tomllib
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", d)[0] for group in (project["dependencies"], *project["optional-dependencies"].values()) for d in group}
    pins = {line.split("==")[0].lower().replace("_", "-") for line in (REPO / "constraints.txt").read_text().splitlines() if "==" in line}
    table = [line for line in (REPO / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    for name in names:
        assert name.lower() in pins, f"constraints.txt does not pin {name}"
        assert any(name in line for line in table), f"the README does not say what {name} is for"


def test_every_script_can_be_imported_and_helps():
    """main(argv) of each script takes --help, exits with 0, and says what the script is."""
    for name in SCRIPTS:
        if not (REPO / f"{name}.py").exists():
            continue
        module = __import__(name)
        with pytest.raises(SystemExit) as end, contextlib.redirect_stdout(io.StringIO()) as said:
            module.main(["--help"])
        assert end.value.code == 0 and module.__doc__.split("\n")[0].split()[0] in said.getvalue()


def test_the_tests_are_called_by_ci_through_make_alone():
    lines = [line for line in (REPO / ".ci" / "run").read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert [line for line in lines if "make" in line] == ["make test"] and os.access(REPO / ".ci" / "run", os.X_OK)
    assert "pytest" in (REPO / "Makefile").read_text() and sys.version_info >= (3, 11)
