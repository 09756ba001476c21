"""docs/tutorial.md beyond its blocks, which test_house.py runs: glossary, exercises."""

import re

import pytest

from common import REPO
from common_house import anchor, read, section, table_rows
from model import LM, ModelConfig

TITLES = re.findall(r"^## (.*)$", read("docs/tutorial.md"), re.M)
EXERCISES = re.findall(r"^\d+\. (.*)$", section("docs/tutorial.md", TITLES[-1]), re.M)


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_it_begins_with_links_to_all_its_sections_which_are_numbered():
    contents = read("docs/tutorial.md").partition("\n## ")[0]
    links = re.findall(r"^(\d+)\. \[(.*)\]\(#([\w-]+)\)$", contents, re.M)
    assert [f"{n}. {title}" for n, title, _ in links] == TITLES
    assert [link for _, _, link in links] == [anchor(title) for title in TITLES]
    assert [int(n) for n, _, _ in links] == list(range(1, 1 + len(TITLES)))


def test_the_glossary_s_parameters_are_all_those_of_a_time_mixer_and_its_code_is_in_the_chapters():
    rows = table_rows(section("docs/tutorial.md", next(title for title in TITLES if "Glossary" in title)))
    sizes = dict(n_layer=2, n_embd=32, rwkv_head_size=16)
    block = LM(ModelConfig(mixer="r", **sizes)).blocks[1]
    own = {name.split(".")[0] for name in block.att.state_dict()}
    told = {name.split(".")[0] for row in rows for name in names(" ".join(row[4:]))}
    assert told - {"ln1", "time_decay", "time_first"} == own   # a norm of the block, two of RWKV-4
    code = read("model.py") + read("wkv.py")
    for _, word, _, cell, *_ in rows:
        for name in names(cell):
            text = read("docs/tutorial.md") if "section" in cell else code
            assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text), f"{word}: {name}"


@pytest.mark.parametrize("exercise", EXERCISES, ids=[words.split("**")[1] for words in EXERCISES])
def test_every_exercise_says_when_it_is_solved_by_a_test_or_an_assertion_that_can_be(exercise):
    assert re.search(r"Solved|removed when", exercise)
    code = names(exercise)
    tests = [name for name in code if name.startswith("test_")]
    files = [path.read_text(encoding="utf-8") for path in (REPO / "tests").rglob("test_*.py")]
    for name in tests:
        assert any(f"\ndef {name}(" in source for source in files), f"there is no {name}"
    assertions = [line for line in code if line.startswith(("assert ", "torch.testing.assert_close"))]
    for line in assertions:
        compile(line, "exercise", "exec")
    assert tests or assertions or "the block of section" in exercise


def test_the_sections_that_the_page_and_the_readme_speak_of_exist():
    text = read("docs/tutorial.md") + section("README.md", "The five chapters, in the order to read them")
    spoken = {int(n) for n in re.findall(r"\b[Ss]ections? (\d+)", text)}
    assert len(spoken) > 8 and max(spoken) <= len(TITLES)
