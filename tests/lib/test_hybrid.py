"""Hybrids: patterns of layers, and what each kind of layer remembers."""

from dataclasses import replace

import pytest
import torch

from common import one_line, tiny_model
from lib.hybrid import cache_bytes, describe, mixer_letters, unit
from lib.states import nbytes
from model import ModelConfig

# ------------------------------------------------------------------------------------------
# Patterns


@pytest.mark.parametrize(
    "pattern, letters",
    [
        ("a", "aaaaaa"),
        ("r", "rrrrrr"),
        ("ra", "rarara"),
        ("rra", "rrarra"),
        ("arrrrr", "arrrrr"),
        ("rraa", "rraarr"),
        ("all", "rrrrrr"),
        ("alternate", "rarara"),
        ("every:1", "rrrrrr"),
        ("every:2", "rarara"),
        ("every:4", "raaara"),
        ("every:6", "raaaaa"),
        ("first:1", "raaaaa"),
        ("first:4", "rrrraa"),
        ("first:6", "rrrrrr"),
        ("last:1", "aaaaar"),
        ("last:4", "aarrrr"),
        ("0,2,5", "raraar"),
        ("5,2", "aaraar"),
        ("3", "aaaraa"),
        ("0,0", "raaaaa"),
        ("auto:1", "aaaaaa"),
        ("auto:10000000000", "rrrrrr"),
    ],
)
def test_every_pattern_names_the_layers_that_are_rwkv(pattern, letters):
    assert mixer_letters(ModelConfig(n_layer=6), pattern) == letters


def test_the_names_agree_where_they_mean_the_same():
    for L in range(1, 9):
        letters = lambda pattern: mixer_letters(ModelConfig(n_layer=L), pattern)  # noqa: E731
        assert (
            letters("all")
            == letters("r")
            == letters("every:1")
            == letters(f"first:{L}")
            == letters(f"last:{L}")
            == letters(",".join(map(str, range(L))))
        )
        if L > 1:
            assert letters("alternate") == letters("every:2") == letters("ra")
        for K in range(1, L):
            flipped = letters(f"last:{L - K}").translate(str.maketrans("ar", "ra"))
            assert letters(f"first:{K}") == flipped  # the first K, or all but the last L - K


@pytest.mark.parametrize(
    "shape", [{}, {"n_kv_head": 1}, {"block_size": 1024}, {"rwkv_head_size": 16, "block_size": 32}], ids=str
)
def test_auto_keeps_as_many_attention_layers_as_the_memory_of_block_size_has_room_for(shape):
    cfg = ModelConfig(n_layer=12, **shape)
    room = 12 * cache_bytes(cfg, "a", cfg.block_size)
    before = 12
    for K in (
        1,
        cfg.block_size,
        cfg.block_size + 1,
        2 * cfg.block_size,
        3 * cfg.block_size,
        16 * cfg.block_size,
        10**7,
    ):
        letters = mixer_letters(cfg, f"auto:{K}")
        a = letters.count("a")
        takes = lambda a: a * cache_bytes(cfg, "a", K) + (12 - a) * cache_bytes(
            cfg, "r", K
        )  # noqa: E731, B023
        assert a <= before
        before = a
        if K <= cfg.block_size:
            assert a == 12
        else:
            assert takes(a) <= room < takes(a + 1) and (a == 0 or letters[-1] == "a")
            gaps = [len(run) for run in letters.split("a")[:-1]]
            assert not gaps or max(gaps) - min(gaps) <= 1  # evenly spread


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "rx",
        "rrrrrrr",
        "first:0",
        "first:7",
        "last:-1",
        "every:",
        "every:0",
        "every:x",
        "6",
        "-1",
        "0,",
        ",",
        "0, 2",
        "0-2",
        "auto:0",
        "auto",
        "auto:",
        "auto:-1",
        "auto:1e4",
        "all:2",
        " r",
        "r ",
        "a,r",
        "alternate:2",
        "ALL",
        "RA",
        "most:3",
        "1.5",
        "first:1:2",
        ":",
        ":2",
    ],
)
def test_any_other_pattern_is_refused_in_one_line_that_says_what_there_is(pattern):
    with pytest.raises(ValueError, match="first:K") as e:
        mixer_letters(ModelConfig(n_layer=6), pattern)
    assert repr(pattern) in one_line(e.value) and "n_layer = 6" in str(e.value)


def test_a_long_pattern_with_a_letter_left_out_is_refused():
    """29 letters for 30 layers once trained the wrong layers for hours."""
    layers = "aaaaaaaaaaaraaaraaaaaaaaararar"
    cfg = ModelConfig(n_layer=30)
    assert mixer_letters(cfg, layers) == layers
    assert mixer_letters(cfg, layers[:15]) == 2 * layers[:15]
    assert mixer_letters(cfg, "rrrarrrr") == (4 * "rrrarrrr")[:30]
    for pattern in (layers[1:], layers[:9]):
        with pytest.raises(ValueError, match=f"has {len(pattern)} letters, the model 30 layers") as e:
            mixer_letters(cfg, pattern)
        one_line(e.value)


# ------------------------------------------------------------------------------------------
# Bytes


@pytest.mark.parametrize(
    "n, text",
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (999_990, "999.99 kB"),
        (12_982_272, "12.98 MB"),
        (68_049_600_000, "68.05 GB"),
        (10**12, "1.00 TB"),
        (1.2345e15, "1,234.50 TB"),
    ],
)
def test_bytes_for_people(n, text):
    assert unit(n) == text


def numbers(text: str) -> list[int]:
    return [int(word.replace(",", "")) for word in text.split() if word.replace(",", "").isdigit()]


@pytest.mark.parametrize("n", [1, 9, 1000])
@pytest.mark.parametrize(
    "shape",
    [
        {"mixer": "all"},
        {"mixer": "a"},
        {"mixer": "1,2", "n_kv_head": 1},
        {"mixer": "first:1", "rwkv_size": 64},
        {"mixer": "all", "ffn": "channelmix"},
    ],
    ids=str,
)
def test_describe_counts_what_a_real_model_has_and_remembers(shape, n):
    shape = shape | {"mixer": mixer_letters(ModelConfig(n_layer=3), shape["mixer"])}
    model = tiny_model(n_layer=3, **shape)
    head, *rows = describe(model.cfg, n).splitlines()
    assert model.cfg.mixers in head and numbers(head)[:2] == [3, model.n_params()]
    state = model(torch.zeros(1, n, dtype=torch.long))[1]
    assert head.partition(f"memory of {n:,} tokens: ")[2] == unit(nbytes(state)) + (
        ", 384 bytes of it in ChannelMix" if "ffn" in shape else ""
    )
    count = lambda s: (
        s.nbytes if isinstance(s, torch.Tensor) else sum(map(count, s)) if isinstance(s, tuple) else 0
    )  # noqa: E731
    layers = state.layers
    total = sum(count(layer[0]) for layer in layers)
    for row, kind in zip(rows, "ar"):
        mine = [i for i, letter in enumerate(model.cfg.mixers) if letter == kind]
        params = sum(p.numel() for i in mine for p in model.blocks[i].att.parameters())
        memory = sum(count(layers[i][0]) for i in mine)
        assert memory == len(mine) * cache_bytes(model.cfg, kind, n)
        assert numbers(row)[:2] == [len(mine), params]
        assert row.split("%")[0].endswith(f"{100 * params / model.n_params():.1f}") and row.endswith(
            f"{memory / total:.1%}"
        )
    with pytest.raises(ValueError, match="at least 1"):
        describe(model.cfg, 0)


def test_a_pattern_for_layers_beyond_all_models_is_refused_at_once():
    """A thousand million layers would be built for hours."""
    for n_layer, pattern in ((10**7, "all"), (1025, "a"), (6, "first:" + "9" * 9000), (6, "ar" * 9000)):
        with pytest.raises(ValueError, match=f"n_layer = {n_layer}, .*: a model has at most 1024") as e:
            mixer_letters(ModelConfig(n_layer=n_layer), pattern)
        assert len(str(e.value)) < 300
    with pytest.raises(ValueError, match="n_layer = 1000000000: .* below 16777216"):
        ModelConfig(n_layer=10**9)
