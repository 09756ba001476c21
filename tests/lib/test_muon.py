"""Muon: orthogonal steps, AdamW elsewhere, and a run that goes on where it was."""

from dataclasses import replace

import pytest
import torch

from common import assert_same_run, one_line, random_batch, state_dict, tiny_model
from common_train import QUIET, Killed, dies_at_call, run_fit
from lib.muon import Muon, orthogonal
from train import FitConfig, param_groups


@pytest.mark.parametrize("shape", [(5, 16, 16), (3, 8, 40), (2, 40, 8), (1, 1, 7)])
def test_orthogonal_keeps_directions_and_evens_lengths(shape):
    """Against the SVD: U and V stay, all singular values come near 1; so for tiny G."""
    torch.manual_seed(0)
    for scale in (1.0, 1e-6):
        G = torch.randn(shape, dtype=torch.float64) * scale
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        core = U.mT @ orthogonal(G) @ Vh.mT
        values = core.diagonal(dim1=1, dim2=2)
        assert (core - torch.diag_embed(values)).abs().max() < 1e-6
        enough = S > 0.03 * S.norm(dim=1, keepdim=True)            # five steps lift what is not too small
        assert values[enough].min() > 0.6 and values.max() < 1.25
    assert torch.equal(orthogonal(torch.zeros(2, 4, 4)), torch.zeros(2, 4, 4))


def groups_of(model, **changes) -> list[dict]:
    return param_groups(model, FitConfig(optimizer="muon", **changes))


def test_the_matrices_of_the_blocks_are_muons_and_nothing_else():
    model = tiny_model(n_layer=2, mixer="ra", positions="learned", bias=True)
    names = {id(p): name for name, p in model.named_parameters()}
    muon = {names[id(p)] for group in groups_of(model) if group["muon"] for p in group["params"]}
    assert muon == {f"blocks.{i}.{part}.weight" for i, parts in enumerate((
        ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"),
        ("att.q_proj", "att.k_proj", "att.v_proj", "att.o_proj", "ffn.key", "ffn.value"))) for part in parts}
    both = [p for group in groups_of(model) for p in group["params"]]
    assert len(both) == len({id(p) for p in both}) == len(names)
    assert not any(group["muon"] for group in param_groups(model, FitConfig()))


def test_a_step_is_the_equation_one_matrix_at_a_time_and_adamw_for_the_rest(monkeypatch):
    """Two steps against a loop; so where few matrices are turned at once."""
    for at_once in (2**24, 1):
        monkeypatch.setattr("lib.muon.AT_ONCE", at_once)
        model, plain = tiny_model(), tiny_model()
        muon, adam = (kind(groups_of(m, weight_decay=0.1), lr=1e-2, betas=(0.9, 0.99))
                      for kind, m in ((Muon, model), (torch.optim.AdamW, plain)))
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = 1e-2 * group["rate"], group["decay"]
        inside = {id(p) for group in muon.param_groups if group["muon"] for p in group["params"]}
        before, momentum = state_dict(model), {}
        expected = {name: p.clone() for name, p in before.items()}
        for seed in (0, 1):
            for m in (model, plain):
                m.zero_grad()
                m(random_batch(seed=seed).x)[0].square().mean().backward()
            for name, p in model.named_parameters():
                if id(p) in inside:
                    g, m = p.grad, momentum.get(name, 0)
                    m = momentum[name] = 0.95 * m + 0.05 * g
                    turned = orthogonal((0.05 * g + 0.95 * m)[None])[0]
                    expected[name] = expected[name] * (1 - 1e-3) - 1e-2 * 0.2 * max(g.shape) ** 0.5 * turned
            plain.load_state_dict(model.state_dict())
            for p, q in zip(plain.parameters(), model.parameters()):
                p.grad = q.grad.clone()
            muon.step(), adam.step()
            others = dict(plain.named_parameters())
            for name, p in model.named_parameters():
                torch.testing.assert_close(p, expected[name] if id(p) in inside else others[name],
                                           rtol=1e-5, atol=1e-6)


def test_a_resumed_run_is_the_same_to_the_bit_and_no_run_of_adamws(tiny, tmp_path):
    cfg = FitConfig(optimizer="muon", max_steps=6, batch_size=2, **QUIET)
    run_fit(tmp_path / "whole", tiny.text, cfg, save_every=3)
    with pytest.raises(Killed):
        run_fit(tmp_path / "killed", tiny.text, cfg, loss_fn=dies_at_call(5), save_every=3)
    run_fit(tmp_path / "killed", tiny.text, cfg, save_every=3)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    with pytest.raises(ValueError, match="another optimizer") as error:
        run_fit(tmp_path / "whole", tiny.text, replace(cfg, optimizer="adamw", max_steps=9))
    one_line(error.value)
