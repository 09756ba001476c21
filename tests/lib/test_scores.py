"""The measurements: each against a hand-worked number or a loop over single tokens."""

import math

import numpy as np
import pytest
import torch

import lib.scores
from common import T, padded, random_batch, tiny_model
from data.loader import Loader
from lib.scores import compare, cross_entropy, loss_by_position, mean_loss, measure, readable


def nll(model, tokens: list[int], t: int) -> float:
    """-log p(tokens[t + 1] | tokens[..t]): the model sees no more than the prefix."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens[: t + 1]]))[0][0, -1].double()
    return -(logits - logits.logsumexp(-1))[tokens[t + 1]].item()


def test_logits_at_t_are_scored_against_token_t_plus_1_under_padding_on_either_side():
    model, batch = tiny_model(mixer="ra"), random_batch(2, 9)
    batch.mask[0, :4] = 0    # padding, or a prompt, on the left
    batch.mask[1, 6:] = 0    # padding on the right
    expected = 0.0
    for b, positions in ((0, range(4, 9)), (1, range(6))):
        tokens = batch.x[b].tolist() + [batch.y[b, -1].item()]
        expected += sum(nll(model, tokens, t) for t in positions)
    assert cross_entropy(model(batch.x)[0], batch).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mixer", ["a", "r", "ra"])
def test_a_padded_batch_has_the_loss_of_its_rows_alone(mixer):
    model, (batch, rows) = tiny_model(mixer=mixer), padded([5, 16, 9])
    together = cross_entropy(model(batch.x)[0], batch)
    alone = sum(cross_entropy(model(row.x)[0], row) for row in rows)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["text", "sft"])
def test_mean_loss_is_the_mean_over_every_target_once(tiny, kind):
    folder = getattr(tiny, kind)
    model, loader = tiny_model(mixer="r").eval(), Loader(folder, "val", 3, T)
    losses = []
    for batch in Loader(folder, "val", 1, T).windows():
        for t in range(batch.x.shape[1]):
            if batch.mask[0, t]:
                with torch.no_grad():
                    logits = model(batch.x[:, : t + 1])[0][0, -1]
                losses.append(-logits.log_softmax(-1)[batch.y[0, t]].item())
        if len(losses) > 300:
            break
    else:
        assert mean_loss(model, loader) == pytest.approx(np.mean(losses), rel=1e-5)
        return
    n = sum(int(b.mask.sum()) for b in Loader(folder, "val", 3, T).windows(len(losses)))
    assert mean_loss(model, loader, n) == pytest.approx(np.mean(losses[:n]), rel=1e-5)


def test_a_model_compared_with_itself_has_no_gap_no_divergence_and_full_agreement(tiny):
    model = tiny_model(mixer="r").eval()
    row = compare(model, model, Loader(tiny.text, "val", 4, T), 600)
    assert row["gap"] == row["kl"] == 0 and row["top1"] == row["top5"] == 1
    assert row["teacher_loss"] == row["val_loss"]
    assert row["by_position"]["teacher"] == row["by_position"]["student"]


def by_hand(teacher, student, loader) -> tuple[list[list[float]], dict[int, list]]:
    """compare's five scores of every target, one position at a time.

    And the two losses by position.
    """
    rows, by_position = [], {}
    with torch.no_grad():
        for batch in loader.windows():
            t_logits = teacher(batch.x)[0][0, :, :257].double()
            s_logits = student(batch.x)[0][0].double()
            for i in batch.mask[0].nonzero().flatten().tolist():
                p, q = t_logits[i].softmax(-1), s_logits[i].softmax(-1)
                y, best = batch.y[0, i], p.argmax().item()
                kl = sum(pi * (math.log(pi) - math.log(qi)) for pi, qi in zip(p.tolist(), q.tolist()))
                five = sorted(range(257), key=lambda j: -q[j].item())[:5]
                rows.append([-math.log(p[y]), -math.log(q[y]), kl, five[0] == best, best in five])
                by_position.setdefault(i, []).append(rows[-1][:2])
    return rows, by_position


def test_compare_equals_a_loop_over_single_positions(tiny):
    teacher, student = tiny_model(1, vocab_size=300).eval(), tiny_model(1, mixer="r").eval()
    with torch.no_grad():  # so that they agree now and then; the teacher has 43 tokens more
        for name in ("emb.weight", "head.weight"):
            student.get_parameter(name).copy_(teacher.get_parameter(name)[:257])
    rows, by_position = by_hand(teacher, student, Loader(tiny.sft, "val", 1, T))
    result = compare(teacher, student, Loader(tiny.sft, "val", 2, T))
    scores = [result[key] for key in ("teacher_loss", "val_loss", "kl", "top1", "top5")]
    assert scores == pytest.approx(np.mean(rows, 0), rel=1e-5)
    assert result["gap"] == result["val_loss"] - result["teacher_loss"]
    for i, losses in by_position.items():
        pair = [result["by_position"][who][i] for who in ("teacher", "student")]
        assert pair == pytest.approx(np.mean(losses, 0), rel=1e-5)
    assert 0 < result["top1"] < result["top5"] < 1  # or the test had nothing to tell apart


def test_a_student_with_more_tokens_than_the_teacher_is_cut_to_the_teachers(tiny):
    teacher, student = tiny_model(1).eval(), tiny_model(2, vocab_size=300).eval()
    cut = tiny_model(2).eval()
    with torch.no_grad():
        for name, p in cut.named_parameters():
            p.copy_(student.get_parameter(name)[: len(p)])
    loader = Loader(tiny.sft, "val", 2, T)
    wide, same = compare(teacher, student, loader, 100), compare(teacher, cut, loader, 100)
    assert wide.pop("by_position") and same.pop("by_position") and wide == pytest.approx(same, rel=1e-6)


def test_a_row_of_the_report_is_compares_without_the_teachers_and_the_positions(tiny):
    teacher, student, loader = tiny_model(1).eval(), tiny_model(mixer="r"), Loader(tiny.text, "val", 4, T)
    row = measure(teacher, student, loader, 300)
    whole = compare(teacher, student.eval(), loader, 300)
    assert row == {key: whole[key] for key in ("val_loss", "gap", "kl", "top1", "top5")}


def test_loss_by_position_is_compares_and_reads_no_further_than_it_is_told(tiny):
    teacher, student = tiny_model(1).eval(), tiny_model(mixer="ra").eval()
    loader = Loader(tiny.sft, "val", 3, T)
    expected = compare(teacher, student, loader, 200)["by_position"]
    for model, losses in ((teacher, expected["teacher"]), (student, expected["student"])):
        for chunk in (None, 5):
            sums, counts = loss_by_position(model, loader, 200, chunk)
            means = (sums / counts)[: len(losses)][counts > 0]
            assert means.tolist() == pytest.approx([x for x, n in zip(losses, counts) if n], rel=1e-5)
        short = loss_by_position(model, loader, 200, 5, reach=7)
        torch.testing.assert_close(short[:, :7], torch.stack([sums, counts])[:, :7])
        assert counts[7:].any() and not short[:, 7:].any()


@pytest.mark.parametrize("most", [1, 257 * 3, 257 * 3 * 5 + 1, 2**24])
def test_logits_in_parts_give_the_same_and_are_never_more_than_so_many(tiny, monkeypatch, most):
    teacher, student = tiny_model(1).eval(), tiny_model(mixer="ra").eval()
    loader = Loader(tiny.sft, "val", 3, T)
    whole = compare(teacher, student, loader, 200)
    sums = loss_by_position(student, loader, 200, 7)
    monkeypatch.setattr(lib.scores, "LOGITS", most)
    sizes = []
    for model in (teacher, student):
        model.head.register_forward_hook(lambda head, args, logits: sizes.append(logits.numel()))
    parts = compare(teacher, student, loader, 200)
    assert max(sizes) <= max(most, 3 * 257)                  # at least a position of every row
    by_position = [parts.pop("by_position"), whole.pop("by_position")]
    assert parts == pytest.approx(whole, rel=1e-6)
    for who in ("teacher", "student"):
        assert by_position[0][who] == pytest.approx(by_position[1][who], rel=1e-6)
    torch.testing.assert_close(loss_by_position(student, loader, 200, 7), sums)


def test_only_attention_with_learned_positions_has_an_end_and_whole_texts_are_not_cut_in_silence(tiny):
    bounded = tiny_model(positions="learned").eval()
    free = tiny_model(positions="learned", mixer="r").eval()
    assert readable(bounded, 5 * T) == T and readable(bounded, 5) == 5
    assert readable(free, 5 * T) == readable(tiny_model(), 5 * T) == 5 * T
    with pytest.raises(ValueError, match="learned positions"):
        mean_loss(bounded, Loader(tiny.text, "val", 2, 4 * T), 1024)
