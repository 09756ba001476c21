"""Direct preference optimisation (DPO, arXiv 2305.18290), whole or in pieces."""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.loader import Batch
from model import LM, State


def sequence_logp(model: LM, batch: Batch, state: State | None = None) -> tuple[Tensor, State]:
    """The sum of each row's log p(target), (B,), and the state after its targets."""
    logits, state = model(batch.x, state)
    logp = logits.float().log_softmax(-1).gather(-1, batch.y[..., None])[..., 0]
    return (logp * batch.mask).sum(1), state


def dpo_loss(policy: LM, batch: Batch, state: tuple | None = None, *, reference: LM, beta: float = 0.1,
             kind: str = "sigmoid", smoothing: float = 0.0) -> tuple[dict[str, Tensor], tuple]:
    """Stage 3 on preferences; the first half of the rows is chosen, the other rejected.

    With d = beta (log-ratio of chosen - log-ratio of rejected), ratios of policy to
    reference, and label smoothing e: (1-e) f(d) + e f(-d), where f(d) is -log s(d) for
    sigmoid and max(0, 1 - d) for hinge. That is no sum over pieces, but what each adds
    is: `state` is (policy's, reference's, log-ratios so far (B,), targets so far (B,)),
    and a piece's loss is the increase.
    """
    before_state, reference_state, *earlier = state or (None, None)
    with torch.no_grad():
        before, reference_state = sequence_logp(reference, batch, reference_state)
    after, policy_state = sequence_logp(policy, batch, before_state)
    ratio, targets = after - before, batch.mask.sum(1)
    how = (beta, kind, smoothing)
    if not earlier:
        return preference_terms(ratio, targets, *how), (policy_state, reference_state, ratio, targets)
    ratio, targets = earlier[0] + ratio, earlier[1] + targets
    past = preference_terms(*earlier, *how)
    terms = {key: value - past[key] for key, value in preference_terms(ratio, targets, *how).items()}
    return terms, (policy_state, reference_state, ratio, targets)


def preference_terms(
    ratio: Tensor, targets: Tensor, beta: float, kind: str, smoothing: float
) -> dict[str, Tensor]:
    """The loss, how often the chosen is ahead, and by how much, summed over pairs."""
    chosen, rejected = ratio.chunk(2)
    d = beta * (chosen - rejected)
    if kind == "sigmoid":
        ahead, behind = -F.logsigmoid(d), -F.logsigmoid(-d)
    else:
        ahead, behind = F.relu(1 - d), F.relu(1 + d)
    loss = (1 - smoothing) * ahead + smoothing * behind
    real = targets.chunk(2)[0] > 0                       # a row without a target (yet) teaches nothing
    return {"loss": (loss * real).sum(), "accuracy": ((d > 0) & real).sum(), "margin": (d * real).sum()}
