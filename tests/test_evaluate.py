"""The measurements: each against a hand-worked number or a loop over single tokens."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from common import T, padded, random_batch, tiny, tiny_model  # noqa: F401   (tiny is a fixture)
from data.loader import Loader
from evaluate import (as_markdown, check_vocabulary, collect, compare, cross_entropy, layer_errors, make_report, mean_loss, state_bytes, unigram_loss,
                      write_report)
from model import CausalSelfAttention, save_model


def nll(model, tokens: list[int], t: int) -> float:
    """-log p(tokens[t + 1] | tokens[..t]) from the prefix alone: the model never sees the answer."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens[: t + 1]]))[0][0, -1].double()
    return -(logits - logits.logsumexp(-1))[tokens[t + 1]].item()


def test_logits_at_t_are_scored_against_token_t_plus_1_under_padding_on_either_side():
    model, batch = tiny_model(mixer="ra"), random_batch(2, 9)
    batch.mask[0, :4] = 0    # padding, or a prompt, on the left
    batch.mask[1, 6:] = 0    # padding on the right
    want = 0.0
    for b, kept in ((0, range(4, 9)), (1, range(6))):
        tokens = batch.x[b].tolist() + [batch.y[b, -1].item()]
        want += sum(nll(model, tokens, t) for t in kept)
    assert cross_entropy(model(batch.x)[0], batch).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("mixer", ["a", "r", "ra"])
def test_a_padded_batch_has_the_loss_of_its_rows_alone(mixer):
    model, (batch, rows) = tiny_model(mixer=mixer), padded([5, 16, 9])
    together = cross_entropy(model(batch.x)[0], batch)
    alone = sum(cross_entropy(model(row.x)[0], row) for row in rows)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["text", "sft"])
def test_mean_loss_is_the_mean_over_every_target_once(tiny, kind):
    model, loader = tiny_model(mixer="r").eval(), Loader(getattr(tiny, kind), "val", 3, T)
    losses = []
    for batch in Loader(getattr(tiny, kind), "val", 1, T).windows():
        for t in range(batch.x.shape[1]):
            if batch.mask[0, t]:
                with torch.no_grad():
                    losses.append(-model(batch.x[:, : t + 1])[0][0, -1].log_softmax(-1)[batch.y[0, t]].item())
        if len(losses) > 300:
            break
    else:
        assert mean_loss(model, loader) == pytest.approx(np.mean(losses), rel=1e-5)
        return
    n = sum(int(b.mask.sum()) for b in Loader(getattr(tiny, kind), "val", 3, T).windows(len(losses)))
    assert mean_loss(model, loader, n) == pytest.approx(np.mean(losses[:n]), rel=1e-5)


def test_a_model_compared_with_itself_has_no_gap_no_divergence_and_full_agreement(tiny):
    model = tiny_model(mixer="r").eval()
    row = compare(model, model, Loader(tiny.text, "val", 4, T), 600)
    assert row["gap"] == row["kl"] == 0 and row["top1"] == row["top5"] == 1
    assert row["teacher_loss"] == row["val_loss"] and row["by_position"]["teacher"] == row["by_position"]["student"]


def test_compare_equals_a_loop_over_single_positions(tiny):
    teacher, student = tiny_model(1, vocab_size=300).eval(), tiny_model(1, mixer="r").eval()
    with torch.no_grad():  # so that they agree now and then; the teacher has 43 tokens more
        for name in ("emb.weight", "head.weight"):
            student.get_parameter(name).copy_(teacher.get_parameter(name)[:257])
    loader = Loader(tiny.sft, "val", 2, T)
    sums, by_position = np.zeros(5), {}
    with torch.no_grad():
        for batch in Loader(tiny.sft, "val", 1, T).windows():
            t_logits, s_logits = teacher(batch.x)[0][0, :, :257].double(), student(batch.x)[0][0].double()
            for i in range(batch.x.shape[1]):
                if not batch.mask[0, i]:
                    continue
                p, q = t_logits[i].softmax(-1), s_logits[i].softmax(-1)
                y = batch.y[0, i]
                kl = sum(pi * (math.log(pi) - math.log(qi)) for pi, qi in zip(p.tolist(), q.tolist()))
                five = sorted(range(257), key=lambda j: -q[j].item())[:5]
                row = [-math.log(p[y]), -math.log(q[y]), kl, five[0] == p.argmax().item(), p.argmax().item() in five]
                sums += row
                by_position.setdefault(i, []).append(row[:2])
    n = sum(map(len, by_position.values()))
    got = compare(teacher, student, loader)
    want = sums / n
    assert [got[k] for k in ("teacher_loss", "val_loss", "kl", "top1", "top5")] == pytest.approx(want, rel=1e-5)
    assert got["gap"] == got["val_loss"] - got["teacher_loss"]
    for i, rows in by_position.items():
        assert [got["by_position"][w][i] for w in ("teacher", "student")] == pytest.approx(np.mean(rows, 0), rel=1e-5)
    assert 0 < got["top1"] < got["top5"] < 1  # or the test had nothing to tell apart


def test_unigram_loss_by_hand():
    """Train a, a, b of a vocabulary {a, b, c}: with one more of each p = 3/6, 2/6, 1/6. Held out: a, c."""
    train, val = (SimpleNamespace(tokens=np.array(tokens, np.uint16), vocab_size=3) for tokens in ([0, 0, 1], [0, 2]))
    assert unigram_loss(train, val) == pytest.approx((math.log(2) + math.log(6)) / 2, rel=1e-12)


@pytest.mark.parametrize("model", [{"mixer": "a"}, {"mixer": "a", "n_kv_head": 1}, {"mixer": "r"}, {"mixer": "ra", "ffn": "channelmix"}], ids=str)
def test_state_bytes_are_those_of_really_running_n_tokens(model):
    lm = tiny_model(**model).eval()
    for n in (1, 2, 37):
        with torch.no_grad():
            _, state = lm(torch.zeros(1, n, dtype=torch.long))
        assert state_bytes(lm, n) == state.nbytes()
    assert (state_bytes(lm, 10) == state_bytes(lm, 10_000)) == (model["mixer"] == "r")


class Pretender(CausalSelfAttention):
    """Passes for attention, and computes what a student's mixer computes, v_first included."""

    def __init__(self, cfg, mixer, shared):
        super().__init__(cfg)
        self.mixer, self.shared = mixer, shared

    def forward(self, x, v_first, state):
        y, self.shared["v_first"], _ = self.mixer(x, None if self.mixer.first else self.shared["v_first"], None)
        return y, v_first, None


def pretend(student, layers=(0, 1)):
    """A teacher that is the student, but whose mixers are called attention."""
    teacher, shared = tiny_model(7, mixer="a", ffn=student.cfg.ffn), {}
    teacher.load_state_dict({k: v for k, v in student.state_dict().items() if ".att." not in k}, strict=False)
    for i in layers:
        teacher.blocks[i].att = Pretender(teacher.cfg, student.blocks[i].att, shared)
    return teacher.eval()


def test_layer_errors_are_zero_for_a_perfect_copy_and_one_for_silence():
    student, batch = tiny_model(mixer="r").eval(), random_batch()
    teacher = pretend(student)
    rows = layer_errors(teacher, student, batch)
    assert [r["layer"] for r in rows] == [0, 1] and all(r["error"] == 0 and r["cosine"] == pytest.approx(1) for r in rows)
    silent = tiny_model(mixer="r").eval()
    torch.nn.init.zeros_(silent.blocks[1].att.output.weight)
    rows = layer_errors(teacher, silent, batch)
    assert rows[0]["error"] == 0 and rows[1]["error"] == 1 and rows[1]["cosine"] == 0


def test_the_report_has_every_key_and_its_numbers_follow_from_each_other(tiny):
    teacher, student = tiny_model(std=0.01).eval(), tiny_model(3, mixer="r", std=0.01).eval()
    train, val = Loader(tiny.text, "train", 1, T), Loader(tiny.text, "val", 4, T)
    report = make_report(teacher, student, train, val, 800)
    assert report["gap"] == report["student"]["val_loss"] - report["teacher"]["val_loss"]
    assert report["teacher"]["params"] == sum(p.numel() for p in teacher.parameters())
    assert report["student"]["params"] == sum(p.numel() for p in student.parameters()) != report["teacher"]["params"]
    assert {"kl", "top1", "top5", "layers", "by_position", "state_bytes", "recovered", "unigram_loss"} <= set(report)
    assert report["unigram_loss"] == unigram_loss(train, val)
    u, t, s = report["unigram_loss"], report["teacher"]["val_loss"], report["student"]["val_loss"]
    assert report["recovered"] == pytest.approx((u - s) / (u - t))
    for n, size in report["state_bytes"].items():
        assert size == {"teacher": state_bytes(teacher, int(n)), "student": state_bytes(student, int(n))}
    assert len(report["by_position"]["student"]) == T
    assert json.loads(json.dumps(report)) == report


def test_recovered_is_one_for_the_teacher_and_zero_for_token_frequencies(monkeypatch, tiny):
    """unigram 3, teacher 1: a student at 1 has recovered all, at 3 nothing, at 1.5 three quarters."""
    model, train, val = tiny_model().eval(), Loader(tiny.text, "train", 1, T), Loader(tiny.text, "val", 4, T)
    monkeypatch.setattr(evaluate, "unigram_loss", lambda *_: 3.0)
    for student, share in ((1.0, 1.0), (3.0, 0.0), (1.5, 0.75)):
        monkeypatch.setattr(evaluate, "compare", lambda *_: {"teacher_loss": 1.0, "val_loss": student, "kl": 0.0, "top1": 1.0, "top5": 1.0, "by_position": {}})
        assert make_report(model, model, train, val, 100)["recovered"] == share


ROW = {"tokens": 4096, "minutes": 1.25, "val_loss": 1.5, "gap": 0.25, "kl": 0.125, "top1": 0.5}


def test_the_report_is_written_as_json_table_and_picture(tmp_path, tiny):
    teacher, student = tiny_model().eval(), tiny_model(3, mixer="r").eval()
    report = make_report(teacher, student, Loader(tiny.text, "train", 1, T), Loader(tiny.text, "val", 4, T), 200)
    report |= {"stages": [{"name": "align", **ROW}], "controls": {"no stage 1": {"name": "distil", **ROW}}}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 2.0 / i, "val_loss": 2.0}) + "\n" for i in (1, 2)))
    write_report(tmp_path, report, {"distil": tmp_path / "metrics.jsonl", "none": tmp_path / "missing.jsonl"})
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.md").read_text() == as_markdown(report)
    assert "| align | 4,096 | 1.2 | 1.5000 | 0.2500 | 0.1250 | 50.0% |" in as_markdown(report).replace("1.3 |", "1.2 |")
    assert "| control: no stage 1 | 4,096 |" in as_markdown(report)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))


def test_seeds_are_collected_into_median_and_range(tmp_path):
    for seed, gap in enumerate((0.3, 0.1, 0.2)):
        report = {"teacher": {"val_loss": 1.25}, "stages": [{"name": "distil", **ROW, "gap": gap}]}
        report |= {"controls": {"cross-entropy only": {"name": "distil", **ROW}}} if seed == 0 else {}
        (tmp_path / f"seed{seed}.json").write_text(json.dumps(report))
    table = collect(tmp_path)
    assert "| distil | 4,096 |" in table and "0.2000 (0.1000 ... 0.3000)" in table
    line = next(row for row in table.splitlines() if "cross-entropy only" in row)
    assert "0.2500" in line and "..." not in line  # one seed has no range
    with pytest.raises(ValueError, match="no reports"):
        collect(tmp_path / "empty")


def test_data_teacher_and_student_must_share_their_tokens():
    small, large = tiny_model(vocab_size=100), tiny_model(vocab_size=257)
    loader = SimpleNamespace(vocab_size=257, folder=Path("data/x"))
    check_vocabulary(large, large, loader)
    with pytest.raises(ValueError, match="data/x has 257 tokens, the student 100"):
        check_vocabulary(large, small, loader)
    with pytest.raises(ValueError, match="the teacher has 100 tokens, fewer than the student's 257"):
        check_vocabulary(small, large, loader)


def test_one_model_alone_gives_its_loss(tmp_path, tiny, capsys):
    save_model(tiny_model(), tmp_path / "m", {"tokenizer": "bytes"})
    evaluate.main(["--teacher", str(tmp_path / "m"), "--student", "None", "--data", tiny.text, "--block_size", "8", "--max_tokens", "200"])
    want = mean_loss(tiny_model(), Loader(tiny.text, "val", 16, 8), 200)
    assert f"{want:.4f} nats per token" in capsys.readouterr().out
