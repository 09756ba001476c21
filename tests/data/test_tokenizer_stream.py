"""Tokens become text as soon as a character is whole."""

from data.tokenizer import TextStream, get_tokenizer

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
