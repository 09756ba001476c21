"""The house's rules: floors, widths, and that what the documents say can be run."""

import ast
import contextlib
import graphlib
import importlib
import io
import os
import re
import subprocess
import sys
import tomllib

import pytest

from common import REPO
from common_house import (CHAPTERS, FLOORS, FOLDERS, PRODUCT, RULE, SCRIPTS, SOURCES, all_flags, anchor,
                          blocks, check_line, commands, count_lines, defined_names, defines, flags, functions,
                          help_text, imported, module_name, read, section, short, silenced_lambdas,
                          table_rows, too_wide)

WITH_COMMANDS = ["README.md", "docs/manual.md", "docs/results.md"]
DOCUMENTS = [*WITH_COMMANDS, "docs/tutorial.md", "docs/chunking.md"]
WITH_PYTHON = ["README.md", "docs/manual.md", "docs/tutorial.md", "docs/chunking.md"]
ELSEWHERE = "For people who come from elsewhere"


# ------------------------------------------------------------------------------------------
# Floors

def test_imports_go_downstairs_and_never_in_a_circle():
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms.split()}
    modules = {module_name(path) for path in PRODUCT}
    graph = {module_name(path): imported(read(path), modules) for path in PRODUCT}
    for module, others in graph.items():
        room = module.split(".")[0]
        assert room in floor, f"{module} is on no floor: put it into one of the folders"
        for other in others:
            below = other.split(".")[0]
            downstairs = below == room or floor[below] < floor[room]
            assert downstairs, f"{module} imports {other}, which is not below it"
    graphlib.TopologicalSorter(graph).prepare()                # raises CycleError, which names the circle


def test_the_reader_of_imports_sees_every_spelling():
    modules = {"lib", "lib.runs", "wkv", "data.loader"}
    source = "import wkv\nfrom lib import runs\ndef f():\n    from data.loader import Loader\nimport torch"
    assert imported(source, modules) == {"wkv", "lib.runs", "data.loader"}
    assert imported("from lib import read_me", modules) == {"lib"}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_states_its_law(folder):
    text = ast.get_docstring(ast.parse(read(f"{folder}/__init__.py")))
    assert text and "The room's law" in text, f"{folder}/__init__.py does not say what belongs into it"


def test_every_tool_with_a_main_is_a_script_of_this_list():
    tools = [path for path in PRODUCT if path.parent.name == "tools"]
    with_main = {module_name(path) for path in tools if "main" in defined_names(ast.parse(read(path)).body)}
    assert with_main == {name for name in SCRIPTS if name.startswith("tools.")}


# ------------------------------------------------------------------------------------------
# Sizes

BUDGETS = {"wkv.py": 160, "model.py": 470, "train.py": 270, "distill.py": 430, "sample.py": 170}
TOGETHER = 1500


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_five_chapters_keep_to_their_budgets(chapter):
    lines = count_lines(chapter)
    message = (f"{chapter} has {lines} lines, its budget is {BUDGETS[chapter]}: make it clearer, or raise "
               "the number in the same commit and say why")
    assert lines <= BUDGETS[chapter], message


def test_the_five_chapters_can_be_read_in_an_evening():
    assert sum(BUDGETS.values()) <= TOGETHER
    assert sum(map(count_lines, CHAPTERS)) <= TOGETHER


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_function_of_the_chapters_is_longer_than_50_lines(chapter):
    long = {name: lines for name, lines in functions(read(chapter)) if lines > 50}
    assert not long, f"{chapter}: {long}"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_test_file_of_a_chapter_has_at_most_250_lines(chapter):
    assert count_lines(f"tests/test_{chapter}") <= 250, "bad inputs and odd sizes belong into tests/edge"


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_code_has_at_most_110_columns_and_prose_88(path):
    wide = too_wide(read(path))
    assert not wide, f"{short(path)}, line " + ", line ".join(wide)


def test_the_measure_of_widths_tells_prose_from_code():
    long = "x" * 88
    docstring = f"def f():\n    '''{long}\n    '''"
    prose = [f"# {long}", f'"""{long}"""', docstring, f"class A:\n    # {long}\n    a = 1"]
    string = f"a = '''\n{long}x\n'''"
    code = [f"a = '{long}'", f"a = 1  # {long}", string, f"def f():\n    a = '{long}'", RULE]
    assert all(len(too_wide(text)) == 1 for text in prose)
    assert not any(map(too_wide, code))
    assert too_wide(f"a = '{long * 2}'") == ["1: 182 columns, of 110"] and too_wide(RULE + "-")


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_section_rules_are_all_alike(path):
    rules = [line.strip() for line in read(path).splitlines() if re.fullmatch(r"\s*# ?[-=#]{8,}", line)]
    assert set(rules) <= {RULE}, f"{short(path)}: a rule is # and 90 dashes"


@pytest.mark.parametrize("path", PRODUCT, ids=short)
def test_no_lambda_needs_an_excuse(path):
    lines = silenced_lambdas(read(path))
    assert not lines, f"{short(path)}, lines {lines}: write a def"


def test_an_excused_lambda_is_seen():
    assert silenced_lambdas("f = lambda: 1  # noqa: E731\ng = sorted([], key=lambda x: x)\n") == [1]
    assert silenced_lambdas("f = (lambda:\n     1)  # noqa\nimport os  # noqa\n") == [1]


def test_distill_has_at_most_112_flags():
    assert len(flags(help_text("distill"))) <= 112


def test_no_file_of_the_repository_mentions_the_machine_it_was_written_on():
    list_files = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(list_files, cwd=REPO, capture_output=True, text=True)
    files = [REPO / name for name in listed.stdout.splitlines()]
    if listed.returncode:                                      # not a clone
        files = [*SOURCES, *REPO.glob("*.*"), *REPO.glob("docs/*")]
    places = ["/" + "work/", r"\.\./" + "shared", r"\bsha" + "red/", "/ro" + "ot/", r"/home/\w", r"/Users/\w"]
    places += [r"/\.lib" + "rary", "index" + "-url"]
    home = re.compile("|".join(places))
    for path in files:
        if path.is_file() and path.suffix not in (".png", ".bin", ".pt", ".safetensors", ".state"):
            for i, line in enumerate(read(path).splitlines(), 1):
                assert not home.search(line), f"{short(path)}:{i}: {line.strip()[:120]}"


# ------------------------------------------------------------------------------------------
# Commands

@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_of_the_documents_parses(document):
    lines = commands(document)
    assert lines or document not in WITH_COMMANDS
    for line in lines:
        check_line(line)


PYTHON = ".venv/bin/python "
WRONG = ["make nothing", "python train.py --nonsense 3", "python train.py config/none.toml",
         "python nothing.py", "torchrun --nproc_per_node=2 distill.py --lr 3", "python -m data.prepare a b c",
         "python tools/plan.py", "python wkv.py --fast", "python -m tools.nothing", "rm -r out",
         "git status && make nothing"]


@pytest.mark.parametrize("line", WRONG)
def test_the_commands_that_should_not_parse_do_not(line):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_line(line)


@pytest.mark.parametrize("target", re.findall(r"^([\w-]+):", read("Makefile"), re.M))
def test_the_commands_of_every_target_parse(target):
    make = ["make", "-n", "-B", target]
    recipe = subprocess.run(make, cwd=REPO, capture_output=True, text=True, check=True).stdout
    lines = recipe.replace("\\\n", "").replace("$seed", "0").splitlines()
    scripts = [line[line.index(PYTHON):].partition(" || ")[0] for line in lines if PYTHON in line]
    assert scripts
    for line in scripts:
        if "$" not in line:
            check_line(line)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_can_be_imported_and_helps(name):
    """main(argv) takes --help, exits with 0, and says what the script is."""
    assert importlib.import_module(name).__doc__.split("\n")[0].split()[0] in help_text(name)


@pytest.mark.parametrize("document", WITH_PYTHON)
def test_every_python_block_of_the_documents_runs(document, tmp_path, monkeypatch):
    """In order, in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    python, namespace = blocks(document, "python", "py"), {"__name__": "__main__"}
    assert python, f"{document} has no Python"
    for i, block in enumerate(python, 1):
        exec(compile(block, f"{document}, block {i}", "exec"), namespace)


# ------------------------------------------------------------------------------------------
# Documents

MARKDOWN = sorted(short(path) for path in [REPO / "README.md", *REPO.glob("docs/**/*.md")])


@pytest.mark.parametrize("document", MARKDOWN)
def test_every_relative_link_exists(document):
    path = REPO / document
    text = re.sub(r"^```.*?^```", "", read(path), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, heading = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{document} links to {link}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", read(target), re.M)
            assert heading in map(anchor, titles), f"{document} links to {link}"


def test_the_lines_that_chunking_md_quotes_are_those_of_the_code():
    def bare(text):
        return {" ".join(line.split("  #")[0].split()) for line in text.splitlines()}

    quoted = set().union(*map(bare, blocks("docs/chunking.md", "text"))) - {"..."}
    assert len(quoted) > 20
    assert not quoted - bare(read("kernels/wkv_torch.py"))


def test_the_readme_has_150_to_180_lines():
    assert 150 <= count_lines("README.md") <= 180


def test_the_readme_lists_the_five_chapters_in_order_with_their_lengths():
    """Each row: | [`name`](name) | ... | lines |. The number may be five lines off."""
    rows = re.findall(r"^\| \[`(\w+\.py)`\]\(\1\).*\| *(\d+) *\|$", read("README.md"), re.M)
    assert [name for name, _ in rows] == CHAPTERS
    for name, number in rows:
        lines = count_lines(name)
        assert abs(int(number) - lines) <= 5, f"the README gives {name} {number} lines: it has {lines}"


def test_the_readme_has_a_line_for_every_other_folder():
    text = section("README.md", "The rest of the house")
    for folder in [*FOLDERS, "docs", "tests"]:
        assert re.search(rf"`{folder}/`", text), f"the README does not say what is in {folder}/"


@pytest.mark.parametrize("document", WITH_COMMANDS)
def test_the_documents_have_no_blank_left_to_fill(document):
    """A line of capitals and underscores alone is a placeholder."""
    text = re.sub(r"`[^`]*`", "", read(document))
    assert not re.findall(r"\b[A-Z]+_[A-Z_]+\b(?!=)", text) and not re.findall(r"^[A-Z]{4,}$", text, re.M)
    assert not re.search(r"\bTODO\b|\bTBD\b|\?\?\?", text)


def test_the_manual_begins_with_links_to_all_its_sections():
    titles = re.findall(r"^## (.*)$", read("docs/manual.md"), re.M)
    contents = read("docs/manual.md").partition("\n## ")[0]
    assert re.findall(r"\]\(#([\w-]+)\)", contents) == [anchor(title) for title in titles]


@pytest.mark.parametrize("module", SCRIPTS)
def test_the_manual_names_every_setting(module):
    """By the last part of its name: `--align.max_steps` is explained at `max_steps`."""
    manual = set(re.findall(r"[a-z]\w*", read("docs/manual.md")))
    missing = {name.split(".")[-1] for name in flags(help_text(module))} - manual
    assert not missing, f"docs/manual.md does not mention {module}'s {', '.join(sorted(missing))}"


def test_what_the_manual_offers_to_people_from_elsewhere_exists():
    """Right-hand sides are code: `file.py:Name`, a file, `--flag`, or a command."""
    rows, known = table_rows(section("docs/manual.md", ELSEWHERE)), all_flags()
    assert len(rows) > 40
    for foreign, *rest in rows:
        spans = re.findall(r"`([^`]+)`", rest[0])
        assert foreign and spans, f"{foreign}: nothing of ours beside it"
        for span in spans:
            check_offer(span, known)


def check_offer(span: str, known_flags: set[str]) -> None:
    file, colon, name = span.partition(":")
    if span.startswith("--"):
        flag = "--" + span.split()[0][2:].replace("-", "_")
        assert flag in known_flags, f"no such flag: {span}"
    elif " " in span:
        check_line(span)
    elif colon:
        assert defines(file, name), f"there is no {name} in {file}"
    else:
        assert (REPO / span).exists(), f"there is no {span}"


def test_what_does_not_exist_cannot_be_offered():
    known = {"--mixer", "--no_gate", "--match.max_steps"}
    for span in ("wkv.py:wkv7", "model.py:ModelConfig.rank", "model.py:ModelConfig.n_layer",
                 "wkv.py:BACKENDS", "config/rwkv7-3b.toml", "--mixer 0,2", "--no-gate",
                 "--match.max_steps", "make test"):
        check_offer(span, known)
    for span in ("wkv.py:wkv8", "model.py:ModelConfig.range", "nothing.py:f", "wkv.py:wkv7.f",
                 "config/none.toml", "--mixers", "make nothing"):
        with pytest.raises(AssertionError):
            check_offer(span, known)


def test_every_dependency_is_pinned_and_in_the_readmes_table():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    groups = (project["dependencies"], *project["optional-dependencies"].values())
    names = {re.match(r"[\w-]+", requirement)[0] for group in groups for requirement in group}
    pinned = [line.split("==")[0] for line in read("constraints.txt").splitlines() if "==" in line]
    pins = {name.lower().replace("_", "-") for name in pinned}
    table = table_rows(section("README.md", "Dependencies"))
    for name in names:
        assert name.lower() in pins, f"constraints.txt does not pin {name}"
        assert any(name in row[0] for row in table), f"the README does not say what {name} is for"


def test_the_tests_are_called_by_ci_through_make_alone():
    lines = [line for line in read(".ci/run").splitlines() if line.strip() and not line.startswith("#")]
    assert [line for line in lines if "make" in line] == ["make test"]
    assert os.access(REPO / ".ci" / "run", os.X_OK)
    assert "pytest" in read("Makefile") and sys.version_info >= (3, 11)
