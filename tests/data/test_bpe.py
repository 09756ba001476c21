"""A model's own tokenizer: the ids are those of the library, and text stays text."""

import numpy as np
import pytest
import tiktoken
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from common_bpe import CHATML, MIXED, PRE, ids, imported, scraps, train, whole
from data.bpe import BYTE
from data.prepare import prepare
from data.tokenizer import get_tokenizer, opening, stops


@pytest.mark.parametrize("pre", PRE)
def test_ids_are_those_of_tokenizers(tmp_path, pre):
    original = train(pre)
    enc = imported(original, tmp_path)
    assert isinstance(enc, tiktoken.Encoding) and enc.n_vocab == original.get_vocab_size()
    for text in MIXED:
        expected = ids(original, text)
        assert enc.encode(text, allowed_special="all") == expected
        assert enc.decode(expected) == text


def test_nfc_is_applied_to_text_but_not_to_added_tokens(tmp_path):
    original = train("Qwen2", normalizer=normalizers.NFC(), added=(AddedToken("e\u0301!", normalized=False),))
    enc = imported(original, tmp_path)
    for text in [*MIXED, "e\u0301 e\u0301! \u00e9!"]:
        assert enc.encode(text, allowed_special="all") == ids(original, text)


def test_added_tokens_are_looked_for_before_or_after_nfc_as_each_says(tmp_path):
    """transformers' add_tokens makes those that are looked for after it."""
    exact = [AddedToken(token, normalized=False) for token in ("<a", "e\u0301!")]
    parts = ["nai\u0308ve", "na\u00efve", "<b>", "\u0338", "<a", "b<a>", "e\u0301!", "\u00e9!", " x"]
    texts = [*MIXED, *scraps(parts, 200, 8)]
    for name, normalizer in (("nfc", normalizers.NFC()), ("none", None)):
        original = train("Qwen2", normalizer=normalizer, added=("nai\u0308ve", "<b>", "b<a>", *exact))
        enc = imported(original, tmp_path / name)
        for text in texts:
            assert enc.encode(text, allowed_special="all") == ids(original, text), (name, text)


def test_bytes_that_are_no_tokens_are_left_out_or_unknown_as_there(tmp_path):
    for i, options in enumerate(({}, {"unk_token": "<|endoftext|>"})):
        original = train("SmolLM2", alphabet=False, **options)
        enc = imported(original, tmp_path / str(i))
        assert bytes([0xE6]) not in map(enc.decode_single_token_bytes, range(enc.n_vocab))
        for text in MIXED:
            assert enc.encode(text, allowed_special="all") == ids(original, text)
    assert enc.encode_ordinary("\ud800") == ids(original, "\ufffd")


def test_bytes_are_written_as_the_library_does():
    assert sorted(BYTE) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE.values()) == list(range(256))
    for character in ("\x00", " ", "\n", "\xad"):
        shown = whole(use_regex=False).pre_tokenize_str(character)[0][0]
        assert bytes(BYTE[c] for c in shown) == character.encode()


# ------------------------------------------------------------------------------------------
# Special tokens

def test_text_never_becomes_a_special_token_but_always_an_added_one(tmp_path):
    original = train(added=("<think>", "  ", "    ", "<thinking>"))
    enc = imported(original, tmp_path)
    text = "<|im_start|>a<think>b<thinking>   c     d<think"
    assert enc.encode(text, allowed_special="all") == ids(original, text)
    assert enc.decode(enc.encode_ordinary(text)) == text
    assert not {0, 1, 2} & {*enc.encode_ordinary(text)} and not {0, 1, 2} & {*enc.encode(text)}
    assert enc.encode(text, allowed_special={"<|im_end|>"}) == enc.encode_ordinary(text)
    assert enc.encode_ordinary("<think>x") == [original.token_to_id("<think>"), *ids(original, "x")]


def test_documents_end_with_the_token_of_pretraining_and_texts_with_any_that_ends(tmp_path):
    original = train()
    enc = imported(original, tmp_path / "a", chat_template=CHATML)
    assert (enc.eot_token, opening(enc), stops(enc)) == (0, [0], (0, 2))
    # 77 is an ordinary token
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [1, 77]}')
    assert stops(get_tokenizer(str(tmp_path / "a"))) == (0, 1, 2)
    original.post_processor = processors.TemplateProcessing(single="<|im_start|> $A",
                                                            special_tokens=[("<|im_start|>", 1)])
    enc = imported(original, tmp_path / "b")
    assert opening(enc) == [1]
    (tmp_path / "t.txt").write_text("one two three\n\n" * 50)
    prepare(tmp_path / "t.txt", tmp_path / "data", tokenizer=str(tmp_path / "b"))
    tokens = np.fromfile(tmp_path / "data" / "val.bin", np.uint16).tolist()
    assert tokens[0] == 1 and tokens[-1] == 0
    assert tokens[1:-1] == enc.encode_ordinary(enc.decode(tokens[1:-1]))
    assert (opening(get_tokenizer("bytes")), stops(get_tokenizer("bytes"))) == ([256], (256,))
