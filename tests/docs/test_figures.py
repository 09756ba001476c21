"""docs/figures.py: the committed pictures are what it draws, and say what is true."""

import importlib.util
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from common import REPO
from common_house import blocks, read
from wkv import wkv7_loop

spec = importlib.util.spec_from_file_location("figures", REPO / "docs" / "figures.py")
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)
NAMES = list(figures.FIGURES)
SVG = "{http://www.w3.org/2000/svg}"


def elements(name: str, kind: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(figures.FIGURES[name]()).findall(f".//{SVG}{kind}")


@pytest.mark.parametrize("name", NAMES)
def test_drawn_again_a_figure_is_the_committed_one(name):
    committed = (REPO / "docs" / "figures" / f"{name}.svg").read_bytes()
    assert figures.FIGURES[name]().encode() == committed, "python docs/figures.py, then commit the picture"


def test_the_folder_has_these_figures_and_no_others():
    assert sorted(path.stem for path in (REPO / "docs" / "figures").iterdir()) == sorted(NAMES)


def test_the_script_writes_every_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "new")
    figures.main()
    assert {path.name for path in (tmp_path / "new").iterdir()} == {f"{name}.svg" for name in NAMES}
    assert all(path.read_text(encoding="utf-8").endswith("</svg>\n") for path in (tmp_path / "new").iterdir())


def test_the_tutorial_shows_every_figure_once_and_says_what_is_on_it():
    shown = re.findall(r"!\[([^\]]+)\]\(figures/([\w-]+)\.svg\)", read("docs/tutorial.md"))
    assert sorted(name for _, name in shown) == sorted(NAMES)
    assert all(len(words.split()) > 2 for words, _ in shown)


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_for_light_and_dark_and_names_no_colour_outside_its_palette(name):
    """Both palettes define the same names, and every class in use has a rule."""
    drawing = figures.FIGURES[name]()
    light, dark = (re.findall(r"(--\w+):", part) for part in figures.STYLE.split("@media")[:2])
    assert "prefers-color-scheme: dark" in drawing and len(light) > 8
    assert sorted(light) == sorted(dark)
    style, body = drawing.split("</style>")
    assert not re.search(r"#[0-9a-f]{3,6}\b|rgb", body)
    used = {word for names in re.findall(r'class="([^"]*)"', body) for word in names.split()}
    rules = set(re.findall(r"\.([a-z]\w*)", style))
    assert used <= rules, used - rules


@pytest.mark.parametrize("name", NAMES)
def test_everything_lies_within_the_picture(name):
    """Boxes exactly; a word by a generous guess of its width."""
    _, _, width, height = map(float, ElementTree.fromstring(figures.FIGURES[name]()).get("viewBox").split())
    for rect in elements(name, "rect"):
        x, y, w, h = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
        assert 0 <= x and x + w <= width and 0 <= y and y + h <= height
    for words in elements(name, "text"):
        kind, x = words.get("class").split(), float(words.get("x"))
        size = 6.0 if "tiny" in kind else 7.0 if "small" in kind else 8.5
        length = size * len(words.text)
        left = x if "left" in kind else x - length if "end" in kind else x - length / 2
        assert left >= 0 and left + length <= width, words.text
        assert 6 <= float(words.get("y")) <= height - 6, words.text


def test_the_cascade_takes_75_steps_with_the_arrow_27_without_and_9_in_chunks_of_4():
    """Layer i is at token t at step i + t + 1, and with the arrow at 3t + i + 1."""
    assert [max(figures.schedule(*shape).values())
            for shape in ((25, 3, True), (25, 3, False), (7, 3, False))] == [75, 27, 9]
    assert figures.schedule(25, 3, False) == {(i, t): i + t + 1 for i in range(3) for t in range(25)}
    assert figures.schedule(25, 3, True) == {(i, t): 3 * t + i + 1 for i in range(3) for t in range(25)}


def test_every_cell_is_drawn_with_its_step_and_moves_at_it():
    for name, cells, steps in (("cascade", 150, 75), ("cascade-chunks", 21, 9)):
        drawing = figures.FIGURES[name]()
        drawn = re.findall(r'class="cell s(\d+)"/><text[^>]*>(\d+)</text>', drawing)
        assert len(drawn) == cells and all(moves == says for moves, says in drawn)
        assert {int(says) for says, _ in drawn} == set(range(1, steps + 1))
        for s in range(1, steps + 1):
            assert f"@keyframes s{s} " in drawing and f".s{s} {{ animation-name: s{s} }}" in drawing


def test_the_schedule_is_the_one_that_the_tutorial_computes():
    source = next(block for block in blocks("docs/tutorial.md", "python") if "def schedule" in block)
    space = {}
    exec(source.split("\nassert")[0], space)
    for shape in ((25, 3, True), (25, 3, False), (7, 3, False), (1, 1, True)):
        assert space["schedule"](*shape) == figures.schedule(*shape)


@pytest.mark.parametrize("rule, w, a", [("linear attention", 0.0, 0.0), ("fading", 0.5, 0.0),
                                        ("delta rule", 0.0, 1.0)])
def test_the_states_are_those_of_the_operator(rule, w, a):
    """rungs.svg against wkv.py: w is the fading factor (0: none), a what is erased."""
    keys, values = torch.eye(4).double()[[0, 1, 2, 0]], torch.eye(4).double()[[1, 3, 2, 0]]
    decay = torch.full((4, 4), w).double().log() if w else torch.zeros(4, 4).double()
    inputs = [x[None, :, None] for x in (keys, decay, keys, values, keys, torch.full((4, 4), a).double())]
    for n, drawn in enumerate(figures.states(rule), 1):
        _, S = wkv7_loop(*(x[:, :n] for x in inputs), torch.zeros(1, 1, 4, 4).double())
        torch.testing.assert_close(torch.tensor(drawn).double(), S[0, 0])
