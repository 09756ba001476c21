"""Generation: what is drawn is what the whole-sequence logits say.

And the memory of an RNN stays as it is.
"""

import pytest
import torch

import sample
from common import tiny_model
from common_models import constant_model, rwkv_folder  # noqa: F401
from common_sample import MODELS, drawn, talker, tokens  # noqa: F401
from lib.folders import load_model
from lib.state_file import load_state
from lib.states import nbytes
from model import State
from sample import choose, generate, main

# ------------------------------------------------------------------------------------------
# Choosing tokens

HALVES = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625]).log()  # likeliest first: tokens 1, 3, 0, then 2, 4
ALL = {1: 0.5, 3: 0.25, 0: 0.125, 2: 0.0625, 4: 0.0625}
TWO = {1: 2 / 3, 3: 1 / 3}


@pytest.mark.parametrize("options, shares", [
    ({"top_p": 0.01}, {1: 1}),
    ({"top_p": 0.5}, {1: 1}),
    ({"top_p": 0.51}, TWO),
    ({"top_p": 0.75}, TWO),
    ({"top_p": 0.875}, {1: 4 / 7, 3: 2 / 7, 0: 1 / 7}),
    ({"top_p": 1.0}, ALL),
    ({"top_k": 2}, TWO),
    ({"top_k": 99}, ALL),
    ({"top_k": 3, "top_p": 0.75}, TWO),
    ({"top_k": 1, "top_p": 1.0}, {1: 1}),
    # probabilities squared
    ({"temperature": 0.5}, {1: 64 / 86, 3: 16 / 86, 0: 4 / 86, 2: 1 / 86, 4: 1 / 86}),
    # top_p counts after the temperature
    ({"temperature": 0.5, "top_p": 0.75}, {1: 64 / 80, 3: 16 / 80}),
])
def test_only_the_likeliest_tokens_are_drawn_and_in_proportion(options, shares):
    n = 40_000
    draws = choose(HALVES.expand(n, 5), generator=torch.Generator().manual_seed(0), **options)
    share = draws.bincount(minlength=5) / n
    for token in range(5):
        tolerance = 0.012 if token in shares else 1e-9
        assert abs(share[token] - shares.get(token, 0)) < tolerance, (token, share)


@pytest.mark.parametrize("options", ({}, {"top_k": 50}, {"top_p": 0.9}))
def test_one_seed_gives_one_text_and_another_seed_another(options):
    model, prompt = tiny_model(mixer="r").eval(), tokens(1, 5).expand(3, 5)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    texts = [drawn(model, prompt, 20, generator=generator, **options) for generator in generators]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert len(set(map(str, texts[0].tolist()))) == 3  # rows of one prompt are different samples


def test_top_k_of_one_is_greedy_however_hot():
    model, prompt = tiny_model(mixer="r").eval(), tokens(2, 5)
    greedy = drawn(model, prompt, 20, temperature=0)
    assert torch.equal(drawn(model, prompt, 20, top_k=1, temperature=9.0), greedy)
    assert torch.equal(drawn(model, prompt, 20, temperature=1e-30), greedy)


# ------------------------------------------------------------------------------------------
# Generating

@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_the_argmax_of_whole_sequence_logits(name):
    model, prompt = tiny_model(std=0.5, **MODELS[name]).eval(), tokens(2, 9)
    new = drawn(model, prompt, 20, temperature=0)
    with torch.no_grad():
        logits = model(torch.cat((prompt, new), 1))[0]
    assert new.shape == (2, 20) and torch.equal(new, logits[:, 8:-1].argmax(-1))


@pytest.mark.parametrize("name", MODELS)
def test_a_text_goes_on_from_its_state(name):
    model, prompt = tiny_model(std=0.5, **MODELS[name]).eval(), tokens(2, 9)
    new = drawn(model, prompt, 12, temperature=0)
    *_, (last, state) = generate(model, prompt, 5, temperature=0)
    assert torch.equal(drawn(model, last[:, None], 7, temperature=0, state=state), new[:, 5:])


def test_penalties_by_hand():
    model, prompt = constant_model([3.0, 2.5, 2.2, 0.0]), torch.tensor([[3, 3]])
    assert drawn(model, prompt, 4, temperature=0).tolist() == [[0, 0, 0, 0]]
    # presence, once: 3.0 -> 2.0, 2.5 -> 1.5, 2.2 -> 1.2, then 2.0 stays the largest;
    # the prompt's 3 does not count
    assert drawn(model, prompt, 6, temperature=0, presence=1.0).tolist() == [[0, 1, 2, 0, 0, 0]]
    # frequency, each time: 3.0, 2.5, (2.4 | 1.9 | 2.2), (1.8 | 1.9 | 2.2),
    # (1.8 | 1.9 | 1.6), (1.8 | 1.3 | 1.6)
    assert drawn(model, prompt, 6, temperature=0, frequency=0.6).tolist() == [[0, 1, 0, 2, 1, 0]]
    # both: 3.0, then 3.0 - 0.3 - 0.4 = 2.3 | 2.5, then 2.3 | 1.8 | 2.2,
    # then 1.9 | 1.8 | 2.2
    both = drawn(model, prompt, 4, temperature=0, presence=0.3, frequency=0.4)
    assert both.tolist() == [[0, 1, 0, 2]]


def test_a_row_that_has_stopped_repeats_its_stop_and_the_end_is_when_all_have():
    model, prompt = constant_model([1.0, 1.0, 1.0, 1.0]), torch.zeros(6, 1, dtype=torch.long)
    rows = drawn(model, prompt, 500, stop=(2,), generator=torch.Generator().manual_seed(0)).tolist()
    first = [row.index(2) for row in rows]
    assert len(set(first)) > 1 and max(first) == len(rows[0]) - 1 < 400
    assert all(set(row[i:]) == {2} for row, i in zip(rows, first))
    assert drawn(constant_model([1.0, 2.0]), prompt, 9, temperature=0, stop=(1,)).shape == (6, 1)
    assert drawn(constant_model([1.0, 2.0]), prompt, 9, temperature=0).shape == (6, 9)


def test_each_of_several_end_tokens_ends_a_row_which_then_repeats_the_first():
    model, prompt = constant_model([1.0, 1.0, 1.0, 1.0]), torch.zeros(8, 1, dtype=torch.long)
    rows = drawn(model, prompt, 500, stop=(2, 3), generator=torch.Generator().manual_seed(0)).tolist()
    ends = [next(i for i, token in enumerate(row) if token > 1) for row in rows]
    assert {row[i] for row, i in zip(rows, ends)} == {2, 3} and len(rows[0]) < 400
    assert all(set(row[i + 1 :]) <= {2} for row, i in zip(rows, ends))


def test_the_state_of_an_rnn_has_as_many_bytes_after_ten_thousand_tokens_as_after_ten():
    model = tiny_model(mixer="r", ffn="channelmix").eval()
    (_, ten), = generate(model, tokens(1, 10), 1)
    (_, many), = generate(model, tokens(1, 10_000), 1)
    *_, (_, later) = generate(model, tokens(1, 1), 20, state=many)
    assert (ten.position, many.position, later.position) == (10, 10_000, 10_020)
    # per layer: S of 2 heads x 16 x 16, and the last input of both halves of the block,
    # of 4 bytes each
    assert nbytes(ten) == nbytes(many) == nbytes(later) == 4 * 2 * (2 * 16 * 16 + 32 + 32)


# ------------------------------------------------------------------------------------------
# To the terminal

def test_the_script_prints_prompt_and_text_and_on_stderr_speed_and_memory(rwkv_folder, capsys):  # noqa: F811
    args = ["--ckpt", str(rwkv_folder), "--prompt", "né", "--max_tokens", "12", "--no-stop"]
    main(args)
    out, err = capsys.readouterr()
    assert out.startswith("né") and out.endswith("\n")
    assert "prefill 4 tokens" in err and "decode 1 x 11 tokens" in err and "tokens/s" in err
    # the state has read <|endoftext|>, three bytes, and all but the last of twelve;
    # the cache would be 2 layers x (k, v) x 32 x 4 bytes
    memory = f"memory of 15 tokens: {4 * 2 * (2 * 16 * 16 + 64):,} bytes"
    assert memory in err and f"keeps {15 * 2 * 2 * 32 * 4:,}" in err
    main(args)
    assert capsys.readouterr().out == out
    main([*args, "--seed", "2"])
    assert capsys.readouterr().out != out
    main([*args, "--num_samples", "3"])
    out, err = capsys.readouterr()
    texts = out.split("\n---------------\n")
    assert "prefill 12 tokens" in err and "decode 3 x 11 tokens" in err and memory in err  # each
    assert len(texts) == 3 and all(t.startswith("né") for t in texts) and len(set(texts)) == 3


def test_a_prompt_is_what_training_saw_after_the_end_of_a_document(rwkv_folder, capsys,  # noqa: F811
                                                                   tmp_path, monkeypatch):
    calls = []

    def two_steps(model, prompt, n, **options):
        calls.append((prompt.tolist(), options["stop"]))
        yield torch.tensor([65] * len(prompt)), State(1, ())
        yield torch.tensor([256] * len(prompt)), State(2, ())

    monkeypatch.setattr(sample, "generate", two_steps)
    (tmp_path / "p.txt").write_bytes("a<|endoftext|>\n".encode())
    base = ["--ckpt", str(rwkv_folder)]
    main(base)
    assert capsys.readouterr().out == "A\n"  # the end is not shown
    main([*base, "--prompt", f"FILE:{tmp_path / 'p.txt'}", "--no-stop", "--num_samples", "2"])
    text = "a<|endoftext|>\nA<|endoftext|>"
    assert capsys.readouterr().out == f"{text}\n---------------\n{text}\n"
    # what a user writes is text, not the special token
    assert calls == [([[256]], (256,)), ([[256, *b"a<|endoftext|>\n"]] * 2, ())]


def test_a_text_ends_at_each_of_the_models_end_tokens(talker, monkeypatch, capsys):  # noqa: F811
    stops = []

    def one_step(model, prompt, n, **options):
        stops.append(options["stop"])
        yield torch.tensor([261]), State(1, ())

    monkeypatch.setattr(sample, "generate", one_step)
    main(["--ckpt", str(talker), "--prompt", "a"])
    assert stops == [(256, 261)] and capsys.readouterr().out == "a\n"


def test_a_saved_state_goes_on_without_the_text_that_it_has_read(rwkv_folder, tmp_path, capsys):  # noqa: F811
    base = ["--ckpt", str(rwkv_folder), "--no-stop", "--temperature", "0", "--max_tokens"]
    main([*base, "20", "--prompt", "once upon"])
    whole = capsys.readouterr().out
    book = str(tmp_path / "book.state")
    main([*base, "8", "--prompt", "once upon", "--save_state", book])
    begun = capsys.readouterr().out.removesuffix("\n")
    state, unread = load_state(book, load_model(rwkv_folder))
    assert state.position == 1 + len("once upon") + 7 and len(unread) == 1  # the last one drawn
    main([*base, "12", "--load_state", book])
    assert begun + capsys.readouterr().out == whole
