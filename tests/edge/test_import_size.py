"""Headers that promise more than their files hold: refused before it is built or read.

Each would take gigabytes or hours; here none takes more than a moment, for the names
are read first.
"""

import json
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from common_convert import COMMON, WIDE, edit, original, refused, rwkv, write_gguf
from tools import from_gguf


# ------------------------------------------------------------------------------------------
# GGUF, written by hand: magic, version, tensors, settings; then both

def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def setting(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, n: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, n) + items


def tensor(name: str, shape: list[int], offset: int, kind: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + dims + struct.pack("<IQ", kind, offset)


def gguf_file(settings: list[bytes] = (), tensors: list[bytes] = (), data: bytes = b"", n_settings=None,
              n_tensors=None) -> bytes:
    arch = setting("general.architecture", 8, string("llama"))
    n_settings = len(settings) + 1 if n_settings is None else n_settings
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    head = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_settings) + arch + b"".join([*settings, *tensors])
    return head + b"\0" * (-len(head) % 32) + data


NESTED = array(9, 1, array(9, 1, array(4, 1, b"\0\0\0\0")))
OVERLAP = [tensor("a", [8], 0), tensor("b", [8], 16)]
HOSTILE = {
    "2^63 settings": (dict(n_settings=2**63), "settings, more than 4,096"),
    "4,000 settings": (dict(n_settings=4000), "damaged"),
    "2^63 tensors": (dict(n_tensors=2**63), "tensors, more than 16,384"),
    "16,000 tensors": (dict(n_tensors=16_000), "ends too early"),
    "an array of 2^63": (dict(settings=[setting("llama.x", 9, array(4, 2**63))]), "items in arrays"),
    "an array of a million": (dict(settings=[setting("llama.x", 9, array(4, 10**6))]), "ends too early"),
    "2^63 strings": (dict(settings=[setting("llama.x", 9, array(8, 2**63))]), "items in arrays"),
    "a million strings that are not there": (dict(settings=[setting("llama.x", 9, array(8, 10**6))]),
                                             "ends too early"),
    "a string of 2^63": (dict(settings=[setting("llama.x", 8, struct.pack("<Q", 2**63))]), "ends too early"),
    "arrays of arrays": (dict(settings=[setting("llama.x", 9, NESTED)]), "damaged"),
    "an unknown type": (dict(settings=[setting("llama.x", 77, b"")]), "damaged"),
    "a setting twice": (dict(settings=[setting("llama.x", 4, b"\0" * 4)] * 2), "Duplicate"),
    "a tensor of 2^40": (dict(tensors=[tensor("a", [2**40], 0)]), "ends too early"),
    "one of 2^80": (dict(tensors=[tensor("a", [2**40, 2**40], 0)]), "damaged"),
    "one of 2^64 + 8": (dict(tensors=[tensor("a", [2**63 + 4, 2], 0)], data=b"\0" * 32), "damaged"),
    "2^31 dimensions": (dict(tensors=[string("a") + struct.pack("<I", 2**31)]), "ends too early"),
    "an offset of 2^64 - 32": (dict(tensors=[tensor("a", [8], 2**64 - 32)], data=b"\0" * 32), "damaged"),
    "a tensor of no dimensions": (dict(tensors=[tensor("token_embd.weight", [], 0)], data=b"\0" * 32),
                                  "embedding_length is missing"),
    "tensors that overlap": (dict(tensors=OVERLAP, data=b"\0" * 64), "numbers of b lie where others are"),
    "no power of two as alignment": (dict(settings=[setting("general.alignment", 4, b"\3\0\0\0")]),
                                     "alignment"),
    "letters that are none": (dict(settings=[setting("llama.x", 8, string("a")[:-1] + b"\xff")]), "damaged"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("parts, says", HOSTILE.values(), ids=HOSTILE)
def test_ggufs_that_promise_more_than_they_hold(parts, says, tmp_path):
    (tmp_path / "m.gguf").write_bytes(gguf_file(**parts))
    refused(says, path=tmp_path / "m.gguf", tmp_path=tmp_path)


def test_an_array_of_strings_takes_little_more_than_the_file(tmp_path):
    """A view of 100 bytes a string, where gguf's own reader has a thousand."""
    n = 100_000
    empty = setting("tokenizer.ggml.tokens", 9, array(8, n, b"\0" * 8 * n))
    ones = setting("llama.y", 9, array(5, 3, b"\1\0\0\0" * 3))
    (tmp_path / "m.gguf").write_bytes(gguf_file([empty, ones]))
    reader, values = from_gguf.open_gguf(tmp_path / "m.gguf")
    field = reader.fields["tokenizer.ggml.tokens"]
    assert field.contents() == [""] * n and values["llama.y"] == [1, 1, 1]
    assert len(field.parts) == n + 5 and all(part.base is not None for part in field.parts[5:])


# ------------------------------------------------------------------------------------------
# Hugging Face

@pytest.mark.parametrize("changes, words", [
    (dict(num_hidden_layers=10**9), ["num_hidden_layers", "damaged"]),
    (dict(num_hidden_layers=2**24), ["n_layer = 16777216"]),
    (dict(hidden_size=10**399), ["hidden_size", "damaged"]),
    (dict(hidden_size=2**20, num_attention_heads=2**10), ["embed_tokens.weight is (97, 48)", "1048576"]),
    (dict(intermediate_size=2**24), ["up_proj", "16777216"]),
    (dict(vocab_size=2**24), ["(97, 48)"]),
    (dict(vocab_size=float("inf")), ["vocab_size is inf, expected int"]),
    (dict(vocab_size=-1), ["vocab_size = -1"]),
    (dict(num_attention_heads=0), ["n_head = 0"]),
    (dict(rms_norm_eps=10**399), ["rms_norm_eps"]),
    (dict(rope_parameters=None, rope_theta=10**399), ["rope_theta"]),
    (dict(rope_parameters="x"), ["rope_parameters is 'x'"]),
    (dict(model_type=["llama"] * 10**5), ["model_type is"]),
    (dict(model_type="x" * 10**5), ["not supported"]),
])
def test_settings_that_the_tensors_do_not_have(changes, words, tmp_path):
    original("Llama", COMMON).save_pretrained(tmp_path / "original")
    edit(tmp_path / "original", **{key: 0 if value == 10**399 else value for key, value in changes.items()})
    for key, value in changes.items():
        if value == 10**399:
            file = tmp_path / "original" / "config.json"
            file.write_text(file.read_text().replace(f'"{key}": 0', f'"{key}": 1{"0" * 399}'))
    refused(*words, path=tmp_path / "original", tmp_path=tmp_path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}", b"", b"\xff", b"null"])
def test_a_config_that_is_no_json_object(content, tmp_path):
    original("Llama", COMMON).save_pretrained(tmp_path / "original")
    (tmp_path / "original" / "config.json").write_bytes(content)
    refused("config.json is damaged", path=tmp_path / "original", tmp_path=tmp_path)


def test_a_header_larger_than_any_and_an_index_of_100000_shards(tmp_path):
    folder = tmp_path / "original"
    original("Llama", COMMON).save_pretrained(folder)
    file = folder / "model.safetensors"
    with open(tmp_path / "whole", "wb") as copy:
        copy.write(file.read_bytes())
    with open(file, "wb") as header:
        header.write((10**8).to_bytes(8, "little"))
        header.truncate(10**8 + 8)
    refused("its header claims 100,000,000 bytes", path=folder, tmp_path=tmp_path)
    file.unlink()
    many = [f"model-{i}.safetensors" for i in range(10**5)]
    for names in (many, ["../../etc/passwd"], ["/etc/passwd"], [".."]):
        weight_map = {str(i): name for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        refused("is no file of this folder", path=folder, tmp_path=tmp_path)


def test_an_adapter_is_refused_by_name(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    refused("LoRA adapter", "merge_and_unload", path=folder, tmp_path=tmp_path)
    original("Llama", COMMON).save_pretrained(tmp_path / "original")
    file = tmp_path / "original" / "model.safetensors"
    whole = load_file(file)
    save_file(whole | {"base_model.model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 2)}, file)
    refused("lora_A", "merge_and_unload", path=tmp_path / "original", tmp_path=tmp_path)
    save_file(whole | {"_orig_mod.model.norm.weight": torch.ones(48)}, file)
    refused("model.norm.weight is there twice", path=tmp_path / "original", tmp_path=tmp_path)


# ------------------------------------------------------------------------------------------
# .pth

def test_a_pth_that_names_thousands_of_blocks(tmp_path):
    """Some of each block's tensors, or all of them; no block is built before their
    shapes are known to fit.
    """
    tensors = {k: v.clone() for k, v in rwkv(L=2).state_dict().items()}
    names = {f"blocks.{i}.ln1.weight": torch.ones(3) for i in range(2, 5000)}
    torch.save(tensors | names, tmp_path / "m.pth")
    refused("tensors are missing", path=tmp_path / "m.pth", tmp_path=tmp_path)
    second = [name for name in tensors if name.startswith("blocks.1.")]
    one = torch.ones(1)
    every = {name.replace("1", str(i), 1): one for i in range(2, 1000) for name in second}
    torch.save(tensors | every, tmp_path / "m.pth")
    refused("blocks.2.ln1.weight is (1,)", path=tmp_path / "m.pth", tmp_path=tmp_path)


def test_a_pth_that_would_become_larger_than_it_is(tmp_path):
    torch.save(rwkv(L=2).state_dict(), tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, \
            zipfile.ZipFile(tmp_path / "m.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry))
    refused("damaged", path=tmp_path / "m.pth", tmp_path=tmp_path)


def test_numbers_that_are_none_are_named_by_their_tensor(tmp_path):
    write_gguf(tmp_path / "m.gguf", broken("Llama", WIDE), "llama")
    torch.save({k: v * float("nan") if "w0" in k else v for k, v in rwkv(L=2).state_dict().items()},
               tmp_path / "m.pth")
    refused("ln_out.weight has infinite values or NaN", path=tmp_path / "m.gguf", tmp_path=tmp_path)
    refused("att.w0 has infinite values or NaN", path=tmp_path / "m.pth", tmp_path=tmp_path)


def broken(*kind) -> torch.nn.Module:
    model = original(*kind)
    model.model.norm.weight.data[3] = float("inf")
    return model
