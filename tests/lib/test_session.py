"""A session: the model that its options say; a state is written at the end or never."""

import pytest
import torch

import lib.session
from common import one_line, tiny_model
from common_models import rwkv_folder  # noqa: F401
from data.tokenizer import TextStream, get_tokenizer
from lib.decode import Decoder
from lib.folders import load_model, save_model
from lib.session import Session, SessionConfig, first_tokens, read_only, room, session
from lib.state_file import compress, load_state, save_state
from lib.states import process
from model import State
from sample import generate, main


def test_the_scripts_dtype_is_of_the_decoders_matrices(tmp_path, capsys):
    save_model(tiny_model(mixer="r", ffn="channelmix"), tmp_path / "r", {"tokenizer": "bytes"})
    save_model(tiny_model(), tmp_path / "a", {"tokenizer": "bytes"})
    options = ["--prompt", "a", "--no-stop", "--temperature", "0", "--max_tokens", "40"]
    options += ["--dtype", "bfloat16"]
    main(["--ckpt", str(tmp_path / "r"), *options])
    half = Decoder(load_model(tmp_path / "r").eval(), torch.bfloat16)
    stream = TextStream(get_tokenizer("bytes"))
    steps = generate(half, torch.tensor([[256, 97]]), 40, temperature=0)
    new = [stream(token.item()) for token, _ in steps]
    assert capsys.readouterr().out == "a" + "".join(new) + stream(None) + "\n"
    with pytest.raises(ValueError, match="keep float32") as e:
        main(["--ckpt", str(tmp_path / "a"), *options])
    one_line(e.value)


def test_what_is_remembered_is_written_with_what_was_not_read(rwkv_folder, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "deep" / "s.state"
    cfg = SessionConfig(ckpt=str(rwkv_folder), save_state=str(file))
    with session(cfg) as here:
        assert here.state is None and here.unread == [] and here.decoder.cfg.mixers == "rr"
        read_only([256, 97, 98], here)
        assert not file.exists()
    assert "memory of 2 tokens" in capsys.readouterr().err
    state, unread = load_state(file, load_model(rwkv_folder), "bytes")
    assert state.position == 2 and unread == [98]
    with session(SessionConfig(ckpt=str(rwkv_folder), load_state=str(file))) as here:
        assert here.state.position == 2 and here.unread == [98]


@pytest.mark.parametrize("unread", [[], [7], [7, 8]])
def test_a_state_that_is_saved_again_keeps_what_was_not_read(rwkv_folder, tmp_path, unread):  # noqa: F811
    """[] where the text had ended: no other document begins by itself."""
    model, (file, again) = load_model(rwkv_folder), (tmp_path / "s.state", tmp_path / "again.state")
    _, state = process(model, torch.tensor([[256, 97, 98]]))
    save_state(file, model, state, "bytes", unread)
    main(["--ckpt", str(rwkv_folder), "--load_state", str(file), "--max_tokens", "0",
          "--save_state", str(again)])
    after, left = load_state(again, model, "bytes")
    assert (after.position, left) == (3, unread)
    rest = torch.tensor([left + [99]])
    expected, _ = process(model, torch.tensor([unread + [99]]), state)
    torch.testing.assert_close(process(model, rest, after)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_state_of_two_texts_is_refused(rwkv_folder, tmp_path, dtype):  # noqa: F811
    model, file = load_model(rwkv_folder), tmp_path / "two.state"
    _, state = process(model, torch.tensor([[256, 97], [256, 98]]))
    save_state(file, model, compress(state, dtype), "bytes")
    with pytest.raises(ValueError, match="two.state remembers 2 texts, and goes on with one: save one") as e:
        main(["--ckpt", str(rwkv_folder), "--load_state", str(file)])
    one_line(e.value)


def test_a_session_that_fails_writes_nothing(rwkv_folder, tmp_path):  # noqa: F811
    file = tmp_path / "s.state"
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            with session(SessionConfig(ckpt=str(rwkv_folder), save_state=str(file))) as here:
                read_only([256, 97], here)
                raise error("no")
    assert not file.exists()


def test_a_reader_that_leaves_is_no_error_unless_a_state_was_to_be_kept(rwkv_folder, tmp_path,  # noqa: F811
                                                                        monkeypatch):
    hushed = []
    monkeypatch.setattr(lib.session, "hush", lambda e: hushed.append(e))
    with session(SessionConfig(ckpt=str(rwkv_folder))):
        raise BrokenPipeError
    file = tmp_path / "s.state"
    with pytest.raises(ValueError, match="nothing was saved to .*ended before the text began") as e:
        with session(SessionConfig(ckpt=str(rwkv_folder), save_state=str(file))):
            raise BrokenPipeError
    one_line(e.value)
    assert len(hushed) == 2 and not file.exists()


def test_there_is_room_up_to_the_last_learned_position_and_without_these_for_ever():
    """The last token drawn needs no position: nobody reads it."""
    decoder = Decoder(tiny_model(positions="learned"))

    def bounded(start: int) -> Session:
        return Session(decoder, get_tokenizer("bytes"), State(start, ()) if start else None, [])

    free = Session(Decoder(tiny_model()), get_tokenizer("bytes"), State(99, ()), [])
    assert room(bounded(0), 16) == 1 and room(bounded(5), 6) == 6 and room(free, 99) == float("inf")
    for start, prompt, words in ((0, 17, "position 17, the model has learned 16: shorten it"),
                                 (10, 7, "position 17.*, or begin without the 10 of --load_state")):
        with pytest.raises(ValueError, match=words) as e:
            room(bounded(start), prompt)
        one_line(e.value)
    with pytest.raises(ValueError, match="the prompt in line 3 ends at"):
        room(bounded(0), 17, " in line 3")


def test_a_prompt_that_the_model_cannot_read_is_one_line(tmp_path):
    save_model(tiny_model(vocab_size=100), tmp_path / "m", {"tokenizer": "bytes"})
    with session(SessionConfig(ckpt=str(tmp_path / "m"))) as here:
        with pytest.raises(ValueError, match="token 256, .* vocabulary ends at 99: meta.json in m") as e:
            first_tokens("a", here, "m")
        one_line(e.value)
        here.state, here.unread = State(1, ()), [7]
        assert first_tokens("ab", here, "m") == [7, 97, 98]
        here.state = None
        with pytest.raises(ValueError, match="nothing to read and to remember; give a prompt") as e:
            read_only([5], here)
        one_line(e.value)


def test_files_that_cannot_be_are_refused_before_anything_is_loaded(tmp_path):
    for change, words in (({"load_state": ""}, "load_state is empty .*: name one, or omit it"),
                          ({"save_state": ""}, "save_state is empty .*: name one, or omit it"),
                          ({"save_state": str(tmp_path)}, "is a folder: name a file"),
                          ({"state_dtype": "int4"}, "state_dtype = 'int4': choose one of float32"),
                          ({"dtype": "int4"}, "dtype = 'int4': choose one of float32, .*, int8")):
        with pytest.raises(ValueError, match=words) as e:
            SessionConfig(**change)
        one_line(e.value)


def test_a_state_replaces_nothing_but_a_state(rwkv_folder, tmp_path):  # noqa: F811
    """Before the model is loaded, which may take minutes."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    weights = rwkv_folder / "model.safetensors"
    before, notes = weights.read_bytes(), tmp_path / "notes.txt"
    for file in (weights, rwkv_folder / "config.json", notes, tmp_path / "link", "/dev/null"):
        with pytest.raises(ValueError, match="^--save_state: .*this command did not write it") as e:
            main(["--ckpt", "no-such-model", "--save_state", str(file)])
        one_line(e.value)
        with pytest.raises(ValueError):
            main(["--ckpt", str(rwkv_folder), "--prompt", f"FILE:{notes}", "--save_state", str(file)])
    assert weights.read_bytes() == before and notes.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_a_reader_that_leaves_at_the_end_leaves_the_state(rwkv_folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(lib.session, "hush", lambda e: None)
    for error in (BrokenPipeError(), OSError(5, "Input/output error")):
        file = tmp_path / f"{type(error).__name__}.state"
        with session(SessionConfig(ckpt=str(rwkv_folder), save_state=str(file))) as here:
            read_only([256, 97, 98], here)
            raise error
        assert load_state(file, load_model(rwkv_folder), "bytes")[1] == [98]
    with pytest.raises(OSError, match="Input/output error"):               # nothing to keep: it is said
        with session(SessionConfig(ckpt=str(rwkv_folder))):
            raise OSError(5, "Input/output error")
