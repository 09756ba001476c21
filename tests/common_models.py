"""Models whose answers are known beforehand, a small RWKV-7's folder, and reports."""

from pathlib import Path

import pytest
import torch

from common import tiny_model
from lib.folders import save_model
from model import LM, CausalSelfAttention, ModelConfig, State

# of a report's table
ROW = {"tokens": 4096, "minutes": 1.25, "val_loss": 1.5, "gap": 0.25, "kl": 0.125, "top1": 0.5}


def constant_model(logits: list[float]) -> LM:
    """A model with these logits after any text: its last norm puts out a constant."""
    model = LM(ModelConfig(vocab_size=len(logits), n_layer=1, n_embd=4, n_head=1))
    with torch.no_grad():
        model.ln_out.weight.zero_()
        model.ln_out.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
        model.head.weight.zero_()
        model.head.weight[:, 0] = torch.tensor(logits)
    return model


@pytest.fixture(scope="module")
def rwkv_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(tiny_model(mixer="r", ffn="channelmix"), path, {"tokenizer": "bytes"})
    return path


def panels(picture: Path) -> int:
    """How many panels a report's .png has, by its width."""
    return round(int.from_bytes(picture.read_bytes()[16:20], "big") / (3.6 * 120))


class Oracle(torch.nn.Module):
    """Answers by a rule of all tokens so far: rule(list of ids) -> the next one.

    Its state is these tokens.
    """

    def __init__(self, rule):
        super().__init__()
        self.rule, self.head = rule, torch.nn.Identity()
        self.one = torch.nn.Parameter(torch.zeros(1))
        self.cfg = ModelConfig()

    def hidden(self, tokens, state=None):
        whole = torch.cat((state.layers[0], tokens), 1) if state else tokens
        past = whole.shape[1] - tokens.shape[1]
        rows = whole.tolist()
        best = torch.tensor([[self.rule(row[: i + 1]) for i in range(past, len(row))] for row in rows])
        return 30.0 * torch.nn.functional.one_hot(best, 257), State(whole.shape[1], (whole,))

    forward = __call__ = hidden


class Pretender(CausalSelfAttention):
    """Passes for attention, and does what a student's mixer does, v_first included."""

    def __init__(self, cfg, mixer, shared):
        super().__init__(cfg)
        self.mixer, self.shared = mixer, shared

    def forward(self, x, v_first, state):
        student_v_first = None if self.mixer.first else self.shared["v_first"]
        y, self.shared["v_first"], _ = self.mixer(x, student_v_first, None)
        return y, v_first, None


def pretend(student, layers=(0, 1)):
    """A teacher that is the student, but whose mixers are called attention."""
    teacher, shared = tiny_model(7, mixer="a", ffn=student.cfg.ffn), {}
    common = {name: p for name, p in student.state_dict().items() if ".att." not in name}
    teacher.load_state_dict(common, strict=False)
    for i in layers:
        teacher.blocks[i].att = Pretender(teacher.cfg, student.blocks[i].att, shared)
    return teacher.eval()
