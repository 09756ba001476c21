"""tools.evaluate and tools.passkey where a number, a folder or the data is wrong."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common import one_line, tiny_model
from lib.folders import check_vocabulary, save_model
from tools import evaluate, passkey
from tools.evaluate import EvaluateConfig
from tools.passkey import PasskeyConfig


def refused(call, words: str) -> None:
    with pytest.raises(ValueError, match=words) as e:
        call()
    one_line(e.value)


@pytest.mark.parametrize("config", [EvaluateConfig, PasskeyConfig])
def test_bad_settings_end_in_one_clear_line(config):
    for change, words in (({"block_size": 0}, "at least 1"), ({"max_tokens": -5}, "at least 1"),
                          ({"batch_size": 0}, "at least 1"), ({"out": ""}, "out is empty"),
                          ({"student": ""}, "student is empty"),
                          ({"out": __file__}, "is a file: name a folder")):
        refused(lambda: config(**change), words)


def test_bad_settings_of_the_passkey_end_in_one_clear_line():
    for change, words in (({"longest": 0}, "at least 1"), ({"passkey": 0}, "at least 1"),
                          ({"passkey": 90001}, "below 90001"), ({"depths": 1}, "at least 2"),
                          ({"depths": 101}, "below 101"), ({"longest": None, "passkey": None}, "both off")):
        refused(lambda: PasskeyConfig(**change), words)


def test_bad_input_ends_in_one_clear_line(tiny, tmp_path):
    save_model(tiny_model(), tmp_path / "model", {"tokenizer": "bytes"})
    common = ["--student", "None", "--max_tokens", "100"]
    here = ["--teacher", str(tmp_path / "model")]
    missing = ["--teacher", str(tmp_path / "none"), "--data", tiny.text]
    for main in (evaluate.main, passkey.main):
        refused(lambda: main(common + missing), "no model at")
        refused(lambda: main([*common, *here, "--data", str(tmp_path / "x")]), "does not exist")
    long = ["--passkey", "2", "--block_size", "128", "--longest", "999"]
    for flags, words in ((["--data", tiny.sft, "--longest", "2"], "supervised examples"),
                         (["--data", tiny.sft, "--longest", "None", "--passkey", "2"], "supervised examples"),
                         (["--data", tiny.text, "--longest", "None", "--passkey", "2"], "no room"),
                         (["--data", tiny.text, *long], "lower --longest")):
        refused(lambda: passkey.main([*common, *here, *flags]), words)


def test_models_and_data_of_other_tokenizers_are_refused(tiny, tmp_path):
    save_model(tiny_model(), tmp_path / "bytes", {"tokenizer": "bytes"})
    save_model(tiny_model(), tmp_path / "other", {"tokenizer": "gpt2"})
    for main in (evaluate.main, passkey.main):
        for teacher, student in (("other", "bytes"), ("bytes", "other")):
            flags = ["--teacher", str(tmp_path / teacher), "--student", str(tmp_path / student),
                     "--data", tiny.text]
            refused(lambda: main(flags), "other reads gpt2 tokens, .* holds bytes: prepare the data again")


def test_it_is_the_ids_in_the_data_that_teacher_and_student_must_have(tmp_path):
    """A tokenizer may have one added token more, a model more rows than tokens."""
    small, large = tiny_model(vocab_size=100), tiny_model(vocab_size=257)
    meta = {"dtype": "uint16", "tokens": {"train": 3, "val": 2}}
    loader = SimpleNamespace(vocab_size=257, folder=tmp_path, meta=meta)
    loader.parts = [loader]
    np.array([3, 99, 0], np.uint16).tofile(tmp_path / "train.bin")
    for val in ([5, 99], [5, 100]):
        np.array(val, np.uint16).tofile(tmp_path / "val.bin")
        check_vocabulary(large, large, loader)
        for teacher, student, name in ((large, small, "student"), (small, large, "teacher")):
            if max(val) < 100:
                check_vocabulary(teacher, student, loader)
            else:
                refused(lambda: check_vocabulary(teacher, student, loader),
                        f"257 tokens, the {name} 100, and token 100 occurs: prepare the data")


def test_a_report_of_another_command_is_not_replaced(tiny, tmp_path):
    """And one that could not be written is found out before all the measuring."""
    distilled = {"teacher": {}, "by_position": {}, "stages": []}
    (tmp_path / "file").touch()
    for main, name in ((evaluate.main, "report"), (passkey.main, "passkey")):
        for i, text in enumerate((json.dumps(distilled), "{", "[]", "")):
            out = tmp_path / f"{name}{i}"
            out.mkdir()
            (out / f"{name}.json").write_text(text)
            refused(lambda: main(["--teacher", "none", "--out", str(out)]), "this command did not write it")
            assert (out / f"{name}.json").read_text() == text
        with pytest.raises(OSError) as e:
            main(["--teacher", "none", "--out", str(tmp_path / "file" / "deep")])
        assert "file" in str(e.value.filename)


def test_what_was_measured_is_saved_before_it_is_printed(tiny, tmp_path, monkeypatch):
    class Gone:
        def write(self, _):
            raise BrokenPipeError

        def flush(self):
            pass

    save_model(tiny_model(), tmp_path / "m", {"tokenizer": "bytes"})
    flags = ["--teacher", str(tmp_path / "m"), "--student", str(tmp_path / "m"), "--data", tiny.text]
    flags += ["--max_tokens", "200", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "stdout", Gone())
    for main, more, name in ((evaluate.main, [], "report"),
                             (passkey.main, ["--passkey", "None", "--longest", "2"], "passkey")):
        with pytest.raises(BrokenPipeError):
            main([*flags, *more])
        assert (tmp_path / "out" / f"{name}.json").exists() and (tmp_path / "out" / f"{name}.png").exists()
    monkeypatch.undo()
    evaluate.main(flags)                                     # its own report may be replaced
