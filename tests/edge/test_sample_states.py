"""--load_state and --save_state of sample.py, tools.chat and tools.batch."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import REPO, one_line, tiny_model
from common_states import ALL, drawn, talker  # noqa: F401   (talker is a fixture)
from lib.folders import load_model, save_model
from lib.state_file import Int8, load_state
from sample import main
from tools import batch, chat


@pytest.fixture(scope="module", params=("RWKV-7", "GPT", "hybrid"))
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(tiny_model(std=0.5, **ALL[request.param]), path, {"tokenizer": "bytes"})
    return path


# ------------------------------------------------------------------------------------------
# sample.py


@pytest.mark.parametrize("mixer", ["r", "a"])
def test_a_character_that_is_cut_is_shown_when_it_is_whole(tmp_path, capsys, mixer):
    """A model that writes one character of three bytes for ever, in three parts."""
    model, sign = tiny_model(mixer=mixer), "€".encode()
    with torch.no_grad():
        for block in model.blocks:
            for parameter in (*block.att.parameters(), *block.ffn.parameters()):
                parameter.zero_()
        model.emb.weight.zero_()
        model.head.weight = torch.nn.Parameter(torch.zeros_like(model.head.weight))
        for i, byte in enumerate(sign):
            model.emb.weight[byte, i] = model.head.weight[sign[(i + 1) % 3], i] = 9.0
    save_model(model, tmp_path / "model", {"tokenizer": "bytes"})
    base = ["--ckpt", str(tmp_path / "model"), "--temperature", "0", "--no-stop", "--max_tokens"]
    file, shown = str(tmp_path / "x.state"), []

    def said(*words: str) -> str:
        main([*base, *words])
        return capsys.readouterr().out.removesuffix("\n")

    whole = said("9", "--prompt", "€")
    assert whole == "€€€€"
    for n in range(1, 8):
        first = said(str(n), "--prompt", "€", "--save_state", file)
        one = said("1", "--load_state", file, "--save_state", file)
        said("0", "--load_state", file, "--save_state", file)              # saved again: nothing changes
        shown.append(first + one + said(str(8 - n), "--load_state", file))
        assert "\ufffd" not in first + one
    assert shown == [whole] * 7
    assert said("1", "--prompt", "€") == "€\ufffd"                          # nobody goes on


def test_a_book_read_once_goes_on_as_if_it_were_read_again(folder, tmp_path, capsys):
    book = str(tmp_path / "book.state")
    base = ["--ckpt", str(folder), "--no-stop", "--temperature", "0", "--max_tokens"]
    main([*base, "30", "--prompt", "once upon a time"])
    whole = capsys.readouterr().out
    main([*base, "0", "--prompt", "once upon a", "--save_state", book])
    assert capsys.readouterr().out == ""
    main([*base, "30", "--prompt", " time", "--load_state", book])
    assert capsys.readouterr().out == whole.removeprefix("once upon a")
    # in two halves: what was generated first is in the state, its last token too
    main([*base, "13", "--prompt", " time", "--load_state", book, "--save_state", book])
    capsys.readouterr()
    state, unread = load_state(book, load_model(folder), "bytes")
    assert len(unread) == 1 and state.position == 1 + len("once upon a time") + 12
    new = drawn(load_model(folder).eval(), torch.tensor([[256, *b"once upon a time"]]), 30, temperature=0)[
        0
    ].tolist()
    assert (
        drawn(load_model(folder).eval(), torch.tensor([unread]), 17, temperature=0, state=state)[0].tolist()
        == new[13:]
        and unread == new[12:13]
    )
    main([*base, "17", "--load_state", book, "--num_samples", "2"])
    a, b = capsys.readouterr().out.removesuffix("\n").split("\n---------------\n")
    assert a == b
    for dtype in ("int8", "float16"):
        main([*base, "0", "--prompt", "once upon a", "--save_state", book, "--state_dtype", dtype])
        main([*base, "5", "--prompt", " time", "--load_state", book])


def test_a_text_ends_at_the_last_learned_position_whatever_was_read_before(tmp_path, capsys):
    """What can't go on is refused before any print; what can goes on to the end."""
    save_model(tiny_model(positions="learned", block_size=16), tmp_path / "m", {"tokenizer": "bytes"})
    base, state = ["--ckpt", str(tmp_path / "m"), "--no-stop", "--temperature", "0"], str(
        tmp_path / "s.state"
    )
    main(
        [*base, "--prompt", "a" * 9, "--save_state", state]
    )  # 10 tokens, and 7 more of which the last is not read
    assert "decode 1 x 6 tokens" in capsys.readouterr().err
    for args, word in (
        (
            ["--load_state", state, "--prompt", "b"],
            "position 18, the model has learned 16: shorten it, or begin without the 16 of",
        ),
        (["--load_state", state], "position 17"),
        (["--prompt", "a" * 16], "position 17, the model has learned 16: shorten it"),
    ):
        with pytest.raises(ValueError, match=word) as e:
            main([*base, *args])
        assert capsys.readouterr().out == "" and one_line(e.value)


@pytest.mark.parametrize("chats", (False, True))
def test_what_was_said_is_kept_when_the_reader_leaves_early(chats, talker, tmp_path):  # noqa: F811
    """`python sample.py ... --save_state F | head`: quiet, and the state is that of a
    text that goes on.
    """
    file = tmp_path / "s.state"
    script = ["-m", "tools.chat"] if chats else ["sample.py", "--prompt", "a", "--no-stop"]
    run = subprocess.Popen(
        [sys.executable, *script, "--ckpt", str(talker), "--max_tokens", "20000", "--save_state", str(file)],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    run.stdin.write(b"hello\n" * 2000)
    run.stdin.close()
    run.stdout.read(3)
    run.stdout.close()
    err = run.stderr.read().decode()
    assert run.wait() == 0 and "Traceback" not in err and "memory of" in err and "BrokenPipe" not in err
    state, unread = load_state(file, load_model(talker))
    assert state.position > 1 and len(unread) >= 1


# ------------------------------------------------------------------------------------------
# tools.chat


@pytest.mark.parametrize("dtype", ("float32", "int8"))
def test_a_chat_goes_on_in_another_process(talker, dtype, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Two questions in one chat, or one today and one tomorrow: the state waits in the
    same dtype either way.
    """
    args = ["--ckpt", str(talker), "--max_tokens", "6", "--temperature", "0", "--state_dtype", dtype]
    file = ["--save_state", str(tmp_path / "c.state")]
    heard = []
    for questions, more in (("one\ntwo\n", []), ("one\n", file), ("two\n", ["--load_state", file[1], *file])):
        monkeypatch.setattr(sys, "stdin", io.StringIO(questions))
        chat.main([*args, *more])
        heard.append(capsys.readouterr())
    assert (
        heard[0].out == heard[1].out + heard[2].out
        and heard[0].err == heard[2].err
        and "memory of" in heard[0].err
    )
    back, unread = load_state(file[1], load_model(talker))
    assert isinstance(back.layers[0][0][1], Int8) == (dtype == "int8") and unread[-1] == 10


# ------------------------------------------------------------------------------------------
# tools.batch


def test_prompts_from_a_file_are_those_given_one_by_one(folder, tmp_path, capsys):
    lines = ["a", "a longer one", "", "né"]
    (tmp_path / "p.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    base = ["--ckpt", str(folder), "--no-stop", "--max_tokens", "9"]
    batch.main([*base, "--prompts", str(tmp_path / "p.txt")])
    out, err = capsys.readouterr()
    assert (
        f"prefill {sum(len(line.encode()) + 1 for line in lines)} tokens" in err
        and "decode 4 x 8 tokens" in err
        and "memory of 21 tokens" in err
    )
    single = []
    for line in lines:
        main([*base, "--prompt", line])
        single.append(capsys.readouterr().out.removesuffix("\n"))
    assert out == "\n---------------\n".join(single) + "\n"


def test_prompts_end_each_at_its_own_last_position(tmp_path, capsys):
    """With learned positions no long line cuts a short one; one too long is named."""
    save_model(
        tiny_model(positions="learned", block_size=24, std=0.5), tmp_path / "m", {"tokenizer": "bytes"}
    )
    lines, base = ["one", "a much longer line", "two", "x" * 22], [
        "--ckpt",
        str(tmp_path / "m"),
        "--max_tokens",
        "30",
    ]
    for more in (["--no-stop"], []):
        (tmp_path / "p.txt").write_text("\n".join(lines))
        batch.main([*base, *more, "--prompts", str(tmp_path / "p.txt")])
        out, single = capsys.readouterr().out, []
        for line in lines:
            main([*base, *more, "--prompt", line])
            single.append(capsys.readouterr().out.removesuffix("\n"))
        assert out == "\n---------------\n".join(single) + "\n"
    (tmp_path / "p.txt").write_text("one\n" + "x" * 24)
    with pytest.raises(ValueError, match="in line 2 ends at position 25"):
        batch.main([*base, "--prompts", str(tmp_path / "p.txt")])


def test_only_a_line_feed_ends_a_prompt(tmp_path, capsys):
    save_model(tiny_model(mixer="r"), tmp_path / "m", {"tokenizer": "bytes"})
    (tmp_path / "p.txt").write_bytes("\ufeffone\x0ctwo\u2028three\x85four\r\n\r\nfive\r\n".encode())
    batch.main(["--ckpt", str(tmp_path / "m"), "--prompts", str(tmp_path / "p.txt"), "--max_tokens", "1"])
    wants = ["one\x0ctwo\u2028three\x85four", "", "five"]
    for text, want in zip(capsys.readouterr().out.split("\n---------------\n"), wants, strict=True):
        assert text.startswith(want)


def test_prompts_go_on_from_a_state(folder, tmp_path, capsys):
    book, lines = str(tmp_path / "book.state"), ["a", "longer"]
    base = ["--ckpt", str(folder), "--no-stop", "--max_tokens"]
    main([*base, "0", "--prompt", "once upon", "--save_state", book])
    (tmp_path / "p.txt").write_text("\n".join(lines))
    capsys.readouterr()
    batch.main([*base, "7", "--prompts", str(tmp_path / "p.txt"), "--load_state", book])
    out, single = capsys.readouterr().out, []
    for line in lines:
        main([*base, "7", "--prompt", line, "--load_state", book])
        single.append(capsys.readouterr().out.removesuffix("\n"))
    assert out == "\n---------------\n".join(single) + "\n"


# ------------------------------------------------------------------------------------------
# What a user can get wrong


def test_bad_states_of_the_scripts_are_one_line(folder, talker, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "p.txt").write_text("a\nb\n")
    p, s = str(tmp_path / "p.txt"), str(tmp_path / "s.state")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    choices = "float32.*float16.*bfloat16"
    cases = [
        (main, ["--load_state", p], "damaged or no state"),
        (main, ["--load_state", "none"], "no state at"),
        (main, ["--state_dtype", "int4"], "int4.*--state.dtype.*" + choices),
        (main, ["--dtype", "int4"], "int4.*--dtype.*" + choices),
        (main, ["--save_state", s, "--num_samples", "2"], "num_samples"),
        (batch.main, ["--save_state", s, "--prompts", p], "state of one text"),
        (batch.main, ["--state_dtype", "int8", "--prompts", p], "int8 is for the --save_state of"),
        (batch.main, ["--prompts", p, "--prompt", "a"], "prompt"),
        (main, ["--prompts", p], "prompts"),
        (batch.main, ["--prompts", str(tmp_path / "empty.txt")], "has no line"),
        (batch.main, ["--prompts", "none.txt"], "can't be read"),
        (batch.main, ["--prompts", ""], "prompts is empty"),
        (batch.main, ["--prompts", p, "--load_state", "none"], "no state at"),
        (main, ["--load_state", ""], "load_state is empty"),
        (main, ["--save_state", ""], "save_state is empty"),
        (main, ["--save_state", str(tmp_path)], "is a folder: name a file"),
        (main, ["--state_dtype", "int8"], "for --save_state and tools.chat"),
        (main, ["--max_tokens", "0"], "max_tokens"),
        (main, ["--max_tokens", "0", "--save_state", s], "nothing to read"),
        (chat.main, ["--ckpt", str(talker), "--save_state", s], "nothing was said"),
        (chat.main, ["--ckpt", str(folder), "--load_state", p], "damaged or no state"),
    ]
    for script, args, word in cases:
        with pytest.raises(ValueError, match=word) as e:
            script(["--ckpt", str(folder), *args])
        one_line(e.value)
    assert not Path(s).exists()
