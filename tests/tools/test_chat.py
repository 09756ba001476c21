"""A chat: one state hears it all, each word is read once, and what was said is kept."""

import errno
import io
import shutil
import sys

import pytest
import torch

import tools.chat
from common import one_line, start, tiny_model
from common_models import rwkv_folder  # noqa: F401
from common_sample import drawn, talker  # noqa: F401
from data.chat import encode_turns
from data.tokenizer import load_tokenizer
from lib.folders import load_model, save_model
from lib.state_file import load_state
from lib.states import process, tensors
from model import State
from sample import generate
from tools.chat import ChatConfig, main


def test_a_chat_reads_each_word_once_and_as_the_template_has_it(talker, capsys, monkeypatch):  # noqa: F811
    """What the model is fed, piece by piece, is the whole conversation.

    Whatever ends an answer, the next question follows a whole one.
    """
    fed, answers = [], iter([b"yes", b"no", b"cut"])
    ends = iter([[261], [256], []])  # its own end of a turn, the end of a document, max_tokens

    def scripted(model, prompt, n, *, stop, state, **options):
        assert stop == (256, 261) and (state is None) == (not fed)
        answer = [*next(answers), *next(ends)]
        fed.extend([*prompt[0].tolist(), *answer[:-1]])  # the last one is not read yet
        yield from ((torch.tensor([token]), State(len(fed), ())) for token in answer)

    monkeypatch.setattr(tools.chat, "generate", scripted)
    monkeypatch.setattr(sys, "stdin", io.StringIO(" a </a>\n\n  \nb\n"))
    main(["--ckpt", str(talker), "--prompt", "first"])
    talk = [("user", "first"), ("assistant", "yes"), ("user", "a </a>"), ("assistant", "no"),
            ("user", "b"), ("assistant", "cut")]
    expected, _ = encode_turns(load_tokenizer(talker), talk)
    assert fed == expected[: len(fed)] and expected[len(fed) :] == [ord("t"), 261, 10]
    out, err = capsys.readouterr()
    assert out == "yes\nno\ncut\n" and f"memory of {len(fed)} tokens" in err


def test_a_chat_goes_on_in_one_state(talker, capsys, monkeypatch):  # noqa: F811
    """It answers as if each time the whole conversation were read anew."""
    model, enc = load_model(talker).eval(), load_tokenizer(talker)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo"))
    main(["--ckpt", str(talker), "--max_tokens", "5", "--temperature", "0"])
    tokens, answers = [], []
    for question in ("one", "two"):
        ids, _ = encode_turns(enc, [("user", question)], opens=not tokens, reply=True)
        tokens += ids
        answer = drawn(model, torch.tensor([tokens]), 5, temperature=0, stop=(256, 261))[0].tolist()
        answers.append(b"".join(enc.decode_single_token_bytes(t) for t in answer if t < 256))
        tokens += [t for t in answer if t not in (256, 261)] + [261, 10]
    expected = "".join(answer.decode(errors="replace") + "\n" for answer in answers)
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("when", (0, 3))
def test_a_chat_that_is_interrupted_keeps_what_was_said(talker, when, tmp_path, monkeypatch):  # noqa: F811
    """In the second answer, before its first token or after three.

    The state is that of all that was read for what was said.
    """
    turns = []

    def interrupted(decoder, text, *args, **options):
        turns.append((text[0].tolist(), []))
        for i, (token, state) in enumerate(generate(decoder, text, *args, **options)):
            if len(turns) == 2 and i == when:
                raise KeyboardInterrupt
            turns[-1][1].append(token.item())
            yield token, state

    monkeypatch.setattr(tools.chat, "generate", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\nthree\n"))
    file = tmp_path / "c.state"
    main(["--ckpt", str(talker), "--max_tokens", "6", "--save_state", str(file)])
    assert len(turns) == 2 and len(turns[1][1]) == when
    model = load_model(talker).eval()
    state, unread = load_state(file, model)
    read = [token for text, answer in turns if answer for token in (*text, *answer[:-1])]
    _, whole = process(model, torch.tensor([read]))
    last = turns[1 if when else 0][1][-1]
    assert state.position == len(read) and unread[0] in (last, 261) and unread[-2:] == [261, 10]
    for a, b in zip(tensors(state), tensors(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_chat_at_the_last_learned_position_ends_and_keeps_what_was_said(talker, tmp_path,  # noqa: F811
                                                                          capsys, monkeypatch):
    save_model(tiny_model(positions="learned", block_size=40, vocab_size=270), tmp_path / "a", {})
    for file in talker.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, tmp_path / "a")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n" * 9))
    main(["--ckpt", str(tmp_path / "a"), "--max_tokens", "6", "--save_state", str(tmp_path / "c.state")])
    assert "longer than the 40 positions" in capsys.readouterr().err
    state, _ = load_state(tmp_path / "c.state", load_model(tmp_path / "a"))
    assert 20 < state.position <= 40


def test_a_chat_that_cannot_be_is_one_line(rwkv_folder, talker):  # noqa: F811
    for args, word in ((["--ckpt", str(rwkv_folder)], "no chat template"),
                       (["--ckpt", str(talker), "--num_samples", "2"], "num_samples"),
                       (["--ckpt", str(talker), "--no-stop"], "no-stop"),
                       (["--ckpt", str(talker), "--max_tokens", "0"], "max_tokens = 0")):
        with pytest.raises(ValueError, match=word) as e:
            main(args)
        one_line(e.value)
    with pytest.raises(ValueError, match="top_p"):
        main(["--ckpt", str(talker), "--top_p", "2"])
    assert ChatConfig().how.temperature == 0.8  # as sample.py's


def test_a_line_that_never_ends_ends_the_chat_and_keeps_what_was_said(talker, tmp_path, capsys,  # noqa: F811
                                                                      monkeypatch):
    monkeypatch.setattr(tools.chat, "LONGEST", 50)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n" + "x" * 1000))
    file = tmp_path / "c.state"
    main(["--ckpt", str(talker), "--max_tokens", "6", "--save_state", str(file)])
    assert "a message of 50 characters or more ends the chat" in capsys.readouterr().err and file.exists()


def test_a_chat_with_nobody_there_ends_at_once(talker):  # noqa: F811
    run = start("-c", "import os, sys; sys.argv[0] = 'chat.py'; os.close(0); sys.stdin = None; "
                "from config import run; from tools.chat import main; run(main, output=True)",
                "--ckpt", talker, "--prompt", "hello", "--max_tokens", "3")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0 and out.endswith("\n") and one_line(err).startswith("memory of")


def test_a_stdin_that_cannot_be_read_is_said_and_what_was_said_is_kept(talker, tmp_path, capsys,  # noqa: F811
                                                                       monkeypatch):
    class Torn(io.StringIO):
        def readline(self, *_):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stdin", Torn())
    monkeypatch.setattr(tools.chat, "hush", lambda e: print(e, file=sys.stderr))
    args = ["--ckpt", str(talker), "--prompt", "one", "--max_tokens", "3"]
    with pytest.raises(OSError, match="Input/output error"):
        main(args)
    main([*args, "--save_state", str(tmp_path / "c.state")])
    assert "Input/output error" in capsys.readouterr().err and (tmp_path / "c.state").exists()
