"""A model's own tokenizer goes from script to script, into every folder they write."""

import pytest

import distill
import train
from common import TINY, one_line
from common_bpe import MANUAL, model_folder  # noqa: F401
from common_data import write_jsonl
from data.prepare import prepare
from data.tokenizer import load_tokenizer


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
