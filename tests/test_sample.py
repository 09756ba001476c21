"""Generation: what is drawn is what the whole-sequence logits say, and the memory of an RNN stays as it is."""

import io
import os
import shutil
import subprocess
import sys

import pytest
import torch

import decode
import sample
from bench import official, random_rwkv
from common import REPO, one_line, tiny_model
from data.bpe import BYTE
from data.chat import encode_turns
from data.tokenizer import get_tokenizer, load_tokenizer, write_tokenizer
from model import LM, ModelConfig, State, load_model, save_model, tensors
from decode import Product
from sample import Characters, Decoder, choose, generate, main, optimize_for_inference
from state import load_state, process

BYTES = get_tokenizer("bytes")
MODELS = {
    "GPT": {}, "GPT, learned positions": {"positions": "learned", "block_size": 64},
    "grouped heads": {"n_kv_head": 1, "ffn": "swiglu", "norm": "rmsnorm"},
    "RWKV-7": {"mixer": "r", "ffn": "channelmix"}, "student": {"mixer": "r"},
    "hybrid": {"mixer": "ra"}, "hybrid, attention first": {"mixer": "ar", "ffn": "channelmix"},
}


def tokens(B: int, T: int, vocab: int = 257, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab, (B, T), generator=torch.Generator().manual_seed(seed))


def drawn(model, prompt, n, **options) -> torch.Tensor:
    """(B, up to n) tokens."""
    return torch.stack([t for t, _ in generate(model, prompt, n, **options)], 1)


def constant_model(logits: list[float]) -> LM:
    """A model whose logits are these after any text: the last norm puts out a constant."""
    model = LM(ModelConfig(vocab_size=len(logits), n_layer=1, n_embd=4, n_head=1))
    with torch.no_grad():
        model.ln_out.weight.zero_()
        model.ln_out.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
        model.head.weight.zero_()
        model.head.weight[:, 0] = torch.tensor(logits)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Generation and the model

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


SWITCHES = {
    "official": {"ffn": "channelmix"}, "three layers, wide heads": {"ffn": "channelmix", "n_layer": 3, "rwkv_size": 48},
    "relu2": {}, "gelu, biases, tied": {"ffn": "gelu", "bias": True, "qkv_bias": True, "tied": True}, "swiglu, rmsnorm": {"ffn": "swiglu", "norm": "rmsnorm"},
    "no gate": {"gate": False}, "no group norm": {"group_norm": False}, "no token shift": {"token_shift": False}, "no bonus": {"bonus": False},
    "nothing": {"gate": False, "group_norm": False, "token_shift": False, "bonus": False, "ln0": False, "norm_bias": False},
    "ranks": {"rank_w": 3, "rank_a": 5, "rank_v": 2, "rank_g": 9}, "v's rank the largest": {"rank_w": 3, "rank_a": 3, "rank_v": 9, "rank_g": 5},
    "learned positions": {"positions": "learned"}, "one layer": {"n_layer": 1},
}


@pytest.mark.parametrize("B", (1, 3))
@pytest.mark.parametrize("name", SWITCHES)
def test_the_decoder_is_the_model(name, B, monkeypatch):
    """Logits and states of 20 single tokens, past the end of learned positions, in float64 throughout."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # with which LM computes decay and removal key
    model = tiny_model(**{"mixer": "r"} | SWITCHES[name]).double().eval()
    decoder, text = Decoder(model), tokens(B, 30)
    assert decoder.layers is not None
    with torch.no_grad():
        _, ours = _, theirs = model(text[:, :10])
        for t in text[:, 10:].unbind(1):
            a, ours = decoder(t, ours)
            b, theirs = model(t[:, None], theirs)
            torch.testing.assert_close(a, b[:, 0], rtol=1e-10, atol=1e-10)
    assert ours.position == theirs.position == 30 and [att[2] for att, _ in ours.layers] == [att[2] for att, _ in theirs.layers]
    assert ours.nbytes() == theirs.nbytes()
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("C, threads, dtype, most", ((256, 1, None, 1e-5), (512, 2, None, 1e-5), (512, 3, None, 1e-5), (512, 2, torch.bfloat16, 3e-2),
                                                     (512, 3, torch.float16, 4e-3)))
def test_the_decoder_is_the_model_where_weights_are_read_by_rows(C, threads, dtype, most):
    """Also where each thread reads a part of them, and in 16 bits."""
    model = random_rwkv(ModelConfig(n_layer=2, n_embd=C, mixer="r", ffn="channelmix", rwkv_head_size=64, vocab_size=1000))
    before, text = torch.get_num_threads(), tokens(1, 40, 1000)
    torch.set_num_threads(threads)
    try:
        decoder = Decoder(model, dtype)
        with torch.no_grad():
            _, state = model(text[:, :20])
            logits, _ = model(text[:, 20:], state)
            for i in range(20):
                ours, state = decoder(text[:, 20 + i], state)
                assert (ours - logits[:, i]).norm() < most * logits[:, i].norm()
        assert decoder.layers[0].ffn_key.parts == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("B", (1, 3))
@pytest.mark.parametrize("dtype, most", ((torch.bfloat16, 3e-2), (torch.float16, 4e-3), (None, 1e-5)))
def test_optimize_for_inference_says_what_the_model_says_as_well_as_its_matrices_can(dtype, most, B):
    """Matrices in 16 bits, all else in float32: the state too. Without a dtype the logits are the model's, to 1e-5."""
    model, text = tiny_model(mixer="r", ffn="channelmix").eval(), tokens(B, 30)
    fast = optimize_for_inference(model, dtype)
    with torch.no_grad():
        logits, _ = model(text)
        _, state = model(text[:, :10])
        for i in range(10, 30):
            ours, state = fast(text[:, i], state)
            assert (ours - logits[:, i]).norm() < most * logits[:, i].norm()
    assert {x.dtype for x in tensors(state)} == {torch.float32} == {ours.dtype}
    with pytest.raises(ValueError, match="model.to") as e:
        optimize_for_inference(tiny_model(mixer="ra"), torch.bfloat16)
    one_line(e.value)


@pytest.mark.parametrize("shape, sparse", (((600, 300), False), ((3, 300, 200), False), ((600, 300), True)), ids=str)
@pytest.mark.parametrize("dtype, most", ((None, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)))
def test_a_product_is_x_times_w_plus_what_is_added(shape, sparse, dtype, most):
    """By rows and by BLAS; where the rows of zeros are skipped, also with nothing but zeros and with a single number."""
    torch.manual_seed(0)
    W, bias = torch.randn(shape), torch.randn(*shape[:-2], 1, shape[-1])
    product = Product(W, bias, dtype, sparse=sparse)
    for B, kept in ((1, 600), (4, 600), (1, 100), (1, 1), (1, 0)):
        x, add = torch.randn(*shape[:-2], B, shape[-2]), torch.randn(*shape[:-2], B, shape[-1])
        x[..., kept:] = 0
        out, want = torch.empty_like(add), x.double() @ W.double() + bias
        for got, true in ((product(x), want), (product(x, add, out=out), want + add)):
            assert (got - true).norm() <= most * true.norm()
        assert torch.equal(out, product(x, add))


def test_the_scripts_dtype_is_of_the_decoders_matrices(tmp_path, capsys):
    save_model(tiny_model(mixer="r", ffn="channelmix"), tmp_path / "r", {"tokenizer": "bytes"})
    save_model(tiny_model(), tmp_path / "a", {"tokenizer": "bytes"})
    options = ["--prompt", "a", "--no-stop", "--temperature", "0", "--max_tokens", "40"]
    main(["--ckpt", str(tmp_path / "r"), *options, "--dtype", "bfloat16"])
    half = optimize_for_inference(load_model(tmp_path / "r").eval(), torch.bfloat16)
    stream = Characters(get_tokenizer("bytes"))
    new = [stream(t.item()) for t, _ in generate(half, torch.tensor([[256, 97]]), 40, temperature=0)]
    assert capsys.readouterr().out == "a" + "".join(new) + stream(None) + "\n"
    with pytest.raises(ValueError, match="keep float32") as e:
        main(["--ckpt", str(tmp_path / "a"), *options, "--dtype", "bfloat16"])
    one_line(e.value)


def replayed(step):
    """What decode.record does, without a GPU: another run of the step, written over what the first one returned."""
    result = step()
    return lambda: torch._foreach_copy_(tensors(result), tensors(step())), result


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))))
def test_a_recorded_step_is_the_step_and_its_states_are_values(name, device, monkeypatch):
    """Batches of several sizes, two texts that go on from one state, and the states that were kept."""
    model = tiny_model(**{"mixer": "r"} | SWITCHES[name]).to(device).eval()
    plain, fast = Decoder(model), Decoder(model)
    plain.records = False
    if device == "cpu":
        monkeypatch.setattr(decode, "record", replayed)
        fast.records = model.cfg.positions != "learned"
    for B in (1, 3, 1):
        text = tokens(B, 30).to(device)
        with torch.no_grad():
            _, start = model(text[:, :10])
        kept, seen = [x.clone() for x in tensors(start)], []
        for piece in (text[:, 10:20], text[:, 20:30]):
            a = b = start
            for t in piece.unbind(1):
                (theirs, a), (ours, b) = plain(t, a), fast(t, b)
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            seen += [(b, [x.clone() for x in tensors(b)])]
            assert (fast.recorded is not None) == fast.records
            assert (a.position, [att[2] for att, _ in a.layers]) == (b.position, [att[2] for att, _ in b.layers]) == (20, [20] * model.cfg.n_layer)
        assert all(map(torch.equal, kept, tensors(start)))
        assert all(torch.equal(x, y) for state, before in seen for x, y in zip(tensors(state), before, strict=True))


def test_the_decoder_leaves_a_state_as_it_was_and_the_threads_too():
    model = tiny_model(mixer="r", ffn="channelmix").eval()
    with torch.no_grad():
        _, state = model(tokens(1, 9))
    decoder, before = Decoder(model), [x.clone() for x in tensors(state)]
    first, after = decoder(torch.tensor([5]), state)
    kept = [x.clone() for x in tensors(after)]
    decoder(torch.tensor([6]), after)
    again, _ = decoder(torch.tensor([5]), state)
    assert torch.equal(first, again) and all(map(torch.equal, before, tensors(state))) and all(map(torch.equal, kept, tensors(after)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        decoder(torch.tensor([6]), after)
        with pytest.raises(IndexError):
            decoder(torch.tensor([999]), after)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("N", (32, 64))
def test_logits_are_the_official_packages_after_a_prompt_and_after_50_single_tokens(N, tmp_path):
    pytest.importorskip("rwkv")
    model = random_rwkv(ModelConfig(n_layer=3, n_embd=128, mixer="r", ffn="channelmix", rwkv_head_size=N))
    forward, text = official(model, tmp_path), tokens(1, 40)
    theirs, their_state = forward(text[0].tolist(), None)
    (token, state), = generate(model, text, 1, temperature=0)
    decoder = Decoder(model)
    with torch.no_grad():
        ours = model(text)[0][0, -1]
    assert theirs.std() > 0.1
    for i in range(51):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), f"after {i} tokens"
        ours, state = decoder(token, state)
        theirs, their_state = forward(token.tolist(), their_state)
        ours, token = ours[0], ours.argmax(-1)


def test_the_state_of_an_rnn_has_as_many_bytes_after_ten_thousand_tokens_as_after_ten():
    model = tiny_model(mixer="r", ffn="channelmix").eval()
    (_, ten), = generate(model, tokens(1, 10), 1)
    (_, many), = generate(model, tokens(1, 10_000), 1)
    *_, (_, later) = generate(model, tokens(1, 1), 20, state=many)
    assert (ten.position, many.position, later.position) == (10, 10_000, 10_020)
    # per layer: S of 2 heads x 16 x 16, and the last input of both halves of the block; 4 bytes each
    assert ten.nbytes() == many.nbytes() == later.nbytes() == 4 * 2 * (2 * 16 * 16 + 32 + 32)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing

@pytest.mark.parametrize("options", ({}, {"top_k": 50}, {"top_p": 0.9}))
def test_one_seed_gives_one_text_and_another_seed_another(options):
    model, prompt = tiny_model(mixer="r").eval(), tokens(1, 5).expand(3, 5)
    texts = [drawn(model, prompt, 20, generator=torch.Generator().manual_seed(seed), **options) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert len(set(map(str, texts[0].tolist()))) == 3  # rows of one prompt are different samples


def test_top_k_of_one_is_greedy_however_hot():
    model, prompt = tiny_model(mixer="r").eval(), tokens(2, 5)
    assert torch.equal(drawn(model, prompt, 20, top_k=1, temperature=9.0), drawn(model, prompt, 20, temperature=0))
    assert torch.equal(drawn(model, prompt, 20, temperature=1e-30), drawn(model, prompt, 20, temperature=0))


HALVES = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625]).log()  # likeliest first: tokens 1, 3, 0, then 2 and 4


@pytest.mark.parametrize("options, kept", [
    ({"top_p": 0.01}, {1: 1}), ({"top_p": 0.5}, {1: 1}), ({"top_p": 0.51}, {1: 2 / 3, 3: 1 / 3}), ({"top_p": 0.75}, {1: 2 / 3, 3: 1 / 3}),
    ({"top_p": 0.875}, {1: 4 / 7, 3: 2 / 7, 0: 1 / 7}), ({"top_p": 1.0}, {1: 0.5, 3: 0.25, 0: 0.125, 2: 0.0625, 4: 0.0625}),
    ({"top_k": 2}, {1: 2 / 3, 3: 1 / 3}), ({"top_k": 99}, {1: 0.5, 3: 0.25, 0: 0.125, 2: 0.0625, 4: 0.0625}),
    ({"top_k": 3, "top_p": 0.75}, {1: 2 / 3, 3: 1 / 3}), ({"top_k": 1, "top_p": 1.0}, {1: 1}),
    ({"temperature": 0.5}, {1: 64 / 86, 3: 16 / 86, 0: 4 / 86, 2: 1 / 86, 4: 1 / 86}),  # probabilities squared
    ({"temperature": 0.5, "top_p": 0.75}, {1: 64 / 80, 3: 16 / 80}),                    # top_p counts after the temperature
])
def test_only_the_kept_tokens_are_drawn_and_in_proportion(options, kept):
    n = 40_000
    draws = choose(HALVES.expand(n, 5), generator=torch.Generator().manual_seed(0), **options)
    share = draws.bincount(minlength=5) / n
    for token in range(5):
        assert abs(share[token] - kept.get(token, 0)) < (0.012 if token in kept else 1e-9), (token, share)


def test_penalties_by_hand():
    model, prompt = constant_model([3.0, 2.5, 2.2, 0.0]), torch.tensor([[3, 3]])
    assert drawn(model, prompt, 4, temperature=0).tolist() == [[0, 0, 0, 0]]
    # presence, once: 3.0 -> 2.0, 2.5 -> 1.5, 2.2 -> 1.2, then 2.0 stays the largest; the prompt's 3 does not count
    assert drawn(model, prompt, 6, temperature=0, presence=1.0).tolist() == [[0, 1, 2, 0, 0, 0]]
    # frequency, each time: 3.0, 2.5, (2.4 | 1.9 | 2.2), (1.8 | 1.9 | 2.2), (1.8 | 1.9 | 1.6), (1.8 | 1.3 | 1.6)
    assert drawn(model, prompt, 6, temperature=0, frequency=0.6).tolist() == [[0, 1, 0, 2, 1, 0]]
    # both: 3.0, then 3.0 - 0.3 - 0.4 = 2.3 | 2.5, then 2.3 | 1.8 | 2.2, then 1.9 | 1.8 | 2.2
    assert drawn(model, prompt, 4, temperature=0, presence=0.3, frequency=0.4).tolist() == [[0, 1, 0, 2]]


def test_a_row_that_has_stopped_repeats_its_stop_and_the_end_is_when_all_have():
    model, prompt = constant_model([1.0, 1.0, 1.0, 1.0]), torch.zeros(6, 1, dtype=torch.long)
    rows = drawn(model, prompt, 500, stop=(2,), generator=torch.Generator().manual_seed(0)).tolist()
    first = [row.index(2) for row in rows]
    assert len(set(first)) > 1 and max(first) == len(rows[0]) - 1 < 400 and all(set(row[i:]) == {2} for row, i in zip(rows, first))
    assert drawn(constant_model([1.0, 2.0]), prompt, 9, temperature=0, stop=(1,)).shape == (6, 1)
    assert drawn(constant_model([1.0, 2.0]), prompt, 9, temperature=0).shape == (6, 9)


def test_bad_options_of_the_library_are_one_line():
    model, prompt = tiny_model().eval(), tokens(1, 3)
    nan, inf = float("nan"), float("inf")
    for options in ({"n": 0}, {"temperature": -0.1}, {"temperature": nan}, {"temperature": inf}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1},
                    {"top_p": nan}, {"presence": nan}, {"frequency": inf}):
        with pytest.raises(ValueError) as e:
            next(generate(model, prompt, **{"n": 5} | options))
        assert ("max_tokens" if "n" in options else list(options)[0]) in one_line(e.value)
    for bad in (torch.zeros(1, 0, dtype=torch.long), torch.tensor([[1, 257]]), torch.tensor([[-1]])):
        with pytest.raises(ValueError, match="vocabulary"):
            next(generate(model, bad, 5))
    model = tiny_model(positions="learned").eval()
    *_, (last, state) = generate(model, prompt, 14)  # the last token that is drawn is not read: 3 + 13 positions
    for full in ({"tokens": prompt, "n": 15}, {"tokens": last[:, None], "n": 1, "state": state}):
        with pytest.raises(ValueError, match="learned 16: shorten"):
            next(generate(model, **full))
    with pytest.raises(ValueError, match="not finite"):
        next(generate(constant_model([float("nan"), 1.0]), torch.tensor([[0]]), 5))


# ---------------------------------------------------------------------------------------------------------------------
# The terminal

def test_characters_appear_when_their_last_byte_does_and_bad_bytes_never_crash():
    stream, seen = Characters(BYTES), []
    for byte in "aé漢🙂".encode():
        seen.append(stream(byte))
    assert seen == ["a", "", "é", "", "", "漢", "", "", "", "🙂"] and stream(None) == ""
    stream = Characters(BYTES)
    assert "".join(map(stream, b"\xff\xc3(\xe6\xbc")) == "\ufffd\ufffd(" and stream(None) == "\ufffd"  # nonsense, a false start, an unfinished one
    assert [Characters(BYTES)(t) for t in (256, 300)] == ["<|endoftext|>", "\ufffd"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(tiny_model(mixer="r", ffn="channelmix"), path, {"tokenizer": "bytes"})
    return path


def test_the_script_prints_prompt_and_text_and_on_stderr_speed_and_memory(folder, capsys):
    args = ["--ckpt", str(folder), "--prompt", "né", "--max_tokens", "12", "--no-stop"]
    main(args)
    out, err = capsys.readouterr()
    assert out.startswith("né") and out.endswith("\n")
    assert "prefill 4 tokens" in err and "decode 1 x 11 tokens" in err and "tokens/s" in err
    # the state has read <|endoftext|>, three bytes, and all but the last of twelve; the cache would be 2 layers x (k, v) x 32 x 4 bytes
    assert f"memory of 15 tokens: {4 * 2 * (2 * 16 * 16 + 64):,} bytes" in err and f"keeps {15 * 2 * 2 * 32 * 4:,}" in err
    main(args)
    assert capsys.readouterr().out == out
    main([*args, "--seed", "2"])
    assert capsys.readouterr().out != out
    main([*args, "--num_samples", "3"])
    out, err = capsys.readouterr()
    texts = out.split("\n---------------\n")
    assert "prefill 12 tokens" in err and "decode 3 x 11 tokens" in err and f"memory of 15 tokens: {4 * 2 * (2 * 16 * 16 + 64):,} bytes" in err  # each
    assert len(texts) == 3 and all(t.startswith("né") for t in texts) and len(set(texts)) == 3


def test_a_prompt_is_what_training_saw_after_the_end_of_a_document(folder, capsys, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sample, "generate", lambda model, tokens, n, **options: seen.append((tokens.tolist(), options["stop"])) or iter(
        [(torch.tensor([65] * len(tokens)), State(1, ())), (torch.tensor([256] * len(tokens)), State(2, ()))]))
    (tmp_path / "p.txt").write_bytes("a<|endoftext|>\n".encode())
    base = ["--ckpt", str(folder)]
    main(base)
    assert capsys.readouterr().out == "A\n"  # the end is not shown
    main([*base, "--prompt", f"FILE:{tmp_path / 'p.txt'}", "--no-stop", "--num_samples", "2"])
    text = "a<|endoftext|>\nA<|endoftext|>"
    assert capsys.readouterr().out == f"{text}\n---------------\n{text}\n"
    assert seen == [([[256]], (256,)), ([[256, *b"a<|endoftext|>\n"]] * 2, ())]  # what a user writes is text, not the special token


def test_bad_input_is_one_line(folder, tmp_path):
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    save_model(tiny_model(), tmp_path / "no-meta", {})
    save_model(tiny_model(vocab_size=100), tmp_path / "small", {"tokenizer": "bytes"})
    save_model(tiny_model(), tmp_path / "odd", {"tokenizer": "nonsense"})
    save_model(tiny_model(), tmp_path / "gone", {})
    (tmp_path / "gone" / "meta.json").unlink()
    folders = {str(tmp_path / "none"): "no model at", str(tmp_path / "small"): "vocabulary", str(tmp_path / "no-meta"): "tokenizer",
               str(tmp_path / "odd"): "nonsense", str(tmp_path / "gone"): "meta.json"}
    prompts = {f"FILE:{tmp_path / 'latin.txt'}": "not UTF-8", "FILE:nowhere.txt": "can't be read"}
    numbers = {"--max_tokens": ("0", "-3"), "--temperature": ("-1", "nan"), "--top_p": ("0", "1.01"), "--top_k": ("0",), "--num_samples": ("0",),
               "--seed": ("-1", str(2**64)), "--device": ("tpu",)}
    cases = [(["--ckpt", path], word) for path, word in folders.items()] + [(["--prompt", prompt], word) for prompt, word in prompts.items()]
    for args, word in cases + [([flag, value], flag[2:]) for flag, values in numbers.items() for value in values]:
        with pytest.raises(ValueError) as e:
            main(["--ckpt", str(folder), *args])
        assert word in one_line(e.value), args


def test_a_reader_who_has_seen_enough_ends_it_quietly(folder):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "sample.py", "--ckpt", folder, "--prompt", "a", "--max_tokens", "100000", "--no-stop"], cwd=REPO, env=env,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1) == b"a"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Chat

@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model of bytes with a chat template: <u> question </u> <a> answer </a>."""
    path = tmp_path_factory.mktemp("talker")
    save_model(tiny_model(mixer="r", ffn="channelmix", vocab_size=270), path, {})
    letters = [letter for letter, _ in sorted(BYTE.items(), key=lambda item: item[1])]
    frames = {"default": "<s>", "system": None, "user": ["<u>", "</u>"], "assistant": ["<a>", "</a>", "\n"], "trim": True}
    write_tokenizer({"tokens": letters, "split": ["(?s:.)"], "normalizer": None, "unknown": None, "added": {}, "start": None, "end": 256, "stop": [256, 261],
                     "special": {name: 256 + i for i, name in enumerate(("<s>", "<u>", "</u>", "<x>", "<a>", "</a>"))}, "chat": frames}, path)
    return path


@pytest.mark.parametrize("when", (0, 3))
def test_a_chat_that_is_interrupted_keeps_what_was_said(talker, when, tmp_path, monkeypatch):
    """In the second answer, before its first token or after three: the state is that of all that was read for what was said."""
    said = []

    def interrupted(decoder, text, *args, **options):
        said.append((text[0].tolist(), []))
        for i, (token, state) in enumerate(generate(decoder, text, *args, **options)):
            if len(said) == 2 and i == when:
                raise KeyboardInterrupt
            said[-1][1].append(token.item())
            yield token, state

    monkeypatch.setattr(sample, "generate", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\nthree\n"))
    main(["--ckpt", str(talker), "--chat", "--max_tokens", "6", "--save_state", str(tmp_path / "c.state")])
    assert len(said) == 2 and len(said[1][1]) == when
    model = load_model(talker).eval()
    state, unread = load_state(tmp_path / "c.state", model)
    read = [token for text, answer in said if answer for token in (*text, *answer[:-1])]
    _, whole = process(model, torch.tensor([read]))
    assert state.position == len(read) and (unread[0] == said[1 if when else 0][1][-1] or unread[0] == 261) and unread[-2:] == [261, 10]
    for a, b in zip(tensors(state), tensors(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_chat_at_the_last_learned_position_ends_and_keeps_what_was_said(talker, tmp_path, capsys, monkeypatch):
    save_model(tiny_model(positions="learned", block_size=40, vocab_size=270), tmp_path / "a", {})
    for file in talker.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, tmp_path / "a")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n" * 9))
    main(["--ckpt", str(tmp_path / "a"), "--chat", "--max_tokens", "6", "--save_state", str(tmp_path / "c.state")])
    assert "longer than the 40 positions" in capsys.readouterr().err
    assert 20 < load_state(tmp_path / "c.state", load_model(tmp_path / "a"))[0].position <= 40


def test_a_chat_reads_each_word_once_and_as_the_template_has_it(talker, capsys, monkeypatch):
    """What the model is fed, piece by piece, is the whole conversation; whatever ends an answer, the next question follows a whole one."""
    fed, answers = [], iter([b"yes", b"no", b"cut"])
    ends = iter([[261], [256], []])  # its own end of a turn, the end of a document, max_tokens

    def generate(model, tokens, n, *, stop, state, **options):
        assert stop == (256, 261) and (state is None) == (not fed)
        answer = [*next(answers), *next(ends)]
        fed.extend([*tokens[0].tolist(), *answer[:-1]])  # the last one is not read yet
        yield from ((torch.tensor([token]), State(len(fed), ())) for token in answer)

    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr(sample.State, "nbytes", lambda self: 0)
    monkeypatch.setattr(sys, "stdin", io.StringIO(" a </a>\n\n  \nb\n"))
    main(["--ckpt", str(talker), "--chat", "--prompt", "first"])
    talk = [("user", "first"), ("assistant", "yes"), ("user", "a </a>"), ("assistant", "no"), ("user", "b"), ("assistant", "cut")]
    expected, _ = encode_turns(load_tokenizer(talker), talk)
    assert fed == expected[: len(fed)] and expected[len(fed) :] == [ord("t"), 261, 10]
    out, err = capsys.readouterr()
    assert out == "yes\nno\ncut\n" and f"memory of {len(fed)} tokens" in err


def test_a_chat_goes_on_in_one_state(talker, capsys, monkeypatch):
    model, enc = load_model(talker).eval(), load_tokenizer(talker)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo"))
    main(["--ckpt", str(talker), "--chat", "--max_tokens", "5", "--temperature", "0"])
    tokens, answers = [], []
    for question in ("one", "two"):  # the same without a state: all is read anew
        ids, _ = encode_turns(enc, [("user", question)], opens=not tokens, reply=True)
        tokens += ids
        answer = drawn(model, torch.tensor([tokens]), 5, temperature=0, stop=(256, 261))[0].tolist()
        answers.append(b"".join(enc.decode_single_token_bytes(t) for t in answer if t < 256))
        tokens += [t for t in answer if t not in (256, 261)] + [261, 10]
    assert capsys.readouterr().out == "".join(answer.decode(errors="replace") + "\n" for answer in answers)


def test_a_text_ends_at_each_of_the_models_end_tokens(talker, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(sample, "generate", lambda model, tokens, n, **options: seen.append(options["stop"]) or iter([(torch.tensor([261]), State(1, ()))]))
    main(["--ckpt", str(talker), "--prompt", "a"])
    assert seen == [(256, 261)] and capsys.readouterr().out == "a\n"
    model, generator = constant_model([1.0, 1.0, 1.0, 1.0]), torch.Generator().manual_seed(0)
    rows = drawn(model, torch.zeros(8, 1, dtype=torch.long), 500, stop=(2, 3), generator=generator).tolist()
    firsts = [next(token for token in row if token > 1) for row in rows]
    assert {*firsts} == {2, 3} and len(rows[0]) < 400 and all(row[-1] > 1 for row in rows)


def test_a_chat_that_cannot_be_is_one_line(folder, talker):
    for args, word in ((["--ckpt", str(folder), "--chat"], "no chat template"), (["--ckpt", str(talker), "--chat", "--num_samples", "2"], "num_samples"),
                       (["--ckpt", str(talker), "--chat", "--no-stop"], "no-stop")):
        with pytest.raises(ValueError, match=word) as e:
            main(args)
        one_line(e.value)
