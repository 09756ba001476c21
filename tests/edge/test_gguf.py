"""What a GGUF cannot say; GGUFs of an RWKV-7 that are damaged or of another kind."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from common_bpe import save, sequence, split, train, whole
from common_convert import WIDE, bring, original, refused, rewrite_gguf, rwkv, write_gguf
from data.foreign import read_tokenizer_json
from data.tokenizer import write_tokenizer
from lib.folders import save_model
from tools.convert import ExportConfig, ImportConfig, export_model, import_model

gguf = pytest.importorskip("gguf")
LLAMA = dict(ffn="swiglu", norm="rmsnorm", ln0=False)


def export(folder: Path, **settings) -> Path:
    return export_model(ExportConfig(folder=str(folder), format="gguf", **settings))


# ------------------------------------------------------------------------------------------
# Models that it has no place for

@pytest.mark.parametrize("changes, words", [
    (dict(qkv_bias=True), ["qkv_bias = True instead of False"]),
    (dict(LLAMA, o_bias=True), ["output_bias = True"]),
    (dict(bias=True), ["bias = True"]),
    (dict(LLAMA, qk_norm=True), ["qk_norm = True"]),
    (dict(rwkv_rope=True, positions="rope"), ["rwkv_rope = True"]),
    (dict(mixer="rar"), ["attention in layer 1"]),
    (dict(mixer="a"), ["attention in layer 0"]),
    (dict(positions="learned"), ["learned positions"]),
    (dict(rwkv_size=128), ["heads of 128 together in a width of 96"]),
    (dict(ffn="gelu"), ["ffn = gelu instead of channelmix or relu2"]),
    (dict(gate=False), ["gate = False"]),
    (dict(group_norm=False), ["group_norm = False"]),
    (dict(LLAMA, ln0=True), ["ln0 = True"]),
    (dict(ln0=False), ["ln0 = False"]),
    (dict(ffn="swiglu"), ["swiglu"]),
    (dict(LLAMA, bias=True, qkv_bias=True), ["qkv_bias = True", "; bias = True"]),
])
def test_models_that_a_gguf_cannot_say_are_refused_by_name(changes, words, tmp_path):
    save_model(rwkv(**changes), tmp_path / "m", {"tokenizer": "bytes"})
    refused("cannot be written as a GGUF", *words, call=lambda: export(tmp_path / "m"), tmp_path=tmp_path)


def with_tokenizer(folder: Path, rows: int, **changes) -> Path:
    save_model(rwkv(N=64, C=64, L=1, V=rows), folder, {"tokenizer": "bytes"})
    pre = sequence(*split(r"\d{2}"), whole(use_regex=False))
    write_tokenizer(read_tokenizer_json(save(train(pre), folder / "hf")) | changes, folder)
    shutil.rmtree(folder / "hf")
    return folder


def test_tokenizers_that_a_gguf_cannot_say_are_refused_by_name(tmp_path):
    for changes, rows, words in (
        ({}, 1503, ["no name for how the tokenizer bpe-", r"\d{2}"]),
        ({"split": [r"\p{N}"], "normalizer": "NFKC"}, 1503, ["NFKC"]),
        ({}, 1499, ["has 1500 tokens, the model 1499 rows"]),
    ):
        folder = with_tokenizer(tmp_path / "m", rows, **changes)
        if rows == 1499:
            write_tokenizer(read_tokenizer_json(save(train(), tmp_path / "hf")), folder)
        refused(*words, call=lambda: export(folder), tmp_path=tmp_path)
    save_model(rwkv(V=256), tmp_path / "small", {"tokenizer": "bytes"})
    refused("257 tokens, the model 256 rows", call=lambda: export(tmp_path / "small"), tmp_path=tmp_path)


def test_a_model_without_a_tokenizer_has_none_in_the_file(tmp_path):
    save_model(rwkv(), tmp_path / "m", {})
    first = export(tmp_path / "m")
    import_model(ImportConfig(path=str(first), out=str(tmp_path / "back")))
    assert export(tmp_path / "back").read_bytes() == first.read_bytes()


def test_numbers_that_sixteen_bits_have_not_are_refused(tmp_path):
    model = rwkv(V=257)
    model.head.weight.data[3, 3] = 1e6
    save_model(model, tmp_path / "m", {"tokenizer": "bytes"})
    refused("output.weight has infinite values or NaN as torch.float16", "--dtype",
            call=lambda: export(tmp_path / "m", dtype="float16"), tmp_path=tmp_path)
    as_pth = ExportConfig(folder=str(tmp_path / "m"), dtype="q8_0")
    refused("--dtype q8_0", "float32, bfloat16, float16", call=lambda: export_model(as_pth))


# ------------------------------------------------------------------------------------------
# In the place of something else

def test_only_an_rwkv_and_a_modelfile_of_ours_are_replaced(tmp_path):
    save_model(rwkv(V=257), tmp_path / "m", {"tokenizer": "bytes"})
    out, modelfile = tmp_path / "m.gguf", tmp_path / "m.Modelfile"

    def replace() -> Path:
        return export(tmp_path / "m", overwrite=True)

    write_gguf(out, original("Llama", WIDE), "llama")
    refused("no RWKV-7 of this format", call=replace, tmp_path=tmp_path)
    out.write_text("mine")
    refused("no RWKV-7 of this format", call=replace, tmp_path=tmp_path)
    out.unlink()
    modelfile.write_text("FROM llama3\n")
    refused("m.Modelfile", "another --out", call=lambda: export(tmp_path / "m"), tmp_path=tmp_path)
    assert modelfile.read_text() == "FROM llama3\n"
    modelfile.unlink()
    first = export(tmp_path / "m").read_bytes(), modelfile.read_bytes()
    refused("--overwrite", call=lambda: export(tmp_path / "m"), tmp_path=tmp_path)
    export(tmp_path / "m", overwrite=True, dtype="float16")
    replace()
    assert (out.read_bytes(), modelfile.read_bytes()) == first
    refused("ends in .gguf", call=lambda: export(tmp_path / "m", out="x.pth"))


# ------------------------------------------------------------------------------------------
# Files that are damaged, or of another kind

@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    save_model(rwkv(N=64, C=64, L=2, V=257), folder / "m", {"tokenizer": "bytes"})
    return export(folder / "m")


TOKENS = [f"t{i}" for i in range(300)]
LAYER = "blk.1.time_mix_"
NAMED = {"tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.token_type": [1] * 300}
BROKEN_TENSORS = {  # other tensors, of zeros, or none; what is said
    "a matrix is missing": ({f"{LAYER}key": None}, ["1 tensors are missing", f"{LAYER}key", "fetch"]),
    "the shares are missing": ({f"{LAYER}lerp_fused": None}, ["1 tensors are missing", "lerp_fused"]),
    "a share is missing": ({f"{LAYER}lerp_fused": (5, 1, 1, 64)}, [f"{LAYER}lerp_fused", "expected"]),
    "the embedding is missing": ({"token_embd": None}, ["1 tensors are missing", "token_embd"]),
    "a matrix of another shape": ({f"{LAYER}key": (64, 32)},
                                  [f"{LAYER}key.weight is (64, 32)", "expected (64, 64)"]),
    "a rank of another shape": ({f"{LAYER}w2": (64, 16)}, [f"{LAYER}w2.weight is (64, 16)"]),
    "a matrix on its side": ({"blk.1.channel_mix_key": (64, 256)},
                             ["ffn.key.weight is (64, 256)", "expected (256, 64)", "fetch"]),
    "a vector of one number": ({f"{LAYER}w0": (1,)}, [f"{LAYER}w0.weight is (1,)", "fetch"]),
    "a tensor too many": ({"blk.1.attn_q": (4, 4)}, ["attn_q.weight", "no place", "of another kind"]),
}
BROKEN_SETTINGS = {
    "a layer too few": ({"rwkv7.block_count": 1}, ["have no place", "blk.1"]),
    "a layer too many": ({"rwkv7.block_count": 3}, ["are missing", "blk.2"]),
    "a million layers": ({"rwkv7.block_count": 10**6}, ["1000000 layers", "damaged"]),
    "another width": ({"rwkv7.embedding_length": 128}, ["expected"]),
    "no head size": ({"rwkv7.wkv.head_size": None}, ["wkv.head_size is missing"]),
    "heads of 0": ({"rwkv7.wkv.head_size": 0}, ["head_size"]),
    "heads of 48": ({"rwkv7.wkv.head_size": 48}, ["48"]),
    "no eps": ({"rwkv7.attention.layer_norm_epsilon": None}, ["layer_norm_epsilon is missing"]),
    "tokens too many": (NAMED, ["300 tokens", "257 rows", "fetch it again"]),
    "another kind of tokens": ({"tokenizer.ggml.model": "llama"}, ["SentencePiece"]),
}


@pytest.mark.parametrize("shapes, words", BROKEN_TENSORS.values(), ids=BROKEN_TENSORS)
def test_files_of_an_rwkv_with_other_tensors_give_one_line(shapes, words, good, tmp_path):
    tensors = {f"{name}.weight": shape and np.zeros(shape, np.float32) for name, shape in shapes.items()}
    rewrite_gguf(good, tmp_path / "m.gguf", tensors=tensors)
    refused("m.gguf", *words, path=tmp_path / "m.gguf", tmp_path=tmp_path)


@pytest.mark.parametrize("settings, words", BROKEN_SETTINGS.values(), ids=BROKEN_SETTINGS)
def test_files_of_an_rwkv_with_other_settings_give_one_line(settings, words, good, tmp_path):
    rewrite_gguf(good, tmp_path / "m.gguf", settings=settings)
    refused("m.gguf", *words, path=tmp_path / "m.gguf", tmp_path=tmp_path)


def test_files_of_another_architecture_or_with_what_is_no_number_give_one_line(good, tmp_path):
    rewrite_gguf(good, tmp_path / "m.gguf", arch="rwkv6")
    refused("'rwkv6' is not supported", "rwkv7, arwkv7", path=tmp_path / "m.gguf", tmp_path=tmp_path)
    nan = np.full((64,), np.nan, np.float32)
    rewrite_gguf(good, tmp_path / "m.gguf", tensors={f"{LAYER}w0.weight": nan})
    refused("att.w0 has infinite values or NaN", path=tmp_path / "m.gguf", tmp_path=tmp_path)


def test_a_file_that_was_cut_anywhere_gives_one_line(good, tmp_path):
    data = good.read_bytes()
    for size in (0, 3, 20, 500, 5000, len(data) // 2, len(data) - 64):
        (tmp_path / "m.gguf").write_bytes(data[:size])
        refused("damaged, or not a GGUF", "fetch it again", path=tmp_path / "m.gguf", tmp_path=tmp_path)


def test_parts_that_are_missing_or_do_not_belong_together_give_one_line(good, tmp_path):
    write_gguf(tmp_path / "m.gguf", original("Llama", WIDE), "llama", tensors_per_part=10)
    write_gguf(tmp_path / "n.gguf", original("Llama", WIDE | dict(num_hidden_layers=2)), "llama",
               tensors_per_part=7)
    first, second, third = (tmp_path / f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3))
    kept = second.read_bytes()

    def is_refused(*words: str) -> None:
        for part in (first, third):
            refused(*words, path=part, tmp_path=tmp_path)

    second.unlink()
    is_refused("of its 3 parts 1 are missing", second.name, "fetch them too")
    shutil.copy(third, second)
    is_refused(f"{second.name} says that it is part 3 of 3", "not of one model")
    shutil.copy(tmp_path / "n-00002-of-00003.gguf", second)
    is_refused("its parts have 27 tensors", "where it says 30", "fetch all of them again")
    second.write_bytes(kept[: len(kept) // 2])
    is_refused(second.name, "damaged, or not a GGUF")
    second.write_bytes(kept)
    bring(second, tmp_path)
    first.rename(tmp_path / "alone.gguf")
    refused("part 1 of 3", "-00001-of-00003.gguf", path=tmp_path / "alone.gguf", tmp_path=tmp_path)
    shutil.copy(good, tmp_path / "x-00001-of-00001.gguf")
    bring(tmp_path / "x-00001-of-00001.gguf", tmp_path)
    shutil.copy(good, tmp_path / "x-00001-of-99999.gguf")
    refused("99,999 parts", path=tmp_path / "x-00001-of-99999.gguf", tmp_path=tmp_path)
