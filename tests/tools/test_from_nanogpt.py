"""nanoGPT's ckpt.pt: the logits of the GPT-2 that it is, the tokenizer beside it."""

import json

import pytest
import torch

from common_bpe import train
from common_convert import GPT2, bring, nanogpt, original, refused, relative, text
from data.tokenizer import load_tokenizer

EXACT = GPT2 | dict(activation_function="gelu")


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_logits_are_those_of_the_same_gpt2(prefix, tmp_path):
    model = original("GPT2", EXACT)
    torch.save(nanogpt(model, prefix), tmp_path / "ckpt.pt")
    imported = bring(tmp_path / "ckpt.pt", tmp_path)
    assert relative(imported(text())[0], model(text()).logits) < 1e-4 and imported.cfg.tied


@torch.no_grad()
def test_without_biases_norms_have_none_either(tmp_path):
    """nanoGPT's bias=False, with the causal masks of older files."""
    model = original("GPT2", EXACT)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.zero_()
    content = nanogpt(model, bias=False)
    kept = {name: p for name, p in content["model"].items() if not name.endswith("bias")}
    content["model"] = kept | {"transformer.h.0.attn.bias": torch.ones(1, 1, 128, 128)}
    torch.save(content, tmp_path / "ckpt.pt")
    imported = bring(tmp_path / "ckpt.pt", tmp_path)
    assert relative(imported(text())[0], model(text()).logits) < 1e-4
    assert not any(name.endswith("bias") for name, _ in imported.named_parameters())


def test_the_tokenizer_beside_it_comes_along(tmp_path):
    tokenizer = train("GPT-2")
    tokenizer.model.save(str(tmp_path))
    torch.save(nanogpt(original("GPT2", EXACT | dict(vocab_size=1536))), tmp_path / "ckpt.pt")
    bring(tmp_path / "ckpt.pt", tmp_path)
    words = "What is this? 12 things, and then the rest."
    assert load_tokenizer(tmp_path / "imported").encode_ordinary(words) == tokenizer.encode(words).ids
    bring(tmp_path / "ckpt.pt", tmp_path, "again", tokenizer=str(tmp_path / "imported"))
    metas = [json.loads((tmp_path / name / "meta.json").read_text()) for name in ("imported", "again")]
    assert metas[0]["tokenizer"] == metas[1]["tokenizer"]
    refused("bytes has 257 tokens, the model 1,536 rows",
            call=lambda: bring(tmp_path / "ckpt.pt", tmp_path, "third", tokenizer="bytes"))


@pytest.mark.parametrize("changes, words", [
    (dict(n_layer=4), ["12 tensors are missing", "h.3."]),
    (dict(n_layer=10**7), ["10000000 layers"]),
    (dict(n_embd=64), ["wte.weight is (97, 48)", "emb.weight"]),
    (dict(n_head=None), ["n_head is missing"]),
    (dict(bias="yes"), ["bias is 'yes'"]),
    (dict(bias=False), ["have no place", "bias"]),
])
def test_other_shapes_are_refused_by_name(changes, words, tmp_path):
    torch.save(nanogpt(original("GPT2", EXACT), **changes), tmp_path / "ckpt.pt")
    refused(*words, path=tmp_path / "ckpt.pt", tmp_path=tmp_path)
