"""Models of every kind for the tests of the model and of its folders."""

from dataclasses import replace

import pytest
import torch

from model import LM, ModelConfig

GPT = ModelConfig(vocab_size=50, block_size=64, n_layer=3, n_embd=32, n_head=4, rwkv_head_size=16, ln0=False)


RWKV = replace(GPT, mixer="r", ffn="channelmix", positions="none", ln0=True)  # the official RWKV-7


VARIANTS = {
    "gpt": GPT,
    "gpt2": replace(GPT, positions="learned", ffn="gelu", bias=True, qkv_bias=True, tied=True),
    "llama": replace(GPT, positions="rope", ffn="swiglu", norm="rmsnorm", n_kv_head=2),
    "qwen2, one kv head": replace(
        GPT, ffn="swiglu", norm="rmsnorm", n_kv_head=1, qkv_bias=True, rope_theta=1e6, tied=True
    ),
    "qwen3, llama3's rope": replace(
        GPT,
        ffn="swiglu",
        norm="rmsnorm",
        n_kv_head=2,
        head_size=12,
        qk_norm=True,
        rope_scaling="llama3",
        rope_factor=8.0,
        rope_original=32,
    ),
    "linear rope, bias of o alone, exact gelu": replace(
        GPT, ffn="gelu_exact", rope_scaling="linear", rope_factor=3.0, o_bias=True
    ),
    "no positions, free head size": replace(GPT, positions="none", head_size=12, norm_bias=False, ln0=True),
    "attention with channelmix": replace(GPT, ffn="channelmix"),
    "rwkv7": RWKV,
    "rwkv7, one head": replace(RWKV, rwkv_head_size=32, n_layer=1),
    "rwkv7, wider than the model": replace(RWKV, rwkv_size=64, rank_w=4, rank_a=5, rank_v=6, rank_g=7),
    "no gate": replace(RWKV, gate=False),
    "no group norm": replace(RWKV, group_norm=False),
    "no token shift": replace(RWKV, token_shift=False),
    "no bonus": replace(RWKV, bonus=False),
    "rwkv with rope": replace(RWKV, rwkv_rope=True),
    "rwkv with norms and linear rope": replace(
        RWKV, rwkv_rope=True, qk_norm=True, rope_scaling="linear", rope_factor=2.0, o_bias=True
    ),
    "rwkv in llama's clothes": replace(
        GPT,
        mixer="r",
        ffn="swiglu",
        norm="rmsnorm",
        gate=False,
        group_norm=False,
        token_shift=False,
        bonus=False,
        rwkv_rope=True,
        qkv_bias=True,
        bias=True,
        tied=True,
    ),
    "rwkv in gpt2's clothes": replace(
        GPT, mixer="r", ffn="gelu", positions="learned", bias=True, qkv_bias=True
    ),
    "hybrid ar": replace(GPT, mixer="ar"),
    "hybrid ra": replace(GPT, mixer="ra", ffn="swiglu", norm="rmsnorm", n_kv_head=2),
    "hybrid arr, learned": replace(GPT, mixer="arr", positions="learned", ffn="channelmix"),
}


every_variant = pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS.keys())


@torch.no_grad()
def lively(cfg: ModelConfig, seed=0) -> LM:
    """A model whose every parameter matters: initial zeros would hide mistakes."""
    torch.manual_seed(seed)
    model = LM(cfg)
    for name, p in model.named_parameters():
        scale = (
            1.0
            if name in ("emb.weight", "pos.weight")
            else 0.6 / p.shape[-1] ** 0.5 if name.endswith("weight") and p.ndim == 2 else 0.2
        )
        p.add_(scale * torch.randn_like(p))
    return model


def text(T=45, B=2, V=50, seed=1):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def in_pieces(model, tokens, pieces, state=None):
    logits = []
    for part in tokens.split(pieces, 1):
        out, state = model(part, state)
        logits.append(out)
    return torch.cat(logits, 1), state


def relative(out, ref):
    return ((out.double() - ref.double()).norm() / ref.double().norm()).item()


def one_line_error(call, *parts):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    for part in parts:
        assert part in message, (part, message)
