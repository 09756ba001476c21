"""A state is a value: reading gives another one, texts of any lengths go side by side, and a file gives it back or refuses."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import state as states
from common import REPO, one_line, tiny_model
from model import State, load_model, save_model, tensors
from sample import Decoder, generate, main
from state import Int8, compress, copy, expand, fingerprint, join, load_state, process, process_rows, reset, save_state, select
from test_sample import MODELS, drawn, talker, tokens  # noqa: F401

ALL = MODELS | {"RWKV with rope": {"mixer": "r", "rwkv_rope": True}, "RWKV, learned positions": {"mixer": "r", "positions": "learned", "block_size": 64}}


def model_of(name: str):
    return tiny_model(std=0.5, **ALL[name]).eval()


def close(a: State, b: State) -> None:
    assert a.position == b.position
    for x, y in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def same(a: State, b: State) -> bool:
    return a.position == b.position and all(map(torch.equal, tensors(a), tensors(b)))


# ---------------------------------------------------------------------------------------------------------------------
# Reading

@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("piece", (1, 5, 23, 512))
def test_a_text_in_pieces_is_the_text_at_once(name, piece):
    model, text = model_of(name), tokens(2, 23)
    with torch.no_grad():
        logits, whole = model(text)
    last, pieces = process(model, text, piece=piece)
    torch.testing.assert_close(last, logits[:, -1], rtol=1e-4, atol=1e-4)
    close(pieces, whole)


@pytest.mark.parametrize("name", ALL)
def test_conversations_that_take_turns_are_those_held_alone(name):
    """No call changes the state it is given, and none remembers another's: three texts by turns from one beginning."""
    model, opening = model_of(name), tokens(1, 5)
    texts = [tokens(1, 12, seed=seed) for seed in (1, 2, 3)]
    alone = [process(model, torch.cat((opening, text), 1)) for text in texts]
    _, begun = process(model, opening)
    before, now = copy(begun), [begun] * 3
    decoder = Decoder(model)
    for i in range(0, 12, 3):
        for j, text in enumerate(texts):
            kept = copy(now[j])
            _, after = process(model, text[:, i : i + 2], now[j])
            assert same(kept, now[j])
            kept = copy(after)
            logits, now[j] = decoder(text[:, i + 2], after)
            assert same(kept, after)
            if i == 9:
                torch.testing.assert_close(logits, alone[j][0], rtol=1e-4, atol=1e-4)
    assert same(before, begun)
    for a, (_, b) in zip(now, alone):
        close(a, b)


@pytest.mark.parametrize("name", ALL)
def test_a_state_holds_its_own_bytes_and_no_activations(name):
    model = model_of(name)
    _, read = process(model, tokens(2, 60), piece=20)
    for state in (read, Decoder(model)(tokens(2, 1)[:, 0], read)[1], copy(read), select(read, [1, 1])):
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors(state)}
        assert sum(held.values()) == state.nbytes() and not any(x.requires_grad for x in tensors(state))


@pytest.mark.parametrize("name", ALL)
def test_a_reset_state_is_that_of_nothing_read(name):
    model, text = model_of(name), tokens(2, 9)
    _, used = process(model, tokens(2, 17, seed=1))
    kept, empty = copy(used), reset(used)
    logits, state = process(model, text, empty)
    fresh, other = process(model, text)
    torch.testing.assert_close(logits, fresh)
    close(state, other)
    assert same(kept, used) and empty.position == 0


def test_a_copy_may_be_written_into():
    _, state = process(model_of("hybrid"), tokens(1, 9))
    kept, mine = copy(state), copy(state)
    for x in tensors(mine):
        x.zero_()
    assert same(kept, state)


# ---------------------------------------------------------------------------------------------------------------------
# Batches of different lengths

LENGTHS = (7, 1, 12, 7, 3)


@pytest.mark.parametrize("name", ALL)
def test_rows_of_any_lengths_are_read_as_alone_each_token_once(name, monkeypatch):
    model, rows = model_of(name), [tokens(1, n, seed=i)[0] for i, n in enumerate(LENGTHS)]
    read = []
    monkeypatch.setattr(states, "process", lambda model, text, *rest: read.append(text.numel()) or process(model, text, *rest))
    logits, after = process_rows(model, rows)
    assert sum(read) == sum(LENGTHS)
    for row, a, s in zip(rows, logits, after):
        alone, state = process(model, row[None])
        torch.testing.assert_close(a[None], alone, rtol=1e-4, atol=1e-4)
        close(s, state)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_prompts_of_different_lengths_get_the_tokens_each_gets_alone(name, temperature):
    """Also when they draw, each by its own generator; and after a state."""
    model, prompts = model_of(name), [tokens(1, n, seed=i)[0].tolist() for i, n in enumerate(LENGTHS)]
    seeds = lambda: [torch.Generator().manual_seed(i) for i in range(len(prompts))]  # noqa: E731
    for state in (None, process(model, tokens(len(prompts), 4, seed=9))[1]):
        *steps, (_, batches) = generate(model, prompts, 12, temperature=temperature, generator=seeds(), state=state)
        new = torch.stack([t for t, _ in steps], 1)
        for i, (prompt, generator) in enumerate(zip(prompts, seeds())):
            own = None if state is None else select(state, [i])
            assert new[i].tolist() == drawn(model, torch.tensor([prompt]), 12, temperature=temperature, generator=generator, state=own)[0, :11].tolist()
        one = name in ("RWKV-7", "student")
        assert sorted(i for rows, _ in batches for i in rows) == [0, 1, 2, 3, 4] and len(batches) == (1 if one else 4)


def test_joined_states_are_select_backwards():
    model = model_of("RWKV-7")
    _, state = process(model, tokens(3, 9))
    (rows, joined), = join(model.cfg, [select(state, [i]) for i in range(3)])
    assert rows == [0, 1, 2] and same(joined, state)


# ---------------------------------------------------------------------------------------------------------------------
# Smaller

def test_int8_by_hand():
    x = torch.tensor([[0.0, 1.0, -127.0, 63.4], [0, 0, 0, 0], [1e-3, -2e-3, 0, 127e-3]])
    small = compress(State(4, (((x, x[None], 4), None),)), "int8")
    q = small.layers[0][0][0]
    assert q.q.tolist() == [[0, 1, -127, 63], [0] * 4, [1, -2, 0, 127]] and q.scale.shape == (3, 1)
    back = expand(small)
    assert back.position == 4 and back.layers[0][0][2] == 4 and back.layers[0][1] is None
    torch.testing.assert_close(back.layers[0][0][0], torch.tensor([[0.0, 1, -127, 63], [0, 0, 0, 0], [1e-3, -2e-3, 0, 127e-3]]), rtol=4e-3, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_a_compressed_state_is_near_and_small(name):
    """int8: each number within half a step of its row, (half + 0.4 %) of 1/127 of the largest; 16 bits: their rounding."""
    _, state = process(model_of(name), tokens(2, 40))
    for dtype, factor, most in (("float32", 1, 0), ("float16", 2, 2**-11), ("bfloat16", 2, 2**-8), ("int8", None, 0.51 / 127 + 0.004)):
        small = compress(state, dtype)
        back = expand(small)
        for x, y in zip(tensors(state), tensors(back), strict=True):
            assert y.dtype == torch.float32
            assert ((x - y).abs() <= most * x.abs().amax(-1, keepdim=True) + 1e-7).all()
        if factor:
            assert small.nbytes() * factor == state.nbytes()
        else:  # 1 byte a number, 2 a row
            assert small.nbytes() == sum(x.numel() + 2 * x.numel() // x.shape[-1] for x in tensors(state))
        assert compress(small, dtype) is small if dtype == "float32" else same(compress(small, dtype), small)


def test_int8_takes_up_a_quarter_for_heads_of_64():
    _, state = process(tiny_model(mixer="r", ffn="channelmix", n_embd=128, rwkv_head_size=64).eval(), tokens(1, 9))
    assert state.nbytes() / compress(state, "int8").nbytes() > 3.87


def test_int8_changes_what_is_said_by_little():
    """KL of the next 64 tokens against the uncompressed state. The 16-bit formats lose less, and nothing at all is not the answer."""
    model, text = tiny_model(std=1.0, mixer="r", ffn="channelmix", n_embd=64, rwkv_head_size=32).eval(), tokens(8, 64, seed=1)
    _, state = process(model, tokens(8, 200))

    def says(dtype: str) -> torch.Tensor:
        with torch.no_grad():
            return model(text, expand(compress(state, dtype)))[0].double().log_softmax(-1)

    exact = says("float32")
    kl = {d: (exact.exp() * (exact - says(d))).sum(-1).mean().item() for d in states.DTYPES}
    assert kl["float32"] == 0 < kl["float16"] < kl["bfloat16"] < kl["int8"] < 5e-3, kl


def test_what_cannot_be_compressed_is_one_line():
    state = State(1, (((torch.tensor([[1e6]]), torch.ones(1, 1, 1, 1), 1), None),))
    for dtype, word, x in (("float16", "float16 cannot hold", state), ("int4", "int4", state),
                           ("int8", "cannot hold", State(1, (((torch.tensor([[float("nan")]]), torch.ones(1), 1), None),)))):
        with pytest.raises(ValueError, match=word) as e:
            compress(x, dtype)
        one_line(e.value)


# ---------------------------------------------------------------------------------------------------------------------
# Files

@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", states.DTYPES)
def test_a_file_gives_the_state_back_bit_for_bit(name, dtype, tmp_path):
    model = model_of(name)
    _, state = process(model, tokens(2, 9))
    small = compress(state, dtype)
    save_state(tmp_path / "new" / "s.state", model, small, "bytes", [3, 4])
    back, unread = load_state(tmp_path / "new" / "s.state", model, "bytes")
    assert same(back, small) and unread == [3, 4] and same(expand(back), expand(small))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["s.state"]
    process(model, tokens(2, 3), expand(back))


def test_a_fingerprint_is_of_weights_and_settings():
    a = tiny_model(mixer="r")
    assert fingerprint(a) == fingerprint(tiny_model(mixer="r")) != fingerprint(tiny_model(mixer="r", norm_eps=1e-6))
    with torch.no_grad():
        before = fingerprint(a)
        a.blocks[1].att.w0[0, 0, 3] += 1e-6
    assert fingerprint(a) != before


def test_a_foreign_or_damaged_file_is_one_line(tmp_path):
    model, file = model_of("hybrid"), tmp_path / "s.state"
    _, state = process(model, tokens(1, 9))
    save_state(file, model, state, "bytes")
    good = file.read_bytes()
    with safe_open(file, "pt") as f:
        meta, weights = f.metadata(), {name: f.get_tensor(name).clone() for name in f.keys()}

    def refused(word: str, model=model, file=file, tokenizer="bytes"):
        with pytest.raises(ValueError, match=word) as e:
            load_state(file, model, tokenizer)
        one_line(e.value)

    refused("another model", tiny_model(1, std=0.5, **ALL["hybrid"]))
    refused("another model", model_of("RWKV-7"))
    refused("tokenizer", tokenizer="gpt2")
    refused("no state at", file=tmp_path / "none")
    refused("no state at", file=tmp_path)
    for bad in (good[:-7], good[:40], b"", b"nonsense" * 99, bytes(8) + good[8:]):
        file.write_bytes(bad)
        refused("damaged or no state")
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused("damaged")
    save_file(weights, file)
    refused("no state: its format")
    for changed in ({"position": "10"}, {"unread": "[1]"}, {"tokenizer": "gpt2"}, {"model": fingerprint(model_of("GPT"))}):
        save_file(weights, file, meta | changed)
        refused("damaged")
    save_file({name: x for name, x in list(weights.items())[1:]}, file, meta)
    refused("damaged")
    save_model(model, tmp_path / "m", {"tokenizer": "bytes"})
    save_file(weights, file, meta)
    load_state(file, load_model(tmp_path / "m"))


# ---------------------------------------------------------------------------------------------------------------------
# The script

@pytest.fixture(scope="module", params=("RWKV-7", "GPT", "hybrid"))
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(tiny_model(std=0.5, **ALL[request.param]), path, {"tokenizer": "bytes"})
    return path


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
    new = drawn(load_model(folder).eval(), torch.tensor([[256, *b"once upon a time"]]), 30, temperature=0)[0].tolist()
    assert drawn(load_model(folder).eval(), torch.tensor([unread]), 17, temperature=0, state=state)[0].tolist() == new[13:] and unread == new[12:13]
    main([*base, "17", "--load_state", book, "--num_samples", "2"])
    a, b = capsys.readouterr().out.removesuffix("\n").split("\n---------------\n")
    assert a == b
    for dtype in ("int8", "float16"):
        main([*base, "0", "--prompt", "once upon a", "--save_state", book, "--state_dtype", dtype])
        main([*base, "5", "--prompt", " time", "--load_state", book])


def test_prompts_from_a_file_are_those_given_one_by_one(folder, tmp_path, capsys):
    lines = ["a", "a longer one", "", "né"]
    (tmp_path / "p.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    base = ["--ckpt", str(folder), "--no-stop", "--max_tokens", "9"]
    main([*base, "--prompts", str(tmp_path / "p.txt")])
    out, err = capsys.readouterr()
    assert f"prefill {sum(len(line.encode()) + 1 for line in lines)} tokens" in err and "decode 4 x 8 tokens" in err and "memory of 21 tokens" in err
    single = []
    for line in lines:
        main([*base, "--prompt", line])
        single.append(capsys.readouterr().out.removesuffix("\n"))
    assert out == "\n---------------\n".join(single) + "\n"


@pytest.mark.parametrize("dtype", ("float32", "int8"))
def test_a_chat_goes_on_in_another_process(talker, dtype, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Two questions in one chat, or one today and one tomorrow: the state waits in the same dtype either way."""
    args = ["--ckpt", str(talker), "--chat", "--max_tokens", "6", "--temperature", "0", "--state_dtype", dtype]
    file = ["--save_state", str(tmp_path / "c.state")]
    heard = []
    for questions, more in (("one\ntwo\n", []), ("one\n", file), ("two\n", ["--load_state", file[1], *file])):
        monkeypatch.setattr(sys, "stdin", io.StringIO(questions))
        main([*args, *more])
        heard.append(capsys.readouterr())
    assert heard[0].out == heard[1].out + heard[2].out and heard[0].err == heard[2].err and "memory of" in heard[0].err
    back, unread = load_state(file[1], load_model(talker))
    assert isinstance(back.layers[0][0][1], Int8) == (dtype == "int8") and unread[-1] == 10


def test_prompts_end_each_at_its_own_last_position(tmp_path, capsys):
    """With learned positions a short line is not cut by a long one; a line that is too long is named."""
    save_model(tiny_model(positions="learned", block_size=24, std=0.5), tmp_path / "m", {"tokenizer": "bytes"})
    lines, base = ["one", "a much longer line", "two", "x" * 22], ["--ckpt", str(tmp_path / "m"), "--max_tokens", "30"]
    for more in (["--no-stop"], []):
        (tmp_path / "p.txt").write_text("\n".join(lines))
        main([*base, *more, "--prompts", str(tmp_path / "p.txt")])
        out, single = capsys.readouterr().out, []
        for line in lines:
            main([*base, *more, "--prompt", line])
            single.append(capsys.readouterr().out.removesuffix("\n"))
        assert out == "\n---------------\n".join(single) + "\n"
    (tmp_path / "p.txt").write_text("one\n" + "x" * 24)
    with pytest.raises(ValueError, match="in line 2 ends at position 25"):
        main([*base, "--prompts", str(tmp_path / "p.txt")])


def test_only_a_line_feed_ends_a_prompt(tmp_path, capsys):
    save_model(tiny_model(mixer="r"), tmp_path / "m", {"tokenizer": "bytes"})
    (tmp_path / "p.txt").write_bytes("\ufeffone\x0ctwo\u2028three\x85four\r\n\r\nfive\r\n".encode())
    main(["--ckpt", str(tmp_path / "m"), "--prompts", str(tmp_path / "p.txt"), "--max_tokens", "1"])
    wants = ["one\x0ctwo\u2028three\x85four", "", "five"]
    for text, want in zip(capsys.readouterr().out.split("\n---------------\n"), wants, strict=True):
        assert text.startswith(want)


def test_pieces_are_shorter_for_more_rows(monkeypatch):
    """So that memory does not grow with the number of rows, down to 16 tokens of each."""
    model, shapes = model_of("RWKV-7"), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda text, state: shapes.append(tuple(text.shape)) or hidden(text, state))
    for B, T, widths in ((1, 700, (512, 188)), (5, 700, (102,) * 6 + (88,)), (100, 40, (16, 16, 8))):
        shapes.clear()
        process(model, tokens(B, T))
        assert shapes == [(B, n) for n in widths]


def test_what_cannot_be_read_on_from_is_one_line():
    model = model_of("RWKV-7")
    _, two = process(model, tokens(2, 3))
    for call, word in ((lambda: process(model, tokens(1, 3), two), "state of 2"), (lambda: process_rows(model, [tokens(1, 3)[0]], two), "state of 2"),
                       (lambda: process(model, tokens(2, 3), compress(two, "int8")), "expand"), (lambda: process_rows(model, []), "at least one text"),
                       (lambda: process(model, tokens(2, 3)[:0]), "0 texts of 3 tokens")):
        with pytest.raises(ValueError, match=word) as e:
            call()
        one_line(e.value)


@pytest.mark.parametrize("chats", (False, True))
def test_what_was_said_is_kept_when_the_reader_leaves_early(chats, talker, tmp_path):  # noqa: F811
    """`python sample.py ... --save_state F | head`: quiet, and the state is that of a text that goes on."""
    file, more = tmp_path / "s.state", ["--chat"] if chats else ["--prompt", "a", "--no-stop"]
    run = subprocess.Popen([sys.executable, str(REPO / "sample.py"), "--ckpt", str(talker), *more, "--max_tokens", "20000", "--save_state", str(file)],
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    run.stdin.write(b"hello\n" * 2000)
    run.stdin.close()
    run.stdout.read(3)
    run.stdout.close()
    err = run.stderr.read().decode()
    assert run.wait() == 0 and "Traceback" not in err and "memory of" in err and "BrokenPipe" not in err
    state, unread = load_state(file, load_model(talker))
    assert state.position > 1 and len(unread) >= 1


def test_a_text_ends_at_the_last_learned_position_whatever_was_read_before(tmp_path, capsys):
    """Nothing is printed before what cannot go on is refused; what can goes on to the last position."""
    save_model(tiny_model(positions="learned", block_size=16), tmp_path / "m", {"tokenizer": "bytes"})
    base, state = ["--ckpt", str(tmp_path / "m"), "--no-stop", "--temperature", "0"], str(tmp_path / "s.state")
    main([*base, "--prompt", "a" * 9, "--save_state", state])  # 10 tokens, and 7 more of which the last is not read
    assert "decode 1 x 6 tokens" in capsys.readouterr().err
    for args, word in ((["--load_state", state, "--prompt", "b"], "position 18, the model has learned 16: shorten it, or begin without the 16 of"),
                       (["--load_state", state], "position 17"), (["--prompt", "a" * 16], "position 17, the model has learned 16: shorten it")):
        with pytest.raises(ValueError, match=word) as e:
            main([*base, *args])
        assert capsys.readouterr().out == "" and one_line(e.value)


def test_bad_states_of_the_script_are_one_line(folder, talker, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "p.txt").write_text("a\nb\n")
    p, s = str(tmp_path / "p.txt"), str(tmp_path / "s.state")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    for args, word in ((["--load_state", p], "damaged or no state"), (["--load_state", "none"], "no state at"), (["--state_dtype", "int4"], "state_dtype"),
                       (["--dtype", "int8"], "dtype = 'int8': choose one of float32, float16, bfloat16"),
                       (["--save_state", s, "--num_samples", "2"], "num_samples"), (["--save_state", s, "--prompts", p], "prompts"),
                       (["--prompts", p, "--prompt", "a"], "prompt"), (["--prompts", str(tmp_path / "empty.txt")], "has no line"),
                       (["--prompts", "none.txt"], "can't be read"), (["--prompts", ""], "prompts is empty"),
                       (["--load_state", ""], "load_state is empty"), (["--save_state", ""], "save_state is empty"),
                       (["--state_dtype", "int8"], "for --save_state and --chat"), (["--max_tokens", "0"], "max_tokens"),
                       (["--max_tokens", "0", "--save_state", s], "nothing to read"),
                       (["--ckpt", str(talker), "--chat", "--save_state", s], "nothing was said")):
        with pytest.raises(ValueError, match=word) as e:
            main(["--ckpt", str(folder), *args])
        one_line(e.value)
    assert not Path(s).exists()
