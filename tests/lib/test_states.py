"""A state is a value: reading gives another, texts of any lengths go side by side."""

import pytest
import torch

import lib.states
from common import one_line
from common_states import ALL, close, drawn, model_of, same, tokens
from lib.decode import Decoder
from lib.state_file import compress
from lib.states import copy, join, nbytes, process, process_rows, repeat, reset, select, tensors, tree_map
from tools.batch import generate_rows

# ------------------------------------------------------------------------------------------
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
    """Three texts by turns from one start: no call changes the state it is given."""
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
        assert sum(held.values()) == nbytes(state) and not any(x.requires_grad for x in tensors(state))


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


# ------------------------------------------------------------------------------------------
# Batches of different lengths


LENGTHS = (7, 1, 12, 7, 3)


@pytest.mark.parametrize("name", ALL)
def test_rows_of_any_lengths_are_read_as_alone_each_token_once(name, monkeypatch):
    model, rows = model_of(name), [tokens(1, n, seed=i)[0] for i, n in enumerate(LENGTHS)]
    read = []
    monkeypatch.setattr(
        lib.states,
        "process",
        lambda model, text, *rest: read.append(text.numel()) or process(model, text, *rest),
    )
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
        *steps, (_, batches) = generate_rows(
            model, prompts, 12, temperature=temperature, generators=seeds(), state=state
        )
        new = torch.stack([t for t, _ in steps], 1)
        for i, (prompt, generator) in enumerate(zip(prompts, seeds())):
            own = None if state is None else select(state, [i])
            options = {"temperature": temperature, "generator": generator, "state": own}
            alone = drawn(model, torch.tensor([prompt]), 12, **options)
            assert new[i].tolist() == alone[0, :11].tolist()
        one = name in ("RWKV-7", "student")
        assert sorted(i for rows, _ in batches for i in rows) == [0, 1, 2, 3, 4]
        assert len(batches) == (1 if one else 4)


def test_joined_states_are_select_backwards():
    model = model_of("RWKV-7")
    _, state = process(model, tokens(3, 9))
    ((rows, joined),) = join(model.cfg, [select(state, [i]) for i in range(3)])
    assert rows == [0, 1, 2] and same(joined, state)


def test_a_repeated_state_is_that_of_texts_that_began_alike():
    model = model_of("hybrid")
    _, state = process(model, tokens(1, 9))
    _, alike = process(model, tokens(1, 9).expand(3, -1))
    close(repeat(state, 3), alike)
    assert same(select(repeat(state, 3), [2]), state)


def test_a_tree_keeps_its_structure_and_what_is_no_tensor():
    _, state = process(model_of("hybrid"), tokens(2, 9))
    doubled = tree_map(torch.add, state, state)
    assert doubled.position == 9 and doubled.layers[0][0][2] == 9 and doubled.layers[0][1] is None
    assert all(torch.equal(a, 2 * b) for a, b in zip(tensors(doubled), tensors(state), strict=True))
    assert tensors(None) == [] and nbytes(state) == sum(x.numel() * 4 for x in tensors(state))
