"""Losses on held-out text, of one model and of teacher and student side by side."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data.loader import Batch, Loader
from lib.processes import global_sum
from lib.shard import is_sharded
from model import LM

LOGITS = 2**24  # of one model that exist at once
QUICK = 16384   # tokens that a look while training reads, at most


def token_losses(logits: Tensor, batch: Batch) -> Tensor:
    """-log p(target) (B, T), 0 where masked: logits (B, T, V) at position t are scored
    against the token after t.
    """
    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.y.flatten(), reduction="none")
    return loss.view_as(batch.mask) * batch.mask


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Sum over the targets of -log p(target)."""
    return token_losses(logits, batch).sum()


def logits_in_parts(batch: Batch, *sides: tuple[LM, Tensor]) -> Iterator[tuple]:
    """(part of the batch, each side's logits of it), for models and what their `hidden`
    gave: those of all positions never exist together.
    """
    n = max(1, LOGITS // (len(batch.x) * max(model.cfg.vocab_size for model, _ in sides)))
    for part, *rows in zip(batch.split(n), *(h.split(n, 1) for _, h in sides)):
        # a sharded model's h may be in 16 bits
        yield part, *(model.head(h.to(torch.promote_types(h.dtype, torch.float32)))
                      for (model, _), h in zip(sides, rows))
    for model, _ in sides:
        if is_sharded(model):
            model.reshard()                # only its forward does that itself


@torch.no_grad()
def loss_by_position(model: LM, loader: Loader, max_tokens: int | None = None, chunk: int | None = None,
                     reach: int | None = None) -> Tensor:
    """Summed losses and number of targets at each position, (2, T), over the split.

    Every process takes its share. Windows are read `chunk` tokens at a time, of each no
    more than the first `reach`; None = all.
    """
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(2, loader.T, dtype=torch.float64, device=device)
    for batch in loader.windows(max_tokens):
        state = None
        for piece in batch.to(device).split(reach)[0].split(chunk):
            h, state = model.hidden(piece.x, state)
            here = slice(state.position - piece.x.shape[1], state.position)
            losses = [token_losses(logits, part) for part, logits in logits_in_parts(piece, (model, h))]
            sums[:, here] += torch.stack([torch.cat(losses, 1).sum(0), piece.mask.sum(0)])
    return global_sum(sums)


def mean_loss(model: LM, loader: Loader, max_tokens: int | None = None, chunk: int | None = None) -> float:
    """Mean loss in nats per target over the split, read `chunk` tokens at a time."""
    loss, count = loss_by_position(model, loader, max_tokens, chunk).sum(1).tolist()
    return loss / max(1.0, count)


@torch.no_grad()
def mean_terms(loss_fn: Callable, model: LM, loader: Loader, max_tokens: int | None = None,
               chunk: int | None = None) -> dict[str, float]:
    """Every term of a loss, as its mean over held-out targets (preferences: pairs)."""
    model.eval()
    sums, count = {}, torch.zeros((), device=next(model.parameters()).device)
    for batch in loader.windows(max_tokens):
        batch, state = batch.to(count.device), None
        for piece in batch.split(chunk):
            terms, state = loss_fn(model, piece, state)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.double()
        pairs = (batch.mask.sum(1).chunk(2)[0] > 0).sum()     # the chosen rows, which come first
        count += pairs if loader.kind == "preference" else batch.mask.sum()
    return {name: (global_sum(value) / global_sum(count)).item() for name, value in sums.items()}


def averages(sums: Tensor, count: Tensor) -> list:
    """sums / count by position, up to the last with a target: short texts end early."""
    reached = int(count.nonzero().max()) + 1 if count.any() else 0
    return (sums / count.clamp(min=1))[..., :reached].tolist()


@torch.no_grad()
def compare(teacher: LM, student: LM, loader: Loader, max_tokens: int | None = None,
            chunk: int | None = None) -> dict:
    """Losses, gap, KL and agreement over the split, and both losses by position.

    The last are lists of T floats. `chunk` tokens are read at a time; every process
    takes its share.
    """
    device = next(student.parameters()).device
    sums = torch.zeros(5, loader.T, dtype=torch.float64, device=device)    # the five scores, by position
    count = torch.zeros(loader.T, dtype=torch.float64, device=device)
    for batch in loader.windows(max_tokens):
        teacher_state, student_state = None, None
        for piece in batch.to(device).split(chunk):
            ht, teacher_state = teacher.hidden(piece.x, teacher_state)
            hs, student_state = student.hidden(piece.x, student_state)
            here = slice(student_state.position - piece.x.shape[1], student_state.position)
            parts = logits_in_parts(piece, (teacher, ht), (student, hs))
            scores = torch.cat([token_scores(t, s, part.y) for part, t, s in parts], 2)
            sums[:, here] += (scores * piece.mask).sum(1)
            count[here] += piece.mask.sum(0)
    sums, count = global_sum(sums), global_sum(count)
    teacher_loss, student_loss, kl, top1, top5 = (sums.sum(1) / count.sum().clamp(min=1)).tolist()
    by_position = averages(sums[:2], count)
    return {"teacher_loss": teacher_loss, "val_loss": student_loss, "gap": student_loss - teacher_loss,
            "kl": kl, "top1": top1, "top5": top5,
            "by_position": {"teacher": by_position[0], "student": by_position[1]}}


def token_scores(t: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """From both logits (B, T, V) and targets (B, T), five scores per token, (5, B, T).

    The teacher's loss, the student's, KL(teacher || student), whether both prefer the
    same token (top-1), and whether the teacher's choice is among the student's five
    best (top-5). Where one has more tokens than the other, it is cut to the other's.
    """
    V = min(t.shape[-1], s.shape[-1])
    t, s = t[..., :V].float().log_softmax(-1), s[..., :V].float().log_softmax(-1)
    target, best = y[..., None], t.argmax(-1, keepdim=True)
    top5 = s.topk(min(5, V), -1).indices
    return torch.stack([
        -t.gather(-1, target)[..., 0],
        -s.gather(-1, target)[..., 0],
        (t.exp() * (t - s)).sum(-1),
        (top5[..., :1] == best).any(-1).float(),
        (top5 == best).any(-1).float()])


def measure(teacher: LM, student: LM, loader: Loader, max_tokens: int | None = None,
            chunk: int | None = None) -> dict[str, float]:
    """A row of the report: how the student does on held-out text."""
    result = compare(teacher, student.eval(), loader, max_tokens, chunk)
    return {key: result[key] for key in ("val_loss", "gap", "kl", "top1", "top5")}


@dataclass(frozen=True)
class HeldOut:
    """A student on held-out text beside its teacher, while it is being trained."""

    teacher: LM
    student: LM
    loader: Loader
    max_tokens: int | None
    chunk: int | None

    def row(self) -> dict[str, float]:
        return measure(self.teacher, self.student, self.loader, self.max_tokens, self.chunk)

    def quick(self) -> dict[str, float]:
        """On few tokens, renamed: in metrics.jsonl "kl" is the training loss's."""
        few = min(self.max_tokens or QUICK, QUICK)
        row = measure(self.teacher, self.student, self.loader, few, self.chunk)
        return {key if key == "val_loss" else f"val_{key}": value for key, value in row.items()}


def readable(model: LM, n: int) -> int:
    """How many of n tokens the model can read: attention's learned positions end."""
    return min(n, model.cfg.longest or n)
