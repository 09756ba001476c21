"""A model's own tokenizer goes from script to script, into every folder they write."""

import json
from pathlib import Path

import pytest
import tiktoken

import distill
import train
from common import TINY, one_line, tiny_model
from common_bpe import MANUAL, model_folder, save, train as tokenizer_of_the_library  # noqa: F401
from common_data import write_jsonl
from data.prepare import prepare
from data.tokenizer import load_tokenizer, stops
from lib.folders import save_model


def test_training_hands_the_tokenizer_on_to_every_model_folder(tmp_path, model_folder):
    (tmp_path / "a.txt").write_text(MANUAL[:30_000])
    prepare(tmp_path / "a.txt", tmp_path / "text", tokenizer=str(model_folder))
    records = [{"prompt": f"q{i}", "response": f"r{i}"} for i in range(60)]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", records)
    prepare(pairs, tmp_path / "sft", tokenizer=str(model_folder))
    teacher = str(tmp_path / "gpt")
    train.main(["--data", str(tmp_path / "text"), "--out", teacher, *TINY,
                "--max_steps", "2", "--batch_size", "2"])
    steps = []
    for stage in ("align", "match", "finish"):
        steps += [f"--{stage}.max_steps", "2", f"--{stage}.batch_size", "2"]
    distill.main(["--teacher", teacher, "--data", str(tmp_path / "text"),
                  "--finish_data", str(tmp_path / "sft"), "--finish_block_size", "64",
                  "--out", str(tmp_path / "rnn"), *steps])
    expected = load_tokenizer(model_folder)
    folders = [path.parent for path in tmp_path.rglob("model.safetensors")]
    assert len(folders) >= 8  # both runs, three stages, their checkpoints
    for folder in folders:
        assert load_tokenizer(folder).name == expected.name
        assert load_tokenizer(folder).chat == expected.chat
    prepare(tmp_path / "a.txt", tmp_path / "bytes")
    with pytest.raises(ValueError, match=f"{expected.name}.*holds bytes.*--tokenizer") as e:
        distill.main(["--teacher", teacher, "--data", str(tmp_path / "bytes"), "--stages", "align",
                      "--out", str(tmp_path / "no"), *steps])
    one_line(e.value)


def test_text_of_a_sister_without_the_template_leaves_a_student_its_teachers(tmp_path, model_folder, capsys):
    """A base model's tokenizer has the ids of the tuned one's, and the same name."""
    (tmp_path / "a.txt").write_text(MANUAL[:30_000])
    base = save(tokenizer_of_the_library("SmolLM2"), tmp_path / "base", eos_token="<|endoftext|>")
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"q{i}", "response": f"r{i}"} for i in range(60)])
    prepare(tmp_path / "a.txt", tmp_path / "tuned-text", tokenizer=str(model_folder))
    prepare(tmp_path / "a.txt", tmp_path / "base-text", tokenizer=str(base))
    prepare(pairs, tmp_path / "base-sft", tokenizer=str(base))
    loop = ["--max_steps", "1", "--batch_size", "2"]
    teacher, out = str(tmp_path / "gpt"), str(tmp_path / "rnn")
    train.main(["--data", str(tmp_path / "tuned-text"), "--out", teacher, *TINY, *loop])
    text = ["--data", str(tmp_path / "base-text")]
    train.main([*text, "--init", teacher, "--out", str(tmp_path / "on"), *loop])
    job = ["--teacher", teacher, *text, "--out", out, "--align.max_steps", "1",
           "--finish_data", str(tmp_path / "base-sft"), "--finish.max_steps", "1", "--eval_tokens", "200"]
    distill.main([*job, "--stages", "align"])
    expected = load_tokenizer(model_folder)
    for folder in (tmp_path / "on", tmp_path / "rnn", tmp_path / "rnn" / "align"):
        enc = load_tokenizer(folder)
        assert (enc.name, enc.chat, stops(enc)) == (expected.name, expected.chat, stops(expected))
    assert "chat template" not in capsys.readouterr().err
    distill.main([*job, "--stages", "align,finish", "--resume"])     # examples do teach another form
    assert load_tokenizer(out).chat is None
    distill.main(["--teacher", teacher, "--data", str(tmp_path / "base-sft"), "--stages", "align",
                  "--align.max_steps", "1", "--eval_tokens", "200", "--out", str(tmp_path / "of-examples")])
    assert load_tokenizer(tmp_path / "of-examples").chat is None
    said = [line for line in capsys.readouterr().err.splitlines() if "chat template" in line]
    assert len(said) == 2 and all(f"prepare it with --tokenizer {teacher}" in line for line in said)


def test_a_distillation_needs_no_tokenizer_that_would_have_to_be_fetched(tmp_path, tiny, monkeypatch):
    """The texts are tokenized already, and where one trains there may be no network."""
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    save_model(tiny_model(), tmp_path / "gpt", {"tokenizer": "gpt2"})
    for name, source in (("text", f"{tiny.text}.txt"), ("sft", f"{tiny.sft}.jsonl")):
        prepare(Path(source), tmp_path / name)
        meta = json.loads((tmp_path / name / "meta.json").read_text())
        meta = {key: value for key, value in meta.items() if key not in ("blocks", "digest")}
        changed = json.dumps(meta | {"tokenizer": "gpt2"})
        (tmp_path / name / "meta.json").write_text(changed)
    distill.main(["--teacher", str(tmp_path / "gpt"), "--data", str(tmp_path / "text"),
                  "--finish_data", str(tmp_path / "sft"), "--stages", "finish", "--finish.max_steps", "1",
                  "--finish.batch_size", "1", "--eval_tokens", "64", "--out", str(tmp_path / "rnn")])
    assert json.loads((tmp_path / "rnn" / "meta.json").read_text())["tokenizer"] == "gpt2"
