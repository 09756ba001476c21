"""The official RWKV-7's .pth: a flat dict of tensors in torch's zip format.

Our names are the official ones, so nothing is renamed or arranged. What is here: the
shape of a model by its tensors, the official order of their names, and what that format
has no place for.
"""

import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from data.foreign import brief, require_file
from lib.folders import open_model, read_tensor, write_whole
from model import ModelConfig
from tools.checkpoint import Checkpoint, as_dtype, plain_names, unchanged


def from_pth(content: dict) -> Checkpoint:
    """The checkpoint in what `open_pth` gives.

    Widths, heads and ranks are its tensors'; layer 0 has no use for a value residual.
    """
    tensors = state_dict(content)

    def shape(name: str, n: int) -> torch.Size:
        if name not in tensors or tensors[name].ndim != n:
            raise ValueError(f"{name} is missing or has another rank of tensor: it is not an RWKV-7")
        return tensors[name].shape

    V, C = shape("emb.weight", 2)
    H, N = shape("blocks.0.att.r_k", 2)
    n_layer = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    layer_of = {"w": 0, "a": 0, "g": 0, "v": 1}
    ranks = {f"rank_{kind}": shape(f"blocks.{i}.att.{kind}1", 2)[1]
             for kind, i in layer_of.items() if i < n_layer}
    cfg = ModelConfig(
        vocab_size=V,
        block_size=4096,
        n_layer=n_layer,
        n_embd=C,
        mixer="r",
        positions="none",
        rwkv_head_size=N,
        rwkv_size=H * N,
        **ranks,
        ffn="channelmix",
        ffn_size=shape("blocks.0.ffn.key.weight", 2)[0],
    )
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    return Checkpoint(cfg, shapes, lambda name: name, tensors.get, unchanged, r"blocks\.0\.att\.v[012]")


def open_pth(file: Path) -> dict:
    """What torch.save has written, its tensors mapped into memory, read when wanted.

    Raises ValueError for a file that is damaged or holds more than tensors and plain
    values; no code in it is run.
    """
    require_file(file)
    try:
        require_stored(file)
        with warnings.catch_warnings(action="ignore"):  # of what a damaged pickle says of itself
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # torch, pickle and zipfile raise many kinds here
        raise ValueError(f"damaged, or it holds more than tensors ({type(e).__name__}): "
                         "only a dict of tensors in torch's zip format is read") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict of tensors: "
                         "save model.state_dict() alone")
    return content


def require_stored(file: Path) -> None:
    """Raises ValueError for a zip that would become larger than it is."""
    with zipfile.ZipFile(file) as archive:
        packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"{brief(packed[0].filename)} is compressed, which torch does not do")


def state_dict(values: dict) -> dict[str, Tensor]:
    """The tensors by their plain names.

    Raises ValueError for anything but a flat dict of tensors.
    """
    if not all(isinstance(name, str) and is_plain(t) for name, t in values.items()):
        raise ValueError("it is not a flat dict of tensors that hold their own numbers: "
                         "save model.state_dict() alone")
    return {short: values[name] for short, name in plain_names(values).items()}


def is_plain(t: object) -> bool:
    """Whether this is a tensor whose numbers all stand in memory.

    It is not on another device, nor a view that repeats or negates other numbers.
    """
    if type(t) is not Tensor or t.layout != torch.strided or t.device.type != "cpu":
        return False
    if t.is_neg() or t.is_conj():
        return False
    return t.untyped_storage().nbytes() >= t.numel() * t.itemsize


# ------------------------------------------------------------------------------------------
# Export

OF_THE_MIXER = "x_r x_w x_k x_v x_a x_g w1 w2 w0 a1 a2 a0 v1 v2 v0 g1 g2 k_k k_a r_k"
PER_BLOCK = [  # the official order
    *(f"{norm}.{part}" for norm in ("ln1", "ln2", "ln0") for part in ("weight", "bias")),
    *(f"att.{name}" for name in OF_THE_MIXER.split()),
    *(f"att.{name}.weight" for name in ("receptance", "key", "value", "output")),
    "att.ln_x.weight", "att.ln_x.bias",
    "ffn.x_k", "ffn.key.weight", "ffn.value.weight",
]
NOT_IN_LAYER_0 = ("att.v0", "att.v1", "att.v2")
ONLY_IN_LAYER_0 = ("ln0.weight", "ln0.bias")

OFFICIAL = {  # settings of the official RWKV-7
    "ffn": "channelmix", "norm": "layernorm", "norm_eps": 1e-5, "norm_bias": True, "ln0": True,
    "gate": True, "group_norm": True, "token_shift": True, "bonus": True, "rwkv_rope": False,
    "qk_norm": False, "qkv_bias": False, "output_bias": False, "bias": False,
}


def official_names(n_layer: int) -> list[str]:
    """All parameters of an RWKV-7, in the order that the official trainer has."""
    names = ["emb.weight"]
    for i in range(n_layer):
        left_out = ONLY_IN_LAYER_0 if i else NOT_IN_LAYER_0
        names += [f"blocks.{i}.{name}" for name in PER_BLOCK if name not in left_out]
    return [*names, "ln_out.weight", "ln_out.bias", "head.weight"]


def not_official(cfg: ModelConfig) -> list[str]:
    """What of this model the official RWKV-7 has no place for."""
    reasons = [f"{key} = {getattr(cfg, key)} instead of {value}" for key, value in OFFICIAL.items()
               if getattr(cfg, key) != value]
    if "a" in cfg.mixers:
        reasons.append(f"attention in layer {cfg.mixers.index('a')}")
    if cfg.positions == "learned":
        reasons.append("learned positions")
    if cfg.rwkv_size not in (None, cfg.n_embd):
        reasons.append(f"heads of {cfg.rwkv_size} together in a width of {cfg.n_embd}")
    return reasons


def require_own(file: Path) -> None:
    """Raises ValueError for a file that --overwrite may not replace."""
    try:
        from_pth(open_pth(file))
    except (ValueError, OSError):
        raise ValueError(f"{file} is no RWKV-7 of this format, so it is not replaced: "
                         "choose another --out") from None


def write(folder: Path, out: Path, dtype: str | None) -> None:
    """Write a model folder as the file `out`.

    torch.save wants all tensors at once; each is a copy, of whose file nothing stays in
    memory.
    """
    model, file = open_model(folder)

    def read(name: str) -> Tensor:
        tied = model.cfg.tied and name == "head.weight"
        t = read_tensor(file, "emb.weight" if tied else name)  # a tied head is written as a copy
        return as_dtype(name, t, shapes[name], getattr(torch, dtype) if dtype else t.dtype).clone()

    names = official_names(model.cfg.n_layer)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert set(names) == set(shapes), "a model that passes not_official has the official parameters"
    out.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: read(name) for name in names}

    def save(part: Path) -> None:
        open(part, "wb").close()      # else torch has words of its own for what the system refuses
        torch.save(tensors, part)

    write_whole(out, save)


def how_to_run(out: Path) -> str:
    return f"{out}: for the package rwkv, RWKV(model=\"{out.with_suffix('')}\", strategy=\"cpu fp32\")"
