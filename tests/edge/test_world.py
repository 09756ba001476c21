"""Official RWKV-7 models of 65,536 rows, wrong tokenizers, and what ends a text."""

import io
import json
import sys

import pytest
import torch

import sample
import tools.chat
from common import TINY, one_line, tiny_model
from common_bpe import save, train as train_bpe
from data.chat import encode_turns
from data.loader import Loader
from data.prepare import prepare
from data.tokenizer import load_tokenizer
from data.world import FILE, find_vocabulary
from lib.folders import load_model, same_tokenizer, save_model
from lib.state_file import load_state
from lib.states import process, tensors
from model import State
from sample import generate
from tools import batch, convert
from train import main as train_main

pytest.importorskip("rwkv")


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """An RWKV-7's .pth as the official ones are: bfloat16, 65,536 rows."""
    path = tmp_path_factory.mktemp("official") / "rwkv7-g1.pth"
    model = tiny_model(mixer="r", ffn="channelmix", ln0=True, positions="none", vocab_size=65536, n_layer=1)
    torch.save({name: p.bfloat16() for name, p in model.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def imported(official):
    out = official.parent / "world"
    convert.main(["import", str(official), "--out", str(out), "--tokenizer", "world", "--dtype", "bfloat16"])
    return out


def test_an_official_model_is_imported_and_sampled(imported, official, tmp_path, capsys):
    enc, weights = load_tokenizer(imported), load_model(imported).state_dict()
    assert json.loads((imported / "meta.json").read_text())["tokenizer"] == enc.name == "world"
    assert all(torch.equal(weights[name], t.float()) for name, t in torch.load(official).items())
    prompt = "Die Straße 漢字 🙂\n\n    x = 1"
    sample.main(["--ckpt", str(imported), "--prompt", prompt, "--max_tokens", "9", "--temperature", "0"])
    out, err = capsys.readouterr()
    n = len(enc.encode_ordinary(prompt)) + 1           # and the end of the document before
    assert out.startswith(prompt) and f"prefill {n} tokens" in err and n < len(prompt)
    (tmp_path / "a.txt").write_text("Ein Satz. " * 99 + "漢字" * 99)
    meta = prepare(tmp_path / "a.txt", tmp_path / "d", tokenizer=str(imported))
    assert meta["tokenizer"] == "world" and meta["vocab_size"] == 65530
    with pytest.raises(ValueError, match="omit flags") as e:           # the pair itself is right
        train_main(["--init", str(imported), "--data", str(tmp_path / "d"), "--out", str(tmp_path / "o"),
                    *TINY])
    one_line(e.value)
    same_tokenizer(Loader(tmp_path / "d", "train", 2, 16), imported)


def test_without_a_tokenizer_the_right_one_is_named_and_a_wrong_one_refused(official, tmp_path, capsys):
    convert.main(["import", str(official), "--out", str(tmp_path / "none")])
    out = capsys.readouterr().out
    assert "65,536 rows are those of RWKV's World models, --tokenizer world" in out
    assert "data.prepare" not in out
    for call in (lambda: sample.main(["--ckpt", str(tmp_path / "none")]),
                 lambda: prepare("pydoc", tmp_path / "d", tokenizer=str(tmp_path / "none")),
                 lambda: convert.main(["import", str(official), "--out", str(tmp_path / "x"),
                                       "--tokenizer", "bytes"])):
        with pytest.raises(ValueError, match="--tokenizer world") as e:
            call()
        one_line(e.value)
    assert not (tmp_path / "x").exists()
    (tmp_path / "none" / "meta.json").write_text('{"tokenizer": "bytes"}')     # an import of before
    (tmp_path / "a.txt").write_text("a b c\n" * 99)
    prepare(tmp_path / "a.txt", tmp_path / "d")
    for call in (lambda: sample.main(["--ckpt", str(tmp_path / "none")]),
                 lambda: prepare("pydoc", tmp_path / "e", tokenizer=str(tmp_path / "none")),
                 lambda: same_tokenizer(Loader(tmp_path / "d", "train", 2, 16), tmp_path / "none")):
        with pytest.raises(ValueError, match="257 tokens, the model 65,536 rows.*--tokenizer world") as e:
            call()
        one_line(e.value)


def test_the_vocabulary_beside_the_file_is_taken(official, tmp_path, monkeypatch):
    model = tmp_path / "m.pth"
    model.symlink_to(official)
    (tmp_path / FILE).write_bytes(find_vocabulary().read_bytes())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    convert.main(["import", str(model), "--out", str(tmp_path / "out"), "--tokenizer", "world"])
    assert load_tokenizer(tmp_path / "out").name == "world"


def test_sentencepiece_is_named_and_nothing_else_advised(tmp_path):
    folder = save(train_bpe(), tmp_path / "hf")
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["byte_fallback"] = True
    (folder / "tokenizer.json").write_text(json.dumps(values))
    model = tiny_model(ffn="swiglu", norm="rmsnorm", vocab_size=320)

    class Checkpoint:
        cfg, tokenizer = model.cfg, staticmethod(lambda: convert.get_tokenizer(str(folder)))

    with pytest.raises(ValueError, match="SentencePiece tokenizer.*No other can be this model's") as e:
        convert.choose_tokenizer(None, Checkpoint, folder)
    assert "bytes" not in one_line(e.value).replace("byte-level", "")


# ------------------------------------------------------------------------------------------
# Stops

def scripted(enc, pieces, calls):
    """A `generate` that says these pieces, one list after the other."""
    def generate(decoder, prompt, n, *, state, stop, **options):
        calls.append(prompt[0].tolist())
        position = (state.position if state else 0) + prompt.shape[1]
        for i, token in enumerate(pieces.pop(0)):
            yield torch.tensor([token]), State(position + i, ())

    return generate


def test_a_chat_with_a_world_model_ends_answers_at_an_empty_line(imported, capsys, monkeypatch):
    """What it reads is the conversation as the official demo has it."""
    enc, calls = load_tokenizer(imported), []
    said = [enc.encode_ordinary(text) for text in (" One.\n\nUser: no", " Two", " Three\n")]
    said[1] += [11, 11, 66]                            # the empty line comes in two tokens
    said[2] += [0]
    monkeypatch.setattr(tools.chat, "generate", scripted(enc, said, calls))
    monkeypatch.setattr(sys, "stdin", io.StringIO("b\nc\nd\n"))
    monkeypatch.setattr(tools.chat, "messages", lambda first: ["a", "b\r\n\r\nb", "c"])
    tools.chat.main(["--ckpt", str(imported)])
    assert capsys.readouterr().out == "One.\nTwo\nThree\n\n"
    turns = [("user", "a"), ("assistant", "One."), ("user", "b\nb"), ("assistant", "Two"), ("user", "c")]
    read = [enc.decode(call) for call in calls]
    assert read[0] == "User: a\n\nAssistant:" and read[1].lstrip("\n") == "User: b\nb\n\nAssistant:"
    assert read[2] == "\nUser: c\n\nAssistant:"        # of the two line feeds the second was not read yet
    ids, _ = encode_turns(enc, turns, reply=True)
    assert enc.decode(ids) == ("User: a\n\nAssistant: One.\n\nUser: b\nb\n\nAssistant: Two\n\n"
                               "User: c\n\nAssistant:")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small")
    save_model(tiny_model(mixer="r", ffn="channelmix", std=0.5), path, {"tokenizer": "bytes"})
    return path


def test_a_text_ends_at_a_stop_and_its_state_behind_it(small, tmp_path, capsys):
    base = ["--ckpt", str(small), "--no-stop", "--prompt", "ab", "--temperature", "1", "--max_tokens", "60"]
    sample.main(base)
    whole = capsys.readouterr().out.removesuffix("\n")
    plain = [c for c in whole[2:] if c.isascii() and c.isprintable()]
    stop = plain[5]
    file = str(tmp_path / "a.state")
    sample.main([*base, "--stop", stop, "never said", "--save_state", file])
    assert capsys.readouterr().out.removesuffix("\n") == whole[: whole.index(stop, 2)]
    model = load_model(small).eval()
    state, unread = load_state(file, model)
    assert unread == [ord(stop)]                       # the memory ends with the stop
    sample.main([*base, "--stop", stop, "--num_samples", "3"])
    for text in capsys.readouterr().out.removesuffix("\n").split("\n---------------\n"):
        assert stop not in text[2:]
    (tmp_path / "p.txt").write_text("ab\nq\n")
    batch.main(["--ckpt", str(small), "--no-stop", "--prompts", str(tmp_path / "p.txt"), "--max_tokens", "60",
                "--temperature", "1", "--stop", stop])
    assert capsys.readouterr().out.startswith(whole[: whole.index(stop, 2)] + "\n---------------\nq")


def test_the_state_behind_a_stop_is_that_of_its_text(small, tmp_path, monkeypatch):
    file, drawn = str(tmp_path / "a.state"), []

    def recorded(*args, **options):
        for token, state in generate(*args, **options):
            drawn.append(token.item())
            yield token, state

    monkeypatch.setattr(sample, "generate", recorded)
    sample.main(["--ckpt", str(small), "--no-stop", "--prompt", "x", "--max_tokens", "2000",
                 "--temperature", "1", "--stop", "e", "--save_state", file])
    model = load_model(small).eval()
    state, unread = load_state(file, model)
    _, expected = process(model, torch.tensor([[256, ord("x"), *drawn[:-1]]]))
    last = load_tokenizer(small).decode([drawn[-1]])   # "e", or <|endoftext|>, of which "<|e" is left
    assert unread == [*last.partition("e")[0].encode(), ord("e")] and ord("e") not in drawn[:-1]
    for a, b in zip(tensors(state), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("script, more", [(sample, []), (tools.chat, []), (batch, ["--prompts", "x"])])
def test_stops_that_cannot_be_are_one_line(script, more, small, tmp_path):
    for values, words in (([""], "none of them empty"), (["False"], "--no-stop")):
        with pytest.raises(ValueError, match=words) as e:
            script.main(["--ckpt", str(small), *more, "--stop", *values])
        one_line(e.value)
    (tmp_path / "a.toml").write_text('stop = ["a", 3]\n')
    with pytest.raises(ValueError, match="stop = .*texts"):
        script.main([str(tmp_path / "a.toml"), "--ckpt", str(small), *more])
