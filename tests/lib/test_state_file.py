"""A state made smaller, and kept in a file that gives it back or refuses."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lib.state_file
from common import one_line, tiny_model
from common_states import ALL, model_of, same, tokens
from lib.folders import load_model, save_model
from lib.state_file import DTYPES, compress, expand, fingerprint, load_state, save_state
from lib.states import nbytes, process, tensors
from model import State

# ------------------------------------------------------------------------------------------
# Smaller


def test_int8_by_hand():
    x = torch.tensor([[0.0, 1.0, -127.0, 63.4], [0, 0, 0, 0], [1e-3, -2e-3, 0, 127e-3]])
    small = compress(State(4, (((x, x[None], 4), None),)), "int8")
    q = small.layers[0][0][0]
    assert q.q.tolist() == [[0, 1, -127, 63], [0] * 4, [1, -2, 0, 127]] and q.scale.shape == (3, 1)
    back = expand(small)
    assert back.position == 4 and back.layers[0][0][2] == 4 and back.layers[0][1] is None
    torch.testing.assert_close(
        back.layers[0][0][0],
        torch.tensor([[0.0, 1, -127, 63], [0, 0, 0, 0], [1e-3, -2e-3, 0, 127e-3]]),
        rtol=4e-3,
        atol=0,
    )


@pytest.mark.parametrize("name", ALL)
def test_a_compressed_state_is_near_and_small(name):
    """int8: within half a step of its row, (half + 0.4 %) of 1/127 of the largest.

    16 bits: their rounding.
    """
    _, state = process(model_of(name), tokens(2, 40))
    for dtype, factor, most in (
        ("float32", 1, 0),
        ("float16", 2, 2**-11),
        ("bfloat16", 2, 2**-8),
        ("int8", None, 0.51 / 127 + 0.004),
    ):
        small = compress(state, dtype)
        back = expand(small)
        for x, y in zip(tensors(state), tensors(back), strict=True):
            assert y.dtype == torch.float32
            assert ((x - y).abs() <= most * x.abs().amax(-1, keepdim=True) + 1e-7).all()
        if factor:
            assert nbytes(small) * factor == nbytes(state)
        else:  # 1 byte a number, 2 a row
            assert nbytes(small) == sum(x.numel() + 2 * x.numel() // x.shape[-1] for x in tensors(state))
        assert compress(small, dtype) is small if dtype == "float32" else same(compress(small, dtype), small)


def test_int8_takes_up_a_quarter_for_heads_of_64():
    _, state = process(
        tiny_model(mixer="r", ffn="channelmix", n_embd=128, rwkv_head_size=64).eval(), tokens(1, 9)
    )
    assert nbytes(state) / nbytes(compress(state, "int8")) > 3.87


def test_int8_changes_what_is_said_by_little():
    """KL of the next 64 tokens to the uncompressed state; 16 bits lose less, not 0."""
    model, text = tiny_model(
        std=1.0, mixer="r", ffn="channelmix", n_embd=64, rwkv_head_size=32
    ).eval(), tokens(8, 64, seed=1)
    _, state = process(model, tokens(8, 200))

    def says(dtype: str) -> torch.Tensor:
        with torch.no_grad():
            return model(text, expand(compress(state, dtype)))[0].double().log_softmax(-1)

    exact = says("float32")
    kl = {d: (exact.exp() * (exact - says(d))).sum(-1).mean().item() for d in DTYPES}
    assert kl["float32"] == 0 < kl["float16"] < kl["bfloat16"] < kl["int8"] < 5e-3, kl


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_reads_on_from_an_expanded_state(name, weights):
    model, text = model_of(name).to(weights), tokens(2, 3)
    _, state = process(model, tokens(2, 40))
    exact, after = process(model, text, state)
    for dtype in DTYPES:
        logits, expanded = process(model, text, expand(compress(state, dtype)))
        assert (logits - exact).norm() < (0.05 if dtype == "int8" else 0.01) * exact.norm()
        assert [x.dtype for x in tensors(expanded)] == [x.dtype for x in tensors(after)]


def test_what_cannot_be_compressed_is_one_line():
    state = State(1, (((torch.tensor([[1e6]]), torch.ones(1, 1, 1, 1), 1), None),))
    for dtype, word, x in (
        ("float16", "float16 cannot hold", state),
        ("int4", "int4", state),
        ("int8", "cannot hold", State(1, (((torch.tensor([[float("nan")]]), torch.ones(1), 1), None),))),
    ):
        with pytest.raises(ValueError, match=word) as e:
            compress(x, dtype)
        one_line(e.value)


# ------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
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
    assert (
        fingerprint(a)
        == fingerprint(tiny_model(mixer="r"))
        != fingerprint(tiny_model(mixer="r", norm_eps=1e-6))
    )
    with torch.no_grad():
        before = fingerprint(a)
        a.blocks[1].att.w0[0, 0, 3] += 1e-6
    assert fingerprint(a) != before


@pytest.mark.parametrize("pattern, letters", [("all", "rr"), ("first:1", "ra"), ("ra", "ra"), ("r", "rr")])
def test_a_fingerprint_of_before_is_that_of_the_pattern_in_the_folder(pattern, letters, tmp_path):
    """A file with the folder's pattern in its fingerprint is still the model's."""
    model = tiny_model(mixer=letters).eval()
    save_model(model, tmp_path / "m", {"tokenizer": "bytes"})
    config = tmp_path / "m" / "config.json"
    written = f'"mixer": "{model.cfg.mixer}"'
    assert written in config.read_text()
    config.write_text(config.read_text().replace(written, f'"mixer": "{pattern}"'))
    loaded = load_model(tmp_path / "m").eval()
    _, state = process(loaded, tokens(1, 9))
    before = fingerprint(loaded, pattern)
    assert before in lib.state_file.fingerprints(loaded) and (before == fingerprint(loaded)) == (
        pattern == letters
    )
    save_state(tmp_path / "s.state", model, state, "bytes")  # today's, of the letters
    assert same(load_state(tmp_path / "s.state", loaded, "bytes")[0], state)


def test_a_state_that_cannot_be_written_is_one_line_and_leaves_no_file(tmp_path):
    model = model_of("RWKV-7")
    _, state = process(model, tokens(1, 3))
    (tmp_path / "folder.state").mkdir()
    with pytest.raises(ValueError, match="could not be written") as error:
        save_state(tmp_path / "folder.state", model, state, "bytes")
    one_line(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.state"]


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
    for changed in (
        {"position": "10"},
        {"unread": "[1]"},
        {"tokenizer": "gpt2"},
        {"model": fingerprint(model_of("GPT"))},
    ):
        save_file(weights, file, meta | changed)
        refused("damaged")
    save_file({name: x for name, x in list(weights.items())[1:]}, file, meta)
    refused("damaged")
    save_model(model, tmp_path / "m", {"tokenizer": "bytes"})
    save_file(weights, file, meta)
    load_state(file, load_model(tmp_path / "m"))


def sealed(file, parts: dict, meta: dict) -> None:
    """A state file whose digest is right, whatever it says."""
    save_file(parts, file, meta | {"digest": lib.state_file.digest(parts, meta)})


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_hostile_file_with_the_right_digest_is_one_line(dtype, tmp_path):
    """It may say anything: other shapes, other names, absurd numbers, nested lists."""
    model, file = model_of("hybrid"), tmp_path / "s.state"
    _, state = process(model, tokens(1, 9))
    save_state(file, model, compress(state, dtype), "bytes")
    with safe_open(file, "pt") as f:
        meta, parts = f.metadata(), {name: f.get_tensor(name).clone() for name in f.keys()}
    del meta["digest"]
    sealed(file, parts, meta)
    load_state(file, model, "bytes")
    first, *others = sorted(parts)
    changes = [{"position": x} for x in ("-1", "x", "", "9" * 25, "9" * 5000, "8")]
    changes += [{"unread": x} for x in ("3", "[257]", "[-1]", "[1.5]", "[true]", '["a"]', "[", "", "{}",
                                        "[" * 100000, f"[{10**30}]", "[" + "9" * 5000 + "]")]
    bad = [(parts, meta | change) for change in changes]
    bad += [(parts, {key: x for key, x in meta.items() if key != name})
            for name in ("position", "unread", "model", "tokenizer")]
    bad += [({name: x for name, x in parts.items() if name != gone}, meta) for gone in (first, others[-1])]
    bad += [(parts | {name: new}, meta) for name, new in (
        (first, parts[first][..., :1].contiguous()), (first, parts[first].long()), (first, torch.zeros(3)),
        ("blocks.7.0.0", torch.zeros(3)), (first, torch.cat([parts[first]] * 2)),
        (others[-1], parts[others[-1]][None]))]
    bad += [({}, meta)]
    for parts_there, meta_there in bad:
        sealed(file, parts_there, meta_there)
        with pytest.raises(ValueError, match="s.state is damaged") as e:
            load_state(file, model, "bytes")
        assert len(one_line(e.value)) < 600


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", "s.state")

    file, model = tmp_path / "s.state", model_of("RWKV-7")
    save_state(file, model, process(model, tokens(1, 3))[1], "bytes")
    monkeypatch.setattr(type(file), "open", refuse)
    with pytest.raises(ValueError, match="s.state can't be read .Permission denied.: check who may") as e:
        load_state(file, model)
    one_line(e.value)


def test_a_state_is_never_written_over_what_is_none(tmp_path):
    model, file = model_of("RWKV-7"), tmp_path / "mine.txt"
    _, state = process(model, tokens(1, 3))
    file.write_text("mine")
    with pytest.raises(ValueError, match="is no state, and would be replaced") as e:
        save_state(file, model, state, "bytes")
    one_line(e.value)
    assert file.read_text() == "mine"
    for _ in range(2):                                       # a state may be replaced
        save_state(tmp_path / "s.state", model, state, "bytes")
