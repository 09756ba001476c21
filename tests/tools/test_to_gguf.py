"""Exports to GGUF: llama.cpp computes and tokenizes as we do, and all comes back."""

import itertools
import json
import unicodedata
from pathlib import Path

import pytest
import tiktoken
import torch
from tokenizers import AddedToken
from tokenizers.normalizers import NFC

from common_bpe import CHATML, MIXED, SPECIAL, TALKS, save, train
from common_convert import bring, relative, rwkv, text
from common_house import check_line, read
from common_llama import as_likely, ask, difference, forced, greedy, ours
from data.bpe import BYTE, Encoding
from data.chat import frame
from data.foreign import GPT2, read_tokenizer_json
from data.tokenizer import END, get_tokenizer, load_tokenizer, write_tokenizer
from lib.folders import save_model
from model import LM
from tools import gguf_tokenizer, to_gguf
from tools.convert import ExportConfig, export_model, main
from tools.from_gguf import open_gguf
from tools.gguf_tokenizer import read_tokenizer
from tools.widen import widened, widened_parameter

pytest.importorskip("gguf")
V = 257
LLAMA = dict(ffn="swiglu", norm="rmsnorm", ln0=False, norm_eps=1e-6)
ODD = dict(rank_w=24, rank_a=40, rank_v=8, rank_g=72, ffn_size=200)
PLAIN = dict(ffn="relu2", token_shift=False, bonus=False, norm_bias=False, tied=True)
SWITCHES = ("gate", "group_norm", "token_shift", "bonus")
TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2, "q8_0": 6e-2}


def student(N: int = 64, C: int = 128, **changes) -> LM:
    """A random model that is sure of what comes next."""
    model = rwkv(N=N, C=C, V=V, **changes)
    with torch.no_grad():
        model.head.weight.mul_(6)
    return model.eval()


def export(model: LM, folder: Path, name: str, tokenizer: str = "bytes", **settings) -> Path:
    save_model(model, folder / name, {"tokenizer": tokenizer})
    out = folder / f"{name}-{settings.get('dtype', '')}.gguf"
    return export_model(ExportConfig(folder=str(folder / name), format="gguf", out=str(out), **settings))


def random_text(n: int) -> list[int]:
    return text(n, V)[0].tolist()


def check_the_same(models: dict[Path, LM], n_probs: int = V) -> None:
    """Log-probabilities on a forced text and on the greedy path, and 200 tokens."""
    prompt, given = random_text(9), random_text(32)
    questions = [forced(given, n_probs), greedy(prompt, 64, V, n_probs), greedy(prompt, 200, V)]
    answers = ask(dict.fromkeys(models, questions))
    for model, (on_text, on_path, generated) in zip(models.values(), answers):
        path = generated["tokens"]
        before_each = ours(model, prompt + path[:-1])[len(prompt) - 1 :]
        assert len(path) == 200 and as_likely(before_each, path) and on_path["tokens"] == path[:64]
        assert difference(on_path, before_each[:64]) < 1e-5
        assert difference(on_text, ours(model, given)) < 1e-5


# ------------------------------------------------------------------------------------------
# Models

def test_llama_shaped_students_of_all_switches_run_in_llama_cpp(tmp_path):
    models = {}
    for values in itertools.product([False, True], repeat=len(SWITCHES)):
        switches = dict(zip(SWITCHES, values))
        model = student(**LLAMA, **switches, C=64, L=2, tied=switches["gate"])
        models[export(model, tmp_path, "".join(map(str, map(int, values))))] = model
    check_the_same(models, n_probs=32)


def test_official_students_run_in_llama_cpp_also_of_odd_ranks_and_of_narrow_heads(tmp_path):
    models = {
        "as the demo": student(N=32, C=96),
        "odd ranks": student(**ODD),
        "relu2, all off that can be": student(**PLAIN, norm_eps=1e-3),
        "narrow": student(N=16, C=32, L=1),
        "narrow, of a Llama": student(N=32, C=64, **LLAMA),
    }
    check_the_same({export(model, tmp_path, name): model for name, model in models.items()})


@pytest.mark.parametrize("kind", [{}, LLAMA | ODD], ids=["rwkv7", "arwkv7, odd ranks"])
def test_matrices_of_16_and_8_bits_stay_within_their_tolerances(kind, tmp_path):
    model = student(**kind, L=2)
    given = random_text(32)
    files = [export(model, tmp_path, "m", dtype=dtype) for dtype in TOLERANCES]
    sizes = [file.stat().st_size for file in files]
    assert sizes[0] > 1.5 * sizes[1] and sizes[1] == sizes[2] > sizes[3]
    answers = ask({file: [forced(given, 64), greedy(given[:9], 64, V, n_probs=64)] for file in files})
    for tolerance, (on_text, on_path) in zip(TOLERANCES.values(), answers):
        assert difference(on_text, ours(model, given)) < tolerance
        assert difference(on_path, ours(model, given[:9] + on_path["tokens"][:-1])[8:]) < tolerance


FORMS = {
    "rwkv7, odd ranks": dict(**ODD, norm_eps=1e-3),
    "rwkv7, heads of 32": dict(N=32, C=96),
    "rwkv7, one layer": dict(L=1, rank_v=16),
    "relu2, all off that can be": PLAIN,
    "arwkv7, heads of 16": dict(N=16, C=64, **LLAMA),
    "arwkv7, all off that can be": dict(LLAMA | dict.fromkeys(SWITCHES, False)),
    "heads of 128": dict(N=128),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", FORMS.values(), ids=FORMS)
def test_export_import_export_gives_the_same_bytes_and_the_same_logits(kind, tmp_path):
    model = student(**dict(L=2) | kind)
    first = export(model, tmp_path, "first")
    back = bring(first, tmp_path, "back")
    assert relative(back(text(50, V))[0], model(text(50, V))[0]) < 1e-5
    again = export_model(ExportConfig(folder=str(tmp_path / "back"), format="gguf"))
    assert again.read_bytes() == first.read_bytes()
    assert load_tokenizer(tmp_path / "back").name == "bytes"
    if kind.get("N") in (None, 128):                  # nothing was widened: bit for bit
        before = model.state_dict()
        assert all(torch.equal(p, before[name]) for name, p in back.state_dict().items()
                   if name in before and name != "head.weight")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_matrices_of_fewer_bits_come_back_as_they_were_written(dtype, tmp_path):
    first = export(student(**ODD, L=2), tmp_path, "first", dtype=dtype)
    bring(first, tmp_path, "back")
    again = export_model(ExportConfig(folder=str(tmp_path / "back"), format="gguf", dtype=dtype))
    assert again.read_bytes() == first.read_bytes()


NARROW = {"32": dict(N=32), "16": dict(N=16), "32, of a Llama": dict(N=32, **LLAMA),
          "8, without group norm": dict(N=8, **LLAMA, group_norm=False)}


@torch.no_grad()
@pytest.mark.parametrize("kind", NARROW.values(), ids=NARROW)
def test_a_widened_model_gives_the_same_logits_in_float64(kind, tmp_path):
    model = student(C=96, **kind).double()
    wide = LM(widened(model.cfg)).double()
    weights = {name: widened_parameter(name, p, model.cfg) for name, p in model.state_dict().items()}
    wide.load_state_dict(weights)
    assert wide.cfg.rwkv_head_size == 64
    assert relative(wide(text(40, V))[0], model(text(40, V))[0]) < 1e-6   # decay and norm of k: float32


def test_the_command_says_what_it_widens_and_how_to_run_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(student(N=32, C=96), tmp_path / "out" / "Demo", {"tokenizer": "bytes"})
    main(["export", "out/Demo", "--format", "gguf"])
    widening, last = capsys.readouterr().out.splitlines()
    assert "heads of 32 become 64" in widening and "472,896 parameters become 1,166,976" in widening
    assert "llama-completion -m out/Demo.gguf -p" in last
    assert "ollama create demo -f out/Demo.Modelfile && ollama run demo" in last
    main(["export", "out/Demo", "--format", "gguf", "--overwrite", "--no-widen"])
    warning, _ = capsys.readouterr().out.splitlines()
    assert warning.startswith("heads of 32: llama.cpp computes only 64 right everywhere")
    assert open_gguf(Path("out/Demo.gguf"))[1]["rwkv7.wkv.head_size"] == 32


def test_the_demo_ends_with_the_export():
    recipe = read("Makefile").partition("\ndemo:")[2].partition("\n\n")[0].splitlines()
    assert recipe[-1].split()[1:] == "-m tools.convert export out/demo --format gguf --overwrite".split()
    check_line(recipe[-1].replace("$(PY)", "python").strip())


def test_the_modelfile_names_file_template_and_ends(tmp_path):
    out = export(student(), tmp_path, "plain")
    assert out.with_suffix(".Modelfile").read_text().splitlines()[1:] == [
        f"FROM ./{out.name}", 'PARAMETER stop "<|endoftext|>"']
    spec = read_tokenizer_json(save(train(), tmp_path / "hf", chat_template=CHATML))
    folder = with_tokenizer(tmp_path / "m", spec, rows=1503)
    out = export_model(ExportConfig(folder=str(folder), format="gguf"))
    assert out.with_suffix(".Modelfile").read_text().splitlines()[2:] == [
        'TEMPLATE """{{ if .System }}{{ "<|im_start|>system\\n" }}{{ .System }}{{ "<|im_end|>\\n" }}'
        '{{ else }}{{ "<|im_start|>system\\nBe kind.<|im_end|>\\n" }}{{ end }}'
        '{{ range .Messages }}{{ if eq .Role "user" }}{{ "<|im_start|>user\\n" }}{{ .Content }}'
        '{{ "<|im_end|>\\n" }}{{ else if eq .Role "assistant" }}{{ "<|im_start|>assistant\\n" }}'
        '{{ .Content }}{{ "<|im_end|>\\n" }}{{ end }}{{ end }}{{ "<|im_start|>assistant\\n" }}"""',
        'PARAMETER stop "<|endoftext|>"', 'PARAMETER stop "<|im_end|>"']


# ------------------------------------------------------------------------------------------
# Tokenizers

def with_tokenizer(folder: Path, spec: dict, rows: int) -> Path:
    """A tiny model's folder with a tokenizer of its own."""
    save_model(rwkv(N=64, C=64, L=1, V=rows), folder, {"tokenizer": "bytes"})
    write_tokenizer(spec, folder)
    return folder


@pytest.mark.parametrize("pre, normalizer", [("GPT-2", None), ("SmolLM2", None), ("Llama 3", None),
                                             ("Qwen2", NFC())], ids=str)
def test_bpes_give_the_same_ids_in_llama_cpp_and_come_back(pre, normalizer, tmp_path):
    tool = AddedToken("<tool>", normalized=False)        # as Qwen's are; a GGUF doesn't say
    original = train(pre, normalizer=normalizer, added=(tool,))
    spec = read_tokenizer_json(save(original, tmp_path / "hf", chat_template=CHATML))
    folder = with_tokenizer(tmp_path / "m", spec, rows=1503)
    out = export_model(ExportConfig(folder=str(folder), format="gguf"))
    texts = [text for text in (*MIXED[:1], *MIXED[4:60], "a <tool> b <|im_end|>") if text]
    if normalizer:                                    # llama.cpp has none
        texts = [text for text in texts if unicodedata.is_normalized("NFC", text)]
    enc = load_tokenizer(folder)
    talks = [[{"role": role, "content": content} for role, content in talk] for talk in TALKS]
    [answers] = ask({out: [["/tokenize", {"content": text, "parse_special": False}] for text in texts]
                     + [["/apply-template", {"messages": talk}] for talk in talks]})
    for text, answer in zip(texts, answers):
        assert answer["tokens"] == enc.encode_ordinary(text), text
    framed = [answer["prompt"] for answer in answers[len(texts) :]]
    assert framed == [frame(enc.chat, talk) for talk in TALKS]
    bring(out, tmp_path, "back")
    assert load_tokenizer(tmp_path / "back").spec == enc.spec


class Matches:
    """A small tokenizer as World is one: at each byte the longest token that fits."""

    name, n_vocab, eot_token = "world", 300, 0
    chat = {"default": "", "system": ["System: ", "\n\n"], "user": ["User: ", "\n\n"],
            "assistant": ["Assistant:", "\n\n", ""], "lead": " ", "trim": True, "dense": True}
    pieces = [bytes([b]) for b in range(256)]
    pieces += [" ".encode() * 9, b"\n\n", "漢字".encode(), "漢".encode()[:2], "é'\"".encode()]
    pieces += [b"the", b" the", b"there", b"\r\n", b"\0\1"]
    ids = {piece: i for i, piece in enumerate(pieces, 1)}

    def decode_single_token_bytes(self, i: int) -> bytes:
        if not 0 <= i <= len(self.pieces):
            raise KeyError(i)
        return self.pieces[i - 1] if i else b""

    def decode(self, ids: list[int]) -> str:
        return b"".join(map(self.decode_single_token_bytes, ids)).decode()

    def encode(self, text: str, allowed_special: str) -> list[int]:
        return self.encode_ordinary(text)

    def encode_ordinary(self, text: str) -> list[int]:
        rest, ids = text.encode(), []
        while rest:
            longest = max((piece for piece in self.pieces if rest.startswith(piece)), key=len)
            ids.append(self.ids[longest])
            rest = rest[len(longest) :]
        return ids


def merged() -> tiktoken.Encoding:
    """A small tokenizer made as tiktoken's gpt2 is."""
    vocab = json.loads(train().to_str())["model"]["vocab"]
    ranks = {bytes(BYTE[c] for c in token): i for token, i in vocab.items() if token not in SPECIAL}
    return Encoding("gpt2", pat_str=GPT2, mergeable_ranks=ranks, special_tokens={END: vocab[END]})


def test_the_chat_of_world_has_no_empty_line_within_a_message(tmp_path, monkeypatch):
    world = Matches()
    monkeypatch.setattr(to_gguf, "load_tokenizer", lambda folder: world)
    file = export(rwkv(N=64, C=64, L=1, V=320), tmp_path, "m", "world")
    fields = open_gguf(file)[0].fields
    ends = [fields[f"tokenizer.ggml.{kind}_token_id"].contents() for kind in ("bos", "eos", "eot")]
    assert ends == [0, 0, world.ids[b"\n\n"]]
    assert 'PARAMETER stop "\n\n"' in file.with_suffix(".Modelfile").read_text()
    talk = [("system", "Be\r\n\r\nbrief."), ("user", "\n a\n\n\nb \n"), ("assistant", "c"), ("user", "d")]
    job = {"messages": [{"role": role, "content": content} for role, content in talk]}
    [[answer]] = ask({file: [["/apply-template", job]]})
    expected = "System: Be\nbrief.\n\nUser: a\nb\n\nAssistant: c\n\nUser: d\n\nAssistant:"
    assert answer["prompt"] == expected


def test_bytes_and_world_give_the_same_ids_in_llama_cpp_and_come_back(tmp_path, monkeypatch):
    world = Matches()
    monkeypatch.setattr(gguf_tokenizer, "get_tokenizer", lambda name: world if name == "world" else plain)
    plain, files = get_tokenizer("bytes"), {}
    for enc, rows in ((plain, 257), (plain, 260), (world, 320), (merged(), 1500)):
        monkeypatch.setattr(to_gguf, "load_tokenizer", lambda folder, enc=enc: enc)
        files[export(rwkv(N=64, C=64, L=1, V=rows), tmp_path, f"{enc.name}{rows}", enc.name)] = enc
    texts = [text for text in (*MIXED[:2], *MIXED[4:40],
                               "there the   漢字漢é'\"\r\n\n\n\x00\x01") if text]
    questions = [["/tokenize", {"content": text, "parse_special": False}] for text in texts]
    answers = ask(dict.fromkeys(files, questions + [["/tokenize", {"content": "Hi", "add_special": True}]]))
    for (file, enc), (*of_texts, of_prompt) in zip(files.items(), answers):
        assert [answer["tokens"] for answer in of_texts] == [enc.encode_ordinary(text) for text in texts]
        start = [] if enc is world else [enc.eot_token]   # as sample.py has it; kind rwkv knows none
        assert of_prompt["tokens"] == start + enc.encode_ordinary("Hi")
        back = read_tokenizer(open_gguf(file)[0].fields)
        assert back is enc or enc.name == "gpt2" and len(back["tokens"]) == enc.n_vocab
