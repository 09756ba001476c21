"""Sharding: each process keeps a part of every tensor, and no model need fit one GPU.

    torchrun --nproc_per_node=8 distill.py --shard            parts of 1/8
    ... --checkpoint_blocks      activations of one block exist, others are redone

It is PyTorch's own FSDP2 (torch.distributed.fsdp.fully_shard). Weights, gradients and
the optimizer's moments are parts, cut along the first dimension (where that has too few
rows for all processes, along another). A unit is gathered whole when its turn comes and
freed after it: each block, within it the mixer, for stage 1 reads a teacher's mixer
alone; embedding, last norm and head together are the root, whole during a step.
Gradients are averaged over the processes as they are cut, after every backward pass.
On GPUs parts are float32, also of a teacher, whose exact weights its student takes; the
gathered blocks are bfloat16.

No function here makes a whole model: folders are read a tensor at a time into blocks,
which are cut at once, and new weights are drawn in the order of LM.__init__.

What it is not: pipelines, tensor parallelism, offloading.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lib.folders import (finite, load_model, on_paper, open_model, read_shapes, read_tensor, stored_shapes,
                         write_parts)
from lib.processes import is_part, mixed_precision, part_of, whole, world_size
from model import LM, Block, ModelConfig, State, init_model, make_norm


class UnitBlock(Block):
    """A block that may keep only its inputs for the backward pass, and run again."""

    again = False
    unit = None                                            # of a block that is cut FSDP's (unshard, reshard)

    def forward(self, x, v_first, state):
        if not (self.again and torch.is_grad_enabled()):
            return super().forward(x, v_first, state)
        return checkpoint(self.run, x, v_first, state, use_reentrant=False, preserve_rng_state=False)

    def run(self, x, v_first, state):
        """In stage 1 gradients come to the mixer alone, and FSDP does not gather the
        block around it.
        """
        unshard, reshard = self.unit if is_part(next(self.ln1.parameters())) else (int, int)
        unshard()
        try:
            return super().forward(x, v_first, state)
        finally:
            reshard()

    def __copy__(self) -> "UnitBlock":                     # FSDP's class cannot be made without arguments
        return shallow(self, UnitBlock)


class ShardedLM(LM):
    """An LM whose every way in is `forward`, which FSDP listens to."""

    def forward(self, tokens: Tensor, state: State | None = None, logits: bool = True):
        with mixed_precision(tokens):
            x, state = LM.hidden(self, tokens, state)
            return (self.head(x) if logits else x), state

    def hidden(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return self(tokens, state, logits=False)           # the root stays whole: the head may be used

    def __copy__(self) -> "ShardedLM":
        return shallow(self, ShardedLM)


def shallow(module: nn.Module, kind: type) -> nn.Module:
    """A module that shares everything, FSDP's hooks too."""
    view = object.__new__(kind)
    view.__dict__ = dict(module.__dict__)
    return view


def checkpoint_blocks(model: LM) -> None:
    """Let every block run again in the backward pass instead of keeping activations.

    It is torch's non-reentrant checkpointing: v_first stays in the graph.
    """
    for block in model.blocks:
        if type(block) is Block:
            block.__class__ = UnitBlock
        block.again = True


# ------------------------------------------------------------------------------------------
# Cutting

def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, ShardedLM)


def precision_of(model: nn.Module, x: Tensor):
    """Around a call of one of the model's parts on x, past its forward: a sharded one
    gathers its weights in bfloat16 on GPUs.
    """
    return mixed_precision(x) if is_sharded(model) else contextlib.nullcontext()


def cut(module: nn.Module, device: torch.device, half: bool) -> nn.Module:
    """Make the module a unit of FSDP, on the device; `half`: gathered in bfloat16."""
    from torch.distributed.device_mesh import init_device_mesh             # slow to import: two seconds
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")          # no output here is changed in place
    n = world_size()

    def where(p: nn.Parameter):
        even = [dim for dim, size in enumerate(p.shape) if size % n == 0]
        return Shard(even[0]) if p.shape[0] < n and even else None

    half = half and device.type == "cuda"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if half else None
    fully_shard(module, mesh=init_device_mesh(device.type, (n,)), shard_placement_fn=where,
                mp_policy=policy or MixedPrecisionPolicy())
    return module


def cut_block(block: Block, device: torch.device) -> Block:
    block.__class__ = UnitBlock
    cut(block.att, device, half=True)
    if hasattr(block, "ln0"):                              # LM calls it, before the block
        cut(block.ln0, device, half=False)
    cut(block, device, half=True)
    block.unit = block.unshard, block.reshard
    return block


def cut_root(model: LM, device: torch.device) -> LM:
    """The last unit, when all blocks are cut."""
    if model.cfg.tied:
        model.head.weight = model.emb.weight
    model.__class__ = ShardedLM
    cut(model, device, half=False)

    def free(module, args, kwargs, result):                # a model that only reads is cut again at once
        if kwargs.get("logits", True) and not torch.is_grad_enabled():
            model.reshard()

    model.register_forward_hook(free, with_kwargs=True)
    with torch.no_grad():                                  # FSDP's first pass decides that this is the root
        model(torch.zeros(1, 1, dtype=torch.long, device=device))
    return model


@contextlib.contextmanager
def gathered(*modules: nn.Module, device: str | None = None) -> Iterator[None]:
    """Meanwhile their parameters are whole, on the device or where they are, also to be
    changed. Modules that are not cut stay as they are.
    """
    cut_ones = []
    for module in (m for root in modules for m in root.modules()):
        for name, p in module._parameters.items():
            if is_part(p):
                x = whole(p.detach()).to(device or p.device)
                module._parameters[name] = nn.Parameter(x, p.requires_grad)
                cut_ones.append((module, name, p))
    try:
        yield
    finally:
        for module, name, p in cut_ones:
            changed, module._parameters[name] = module._parameters[name].detach(), p
            if p.requires_grad:
                p.detach().copy_(part_of(changed, p))


def in_turn(*models: Iterable[Block], device: str | None = None) -> Iterator[tuple[Block, ...]]:
    """The blocks of models side by side, `gathered` while it is their turn."""
    for blocks in zip(*models):
        with gathered(*blocks, device=device):
            yield blocks


# ------------------------------------------------------------------------------------------
# Making models

def new_model(cfg: ModelConfig, device: torch.device, shard: bool) -> LM:
    """LM(cfg) on the device, with the same initial values, sharded or not."""
    if not shard:
        return LM(cfg).to(device)
    model = on_paper(cfg)
    model.emb = nn.Embedding(cfg.vocab_size, cfg.n_embd)   # all in the order of LM.__init__
    if cfg.positions == "learned":
        model.pos = nn.Embedding(cfg.block_size, cfg.n_embd)
    for i in range(cfg.n_layer):
        model.blocks[i] = cut_block(Block(cfg, i), device)
    model.ln_out = make_norm(cfg)
    model.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
    init_model(InTurn(model))
    return cut_root(model, device)


class InTurn:
    """A model as init_model sees it, with one whole parameter or block at a time, on
    the CPU, whose random numbers LM(cfg) draws.
    """

    def __init__(self, model: LM):
        self.cfg, self.emb, self.head, self.model = model.cfg, model.emb, model.head, model

    @property
    def blocks(self) -> Iterator[Block]:
        return (block for block, in in_turn(self.model.blocks, device="cpu"))

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.model.named_parameters():
            x = whole(p.detach()).cpu()
            yield name, x
            p.detach().copy_(part_of(x, p))


def new_like(other: LM, cfg: ModelConfig) -> LM:
    """LM(cfg), sharded where the other model is."""
    return new_model(cfg, other.emb.weight.device, True) if is_sharded(other) else LM(cfg)


def open_sharded(folder: str | Path, device: torch.device) -> LM:
    """A model folder's model, read a tensor at a time and cut a block at a time.

    Raises ValueError as `open_model`.
    """
    model, file = open_model(folder)
    return assemble(model, lambda name: finite(file, name).float(), device)


def assemble(model: LM, weight: Callable[[str], Tensor], device: torch.device) -> LM:
    """A model on the meta device with weights by their names, sharded."""
    for i, block in enumerate(model.blocks):
        fill(block, weight, f"blocks.{i}.")
        model.blocks[i] = cut_block(block, device)
    for name, part in model.named_children():
        if name != "blocks" and not (name == "head" and model.cfg.tied):
            fill(part, weight, f"{name}.")
    return cut_root(model, device)


def fill(module: nn.Module, weight: Callable[[str], Tensor], prefix: str) -> None:
    weights = {name: weight(prefix + name) for name in module.state_dict()}
    module.load_state_dict(weights, assign=True)
    for part in module.modules():                          # zeros, which no folder has
        for name, left_out in part._buffers.items():
            part._buffers[name] = torch.zeros(left_out.shape)


def load(folder: str | Path, device: torch.device, shard: bool) -> LM:
    """A model folder's model, sharded or not. Raises ValueError as `open_model`."""
    return open_sharded(folder, device) if shard else load_model(folder, device)


def load_like(other: LM, folder: str | Path) -> LM:
    """A model folder's model where the other model is, and sharded if it is."""
    return load(folder, other.emb.weight.device, is_sharded(other))


def frozen_copy(model: LM) -> LM:
    """A model that stays as this one is now."""
    if is_sharded(model):
        weights, device = model.state_dict(), model.emb.weight.device
        twin = assemble(on_paper(model.cfg), lambda name: whole(weights[name].detach()), device)
    else:
        twin = copy.deepcopy(model)
    return twin.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------
# Checkpoints

OPTIMIZER = "optimizer.safetensors"        # beside trainer.pt, "INDEX.NAME" of each parameter's state


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path, rank: int) -> dict:
    """Write the states of parameters in parts; returns what trainer.pt is to hold."""
    saved = optimizer.state_dict()
    states = {f"{i}.{key}": x for i, state in sorted(saved["state"].items())
              for key, x in sorted(state.items())}
    if not any(map(is_part, states.values())):
        return saved
    write_parts(folder / OPTIMIZER, states, {}, rank)
    return saved | {"state": {}}


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict, folder: Path) -> None:
    """Give an optimizer a checkpoint's states, in parts where its parameters are.

    Raises ValueError where they are damaged.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states, file = saved["state"], folder / OPTIMIZER
    if file.exists():
        names = read_shapes(file, f"remove {folder} and --resume from the checkpoint before")
        states = {int(name.partition(".")[0]): {} for name in names}
        for name in names:
            i, _, key = name.partition(".")
            x = read_tensor(file, name)
            states[int(i)][key] = part_of(x, parameters[int(i)]) if x.ndim else x
    else:
        states = {i: {key: part_of(x, parameters[i]) if x.ndim else x for key, x in state.items()}
                  for i, state in states.items()}
    optimizer.load_state_dict(saved | {"state": states})


def load_weights(model: LM, file: Path) -> None:
    """Give a model the weights in a file, a tensor at a time, in parts where it is."""
    weights = model.state_dict()
    for name in stored_shapes(model):
        weights[name].copy_(part_of(finite(file, name), weights[name]))
