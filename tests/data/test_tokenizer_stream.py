"""Tokens become text as soon as a character is whole."""

import random

import pytest

from data.tokenizer import END, TextStream, get_tokenizer
from data.world import World

BYTES = get_tokenizer("bytes")


def test_characters_appear_when_their_last_byte_does_and_bad_bytes_never_crash():
    stream, pieces = TextStream(BYTES), []
    for byte in "aé漢🙂".encode():
        pieces.append(stream(byte))
    assert pieces == ["a", "", "é", "", "", "漢", "", "", "", "🙂"] and stream(None) == ""
    stream = TextStream(BYTES)
    # nonsense, a false start, an unfinished one
    assert "".join(map(stream, b"\xff\xc3(\xe6\xbc")) == "\ufffd\ufffd(" and stream(None) == "\ufffd"
    assert [TextStream(BYTES)(t) for t in (256, 300)] == ["<|endoftext|>", "\ufffd"]


# ------------------------------------------------------------------------------------------
# Texts that end a text

def tokenizer_of(rng: random.Random) -> World:
    """Tokens of up to six letters, a few of which end amid a character."""
    others = ["".join(rng.choices("ab\né🙂", k=rng.randint(1, 6))).encode() for _ in range(60)]
    others = [token[rng.randint(0, 1) :] for token in others if token[1:]]
    return World([b"", *dict.fromkeys([bytes([b]) for b in range(256)] + others)])


@pytest.mark.parametrize("seed", range(20))
def test_a_text_ends_where_a_stop_begins_wherever_tokens_end(seed):
    """Of the texts that stop it the first that is complete; then nothing is printed.

    What is left of the last token is the text up to there, so that it is as if nothing
    had been drawn behind it.
    """
    rng = random.Random(seed)
    enc, stop = tokenizer_of(rng), ("\n\n", "ab\n", "🙂é", "bab")
    for _ in range(30):
        text = "".join(rng.choices("ab\né🙂", k=rng.randint(1, 25)))
        ids, data = enc.encode_ordinary(text), text.encode()
        stream, out, read = TextStream(enc, (0,), stop), "", []
        for token in ids:
            out += stream(token)
            if stream.ended:
                break
            read.append(token)
        ends = [n for n in range(1, len(text) + 1) if text[:n].endswith(stop)]
        if not ends:
            assert out + stream(None) == text and not stream.ended and stream.unread(ids[-1]) == [ids[-1]]
            continue
        whole = text[: ends[0]]
        found = max((end for end in stop if whole.endswith(end)), key=len)
        assert out == whole.removesuffix(found) and stream.by == found
        assert stream(ids[0]) == stream(None) == ""
        assert enc.decode_bytes(read + stream.unread(token)) == whole.encode() == data[: len(whole.encode())]


def test_an_end_token_ends_a_text_and_shows_what_was_held_back():
    stream = TextStream(BYTES, (256,), ("\n\n",))
    assert [stream(token) for token in (*b"a\n", 256, 256)] == ["a", "", "", ""] and stream.ended
    assert stream(None) == "\n" and stream.by is None and stream.unread(256) == []
    stream = TextStream(BYTES, (), ("\ufffd", END))
    assert [stream(token) for token in (97, 300)] == ["a", ""]
    assert stream.ended and stream.unread(300) == [300]
    stream = TextStream(BYTES, (), ("end",))
    assert stream(256) == "<|" and stream.unread(256) == [*b"<|end"]
