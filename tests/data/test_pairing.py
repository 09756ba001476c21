"""Which tokenizer can be a model's, by its size."""

import json

import pytest

from common import one_line
from data.pairing import advice, check_folder, instead, require_pair, rows_of

REAL = [("GPT-2", 50257, 50257), ("nanoGPT", 50257, 50304), ("Pythia", 50277, 50304),
        ("Pythia 12B", 50277, 50688), ("Qwen2.5", 151665, 151936), ("Qwen2.5 32B", 151665, 152064),
        ("World", 65530, 65536),
        ("Phi-2", 50295, 51200), ("DeepSeek", 100015, 102400), ("BLOOM", 250680, 250880), ("ours", 257, 257),
        ("an added token", 32001, 32000), ("Mamba", 50277, 50280)]
WRONG = [(257, 65536), (257, 50304), (50257, 65536), (65530, 50304), (100277, 65536), (32000, 65536),
         (65530, 257), (257, 512)]


@pytest.mark.parametrize("n_tokens, rows", [case[1:] for case in REAL], ids=[case[0] for case in REAL])
def test_real_models_have_their_tokenizers(n_tokens, rows):
    require_pair("x", n_tokens, rows)


@pytest.mark.parametrize("n_tokens, rows", WRONG)
def test_others_are_refused_with_advice_that_can_be_right(n_tokens, rows):
    with pytest.raises(ValueError, match=f"x has {n_tokens:,} tokens, the model {rows:,} rows") as e:
        require_pair("x", n_tokens, rows)
    assert one_line(e.value).endswith(advice(rows))


@pytest.mark.parametrize("rows, name", [
    (65536, "world"), (65530, "world"), (50257, "gpt2"), (50304, "gpt2"), (257, "bytes"), (320, "bytes"),
    *((rows, None) for rows in (97, 32000, 50277, 50432, 65024, 65535, 151936)),
])
def test_advice_names_only_what_fits(rows, name):
    for other in ("bytes", "gpt2", "world"):
        assert (f"--tokenizer {other}" in advice(rows)) == (other == name)
    assert name or "SentencePiece is not supported" in advice(rows)
    kind = "a SentencePiece tokenizer: only byte-level BPE is supported"
    assert "--tokenizer" not in instead(ValueError(kind), rows)
    assert advice(rows) in instead(ValueError("bad"), rows)


def test_a_folder_is_checked_by_its_config(tmp_path, capsys):
    for content in (None, "{", "[]", "{}", '{"vocab_size": "x"}'):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        assert rows_of(tmp_path) is None
        check_folder(tmp_path, "bytes", 257)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 65536}))
    check_folder(tmp_path, "world", 65530)
    with pytest.raises(ValueError, match="257 tokens, the model 65,536 rows.*--tokenizer world; import it"):
        check_folder(tmp_path, "bytes", 257)
    assert capsys.readouterr().err == ""
    check_folder(tmp_path, "bpe-123", 300)             # it came with the model: named, and believed
    assert "bpe-123 has 300 tokens" in one_line(capsys.readouterr().err)
