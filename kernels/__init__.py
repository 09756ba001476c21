"""The same numbers, faster.

The room's law: each form is written for one kind of machine and tested against its
definition. Without this room all would be slower and nothing wrong.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

CHUNK = 32       # tokens per chunk; 16 to 64 cost about the same (docs/log.md)
MAX_LOG = 40.0   # the most that log W may fall within a chunk: 1/W must stay inside float32 and bfloat16.
                 # RWKV-7's e^w >= 0.5452 gives -19.4 over 32 tokens, so 1/W <= 3e8


def why_not_triton(r: Tensor) -> str:
    """Why Triton kernels can't run on inputs like r (B, T, H, N); empty if they can."""
    if find_spec("triton") is None:
        return "needs the package triton: pip install triton (Linux)"
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")
    if not r.is_cuda and not interpreted:
        return ("needs tensors on an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment from the start: "
                "use torch")
    if r.dtype not in (torch.float32, torch.bfloat16, torch.float16) or r.shape[-1] not in (16, 32, 64, 128):
        return ("takes float32, bfloat16 or float16 and heads of 16, 32, 64 or 128, "
                f"not {str(r.dtype)[6:]} and {r.shape[-1]}: use torch")
    return ""


def chunk_length(form: str, r: Tensor, w: Tensor, min_w: float | None) -> int:
    """Tokens per chunk in which this form can run on these inputs; 0: token by token.

    min_w is a lower bound of w; None reads it from w, for which a GPU must stop. (A
    compiled graph cannot read it: there the Triton operator looks at w itself, and
    takes chunks of 16.) Faster decay means shorter chunks. Raises ValueError for w > 0.
    """
    T, N = r.shape[1], r.shape[3]
    unread = form == "triton" and torch.compiler.is_compiling()
    if r.numel() == 0 or form == "loop" and T == 1:                        # generation need not wait
        return 0
    if min_w is None and not unread:
        min_w = least(w)
    if form == "loop":
        return 0
    if form == "triton":
        return triton_chunk(r.dtype, N, min_w)
    L = chunk_of(T)
    while L >= 8 and not -min_w * L <= MAX_LOG:                            # "not <=": NaN ends in the loop
        L //= 2
    return L if L >= 8 else 0


def chunk_of(T: int) -> int:
    """Tokens per chunk of a text of T tokens, where the decays allow it."""
    return min(CHUNK, -(-T // 16) * 16)


def triton_chunk(dtype: torch.dtype, N: int, min_w: float | None) -> int:
    """32 fits into registers and shared memory in bfloat16 with heads of up to 64 only;
    16 always does.

    16 also where nothing is known of the decay, as it allows for the fastest.
    """
    if min_w is None:
        return 16
    L = 32 if dtype == torch.bfloat16 and N <= 64 and -min_w * 32 <= MAX_LOG else 16
    return L if -min_w * L <= MAX_LOG else 0


def least(w: Tensor) -> float:
    """The fastest log decay there is. Raises ValueError where one is positive."""
    low, high = (x.item() for x in torch.aminmax(w.detach()))
    if high > 0:
        raise ValueError(f"log decay w reaches {high:.3g}: it must be <= 0, or the memory grows without end")
    return low
