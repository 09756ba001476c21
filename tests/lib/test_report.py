"""The report of a distillation: layers that can be compared, and rows of before."""

from common import random_batch, tiny_model
import lib.report
from lib.report import layer_errors, table_rows


def test_layer_errors_of_unlike_models_and_of_a_hybrid_teacher():
    assert layer_errors(tiny_model(), tiny_model(n_embd=64, mixer="r"), random_batch(2, 9)) == []
    rows = layer_errors(tiny_model(mixer="ra"), tiny_model(mixer="r"), random_batch(2, 9))
    assert [row["layer"] for row in rows] == [1]  # layer 0 is RWKV in both: it gives v_first, and no row


def test_rows_of_before_have_todays_names_and_controls_come_last():
    report = {
        "stages": [{"name": "start"}, {"name": "distil"}],
        "controls": {"no stage 1": {"name": "distil"}},
    }
    assert [row["name"] for row in table_rows(report)] == ["start", "match", "control: no stage 1"]


def test_layer_errors_look_at_a_few_tokens_however_long_the_batch_is(monkeypatch):
    """All layers' inputs and outputs exist at once, also where training has pieces."""
    seen, real = [], lib.report.attention_io
    monkeypatch.setattr(lib.report, "LOOK", 20)
    monkeypatch.setattr(lib.report, "attention_io", lambda m, x: seen.append(tuple(x.shape)) or real(m, x))
    for shape in ((4, 9), (4, 30), (2, 5)):
        assert len(layer_errors(tiny_model(), tiny_model(mixer="r"), random_batch(*shape))) == 2
    assert seen == [(2, 9), (1, 20), (2, 5)]
