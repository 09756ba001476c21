"""The page that shows what a student learned: its numbers, its size, what it refuses;
and once as a reader sees it, in a real Chromium where there is one.
"""

import base64
import json
import re
import shlex
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tools.look
from common import REPO, one_line, tiny_model
from common_bpe import imported, train
from common_browser import CHROMIUM, INSTALL, Page, photograph
from common_distill import META
from config import cli
from data.tokenizer import get_tokenizer, save_tokenizer
from lib.folders import load_model, save_model
from tools.implied import correlations, read
from tools.look import (LookConfig, as_script, characters, encode, fewer, label, look, main, page,
                        predictions, short)

HARD = 'A </script><script>window.hacked = 1</script> <!-- "q" \'é€🙂 &lt; `${1}` \\u003c\n\tx\x01\x1b'


@pytest.fixture
def folders(tmp_path):
    """A teacher, its student, a hybrid and a stranger; flags that name two of them."""
    save_model(tiny_model(std=1.0), tmp_path / "teacher", META)
    save_model(tiny_model(1, std=1.0, mixer="r"), tmp_path / "student", META)
    save_model(tiny_model(2, std=1.0, mixer="ar"), tmp_path / "hybrid", META)
    save_model(tiny_model(3, std=1.0, mixer="r", n_layer=3), tmp_path / "deeper", META)
    save_model(tiny_model(4, std=1.0, mixer="r", rwkv_head_size=8), tmp_path / "many-heads", META)
    save_model(tiny_model(5, std=1.0, mixer="r", vocab_size=200), tmp_path / "small", META)
    save_model(tiny_model(6, std=1.0, positions="learned"), tmp_path / "learned", META)

    def words(student="student", teacher="teacher", **more) -> list[str]:
        values = {"teacher": tmp_path / teacher, "student": tmp_path / student, "device": "cpu",
                  "text": HARD, "out": tmp_path / "look.html"} | more
        return [word for flag, value in values.items() for word in (f"--{flag}", str(value))]

    return words


def settings(words: list[str]) -> LookConfig:
    return LookConfig(**{flag[2:]: value for flag, value in zip(words[::2], words[1::2])})


class Scripts(HTMLParser):
    """What stands in a page's script elements, as an HTML parser finds them."""

    def __init__(self, html: str):
        super().__init__()
        self.found, self.inside = [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.inside = tag == "script"
        if self.inside:
            self.found.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.found[-1] += data


def payload_of(html: str) -> dict:
    scripts = Scripts(html).found
    assert len(scripts) == 2, "the text opened a script, or closed one"
    return json.loads(scripts[0])


def unpacked(payload: dict) -> np.ndarray:
    """Every map's triangle, as the page computes it: (maps, T (T + 1) / 2)."""
    dtype = np.int16 if payload["levels"] > 127 else np.int8
    q = np.frombuffer(zlib.decompress(base64.b64decode(payload["maps"])), dtype) / payload["levels"]
    largest = np.array([most for layer in payload["largest"] for most in layer])
    return (q * np.abs(q)).reshape(len(largest), -1) * largest[:, None]


# ------------------------------------------------------------------------------------------
# Numbers

def test_the_numbers_of_the_page_are_those_of_the_models(folders, tmp_path):
    main(folders())
    payload = payload_of((tmp_path / "look.html").read_text())
    tokens = [256, *HARD.encode()]
    assert payload["tokens"] == tokens
    (_, teacher), (_, student) = (read(load_model(tmp_path / name).eval(), tokens)
                                  for name in ("teacher", "student"))
    i, j = torch.tril_indices(len(tokens), len(tokens))
    found, n = torch.from_numpy(unpacked(payload)), 0
    for layer, t, s in zip(payload["layers"], teacher, student):
        assert layer["kinds"] == "ar"
        for h, (head, c) in enumerate(zip(layer["heads"], correlations(t.map, s.map))):
            assert head["correlation"] == pytest.approx(c, rel=1e-3)
            for name in ("half_lives", "rate", "norm"):
                assert head[name] == pytest.approx(getattr(s, name)[h].tolist(), rel=1e-3)
            assert (head["share"] is None) == (layer["layer"] == 0)
            for expected in (t.map[h, i, j], s.map[h, i, j]):
                largest = expected.abs().max()
                error = (found[n] - expected).abs() / largest
                assert (error <= 4e-5 * (expected.abs() / largest).sqrt() + 1e-8).all()
                n += 1
    assert n == len(found) == 8


def test_predictions_are_those_of_pytorch():
    torch.manual_seed(0)
    t, s = 3 * torch.randn(2, 6, 40, dtype=torch.float64)
    tokens = torch.randint(0, 40, (6,)).tolist()
    rows = predictions(t, s, tokens)
    p, q = t.log_softmax(-1), s.log_softmax(-1)
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    for i, row in enumerate(rows):
        assert row["kl"] == pytest.approx(kl[i].item(), rel=1e-3)
        assert row["same"] == (t[i].argmax() == s[i].argmax()).item()
        for logs, choices in zip((p[i], q[i]), row["best"]):
            best = logs.exp().topk(5)
            assert [token for token, _ in choices] == best.indices.tolist()
            assert [share for _, share in choices] == pytest.approx(best.values.tolist(), rel=1e-3)
        if i + 1 < len(tokens):
            losses = [F.cross_entropy(x[i], torch.tensor(tokens[i + 1])).item() for x in (t, s)]
            assert row["losses"] == pytest.approx(losses, rel=1e-3)
    assert rows[-1]["losses"] is None and {row["same"] for row in rows} <= {True, False}
    assert [len(choices) for choices in predictions(t[:, :3], s, [0, 1, 2, 0, 1, 2])[0]["best"]] == [3, 3]


def test_a_teacher_beside_itself_is_the_same_everywhere(folders, capsys):
    cfg = settings(folders("teacher"))
    payload, maps = look(cfg)
    assert all(torch.equal(*pair) for pair in maps) and all(row["same"] for row in payload["predictions"])
    assert {head["correlation"] for layer in payload["layers"] for head in layer["heads"]} == {1.0}
    main(folders("teacher"))
    assert "mean correlation 1.000" in capsys.readouterr().out


def test_a_layer_that_stayed_attention_shows_its_own_map_and_no_memory(folders):
    payload, maps = look(settings(folders("hybrid")))
    assert [layer["kinds"] for layer in payload["layers"]] == ["aa", "ar"]
    kept, replaced = (layer["heads"][0] for layer in payload["layers"])
    assert kept["rate"] is kept["half_lives"] is kept["norm"] is None
    assert len(replaced["rate"]) == len(replaced["norm"]) == len(payload["tokens"])
    assert torch.allclose(maps[0][1].sum(-1), torch.ones(()).double()) and maps[1][1].min() < 0


def test_numbers_have_four_digits():
    assert short(torch.tensor([[1.23456, 1e-9], [123456.0, 0.0]], dtype=torch.float64)) == [
        [1.235, 1e-9], [123500.0, 0.0]]
    assert short(None) is None and short(0.1 + 0.2) == 0.3


# ------------------------------------------------------------------------------------------
# Text

def test_a_token_is_shown_as_one_sees_it():
    seen = {b"a": "a", b" the": "␣the", b"\n\t": "⏎⇥", b"\xe2\x82": "‹E2›‹82›", "é".encode(): "é",
            b"x\xff": "x‹FF›", b"\x00": "‹U+0000›", "\u202e".encode(): "‹U+202E›", b"</script>": "</script>",
            "\u0301".encode(): "◌\u0301", b"": "", b"y" * 99: "y" * 39 + "…"}
    assert {data: label(data) for data in seen} == seen


def test_a_part_of_a_character_says_of_which():
    pieces = [b"a", "€".encode()[:1], "€".encode()[1:] + b"b", b"\xff", "🙂".encode(), b""]
    assert characters(pieces) == ["a", "€", "€b", "\udcff", "🙂", ""]


def test_no_text_breaks_out_of_its_page(folders, tmp_path):
    """Neither in the text nor in a name; what a parser reads is what was written."""
    main(folders(out=tmp_path / "</script><b>.html".replace("/", "∕")))
    main(folders())
    html = (tmp_path / "look.html").read_text()
    payload = payload_of(html)
    assert [payload["labels"][str(token)] for token in payload["tokens"][1:4]] == ["A", "␣", "<"]
    assert "hacked" not in html.replace(Scripts(html).found[0], "")
    values = {"a": "</script>", "b": "<!--<script>", "c": "\u2028\"'\\"}
    assert "<" not in as_script(values) and json.loads(as_script(values)) == values


def test_a_page_asks_for_nothing_outside_itself():
    template = tools.look.TEMPLATE.read_text()
    addresses = set(re.findall(r"https?://[^\"'\s]+", template))
    assert addresses == {"http://www.w3.org/2000/svg"}                    # a name of a language
    assert not re.search(r"\bsrc=|@import|url\(|fetch\(|XMLHttpRequest|import\(", template)
    assert "default-src 'none'" in template and template.count("PAYLOAD") == 1


def test_a_models_own_tokenizer_is_used(tmp_path):
    """A byte-level BPE with few merges: é is two tokens, and both say so."""
    enc = imported(train(added=("<|endoftext|>",)), tmp_path / "bpe")
    for name, mixer in (("teacher", "a"), ("student", "r")):
        save_model(tiny_model(mixer=mixer, vocab_size=enc.n_vocab), tmp_path / name, {})
        save_tokenizer(enc, tmp_path / name)
    cfg = LookConfig(teacher=str(tmp_path / "teacher"), student=str(tmp_path / "student"), device="cpu",
                     text="The string 漢")
    payload, _ = look(cfg)
    tokens, labels = payload["tokens"], payload["labels"]
    assert tokens[1:] == enc.encode_ordinary(cfg.text) and len(tokens) < 1 + len(cfg.text.encode())
    whole = [payload["parts"][i] or labels[token] for i, token in enumerate(tokens)]
    assert "".join(dict.fromkeys(whole[1:])).endswith("漢")
    assert any("‹" in label for label in labels.values())


# ------------------------------------------------------------------------------------------
# Size

def test_maps_get_coarser_and_then_the_page_is_refused(folders, monkeypatch):
    """What takes two bytes per entry takes one, where there is no room for two."""
    payload, maps = look(settings(folders()))
    fine, T = page(payload, maps), len(payload["tokens"])
    assert len(fine.encode()) < tools.look.LARGEST and payload_of(fine)["levels"] == 32767
    monkeypatch.setattr(tools.look, "LARGEST", len(fine.encode()))
    coarse = payload_of(page(payload, maps))
    assert coarse["levels"] == 127
    i, j = torch.tril_indices(T, T)
    whole = torch.stack([pair[m][h, i, j] for pair in maps for h in range(2) for m in range(2)])
    largest = whole.abs().amax(-1, keepdim=True)
    error = (torch.from_numpy(unpacked(coarse)) - whole).abs() / largest
    assert (error <= (whole.abs() / largest).sqrt() / 127 + 1 / 127**2).all() and error.max() > 1e-4
    monkeypatch.setattr(tools.look, "LARGEST", 70_000)
    with pytest.raises(ValueError, match="70,000 at most: choose fewer layers .--layers 0.") as error:
        page(payload, maps)
    one_line(error.value)
    assert len(page(*look(settings(folders(layers="0")))).encode()) < 70_000, "what it says helps"
    assert fewer(list(range(30)), 0.1) == "choose fewer layers (--layers 0,10,20), or shorten the text"
    assert fewer([4, 9], 0.6) == "choose fewer layers (--layers 4), or shorten the text"
    assert fewer([4, 9], 0.4) == "shorten the text"


def test_a_whole_page_of_128_tokens_is_below_a_megabyte(folders, tmp_path):
    main(folders(text="x" * 64 + "The quick brown fox" * 3 + "abcdefg"))
    file = tmp_path / "look.html"
    assert file.stat().st_size < 1_000_000 and len(payload_of(file.read_text())["tokens"]) == 129


def test_the_demo_writes_a_page_of_a_text_that_fits():
    """Of the Makefile's recipe `demo`: its flags are read, its text is short enough."""
    makefile = (REPO / "Makefile").read_text()
    recipe = makefile.partition("\ndemo:")[2].partition("\n\n")[0]
    line = next(line for line in recipe.splitlines() if "tools.look" in line)
    text = re.search(r"^LOOK = (.*)$", makefile, re.M)[1]
    cfg = cli(LookConfig, shlex.split(line.replace("$(LOOK)", text).partition("tools.look ")[2]))
    assert 1 < len(encode(get_tokenizer("bytes"), cfg.text)) <= 129 and cfg.out.endswith(".html")
    assert recipe.count(cfg.teacher) > 1 < recipe.count(cfg.student), "it shows what the demo made"


def test_some_layers_alone(folders):
    payload, maps = look(settings(folders(layers="1")))
    assert [layer["layer"] for layer in payload["layers"]] == [1] and len(maps) == 1
    assert payload["layers"][0]["heads"][0]["share"] is not None


# ------------------------------------------------------------------------------------------
# Refusals

REFUSED = [({"text": "x" * 129}, "has 129 tokens, a page shows at most 128"), ({"text": ""}, "text is empty"),
           ({"layers": "2"}, "numbers of 0 to 1"), ({"layers": "a"}, "numbers of 0 to 1"),
           ({"layers": "-1,0"}, "numbers of 0 to 1"), ({"text": "FILE:none.txt"}, "can't be read"),
           ({"student": "small"}, "reads other tokens"), ({"teacher": "small"}, "has token 256"),
           ({"student": "deeper"}, "other layers or heads"),
           ({"student": "many-heads"}, "other layers or heads"),
           ({"teacher": "learned", "text": "a" * 16}, "17 tokens with its opening"),
           ({"student": "nobody"}, "nobody"), ({"device": "tpu"}, "device")]


@pytest.mark.parametrize("changes, says", REFUSED, ids=[says for _, says in REFUSED])
def test_what_cannot_be_shown_is_refused_in_one_line(folders, tmp_path, changes, says):
    with pytest.raises(ValueError, match=says) as error:
        main(folders(**changes))
    one_line(error.value)
    assert not list(tmp_path.glob("*.html*"))


def test_another_tokenizer_is_refused(folders, tmp_path):
    save_model(tiny_model(mixer="r"), tmp_path / "foreign", {})
    save_tokenizer(imported(train(added=("<|endoftext|>",)), tmp_path / "bpe"), tmp_path / "foreign")
    with pytest.raises(ValueError) as error:
        main(folders("foreign"))
    assert one_line(error.value) and not (tmp_path / "look.html").exists()


def test_a_page_is_replaced_and_nothing_else_is(folders, tmp_path, capsys):
    file = tmp_path / "look.html"
    main(folders(text="one"))
    before = file.read_text()
    main(folders(text="two"))
    assert file.read_text() != before and str(file) in capsys.readouterr().out
    file.write_text("<!doctype html>mine")
    with pytest.raises(ValueError, match="did not write it") as error:
        main(folders())
    assert one_line(error.value) and file.read_text() == "<!doctype html>mine"
    assert not tools.look.is_page(tools.look.TEMPLATE), "--out tools/look.html would replace the template"


# ------------------------------------------------------------------------------------------
# In a browser

@pytest.mark.skipif(not CHROMIUM, reason=INSTALL)
def test_a_reader_sees_it_in_chromium(folders, tmp_path):
    """Shown, pointed at, stepped through by keys and sliders, narrow, wide, dark."""
    main(folders("hybrid"))
    payload = payload_of((tmp_path / "look.html").read_text())
    T = len(payload["tokens"])
    with Page(tmp_path / "look.html", tmp_path / "profile") as shown:
        # the text is text, with a chip for each token and for what follows
        assert shown.run("typeof window.hacked") == "undefined"
        assert shown.run("document.querySelectorAll('#chips button').length") == T + 1
        assert shown.run("document.querySelectorAll('.differ').length") == sum(
            not row["same"] for row in payload["predictions"])
        check_values(shown, payload)
        check_choices(shown, payload)
        check_steps(shown, T)
        # the hybrid's first layer has no memory, the second has; a map is read by cells
        assert [shown.run(f"set({{layer: {i}}}); $('plots').hidden") for i in (0, 1)] == [True, False]
        shown.point("figure:nth-of-type(2) .map", 0.05 / T, 10.5 / T)
        assert shown.run("[now.t, now.i]") == [10, 0]
        assert "token 0" in shown.run("$('cell').textContent")
        check_looks(shown)
        assert not shown.complaints()
    photograph(tmp_path / "look.html", tmp_path / "look.png")
    data = (tmp_path / "look.png").read_bytes()
    width, height = (int.from_bytes(data[i : i + 4]) for i in (16, 20))
    assert data.startswith(b"\x89PNG") and 900 < width <= 1000 < height and len(data) > 20_000


def check_values(shown: Page, payload: dict) -> None:
    """The page's maps are what Python reads from the same bytes."""
    values = [row[-1] for row in unpacked(payload)]
    T = len(payload["tokens"])
    script = f"maps.flat(2).map(map => map.at({T - 1}, {T - 1}))"
    assert shown.run(script) == pytest.approx(values)
    reds = shown.run("set({layer: 1, head: 0}), [...document.querySelectorAll('.map canvas')].map(c => "
                     "c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter("
                     "(x, i) => i % 4 === 0 && x > 150).length)")
    assert reds[0] == 0 < reds[1], "only the student's map has something orange"


def check_choices(shown: Page, payload: dict) -> None:
    """Pointing at a token shows what was expected there; a click keeps it."""
    shown.point("[data-token='3']")
    found = shown.run("[...document.querySelectorAll('#choices .token')].map(e => e.textContent)")
    rows = payload["predictions"][2]["best"]
    assert found == [payload["labels"][str(token)] for choices in rows for token, _ in choices]
    assert f"KL {payload['predictions'][2]['kl']:.3g}" in shown.run("$('prediction').textContent")
    shown.run("document.querySelector(\"[data-token='5']\").click()")
    shown.point("[data-token='7']")
    assert shown.run("now.t") == 4
    shown.run("document.querySelector(\"[data-token='5']\").click()")


def check_steps(shown: Page, T: int) -> None:
    """Keys go around; sliders do the same, and take the arrows for themselves."""
    shown.run("set({layer: 0, head: 0, t: 0})")
    for key, place in (("h", [0, 1, 0]), ("h", [0, 0, 0]), ("l", [1, 0, 0]), ("L", [0, 0, 0]),
                       ("H", [0, 1, 0]), ("ArrowLeft", [0, 1, T - 1]), ("ArrowRight", [0, 1, 0])):
        shown.press(key)
        assert shown.run("[now.layer, now.head, now.t]") == place, key
    shown.run("$('layer').value = 1; $('layer').dispatchEvent(new Event('input')); $('token').focus()")
    assert shown.run("[now.layer, now.head, now.t]") == [1, 1, 0]
    assert shown.run("[$('layer-name').textContent, $('head-name').textContent]") == ["Layer 1", "Head 1"]
    shown.run("document.querySelector('[data-place=\"0,0\"]').click(); document.activeElement.blur()")
    assert shown.run("[$('layer').value, $('head').value]") == ["0", "0"]
    for colour in ("0", "1", "kl"):
        shown.run(f"document.querySelector('[name=colour][value=\"{colour}\"]').click()")
        assert shown.run("now.colour") == colour


def check_looks(shown: Page) -> None:
    """Nothing is wider than the window, and the dark is dark."""
    for width in (390, 700, 1000, 1600):
        shown.resize(width)
        assert shown.run("document.documentElement.scrollWidth <= innerWidth"), width
    grounds = []
    for dark in (False, True):
        shown.resize(1000, dark)
        shown.wait(f"matchMedia('(prefers-color-scheme: dark)').matches === {str(dark).lower()}")
        grounds.append(shown.run("[getComputedStyle(document.body).backgroundColor, "
                                 "getComputedStyle(document.body).color]"))
    (paper, ink), (board, chalk) = grounds
    assert paper == "rgb(255, 255, 255)" != board and ink != chalk != board
