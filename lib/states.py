"""What a model remembers, as a value: to read a text into, set side by side, and copy.

    logits, book = process(model, tokens)              any length, a piece at a time
    a = generate(decoder, question, 100, state=book)   no call changes a state, so
    b = generate(decoder, another, 100, state=book)    both continue the same book

Functions on model.State, for attention's growing cache as for RWKV-7's constant one.
Dimension 0 of each of its tensors is the text in the batch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lib.hybrid import cache_bytes
from model import LM, ModelConfig, State

PIECE = 512      # tokens per call, of all rows: fast matrix products, and small activations for any text


# ------------------------------------------------------------------------------------------
# Trees of tensors

def tree_map(fn: Callable, *trees):
    """fn of the tensors at the same place of trees of one structure, in that structure.

    A tree is a nest of tuples and State; what else stands in it (positions, None) is
    taken from the first.
    """
    first = trees[0]
    if isinstance(first, Tensor):
        return fn(*trees)
    if isinstance(first, State):
        return State(first.position, tree_map(fn, *(tree.layers for tree in trees)))
    if not isinstance(first, tuple):
        return first
    parts = [tree_map(fn, *nodes) for nodes in zip(*trees, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)  # a NamedTuple stays one


def tensors(tree) -> list[Tensor]:
    """The tensors of a tree, in order."""
    found: list[Tensor] = []
    tree_map(found.append, tree)
    return found


def nbytes(tree) -> int:
    """Bytes of all tensors: constant for RWKV-7, growing with text for attention."""
    return sum(x.nbytes for x in tensors(tree))


# ------------------------------------------------------------------------------------------
# Reading


@torch.no_grad()
def process(
    model: LM, tokens: Tensor, state: State | None = None, piece: int = PIECE
) -> tuple[Tensor, State]:
    """Read tokens (B, T >= 1), continuing from `state`: logits (B, V) of what comes
    next, and the state.

    Needs memory for the activations of one piece: `piece` tokens of all rows together,
    but at least 16 of each. Raises ValueError as LM does, and for an empty text or
    piece, tokens outside the vocabulary, a state of other than B rows or in int8.
    """
    B, T = tokens.shape
    if B * T == 0 or piece < 1:
        raise ValueError(f"{B} texts of {T} tokens in pieces of {piece}: there must be at least one of each")
    check_tokens(tokens, model.cfg.vocab_size)
    parts = tensors(state)
    if parts and (len(parts[0]) != B or parts[0].dtype == torch.int8):
        raise ValueError(
            f"{B} texts, and the {parts[0].dtype} state of {len(parts[0])}: select as many rows of "
            "it, and expand a compressed one"
        )
    for part in tokens.split(min(piece, max(16, piece // B)), 1):
        x, state = model.hidden(part, state)
    return model.head(x[:, -1]), state


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raises ValueError for a token that the model does not have."""
    low, high = tokens.min().item(), tokens.max().item()
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token {high if low >= 0 else low} is outside the vocabulary of {vocab_size}: "
                         "the text was prepared with another tokenizer than the model's")


def process_rows(model: LM, rows: Sequence[Tensor], state: State | None = None,
                 piece: int = PIECE) -> tuple[Tensor, list[State]]:
    """Read rows (T_i >= 1,) of any lengths, continuing from `state`: logits (B, V), and
    each row's state.

    All read as far as the shortest goes; it is done then, and the others read on. So
    nothing is padded, no state sees what is not its text, and every token is computed
    once. Raises ValueError for no rows, and as `process`.
    """
    if not len(rows):
        raise ValueError("no rows: there must be at least one text")
    logits, states = [None] * len(rows), [None] * len(rows)
    reading, start = list(range(len(rows))), 0
    for end in sorted({len(row) for row in rows}):
        out, state = process(model, torch.stack([rows[i][start:end] for i in reading]), state, piece)
        for j, i in enumerate(reading):
            if len(rows[i]) == end:
                logits[i], states[i] = out[j], select(state, [j])
        rest = [j for j, i in enumerate(reading) if len(rows[i]) > end]
        reading, state, start = [reading[j] for j in rest], select(state, rest), end
    return torch.stack(logits), states


# ------------------------------------------------------------------------------------------
# As values

def copy(state: State) -> State:
    """The same in its own memory and out of autograd, for whoever writes into it."""
    return tree_map(lambda x: x.detach().clone(), state)


def reset(state: State) -> State:
    """As many texts on the same device, with nothing read: gives what None gives."""
    def empty(att):
        if len(att) == 2:  # attention's (k, v), each (B, H, T, N)
            return tuple(x[:, :, :0].clone() for x in att)
        last, S, _ = att
        return torch.zeros_like(last), torch.zeros_like(S), 0

    return State(0, tuple((empty(att), tree_map(torch.zeros_like, ffn)) for att, ffn in state.layers))


def select(state: State, rows: list[int]) -> State:
    """A batch's texts `rows`, in this order, in memory of their own; any may repeat."""
    return tree_map(lambda x: x[torch.tensor(rows, dtype=torch.long, device=x.device)], state)


def join(cfg: ModelConfig, states: Sequence[State]) -> list[tuple[list[int], State]]:
    """States side by side, as far as one step can serve them all: batches, each with
    the indices of its states.

    RWKV-7 does not count its tokens, so all its states fit in one batch, whose position
    is the longest text's. Attention does, by its cache's length, and so do rotary and
    learned positions: there each batch is of states with one position.
    """
    counts = "a" in cfg.mixers or cfg.rwkv_rope or cfg.positions == "learned"
    batches: dict[int, list[int]] = {}
    for i, state in enumerate(states):
        batches.setdefault(state.position if counts else 0, []).append(i)
    joined = []
    for rows in batches.values():
        layers = tree_map(lambda *xs: torch.cat(xs), *(states[i].layers for i in rows))
        joined.append((rows, State(max(states[i].position for i in rows), layers)))
    return joined


def repeat(state: State, n: int) -> State:
    """The state of one text as that of n texts."""
    return select(state, [0] * n)


def memory_line(states: Sequence[State], cfg: ModelConfig, B: int = 1) -> str:
    """Mean bytes of B texts, beside what attention would keep for the longest."""
    T = max(state.position for state in states)
    mine, attention = sum(map(nbytes, states)) // B, cfg.n_layer * cache_bytes(cfg, "a", T)
    return (f"memory of {T:,} tokens: {mine:,} bytes; attention with as many layers and heads keeps "
            f"{attention:,}")
