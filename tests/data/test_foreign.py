"""Strangers' tokenizers: read so that the ids are theirs, or refused."""

import json
import random

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, models, normalizers

from common import one_line
from common_bpe import (CHATML, LLAMA, MIXED, PAGE, PRE, SPECIAL, TALKS, gguf_fields, ids, imported, save,
                        scraps, train)
from data.bpe import ByteLevelBPE, fingerprint
from data.chat import frame
from data.foreign import read_gguf_tokenizer, read_tokenizer_json
from data.tokenizer import get_tokenizer


def test_any_list_of_merges_gives_the_same_ids_or_is_refused(tmp_path):
    """Merges drawn at random.

    The same token twice, tokens that nothing gives, orders that tiktoken can't have.
    """
    read = refused = 0
    for seed in range(400):
        rng, vocab, merges = random.Random(seed), {"a": 0, "b": 1, "c": 2}, []
        for _ in range(rng.randrange(1, 14)):
            pair = rng.choice([*vocab]), rng.choice([*vocab])
            if len("".join(pair)) <= 6 and pair not in merges:
                merges.append(pair)
                vocab.setdefault("".join(pair), len(vocab))
        if rng.random() < 0.3:
            vocab.setdefault("".join(rng.choices("abc", k=rng.randrange(2, 5))), len(vocab))
        original = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rng.random() < 0.3))
        original.pre_tokenizer = PRE["GPT-2"]
        original.add_special_tokens(["</s>"])
        try:
            enc = imported(original, tmp_path)
        except ValueError as e:
            refused += "is merged before" in one_line(e) or "stands for whole pieces" in one_line(e)
            continue
        read += 1
        for text in scraps("abc", 60, 14, seed):
            assert enc.encode_ordinary(text) == ids(original, text), (seed, text)
    assert read > 300 and refused > 20 and read + refused == 400


def test_a_token_that_is_a_whole_piece_needs_no_merges_where_the_file_says_so(tmp_path):
    original = train("Llama 3")
    file = json.loads(original.to_str())
    file["model"]["vocab"]["xyzzy"] = len(file["model"]["vocab"])
    for i, ignore in enumerate((True, False)):
        file["model"]["ignore_merges"] = ignore
        original = Tokenizer.from_str(json.dumps(file))
        enc = imported(original, tmp_path / str(i))
        assert enc.encode_ordinary("xyzzy xyzzy") == ids(original, "xyzzy xyzzy")
        assert (enc.encode_ordinary("xyzzy") == [file["model"]["vocab"]["xyzzy"]]) == ignore


def test_merges_may_be_pairs_or_strings(tmp_path):
    file = json.loads(train().to_str())
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in file["model"]["merges"]]
    read = []
    for merges in (pairs, [" ".join(pair) for pair in pairs]):
        file["model"]["merges"] = merges
        (tmp_path / "tokenizer.json").write_text(json.dumps(file))
        read.append(read_tokenizer_json(tmp_path))
    assert read[0] == read[1] and len([token for token in read[0]["tokens"] if token]) == 1500 - len(SPECIAL)


def test_an_end_that_is_not_flagged_as_special_is_special(tmp_path):
    folder = save(train(), tmp_path / "m", chat_template=CHATML)
    expected = read_tokenizer_json(folder)
    file = json.loads((folder / "tokenizer.json").read_text())
    for token in file["added_tokens"]:
        token["special"] = token["content"] != "<|im_end|>"
    (folder / "tokenizer.json").write_text(json.dumps(file))
    assert read_tokenizer_json(folder) == expected and expected["chat"] and expected["stop"] == [0, 2]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == 2 and "<|im_end|>" in theirs.all_special_tokens


# ------------------------------------------------------------------------------------------
# GGUF

@pytest.mark.parametrize("pre, name", [
    ("SmolLM2", "smollm"),
    ("GPT-2", "gpt-2"),
    ("Qwen2", "qwen2"),
    ("Llama 3", "llama-bpe"),
])
def test_a_gguf_says_what_the_tokenizer_json_says(tmp_path, pre, name):
    think = AddedToken("<think>", normalized=False)     # as Qwen's are; a GGUF doesn't say
    original = train(pre, added=(think,), normalizer=normalizers.NFC() if name == "qwen2" else None)
    fields = gguf_fields(original, **{"ggml.pre": name, "ggml.add_bos_token": False})
    expected = read_tokenizer_json(save(original, tmp_path, chat_template=CHATML))
    spec = read_gguf_tokenizer(fields)
    assert spec == expected and fingerprint(spec) == fingerprint(expected)
    fields = gguf_fields(original, **{"ggml.bos_token_id": 1, "ggml.pre": name})
    assert read_gguf_tokenizer(fields)["start"] == (1 if name == "llama-bpe" else None)


def test_a_real_gguf_is_read(tmp_path):
    gguf = pytest.importorskip("gguf")
    original = train("SmolLM2")
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}
    fields = gguf_fields(original)
    for key, field in fields.items():
        value = field.contents()
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_gguf_tokenizer(gguf.GGUFReader(tmp_path / "m.gguf").fields) == read_gguf_tokenizer(fields)


def test_a_gguf_that_does_not_say_how_it_splits_is_split_as_llama_cpp_would():
    enc = ByteLevelBPE(read_gguf_tokenizer(gguf_fields(train(), **{"ggml.pre": None})))
    assert enc.decode(enc.encode_ordinary(PAGE)) == PAGE
    parts = map(enc.encode_ordinary, ("123", "456", "7"))
    assert enc.encode_ordinary("1234567") == [i for part in parts for i in part]


# ------------------------------------------------------------------------------------------
# Chat templates

def test_a_named_template_and_one_in_a_file_of_its_own_are_found(tmp_path):
    original = train()
    templates = [{"name": "x", "template": LLAMA}, {"name": "default", "template": CHATML}]
    listed = imported(original, tmp_path / "a", chat_template=templates)
    save(original, tmp_path / "b", chat_template=LLAMA)
    (tmp_path / "b" / "chat_template.jinja").write_text(CHATML)
    alone = imported(original, tmp_path / "c", chat_template=CHATML)
    assert listed.chat == get_tokenizer(str(tmp_path / "b")).chat == alone.chat


def test_a_template_without_a_newline_after_the_last_answer_is_frames(tmp_path):
    """As that of Tulu 3 and Falcon3."""
    tulu = ("{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
            "{{ '\n' if m['role'] != 'assistant' else eos_token if loop.last else eos_token + '\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
    folder = save(train(), tmp_path / "m", chat_template=tulu)
    theirs, chat = transformers.AutoTokenizer.from_pretrained(folder), read_tokenizer_json(folder)["chat"]
    assert chat["assistant"][1:] == ["<|im_end|>", "\n"]
    for turns in TALKS:
        messages = [{"role": role, "content": text} for role, text in turns]
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert frame(chat, turns) == expected


@pytest.mark.parametrize("flag", ["lstrip", "rstrip"])
def test_a_template_whose_tokens_take_away_the_space_beside_them_is_left_out(flag, tmp_path):
    folder = save(train(), tmp_path / "m", chat_template=CHATML)
    file = json.loads((folder / "tokenizer.json").read_text())
    for token, left_out in (("<|endoftext|>", False), ("<|im_start|>", True)):
        next(added for added in file["added_tokens"] if added["content"] == token)[flag] = True
        (folder / "tokenizer.json").write_text(json.dumps(file))
        assert (read_tokenizer_json(folder)["chat"] is None) == left_out


# ------------------------------------------------------------------------------------------
# vocab.json and merges.txt

def save_parts(original: Tokenizer, folder, **config) -> None:
    folder.mkdir()
    original.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("pre, config", [
    ("GPT-2", {}),
    ("GPT-2", {"tokenizer_class": "GPT2Tokenizer", "eos_token": {"content": "<|im_end|>"}}),
    ("Qwen2", {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["<|im_start|>"]}),
    ("Qwen2", {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": "<|im_end|>"}),
])
def test_vocab_and_merges_are_the_tokenizer_that_they_were_saved_from(pre, config, tmp_path):
    original = train(pre, normalizer=normalizers.NFC() if pre == "Qwen2" else None)
    save_parts(original, tmp_path / "m", **config)
    enc = get_tokenizer(str(tmp_path / "m"))
    # what tokenizer_config.json does not name is text
    plain = original.__class__.from_str(original.to_str().replace("<|im_", "<#im_"))
    for words in MIXED:
        assert enc.encode_ordinary(words) == ids(plain, words.replace("<|endoftext|>", "")) or "<|" in words
    assert enc.eot_token == original.token_to_id("<|endoftext|>")
    last = original.token_to_id("<|im_end|>")
    assert (last in enc.spec["stop"]) == ("eos_token" in config)


def test_added_tokens_and_what_opens_a_text_come_from_the_files_beside(tmp_path):
    original = train("GPT-2")
    added = {"1500": {"content": "<tool>", "special": False}, "1501": {"content": "[PAD]", "special": True}}
    save_parts(original, tmp_path / "m", added_tokens_decoder=added, add_bos_token=True)
    (tmp_path / "m" / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|endoftext|>"}))
    enc = get_tokenizer(str(tmp_path / "m"))
    assert enc.spec["start"] == 0 and enc.spec["added"] == {"<tool>": 1500}
    assert enc.spec["special"] == {"<|endoftext|>": 0, "[PAD]": 1501} and enc.n_vocab == 1502
    assert enc.encode_ordinary("a<tool>b")[1] == 1500


def test_the_added_tokens_of_older_files_are_those_of_transformers(tmp_path):
    save_parts(train("GPT-2"), tmp_path / "m", tokenizer_class="GPT2Tokenizer")
    files = {"added_tokens": {"<|sep|>": 1500, "<|done|>": 1501},
             "special_tokens_map": {"eos_token": "<|done|>", "bos_token": "<|endoftext|>",
                                    "unk_token": "<|endoftext|>"},
             "config": {"model_type": "gpt2", "eos_token_id": 1501, "vocab_size": 1502}}
    for name, content in files.items():
        (tmp_path / "m" / f"{name}.json").write_text(json.dumps(content))
    enc, theirs = (read(str(tmp_path / "m")) for read in (get_tokenizer,
                                                          transformers.AutoTokenizer.from_pretrained))
    for text in ("question<|sep|>answer", "a<|sep|>\u0338b"):
        assert enc.encode_ordinary(text) == theirs(text, add_special_tokens=False).input_ids
    assert enc.n_vocab == len(theirs) == 1502 and enc.spec["stop"] == [0, theirs.eos_token_id]
    assert enc.spec["added"] == {"<|sep|>": 1500} and enc.spec["special"]["<|done|>"] == 1501


def test_added_tokens_of_older_qwen_files_are_looked_for_in_normalized_text(tmp_path):
    save_parts(train("Qwen2", normalizer=normalizers.NFC()), tmp_path / "m", tokenizer_class="Qwen2Tokenizer")
    (tmp_path / "m" / "added_tokens.json").write_text(json.dumps({"na\u00efve": 1500, "<b>": 1501}))
    enc, theirs = (read(str(tmp_path / "m")) for read in (get_tokenizer,
                                                          transformers.AutoTokenizer.from_pretrained))
    for text in ("nai\u0308ve<b>", "na\u00efve <b>\u0338"):
        assert enc.encode_ordinary(text) == theirs(text, add_special_tokens=False).input_ids
    assert enc.encode_ordinary("nai\u0308ve<b>") == [1500, 1501]


@pytest.mark.parametrize("config, word", [
    ({"tokenizer_class": "RobertaTokenizer"}, "RobertaTokenizer without a tokenizer.json is not supported"),
    ({"add_prefix_space": True}, "add_prefix_space"),
    ({"tokenizer_class": 3}, "vocab.json is no tokenizer"),
    ({"added_tokens_decoder": {"x": {}}}, "no tokenizer"),
])
def test_other_vocabularies_with_merges_are_refused_by_name(config, word, tmp_path):
    save_parts(train("GPT-2"), tmp_path / "m", **config)
    with pytest.raises(ValueError, match=word) as e:
        read_tokenizer_json(tmp_path / "m")
    assert str(tmp_path) in one_line(e.value)
