"""nanoGPT's ckpt.pt: a dict with the weights, `model`, and the shape, `model_args`.

It is a GPT-2 with plain linear maps, exact gelu, and biases everywhere or nowhere.
Optimizer and settings beside them are not read. The file names no tokenizer: vocab.json
and merges.txt beside it are read, else it takes --tokenizer.
"""

from pathlib import Path

from torch import Tensor

from data.foreign import has_tokenizer, read_tokenizer_json
from model import ModelConfig
from tools.checkpoint import TABLE, Checkpoint, rename, same, take
from tools.rwkv_pth import state_dict


def is_nanogpt(content: dict) -> bool:
    return isinstance(content.get("model"), dict) and isinstance(content.get("model_args"), dict)


def from_nanogpt(content: dict, folder: Path) -> Checkpoint:
    """The checkpoint in what `open_pth` gives; its tokenizer may stand in `folder`.

    Raises ValueError for what is missing or damaged.
    """
    tensors = {name.removeprefix("transformer."): t for name, t in state_dict(content["model"]).items()}
    args = content["model_args"]
    emb, head = "wte.weight", "lm_head.weight"
    bias = take(args, "bias", bool, True)
    cfg = ModelConfig(
        vocab_size=take(args, "vocab_size", int, 50304),
        block_size=take(args, "block_size", int),
        n_layer=take(args, "n_layer", int),
        n_embd=take(args, "n_embd", int),
        n_head=take(args, "n_head", int),
        positions="learned",
        qkv_bias=bias,
        bias=bias,
        norm_bias=bias,
        ln0=False,
        ffn="gelu_exact",
        tied=head not in tensors or emb in tensors and same(tensors.get, emb, head),
    )
    ignored = r"h\.\d+\.attn\.bias" + r"|lm_head\.weight" * cfg.tied          # causal masks
    tokenizer = (lambda: read_tokenizer_json(folder)) if has_tokenizer(folder) else None
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    return Checkpoint(cfg, shapes, lambda name: rename(name, TABLE["gpt2"]), tensors.get, split_qkv, ignored,
                      tokenizer)


def split_qkv(name: str, t: Tensor) -> Tensor:
    """q, k and v stand in one matrix."""
    part = name.split(".")[-2]
    return t.chunk(3)["qkv".index(part[0])] if part in ("q_proj", "k_proj", "v_proj") else t
