"""Packed sources: .zst, .parquet, thousands of shards, and what is damaged."""

import gzip
import json
import os
import sys
import tracemalloc

import pyarrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from common import one_line
from common_data import documents, examples, stored
from data import packed
from data.prepare import main, prepare

TEXT = "".join(f"paragraph {i} of the text\n\n" for i in range(400))
RECORDS = [{"text": f"document {i}"} for i in range(100)]


def zst(raw: bytes, **how) -> bytes:
    return zstandard.ZstdCompressor(**how).compress(raw)


def jsonl(records: list[dict]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def everything(folder) -> list[str]:
    return sorted(documents(folder, "train") + documents(folder, "val"))


def write_parquet(path, columns: dict, rows: int = 30):
    parquet.write_table(pyarrow.table(columns), path, row_group_size=rows)
    return path


# ------------------------------------------------------------------------------------------
# .zst

@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl"])
def test_a_zst_file_reads_like_the_plain_one(tmp_path, name):
    raw = jsonl(RECORDS) if name == "a.jsonl" else TEXT.encode()
    (tmp_path / name).write_bytes(raw)
    (tmp_path / f"{name}.zst").write_bytes(zst(raw[:999]) + zst(b"") + zst(raw[999:]))     # several frames
    (tmp_path / "B.ZST").write_bytes(zst(raw))                          # shown by its first line
    for source in (name, f"{name}.zst", "B.ZST"):
        prepare(tmp_path / source, tmp_path / "out" / source)
    plain, *others = (everything(tmp_path / "out" / source) for source in (name, f"{name}.zst", "B.ZST"))
    assert plain == others[0] == others[1] and len(plain) > 10


def test_a_piped_zst_is_known_by_its_first_bytes(tmp_path):
    (tmp_path / "a").write_bytes(zst(jsonl(RECORDS)))
    with open(tmp_path / "a") as file:
        prepare(f"/dev/fd/{file.fileno()}", tmp_path / "out")
    assert len(everything(tmp_path / "out")) == 100


@pytest.mark.parametrize("name", ["a.txt.zst", "a.jsonl.zst", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "cut at the start", "changed", "nothing of the kind"])
def test_a_damaged_file_is_named_with_a_remedy(tmp_path, name, damage):
    raw = TEXT.encode() if ".txt" in name else jsonl([{"text": os.urandom(50).hex()} for _ in range(900)])
    path = tmp_path / "shards" / name
    path.parent.mkdir()
    sound = path.parent / ("0.txt" if ".txt" in name else "0.jsonl")
    sound.write_bytes(b"".join(raw.splitlines(True)[:30]))
    if name == "a.parquet":
        write_parquet(path, {"text": [os.urandom(50).hex() for _ in range(900)]})
    else:
        path.write_bytes(zst(raw, write_checksum=True) if ".zst" in name else gzip.compress(raw))
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes({"cut": whole[:-6], "cut at the start": whole[:9], "nothing of the kind": b"[" * 100,
                      "changed": whole[:middle] + bytes(b ^ 255 for b in whole[middle : middle + 40])
                      + whole[middle + 40 :]}[damage])
    with pytest.raises(ValueError, match=f"{name} (is a damaged|has a NUL|is not UTF-8)") as error:
        prepare(path.parent, tmp_path / "out")
    one_line(error.value)
    assert not (tmp_path / "out").exists()


def test_a_zst_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.LITTLE", 2**20)
    (tmp_path / "a.txt.zst").write_bytes(zst(b"a" * 2**25))
    with pytest.raises(ValueError, match="a.txt.zst unpacks to more than 200 times its size"):
        prepare(tmp_path / "a.txt.zst", tmp_path / "out")


@pytest.mark.parametrize("package, name", [("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet")])
def test_a_missing_package_is_one_line_that_says_what_to_install(tmp_path, monkeypatch, package, name):
    for module in (package, f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"")
    says = f"{name} needs the package {package}: pip install {package}"
    with pytest.raises(ValueError, match=says) as error:
        prepare(tmp_path / name, tmp_path / "out")
    one_line(error.value)


# ------------------------------------------------------------------------------------------
# .parquet

TEXTS = [f"text {i}" for i in range(100)]
OTHER = [f"http://{i}" for i in range(100)]


@pytest.mark.parametrize("columns, column", [
    ({"text": TEXTS, "url": OTHER}, None), ({"content": TEXTS, "n": range(100)}, None),
    ({"content": TEXTS, "url": OTHER}, "content"), ({"text": OTHER, "content": TEXTS}, "content"),
])
def test_a_column_of_texts_is_found_or_named(tmp_path, columns, column):
    columns = {name: list(values) for name, values in columns.items()}
    meta = prepare(write_parquet(tmp_path / "a.parquet", columns), tmp_path / "out", column=column)
    assert everything(tmp_path / "out") == sorted(TEXTS)
    assert meta.get("left_out", {}) == {f"columns {name!r}": 1 for name in columns if columns[name] != TEXTS}


@pytest.mark.parametrize("name, column", [("content", None), ("", None), ("", "")])
def test_a_column_of_texts_may_be_a_dictionary_or_nameless(tmp_path, name, column):
    table = pyarrow.table({name: pyarrow.array(TEXTS).dictionary_encode(), "n": range(100)})
    parquet.write_table(table, tmp_path / "a.parquet")
    prepare(tmp_path / "a.parquet", tmp_path / "out", column=column)
    assert everything(tmp_path / "out") == sorted(TEXTS)


def test_rows_without_a_text_are_counted(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": [*TEXTS, None, "  "]})
    assert prepare(path, tmp_path / "out")["left_out"] == {"blank records": 2}
    assert everything(tmp_path / "out") == sorted(TEXTS)


@pytest.mark.parametrize("name", ["prompt", "input"])
def test_a_column_that_texts_do_not_have_is_not_read_and_may_be_null(tmp_path, name):
    path = write_parquet(tmp_path / "a.parquet", {"text": TEXTS, name: [None, "x"] * 50})
    assert prepare(path, tmp_path / "out")["left_out"] == {f"columns {name!r}": 1}
    assert everything(tmp_path / "out") == sorted(TEXTS)


def test_prompts_and_messages_are_those_of_jsonl(tmp_path):
    pairs = [{"prompt": f"{i}? ", "response": f"{i}!"} for i in range(60)]
    talks = [{"messages": [{"role": "user", "content": pair["prompt"]},
                           {"role": "assistant", "content": pair["response"]}]} for pair in pairs]
    for name, records in (("pairs", pairs), ("talks", talks)):
        table = pyarrow.Table.from_pylist(records)
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=7)
        prepare(tmp_path / f"{name}.parquet", tmp_path / name)
    (tmp_path / "a.jsonl").write_bytes(jsonl(pairs))
    prepare(tmp_path / "a.jsonl", tmp_path / "plain")
    assert examples(tmp_path / "pairs", "train") == examples(tmp_path / "plain", "train")
    assert sorted(stored(tmp_path / "talks")) == sorted(stored(tmp_path / "plain"))


@pytest.mark.parametrize("column, says", [
    (None, "a.parquet has 2 columns of texts, of a, b, n: name the one to be read, --column NAME"),
    ("c", "a.parquet has no column 'c': --column must be one of a, b, n"),
    ("n", "a.parquet, row 1: field 'text' is int"),
])
def test_a_column_that_cannot_be_is_one_line(tmp_path, column, says):
    write_parquet(tmp_path / "a.parquet", {"a": ["x"], "b": ["y"], "n": [1]})
    words = [str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=says) as error:
        main([*words, *(["--column", column] if column else [])])
    one_line(error.value)


def test_a_column_of_jsonl_can_be_named_and_text_files_have_none(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"body": text, "text": "no"} for text in TEXTS]))
    meta = prepare(tmp_path / "a.jsonl", tmp_path / "out", column="body")
    assert everything(tmp_path / "out") == sorted(TEXTS) and meta["left_out"] == {"fields 'text'": 100}
    (tmp_path / "a.txt").write_text(TEXT)
    bad = (("a.jsonl", "head", "line 1 has no field 'head'"), ("a.txt", "body", "has none"))
    for source, column, says in bad:
        with pytest.raises(ValueError, match=says) as error:
            prepare(tmp_path / source, tmp_path / "no", column=column)
        one_line(error.value)
    with pytest.raises(ValueError, match="pydoc has none"):
        prepare("pydoc", tmp_path / "no", column="text")


def test_a_large_row_group_is_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "ROWS", 10)
    path = write_parquet(tmp_path / "a.parquet", {"text": [f"{i} " * 2500 for i in range(400)]}, rows=400)
    tracemalloc.start()
    size = sum(len(row["text"]) for row in packed.rows_of(path, "a", None, print, int))
    assert size > 3e6 and tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


# ------------------------------------------------------------------------------------------
# Folders

def test_two_thousand_shards_of_all_kinds_come_in_order_of_name_and_are_counted(tmp_path):
    folder = tmp_path / "shards"
    for sub in "ab":
        (folder / sub).mkdir(parents=True)
    for i in range(2000):
        text = f"shard {i:04}"
        name = folder / "ab"[i >= 1000] / f"{i:04}"
        if i % 4 == 0:
            name.with_suffix(".txt").write_text(text)
        elif i % 4 == 1:
            name.with_suffix(".jsonl").write_text(json.dumps({"text": text}))
        elif i % 4 == 2:
            name.with_suffix(".md.gz").write_bytes(gzip.compress(text.encode(), 1))
        else:
            name.with_suffix(".jsonl.zst").write_bytes(zst(jsonl([{"text": text}])))
    write_parquet(folder / "c.parquet", {"text": ["shard 2000"]})
    meta = prepare(folder, tmp_path / "out", split="tail")
    # the cut may be inside a document
    text = "".join(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val"))
    assert text == "".join(f"shard {i:04}" for i in range(2001))
    counts = meta["sources"]
    assert {name: counts[name]["documents"] for name in counts} == {"a": 1000, "b": 1001, "c.parquet": 1}
    assert sum(count["tokens"] for count in counts.values()) == sum(meta["tokens"].values())
    (folder / "b" / "1777.jsonl").write_text("{")
    with pytest.raises(ValueError, match="1777.jsonl, line 1 is not JSON"):
        prepare(folder, tmp_path / "out", overwrite=True)


def test_beyond_a_hundred_files_are_counted_together(tmp_path):
    (tmp_path / "d").mkdir()
    for i in range(130):
        (tmp_path / "d" / f"{i:03}.txt").write_text(f"number {i}")
    sources = prepare(tmp_path / "d", tmp_path / "out")["sources"]
    assert len(sources) == 101 and sources["further ones"]["documents"] == 30
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["sources"] == sources


def test_s3_is_refused_in_one_line(tmp_path):
    for source in ("s3://bucket/a.parquet", "gs://bucket/a"):
        with pytest.raises(ValueError, match="nothing is fetched from .*: copy it into a folder") as error:
            prepare(source, tmp_path / "out")
        one_line(error.value)
