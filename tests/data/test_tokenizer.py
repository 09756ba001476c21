"""Tokenizers by name and in folders: equal names are equal tokens."""

import json

import numpy as np
import pytest

from common_bpe import CHATML, PAGE, model_folder, save, train  # noqa: F401
from common_data import BYTES, EOT, documents, write_jsonl
from data.bpe import ByteLevelBPE, fingerprint
from data.foreign import GPT2, read_tokenizer_json
from data.prepare import prepare
from data.tokenizer import (END, TextStream, copy_tokenizer, get_tokenizer, load_tokenizer, save_tokenizer,
                            write_tokenizer)


def test_bytes_ids_are_byte_values_and_any_bytes_round_trip():
    text = "naïve 🙂 \x00\r\n\t 漢字"
    assert BYTES.encode_ordinary(text) == list(text.encode()) and BYTES.decode(list(text.encode())) == text
    every = np.random.default_rng(0).integers(0, 256, 1000).tolist() + list(range(256))
    assert BYTES.decode_bytes(every) == bytes(every)
    assert (BYTES.n_vocab, EOT, BYTES.decode([EOT])) == (257, 256, END)


def test_a_special_token_spelt_in_text_is_only_text(tmp_path):
    assert BYTES.encode_ordinary(END) == list(END.encode())
    prepare(write_jsonl(tmp_path / "a.jsonl", [{"text": f"{END}{i}"} for i in range(40)]), tmp_path / "out")
    assert all(text.startswith(END) for text in documents(tmp_path / "out", "train"))


def test_a_folder_remembers_its_tokenizer_and_what_else_its_meta_said(tmp_path):
    (tmp_path / "meta.json").write_text('{"kind": "text"}')
    save_tokenizer(BYTES, tmp_path)
    assert load_tokenizer(tmp_path).name == "bytes"
    assert json.loads((tmp_path / "meta.json").read_text()) == {"kind": "text", "tokenizer": "bytes"}


def test_a_tokenizer_json_is_answered_with_its_folder(tmp_path):
    folder = save(train("SmolLM2"), tmp_path / "hf")
    with pytest.raises(ValueError, match=f"give the folder that holds it, {folder}$"):
        get_tokenizer(str(folder / "tokenizer.json"))


def test_a_folder_keeps_its_tokenizer_and_only_what_decides_ids_names_it(tmp_path):
    folder = save(train("SmolLM2", added=("<think>",)), tmp_path / "hf", chat_template=CHATML)
    spec = read_tokenizer_json(folder)
    (tmp_path / "meta.json").write_text('{"teacher": "x"}')
    name = write_tokenizer(spec, tmp_path)
    enc = load_tokenizer(tmp_path)
    assert json.loads((tmp_path / "meta.json").read_text()) == {"teacher": "x", "tokenizer": name}
    assert enc.name == name and enc.spec == spec
    for same in (ByteLevelBPE(spec), get_tokenizer(str(tmp_path))):
        assert enc.encode_ordinary(PAGE) == same.encode_ordinary(PAGE)
    assert fingerprint(spec | {"chat": None, "stop": [0]}) == name
    for change in ({"split": [GPT2]}, {"normalizer": "NFC"}, {"tokens": spec["tokens"][:-1]}, {"special": {}},
                   {"added": {}}):
        assert fingerprint(spec | change) != name
    other = write_tokenizer(spec | {"split": [GPT2]}, tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": name}))
    with pytest.raises(ValueError, match=f"{other}.*{name}"):
        load_tokenizer(tmp_path)


def test_copying_where_there_is_no_file_does_nothing(tmp_path, model_folder):
    copy_tokenizer(tmp_path, tmp_path)
    copy_tokenizer(model_folder, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (model_folder / "tokenizer.json").read_bytes()


def test_characters_appear_when_their_last_byte_does_and_bad_bytes_never_crash():
    stream = TextStream(BYTES)
    pieces = [stream(byte) for byte in "aé漢🙂".encode()]
    assert pieces == ["a", "", "é", "", "", "漢", "", "", "", "🙂"] and stream(None) == ""
    stream = TextStream(BYTES)
    # nonsense, a false start, an unfinished one
    assert "".join(map(stream, b"\xff\xc3(\xe6\xbc")) == "\ufffd\ufffd(" and stream(None) == "\ufffd"
    assert [TextStream(BYTES)(token) for token in (256, 300)] == [END, "\ufffd"]
