"""The measurements: each against a hand-worked number or a loop over single tokens."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from common import T, one_line, padded, random_batch, tiny_model
from data.loader import Loader
from data.tokenizer import get_tokenizer
from evaluate import (EvaluateConfig, answer_scores, as_markdown, check_vocabulary, collect, compare, cross_entropy, layer_errors, loss_by_position,
                      loss_by_stretch, make_report, mean_loss, passkey, passkey_texts, readable, unigram_loss, write_report)
from model import CausalSelfAttention, State, remembered_bytes, save_model


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


def test_loss_by_position_is_compares_and_reads_no_further_than_it_is_told(tiny):
    teacher, student = tiny_model(1).eval(), tiny_model(mixer="ra").eval()
    loader = Loader(tiny.sft, "val", 3, T)
    want = compare(teacher, student, loader, 200)["by_position"]
    for model, losses in ((teacher, want["teacher"]), (student, want["student"])):
        for chunk in (None, 5):
            sums, counts = loss_by_position(model, loader, 200, chunk)
            assert (sums / counts)[: len(losses)][counts > 0].tolist() == pytest.approx([x for x, n in zip(losses, counts) if n], rel=1e-5)
        short = loss_by_position(model, loader, 200, 5, reach=7)
        torch.testing.assert_close(short[:, :7], torch.stack([sums, counts])[:, :7])
        assert counts[7:].any() and not short[:, 7:].any()


def test_unigram_loss_by_hand():
    """Train a, a, b of a vocabulary {a, b, c}: with one more of each p = 3/6, 2/6, 1/6. Held out: a, c."""
    train, val = (SimpleNamespace(tokens=np.array(tokens, np.uint16), vocab_size=3) for tokens in ([0, 0, 1], [0, 2]))
    assert unigram_loss(train, val) == pytest.approx((math.log(2) + math.log(6)) / 2, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Past the length of training

class Oracle(torch.nn.Module):
    """Answers by a rule of all tokens so far: rule(list of ids) -> the next one. Its state is these tokens."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.head, self.one = rule, lambda x: x, torch.nn.Parameter(torch.zeros(1))

    def hidden(self, tokens, state=None):
        whole = torch.cat((state.layers[0], tokens), 1) if state else tokens
        past = whole.shape[1] - tokens.shape[1]
        best = torch.tensor([[self.rule(row[: i + 1]) for i in range(past, len(row))] for row in whole.tolist()])
        return 30.0 * torch.nn.functional.one_hot(best, 257), State(whole.shape[1], (whole,))

    forward = __call__ = hidden


def copies(row):
    """The next digit after the last "key is ", as it stood after the first one."""
    said = bytes(b for b in row if b < 256).decode()
    key = said.split("The pass key is ")[1][:5] if said.count("The pass key is ") > 1 else "#####"
    return ord((key + "....")[len(said.rpartition("The pass key is ")[2]) % 5])


def test_passkey_of_a_model_that_copies_is_exact_at_every_depth_and_free_only_where_told():
    texts = passkey_texts(get_tokenizer("bytes"), np.full(5000, ord("x"), np.uint16), 300, 4, 3)
    row = passkey(Oracle(copies), texts, 3, 5)
    assert row["exact"] == [1, 1, 1] and max(row["nats"]) < 1e-3 and row["nats_without"] > 20


def test_passkey_at_each_depth_is_the_mean_over_the_numbers(monkeypatch):
    """Two numbers at two depths and not told: scores in the order of the texts."""
    scores = [(1.0, 1.0), (0.0, 2.0), (0.0, 9.0), (1.0, 3.0), (1.0, 6.0), (0.0, 5.0)]
    monkeypatch.setattr(evaluate, "answer_scores", lambda *_: scores)
    assert passkey(None, None, 2, 1) == {"exact": [1.0, 0.5], "nats": [2.0, 4.0], "nats_without": 7.0}


def test_every_passkey_text_has_the_length_it_says_with_the_key_at_its_depth():
    enc, text, depths = get_tokenizer("bytes"), np.full(5000, ord("x"), np.uint16), (0, 0.5, 1)
    texts = passkey_texts(enc, text, 400, 5, 3)
    assert len(texts) == 5 * 4 and all(len(prompt) + len(answer) == 400 and prompt[0] == 256 for prompt, answer in texts)
    assert len({bytes(answer) for _, answer in texts}) == 5
    for i, (prompt, answer) in enumerate(texts):
        said, key = bytes(prompt[1:]).decode(), bytes(answer).decode()
        before, told, after = said.partition(f" The pass key is {key}.")
        if i % 4 == 3:
            assert not told and key not in said and said.endswith("x What is the pass key? The pass key is ")
        else:
            assert before == "x" * round(depths[i % 4] * said.count("x")) and said.count(key) == 2
            assert after.lstrip(" ").startswith("Remember it") and after.endswith("The pass key is ")
    assert passkey_texts(enc, text, 400, 5, 3) == texts
    for bad, says in ((100, "no room"), (9000, "held-out text has 5000")):
        with pytest.raises(ValueError, match=says) as e:
            passkey_texts(enc, text, bad, 4, 3)
        one_line(e.value)


@pytest.mark.parametrize("mixer", ["a", "r", "ra"])
def test_answers_read_in_pieces_and_side_by_side_have_the_scores_of_one_pass(mixer):
    model = tiny_model(mixer=mixer).eval()
    rows = torch.randint(0, 256, (5, 606)).tolist()
    texts = [(row[:cut], row[cut:]) for row, cut in zip(rows, (600, 600, 580, 604, 605))]
    texts.append((rows[0][:30], [model(torch.tensor([rows[0][:30]]))[0][0, -1].argmax().item()]))  # what it would say itself
    for (prompt, answer), (exact, nats) in zip(texts, answer_scores(model, texts, 4), strict=True):
        logp = model(torch.tensor([prompt + answer]))[0][0, len(prompt) - 1 : -1].log_softmax(-1)
        assert nats == pytest.approx(-logp.gather(1, torch.tensor(answer)[:, None]).mean().item(), rel=1e-4)
        assert exact == float(logp.argmax(-1).tolist() == answer)
    assert exact == 1


def test_loss_by_stretch_is_the_mean_of_the_loss_by_position_and_ends_with_the_text(tiny):
    models = {"teacher": tiny_model(1).eval(), "student": tiny_model(mixer="ra").eval()}
    loader = Loader(tiny.text, "val", 3, 8 * T)
    whole = compare(*models.values(), loader, 1024)["by_position"]
    for name, model in models.items():
        assert loss_by_stretch(model, loader, T, 1024) == pytest.approx(torch.tensor(whole[name]).view(8, T).mean(1).tolist(), rel=1e-4)
    n = len(loader.tokens) - 1  # targets
    losses = loss_by_stretch(models["student"], Loader(tiny.text, "val", 1, 4000 * T), 1000)
    assert len(losses) == -(-n // 1000)
    weights = [1000] * (n // 1000) + [n % 1000] * (n % 1000 > 0)
    assert np.average(losses, weights=weights) == pytest.approx(mean_loss(models["student"], Loader(tiny.text, "val", 1, n), chunk=512), rel=1e-5)


def test_attention_with_learned_positions_is_read_as_far_as_these_go(tiny):
    bounded, free = tiny_model(positions="learned").eval(), tiny_model(positions="learned", mixer="r").eval()
    assert readable(bounded, 5 * T) == T and readable(bounded, 5) == 5
    assert readable(free, 5 * T) == readable(tiny_model(), 5 * T) == 5 * T
    loader = Loader(tiny.text, "val", 2, 4 * T)
    assert len(loss_by_stretch(free, loader, T, 1024)) == 4
    first = sum(cross_entropy(bounded(batch.x[:, :T])[0], batch.split(T)[0]).item() for batch in loader.windows(1024))
    assert loss_by_stretch(bounded, loader, T, 1024) == [pytest.approx(first / (1024 / 4), rel=1e-5)]
    with pytest.raises(ValueError, match="learned positions"):  # but what should be read whole is not cut in silence
        mean_loss(bounded, loader, 1024)


def panels(out: Path) -> int:
    """How many panels report.png has, by its width."""
    return round(int.from_bytes((out / "report.png").read_bytes()[16:20], "big") / (3.6 * 120))


@pytest.mark.parametrize("mixer", ["r", "ra"])
def test_the_script_compares_reads_on_and_asks_for_the_passkey(mixer, tiny, tmp_path, capsys):
    for name, changes in (("teacher", {"positions": "learned"}), ("student", {"mixer": mixer})):
        save_model(tiny_model(block_size=128, **changes), tmp_path / name, {"tokenizer": "bytes"})
    flags = ["--teacher", tmp_path / "teacher", "--student", tmp_path / "student", "--data", tiny.text, "--max_tokens", 1500, "--out", tmp_path / "out"]
    evaluate.main([str(x) for x in flags])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "length" not in report and "passkey" not in report and panels(tmp_path / "out") == 1
    assert f"| student | | | {report['student']['val_loss']:.4f} | {report['gap']:.4f} |" in capsys.readouterr().out
    evaluate.main([str(x) for x in [*flags, "--longest", 5, "--passkey", 2, "--depths", 2]])
    out, said = tmp_path / "out", capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    models = report["length"]["models"]
    assert report["length"]["T"] == 128 and len(models["teacher"]) == 1 and len(models["student"]) == 5
    assert models["teacher"] == [loss_by_stretch(tiny_model(block_size=128, positions="learned").eval(), Loader(tiny.text, "val", 16, 640), 128, 1500)[0]]
    assert report["passkey"]["depths"] == [0, 1] and all(len(row["nats"]) == len(row["exact"]) == 2 for row in report["passkey"]["models"]["student"])
    assert {name: [row["T"] for row in rows] for name, rows in report["passkey"]["models"].items()} == {"teacher": [128], "student": [128, 256, 512]}
    assert (out / "report.md").read_text() == as_markdown(report) and as_markdown(report) in said and panels(out) == 3
    assert f"| teacher | {models['teacher'][0]:.4f} | - | - | - | - |" in said and said.count("| student | 512 |") == 1
    assert report["state_bytes"]["2048"]["teacher"] is None and "\n| 2,048 | - | " in said  # more than learned positions can read


def test_the_teacher_alone_is_evaluated_too(tiny, tmp_path, capsys):
    save_model(tiny_model(block_size=128), tmp_path / "m", {"tokenizer": "bytes"})
    flags = [str(x) for x in ("--teacher", tmp_path / "m", "--student", "None", "--data", tiny.text, "--max_tokens", 1500)]
    evaluate.main(flags)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    evaluate.main([*flags, "--longest", "4", "--out", str(tmp_path / "out")])
    report, said = json.loads((tmp_path / "out" / "report.json").read_text()), capsys.readouterr().out
    assert said.startswith(line) and len(report["length"]["models"]["teacher"]) == 4 and "student" not in said and panels(tmp_path / "out") == 2
    evaluate.main([*flags, "--passkey", "2"])
    assert "| teacher | 128 |" in (said := capsys.readouterr().out) and "| teacher | 256 |" not in said
    model, val = tiny_model(block_size=128).eval(), Loader(tiny.text, "val", 16, 128)
    assert report["by_position"]["teacher"] == pytest.approx(compare(model, model, val, 1500)["by_position"]["teacher"], rel=1e-5)
    assert report["teacher"]["val_loss"] == mean_loss(model, val, 1500)


def test_bad_input_ends_in_one_clear_line(tiny, tmp_path):
    for change, says in (({"longest": 0}, "from 1"), ({"passkey": 0}, "from 1"), ({"passkey": 90001}, "to 90000"), ({"depths": 1}, "from 2"),
                         ({"block_size": 0}, "from 1"), ({"max_tokens": -5}, "from 1"), ({"batch_size": 0}, "from 1"), ({"out": ""}, "out is empty"),
                         ({"collect": ""}, "collect is empty"), ({"student": ""}, "student is empty"), ({"out": __file__}, "is a file: name a folder")):
        with pytest.raises(ValueError, match=says) as e:
            EvaluateConfig(**change)
        one_line(e.value)
    save_model(tiny_model(), tmp_path / "model", {"tokenizer": "bytes"})
    common = ["--student", "None", "--max_tokens", "100"]
    here = ["--teacher", str(tmp_path / "model")]
    for flags, says in ((["--teacher", str(tmp_path / "none"), "--data", tiny.text], "no model at"),
                        ([*here, "--data", str(tmp_path / "x")], "does not exist"),
                        ([*here, "--data", tiny.sft, "--longest", "2"], "supervised examples"),
                        ([*here, "--data", tiny.sft, "--passkey", "2"], "supervised examples"),
                        ([*here, "--data", tiny.text, "--passkey", "2"], "no room"),
                        ([*here, "--data", tiny.text, "--passkey", "2", "--block_size", "128", "--longest", "999"], "lower --longest")):
        with pytest.raises(ValueError, match=says) as e:
            evaluate.main(common + flags)
        one_line(e.value)


# ---------------------------------------------------------------------------------------------------------------------
# Layers and the report

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
        assert size == {"teacher": remembered_bytes(teacher.cfg, int(n)), "student": remembered_bytes(student.cfg, int(n))}
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
