"""States at their edges: many rows, foreign states, and tokens that no model knows."""

import pytest
import torch

from common import one_line
from common_states import ALL, model_of, tokens
from lib.state_file import compress
from lib.states import process, process_rows


def test_pieces_are_shorter_for_more_rows(monkeypatch):
    """So memory does not grow with the number of rows, down to 16 tokens of each."""
    model, shapes = model_of("RWKV-7"), []
    hidden = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda text, state: shapes.append(tuple(text.shape)) or hidden(text, state)
    )
    for B, T, widths in ((1, 700, (512, 188)), (5, 700, (102,) * 6 + (88,)), (100, 40, (16, 16, 8))):
        shapes.clear()
        process(model, tokens(B, T))
        assert shapes == [(B, n) for n in widths]


def test_what_cannot_be_read_on_from_is_one_line():
    model = model_of("RWKV-7")
    _, two = process(model, tokens(2, 3))
    for call, word in (
        (lambda: process(model, tokens(1, 3), two), "state of 2"),
        (lambda: process_rows(model, [tokens(1, 3)[0]], two), "state of 2"),
        (lambda: process(model, tokens(2, 3), compress(two, "int8")), "expand"),
        (lambda: process_rows(model, []), "at least one text"),
        (lambda: process(model, tokens(2, 3)[:0]), "0 texts of 3 tokens"),
    ):
        with pytest.raises(ValueError, match=word) as e:
            call()
        one_line(e.value)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [257, 999, -1, -257])
def test_a_token_outside_the_vocabulary_is_refused_before_anything_is_read(name, bad, monkeypatch):
    """Also in the last piece, and in the longest of several rows."""
    model, text = model_of(name), tokens(2, 40)
    text[1, 39] = bad
    monkeypatch.setattr(model, "hidden", None)
    with pytest.raises(ValueError, match=f"token {bad} is outside the vocabulary of 257") as error:
        process(model, text, piece=8)
    one_line(error.value)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"token {bad} is outside"):
        process_rows(model, [tokens(1, 3)[0], text[1]])


def test_a_piece_holds_at_least_one_token():
    with pytest.raises(ValueError, match="in pieces of 0"):
        process(model_of("RWKV-7"), tokens(1, 3), piece=0)


def test_a_text_of_no_tokens_is_refused():
    for text in (torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match="there must be at least one of each"):
            process(model_of("GPT"), text)
