"""sample.py where something is wrong: options, prompts, folders, a reader, Ctrl-C."""

import os

import pytest
import torch

import sample
from common import one_line, start, tiny_model
from common_models import constant_model, rwkv_folder  # noqa: F401
from common_sample import drawn, tokens
from data.tokenizer import read_prompt
from lib.folders import load_model, save_model
from lib.state_file import load_state
from lib.states import process, tensors
from sample import generate, main
from tools import batch, chat

NAN, INF = float("nan"), float("inf")


# ------------------------------------------------------------------------------------------
# The library

def test_bad_options_of_the_library_are_one_line():
    model, prompt = tiny_model().eval(), tokens(1, 3)
    for options in ({"n": 0}, {"temperature": -0.1}, {"temperature": NAN}, {"temperature": INF}, {"top_k": 0},
                    {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": NAN}, {"presence": NAN}, {"frequency": INF}):
        with pytest.raises(ValueError) as e:
            next(generate(model, prompt, **{"n": 5} | options))
        name = "max_tokens" if "n" in options else list(options)[0]
        assert name in one_line(e.value)
    for bad, rule in ((torch.zeros(1, 0, dtype=torch.long), "texts of 0 tokens.*at least one"),
                      (torch.tensor([[1, 257]]), "token 257 is outside the vocabulary"),
                      (torch.tensor([[-1]]), "token -1 is outside the vocabulary")):
        with pytest.raises(ValueError, match=rule) as e:
            next(generate(model, bad, 5))
        one_line(e.value)
    for temperature in (0.0, 1.0):
        for bad in ([NAN, 1.0], [1.0, INF]):
            with pytest.raises(ValueError, match="not finite"):
                next(generate(constant_model(bad), torch.tensor([[0]]), 5, temperature=temperature))


def test_options_at_the_ends_of_their_ranges_draw_and_no_penalty_makes_a_logit_infinite():
    model, prompt = tiny_model().eval(), tokens(2, 3)
    likeliest = drawn(model, prompt, 4, temperature=0)
    for options in ({"temperature": 5e-324}, {"temperature": 1e-50}, {"temperature": 1e-50, "top_k": 3},
                    {"top_p": 5e-324}, {"top_p": 1e-300, "temperature": 1e-300}):
        assert torch.equal(drawn(model, prompt, 4, **options), likeliest), options
    most = 0.99e20
    for options in ({"temperature": 1e308, "top_p": 1.0}, {"presence": most, "frequency": most},
                    {"presence": -most, "frequency": -most}):
        assert drawn(model, prompt, 4, **options).shape == (2, 4)
    for name in ("presence", "frequency"):
        for value in (1e300, -1e300):
            with pytest.raises(ValueError, match=f"{name} = .*at least -1e.20 and below 1e.20") as e:
                next(generate(model, prompt, 4, **{name: value}))
            one_line(e.value)


def test_text_beyond_learned_positions_is_refused_before_it_is_read():
    model, prompt = tiny_model(positions="learned").eval(), tokens(1, 3)
    *_, (last, state) = generate(model, prompt, 14)  # the last token drawn is not read: 3 + 13 positions
    for full in ({"tokens": prompt, "n": 15}, {"tokens": last[:, None], "n": 1, "state": state}):
        with pytest.raises(ValueError, match="learned 16: shorten") as e:
            next(generate(model, **full))
        one_line(e.value)


# ------------------------------------------------------------------------------------------
# The script

def test_bad_input_is_one_line(rwkv_folder, tmp_path):  # noqa: F811
    save_model(tiny_model(), tmp_path / "no-meta", {})
    save_model(tiny_model(vocab_size=100), tmp_path / "small", {"tokenizer": "bytes"})
    save_model(tiny_model(), tmp_path / "odd", {"tokenizer": "nonsense"})
    save_model(tiny_model(), tmp_path / "gone", {})
    (tmp_path / "gone" / "meta.json").unlink()
    folders = {"none": "no model at", "small": "vocabulary", "no-meta": "tokenizer", "odd": "nonsense",
               "gone": "meta.json"}
    numbers = {"--max_tokens": ("0", "-3"), "--temperature": ("-1", "nan"), "--top_p": ("0", "1.01"),
               "--top_k": ("0",), "--num_samples": ("0",), "--seed": ("-1", str(2**64)), "--device": ("tpu",)}
    cases = [(["--ckpt", str(tmp_path / name)], word) for name, word in folders.items()]
    cases += [([flag, value], flag[2:]) for flag, values in numbers.items() for value in values]
    for args, word in cases:
        with pytest.raises(ValueError) as e:
            main(["--ckpt", str(rwkv_folder), *args])
        assert word in one_line(e.value), args


def test_a_prompt_file_that_cannot_be_read_is_one_line(rwkv_folder, tmp_path):  # noqa: F811
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    prompts = {f"FILE:{tmp_path / 'latin.txt'}": "not UTF-8", "FILE:nowhere.txt": "can't be read"}
    for prompt, word in prompts.items():
        with pytest.raises(ValueError, match=word) as e:
            main(["--ckpt", str(rwkv_folder), "--prompt", prompt])
        one_line(e.value)


def test_a_prompt_file_is_read_before_the_model():
    """Which may take minutes to load."""
    with pytest.raises((ValueError, OSError), match="nowhere.txt"):
        main(["--ckpt", "no-such-model", "--prompt", "FILE:nowhere.txt"])


def test_a_reader_who_has_seen_enough_ends_it_quietly(rwkv_folder):  # noqa: F811
    run = start("sample.py", "--ckpt", rwkv_folder, "--prompt", "a", "--max_tokens", "100000", "--no-stop")
    assert run.stdout.buffer.raw.read(1) == b"a"
    run.stdout.close()
    assert run.stderr.read() == "" and run.wait() == 0


@pytest.mark.parametrize("when", (0, 3))
def test_a_text_that_is_interrupted_keeps_what_was_read_for_what_was_printed(rwkv_folder, when,  # noqa: F811
                                                                             tmp_path, capsys, monkeypatch):
    """Before its first token there is nothing to keep, and nothing is written."""
    texts = []

    def interrupted(decoder, text, *args, **options):
        texts.append(text[0].tolist())
        for i, (token, state) in enumerate(generate(decoder, text, *args, **options)):
            if i == when:
                raise KeyboardInterrupt
            texts[-1].append(token.item())
            yield token, state

    monkeypatch.setattr(sample, "generate", interrupted)
    file = tmp_path / "s.state"
    args = ["--ckpt", str(rwkv_folder), "--prompt", "ab", "--no-stop", "--save_state", str(file)]
    if when == 0:
        with pytest.raises(KeyboardInterrupt):
            main(args)
        assert not file.exists()
        return
    main(args)
    model = load_model(rwkv_folder).eval()
    state, unread = load_state(file, model)
    _, whole = process(model, torch.tensor([texts[0][:-1]]))
    assert unread == texts[0][-1:] and state.position == whole.position == 3 + when - 1
    for a, b in zip(tensors(state), tensors(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert "memory of 5 tokens" in capsys.readouterr().err


def test_prompts_that_never_end_or_never_come_are_refused(tmp_path):
    """Before the model is loaded."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long.txt").write_bytes(b"a" * (2**26 + 1))
    for path, words in (("/dev/zero", "file /dev/zero has more than 67,108,864 bytes: give a shorter one"),
                        (tmp_path / "pipe", "is a pipe: give a file"),
                        (tmp_path / "long.txt", "has more than 67,108,864 bytes"),
                        (tmp_path, "can't be read .Is a directory.")):
        for script, flag in ((main, f"--prompt=FILE:{path}"), (chat.main, f"--prompt=FILE:{path}"),
                             (batch.main, f"--prompts={path}")):
            with pytest.raises(ValueError, match=words) as e:
                script(["--ckpt", "no-such-model", flag])
            one_line(e.value)


def test_a_prompt_may_come_through_the_shells_pipe(tmp_path):
    reader, writer = os.pipe()
    os.write(writer, "\ufeffdu\r\ndé".encode())
    os.close(writer)
    assert read_prompt(f"FILE:/dev/fd/{reader}") == "du\ndé"
    os.close(reader)


def test_numbers_without_bound_are_refused(rwkv_folder):  # noqa: F811
    for flag in ("--num_samples", "--max_tokens", "--seed", "--top_k", "--temperature"):
        for digits in ("9" * 330, "9" * 400, "9" * 5000):
            with pytest.raises(ValueError, match=flag[2:].replace("_", ".")) as e:
                main(["--ckpt", str(rwkv_folder), flag, digits])
            assert len(one_line(e.value)) < 1100
    with pytest.raises(ValueError, match="num_samples = 1000000000: .* below 65536"):
        main(["--num_samples", "1000000000"])


def test_a_prompt_keeps_its_words_whatever_they_look_like(rwkv_folder, capsys):  # noqa: F811
    for prompt in ("x=True", "--stop=False", "-x", "--", "a=False", " "):
        main(["--ckpt", str(rwkv_folder), f"--prompt={prompt}", "--max_tokens", "1", "--no-stop"])
        assert capsys.readouterr().out.startswith(prompt)
