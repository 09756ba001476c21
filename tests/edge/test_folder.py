"""Damaged data folders, and folders that are not to be replaced."""

import json
import os
import shlex
import shutil

import numpy as np
import pytest

from common import one_line, tiny_model
from common_bpe import CHATML, imported, train  # noqa: F401
from common_data import numbered, preference, supervised, text_file, write_jsonl  # noqa: F401
from data.loader import Loader
from data.prepare import prepare
from data.tokenizer import copy_tokenizer, load_tokenizer
from lib.folders import save_model


def read_all(folder) -> list:
    """Every number that a folder gives."""
    batches = [batch for half in ("train", "val") for batch in Loader(folder, half, 4, 64).windows()]
    tensors = [z for batch in batches for z in (batch.x, batch.y, batch.mask)]
    return [value for z in tensors for value in z.flatten().tolist()]


@pytest.mark.parametrize("kind", ["supervised", "preference"])
def test_a_flipped_bit_is_found_wherever_it_is(request, kind):
    folder = request.getfixturevalue(kind)
    expected, rng = read_all(folder), np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for at in rng.integers(0, 8 * len(content), 12).tolist():
            damaged = bytearray(content)
            damaged[at // 8] ^= 1 << at % 8
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=path.name.replace(".", "[.]")) as e:
                read_all(folder)
            one_line(e.value)
        path.write_bytes(content)
    assert read_all(folder) == expected


@pytest.mark.parametrize("a, b", [("train.bin", "val.bin"), ("train.mask.bin", "val.mask.bin"),
                                  ("train.idx.bin", "val.idx.bin"), ("train.mask.bin", "train.bin")])
def test_swapped_files_are_found(supervised, a, b):
    contents = [(supervised / name).read_bytes() for name in (a, b)]
    (supervised / a).write_bytes(contents[1])
    (supervised / b).write_bytes(contents[0])
    with pytest.raises(ValueError, match="missing or damaged"):
        read_all(supervised)


def without_digests(folder) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    rest = {key: value for key, value in meta.items() if key not in ("blocks", "digest")}
    (folder / "meta.json").write_text(json.dumps(rest))


@pytest.mark.parametrize("name, dtype, at, value, complaint", [
    ("train.bin", np.uint16, 5, 9999, "token 9999 outside .*vocabulary of 257 in .*train.bin at position 5"),
    ("train.mask.bin", np.uint8, 7, 2, "2, which is neither 0 nor 1, in .*train.mask.bin at position 7"),
    ("train.idx.bin", np.int64, 0, 1, "train.idx.bin.*number 0 is 1"),
    ("train.idx.bin", np.int64, 3, -1, "train.idx.bin.*number 3 is -1"),
    ("train.idx.bin", np.int64, 3, 2**63 - 1, "train.idx.bin.*number 3 is 9223372036854775807"),
    ("train.idx.bin", np.int64, 3, 0, "train.idx.bin.*number 3 is 0"),
    ("train.idx.bin", np.int64, -1, 700, "train.idx.bin.*is 700"),
])
def test_values_out_of_range_are_named_with_the_place(supervised, name, dtype, at, value, complaint):
    without_digests(supervised)
    values = np.fromfile(supervised / name, dtype)
    values[at] = value
    values.tofile(supervised / name)
    with pytest.raises(ValueError, match=complaint) as e:
        read_all(supervised)
    one_line(e.value)


@pytest.mark.parametrize("name, value", [
    ("vocab_size", "Infinity"), ("vocab_size", "-1"), ("vocab_size", "0"), ("vocab_size", "null"),
    ("vocab_size", "257.0"), ("vocab_size", "true"), ("vocab_size", '"257"'), ("vocab_size", "[257]"),
    ("vocab_size", "1" * 400), ("vocab_size", "1" * 5000), ("kind", "null"), ("kind", '"texts"'),
    ("kind", "[]"), ("kind", "{}"), ("dtype", '"float32"'), ("dtype", '"int64"'), ("dtype", "16"),
    ("tokens", "5"),
    ("tokens", "{}"), ("tokens", '{"train": -5, "val": 5}'), ("tokens", '{"train": 1e3, "val": 5}'),
    ("tokens", '{"train": null}'), ("tokenizer", "3"), ("val_fraction", "NaN"), ("documents", "[1, 2]"),
    ("blocks", "7"), ("digest", "null"), ("split", '"head"'),
])
def test_a_field_of_another_type_or_range_is_named(supervised, name, value):
    meta = json.loads((supervised / "meta.json").read_text())
    text = json.dumps(meta | {name: "HERE"}).replace('"HERE"', value)
    (supervised / "meta.json").write_text(text)
    with pytest.raises(ValueError, match="meta.json.*data.prepare") as e:
        read_all(supervised)
    assert len(one_line(e.value)) < 600


@pytest.mark.parametrize("content", [
    b"", b"null", b"[]", b'"x"', b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"{" + b" " * 10_000_000,
    b"x" * 10_000_000, b'{"kind": "text", "kind": "text"}', b'{"kind": "\\ud800"}', b"\0" * 100,
    '\ufeff{"kind": "text"}'.encode(),
])
def test_what_is_no_meta_json_is_one_line(supervised, content):
    (supervised / "meta.json").write_bytes(content)
    for read in (read_all, load_tokenizer):
        with pytest.raises(ValueError, match="meta.json") as e:
            read(supervised)
        assert len(one_line(e.value)) < 600


def test_what_is_no_file_is_one_line_and_no_waiting(supervised):
    for name in ("meta.json", "train.bin", "train.idx.bin", "train.mask.bin"):
        content = (supervised / name).read_bytes()
        (supervised / name).unlink()
        for make in (os.mkfifo, os.mkdir):
            make(supervised / name)
            with pytest.raises(ValueError, match=name):
                read_all(supervised)
            (supervised / name).unlink() if make is os.mkfifo else (supervised / name).rmdir()
        (supervised / name).write_bytes(content)


def test_a_damaged_tokenizer_is_not_handed_on(tmp_path):
    enc = imported(train(), tmp_path / "hf", chat_template=CHATML)
    (tmp_path / "a.txt").write_text("some text\n\n" * 99)
    prepare(tmp_path / "a.txt", tmp_path / "d", tokenizer=str(tmp_path / "hf"))
    assert load_tokenizer(tmp_path / "d").chat == enc.chat
    file = tmp_path / "d" / "tokenizer.json"
    file.write_text(file.read_text().replace("Be kind", "Be rude"))     # of this its name does not speak
    for read in (load_tokenizer, lambda folder: copy_tokenizer(folder, tmp_path)):
        with pytest.raises(ValueError, match="tokenizer.json.*does not fit its digest"):
            read(tmp_path / "d")
    assert not (tmp_path / "tokenizer.json").exists()


# ------------------------------------------------------------------------------------------
# What is not to be replaced

@pytest.mark.parametrize("files", [
    {"meta.json": "{}"}, {"meta.json": '{"name": "of something else"}'}, {"meta.json": "no JSON"},
    {"meta.json": '{"tokens": 3}', "model.safetensors": ""}, {"train.bin/a": ""},
    {"meta.json": '{"tokens": 3}', "train.bin/thesis": "x"},
])
def test_a_folder_of_something_else_stays_even_with_overwrite(tmp_path, text_file, files):
    for name, content in files.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(content)
    with pytest.raises(ValueError, match="not .only. a prepared data set.*choose another --out") as e:
        prepare(text_file, tmp_path / "out", overwrite=True)
    one_line(e.value)
    assert all((tmp_path / "out" / name).read_text() == content for name, content in files.items())


def test_a_damaged_data_set_of_ours_can_be_replaced(supervised, text_file):
    for content in (b"{", b"[]"):
        (supervised / "meta.json").write_bytes(content)
        prepare(text_file, supervised, overwrite=True)
        assert Loader(supervised, "train", 1, 8).kind == "text"


def test_what_is_read_is_never_replaced(tmp_path, text_file):
    prepare(text_file, tmp_path / "set")
    shutil.copy(text_file, tmp_path / "in.txt")
    cases = [(text_file, text_file, "bytes"), (text_file, tmp_path, "bytes"),
             (text_file, tmp_path / "set", str(tmp_path / "set")), (tmp_path, tmp_path, "bytes")]
    (tmp_path / "link").symlink_to(tmp_path / "set")
    cases.append((text_file, tmp_path / "link", str(tmp_path / "set")))
    for source, out, tokenizer in cases:
        with pytest.raises(ValueError, match="is, or holds, what is to be read.*choose another --out"):
            prepare(source, out, tokenizer, overwrite=True)
    assert Loader(tmp_path / "set", "train", 1, 8).n and text_file.exists()


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path, text_file, monkeypatch):
    def seal_and_disturb(folder):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("precious")

    monkeypatch.setattr("data.prepare.seal", seal_and_disturb)
    with pytest.raises(ValueError, match="thesis.txt"):
        prepare(text_file, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


# ------------------------------------------------------------------------------------------
# What is left out

def test_the_loader_says_how_many_examples_it_cuts_and_leaves_out(tmp_path, capsys):
    records = [{"prompt": "p" * (5 if i % 10 else 90), "response": f"{i:03}" * (1 if i % 4 else 30)}
               for i in range(100)]
    prepare(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "out", split="tail")
    for _ in range(2):
        loader = Loader(tmp_path / "out", "train", 1, 32)
    kept = [r for r in records[:90] if len(r["prompt"]) < 32]
    cut = [r for r in kept if len(r["prompt"] + r["response"]) + 2 > 33]
    text = capsys.readouterr().err
    path = tmp_path / "out" / "train.idx.bin"
    assert loader.n == len(kept) and len(text.splitlines()) == 2    # said once
    assert f"{path}: {len(cut)} of 90 examples are longer than block_size = 32 and are cut" in text
    assert f"{path}: {90 - len(kept)} of 90 examples are left out: they have nothing to learn" in text
    Loader(tmp_path / "out", "train", 1, 256)
    assert not capsys.readouterr().err


def test_what_was_never_prepared_is_not_to_be_moved_away_or_replaced(tmp_path, text_file):
    """A book, a folder of books or a model instead of data: the remedy runs."""
    books, model = tmp_path / "my books", tmp_path / "model"
    books.mkdir()
    shutil.copy(text_file, books)
    save_model(tiny_model(), model, {"tokenizer": "bytes"})
    for place in (text_file, books):
        with pytest.raises(ValueError, match="does not exist: prepare .* first") as e:
            Loader(place, "train", 1, 4)
        words = shlex.split(one_line(e.value).partition("python -m data.prepare ")[2].partition(",")[0])
        assert words == [str(place), "--out", "data/NAME"]
        prepare(words[0], tmp_path / "data")
        shutil.rmtree(tmp_path / "data")
    for _ in range(2):
        with pytest.raises(ValueError, match="is a model folder, not data") as e:
            Loader(model, "train", 1, 4)
        one_line(e.value)
        (model / "meta.json").unlink(missing_ok=True)                  # Hugging Face's have none
    with pytest.raises(ValueError, match="my books has no tokenizer: give the folder of a model") as e:
        prepare(text_file, tmp_path / "data", tokenizer=str(books))
    one_line(e.value)
    books.rename(tmp_path / "data two")
    (tmp_path / "data two" / "train.bin").touch()                      # it was one of ours
    with pytest.raises(ValueError, match="restore it, or move .* SOURCE --out '.*/data two'"):
        Loader(tmp_path / "data two", "train", 1, 4)
