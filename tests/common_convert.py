"""What the tests of tools/convert.py share: tiny checkpoints and their oracles.

Nothing is downloaded: transformers makes random models, gguf's writer their files.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common import one_line, shake
from lib.folders import load_model
from model import LM, ModelConfig
from tools.convert import ImportConfig, import_model

hf = pytest.importorskip("transformers")

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
COMMON = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, rms_norm_eps=1e-4, max_position_embeddings=128,
              bos_token_id=None, eos_token_id=None, pad_token_id=None)
GPT2 = dict(vocab_size=97, n_positions=128, n_embd=48, n_layer=3, n_head=4,
            bos_token_id=None, eos_token_id=None)
# heads of 32: quantised rows come in blocks of 32
WIDE = COMMON | dict(hidden_size=128, intermediate_size=96)
OTHER_GPT2 = dict(activation_function="gelu", tie_word_embeddings=False, n_inner=70, layer_norm_epsilon=1e-3)
BIASED = dict(rope_parameters=LINEAR, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e6}
GROUPED = "llama, llama3 scaling, grouped heads, other head size"
KINDS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2, exact gelu, untied, narrow": ("GPT2", GPT2 | OTHER_GPT2),
    "llama": ("Llama", COMMON),
    GROUPED: ("Llama", COMMON | dict(head_dim=20, rope_parameters=LLAMA3)),
    "llama, linear scaling, biases, tied": ("Llama", COMMON | BIASED),
    "llama, bias of attention only, one kv head":
        ("Llama", COMMON | dict(attention_bias=True, num_key_value_heads=1)),
    "mistral": ("Mistral", COMMON | dict(sliding_window=None, head_dim=16)),
    "mistral, window as long as the context": ("Mistral", COMMON | dict(sliding_window=128)),
    "qwen2": ("Qwen2", COMMON | dict(tie_word_embeddings=True)),
    "qwen2, untied": ("Qwen2", COMMON | dict(rope_parameters=PLAIN_ROPE)),
    "qwen3": ("Qwen3", COMMON | dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3, biases": ("Qwen3", COMMON | dict(head_dim=24, attention_bias=True)),
}


def original(name: str, settings: dict, seed: int = 0, std: float = 0.3) -> torch.nn.Module:
    """A tiny model of transformers in which every weight matters."""
    torch.manual_seed(seed)
    cls = getattr(hf, {"GPT2": "GPT2LMHeadModel"}.get(name, name + "ForCausalLM"))
    model = cls(getattr(hf, name + "Config")(**settings)).eval()
    shake(model, std)
    return model


def rwkv(N: int = 32, C: int = 96, L: int = 3, V: int = 71, **changes) -> LM:
    """A tiny RWKV-7 of ours."""
    torch.manual_seed(0)
    cfg = dict(vocab_size=V, n_layer=L, n_embd=C, mixer="r", positions="none", ffn="channelmix",
               rwkv_head_size=N, block_size=4096)
    model = LM(ModelConfig(**cfg | changes))
    shake(model, 0.3)
    return model


def text(T: int = 100, V: int = 97) -> torch.Tensor:
    return torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def bring(path, tmp_path: Path, name: str = "imported", **settings) -> LM:
    """Import a checkpoint and load it."""
    import_model(ImportConfig(path=str(path), out=str(tmp_path / name), overwrite=True, **settings))
    return load_model(tmp_path / name)


def refused(*words: str, call=None, path=None, tmp_path=None) -> None:
    """It is refused in one line with these words, and leaves nothing behind."""
    before = sorted(tmp_path.rglob("*")) if tmp_path else []
    with pytest.raises(ValueError) as e:
        call() if call else import_model(ImportConfig(path=str(path), out=str(tmp_path / "nothing")))
    assert all(word in one_line(e.value) for word in words), (words, str(e.value))
    assert len(str(e.value)) < 500 and (not tmp_path or sorted(tmp_path.rglob("*")) == before)


def edit(folder: Path, **changes) -> None:
    """Change settings of a folder's config.json; ... removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


# ------------------------------------------------------------------------------------------
# nanoGPT

def nanogpt(gpt2: torch.nn.Module, prefix: str = "", **changes) -> dict:
    """What nanoGPT's train.py would save of transformers' GPT-2."""
    c = gpt2.config
    weights = {prefix + name: p.T.contiguous() if ".h." in name and p.ndim == 2 else p
               for name, p in gpt2.state_dict().items()}
    shape = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.n_positions, bias=True,
                 vocab_size=c.vocab_size, dropout=0.0)
    return {"model": weights, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
            "model_args": shape | changes, "iter_num": 7, "best_val_loss": torch.tensor(3.0),
            "config": {"out_dir": "out", "compile": True}}


# ------------------------------------------------------------------------------------------
# GGUF

LLAMA_CPP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
             "model.layers": "blk", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.o_proj": "attn_output", "self_attn.": "attn_", "mlp.": "ffn_", "_proj": ""}


def write_gguf(file: Path, model: torch.nn.Module, arch: str, quantise=lambda name, p: None,
               tensors_per_part: int = 0, **changes) -> None:
    """A GGUF as llama.cpp's converter lays it out: llama's q and k rows in pairs.

    `quantise` names a tensor's type; the model then gets what the file can say.
    """
    gguf = pytest.importorskip("gguf")
    c, writer = model.config, gguf.GGUFWriter(file, arch, split_max_tensors=tensors_per_part)
    values = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": float(c.rope_parameters["rope_theta"]),
        "rope.dimension_count": 32,
    } | changes
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in values.items():
        add[type(value)](f"{arch}.{key}", value)
    for name, p in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            # llama.cpp turns neighbours: row i of each half stands beside the other's
            rows = p.view(-1, 2, 16, *p.shape[1:])
            p = torch.stack((rows[:, 0], rows[:, 1]), 2).reshape(p.shape)
        for foreign, short in LLAMA_CPP.items():
            name = name.replace(foreign, short)
        kind = quantise(name, p)
        if kind:
            kind = gguf.GGMLQuantizationType[kind]
            data = gguf.quantize(p.numpy(), kind)
            p.copy_(torch.from_numpy(np.array(gguf.dequantize(data, kind))))  # so that the oracle has it too
            writer.add_tensor(name, data, raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(p.numpy()))
    if c.rope_parameters["rope_type"] == "llama3":
        plain = 5000.0 ** (-torch.arange(0, 32, 2) / 32)
        factors = (plain / model.model.rotary_emb.inv_freq).float()
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rewrite_gguf(file: Path, out: Path, arch: str | None = None, settings: dict | None = None,
                 tensors: dict | None = None) -> None:
    """The same GGUF with other settings, or tensors (arrays); None is without one."""
    gguf = pytest.importorskip("gguf")
    reader, settings, tensors = gguf.GGUFReader(file), settings or {}, tensors or {}
    old = {key: (field.contents(), field.types) for key, field in reader.fields.items()}
    arch = arch or old["general.architecture"][0]
    writer = gguf.GGUFWriter(out, arch)
    for key, (value, (kind, *of_items)) in old.items():
        value = settings.get(key, value)
        if not key.startswith(("GGUF.", "general.architecture")) and value is not None:
            writer.add_key_value(key, value, kind, *of_items)
    for name, t in ({t.name: t.data for t in reader.tensors} | tensors).items():
        if t is not None:
            writer.add_tensor(name, np.array(t))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
