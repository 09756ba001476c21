"""The forms that records of .jsonl have elsewhere: all become the three kinds."""

import pytest

from common import one_line
from common_bpe import model_folder  # noqa: F401
from common_data import examples, stored, write_jsonl
from data.prepare import prepare
from data.records import Example, read_record
from data.tokenizer import load_tokenizer

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
WORSE = {"role": "assistant", "content": "b"}
PAIR, CHOICE = Example("q", ("q", "a")), Example("q", ("q", "a", "b"))
TALK = Example("q", ("q", "a"), ("user", "assistant"))
CHOSEN = Example("q", ("q", "a", "b"), ("user", "chosen", "rejected"))


@pytest.mark.parametrize("record, example, unread", [
    ({"text": "t", "url": "u"}, Example("t", ("t",)), {"url"}),
    ({"prompt": "q", "response": "a", "text": "q a"}, PAIR, {"text"}),
    ({"prompt": "q", "completion": "a"}, PAIR, set()),
    ({"prompt": [ASK], "completion": [ANSWER]}, TALK, set()),
    ({"prompt": [ASK], "completion": "a"}, TALK, set()),
    ({"instruction": "q", "output": "a"}, PAIR, set()),
    ({"instruction": "q", "input": "", "output": "a", "text": "Below is"}, PAIR, {"text"}),
    ({"instruction": "q", "input": "x", "output": "a"}, Example("q\n\nx", ("q\n\nx", "a")), set()),
    ({"messages": [ASK, ANSWER]}, TALK, set()),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "id": 3}, TALK,
     {"id"}),
    ({"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}, TALK, set()),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, CHOICE, set()),
    # ultrafeedback, and as trl has it
    ({"prompt": "q", "chosen": [ASK, ANSWER], "rejected": [ASK, WORSE], "messages": [ASK, ANSWER]}, CHOSEN,
     {"messages"}),
    ({"chosen": [ASK, ANSWER], "rejected": [ASK, WORSE]}, CHOSEN, set()),
    ({"prompt": [ASK], "chosen": [ANSWER], "rejected": [WORSE]}, CHOSEN, set()),
    ({"prompt": "q", "chosen": [ANSWER], "rejected": [WORSE]}, CHOSEN, set()),
    ({"prompt": [ASK], "chosen": "a", "rejected": "b"}, CHOSEN, set()),
])
def test_forms_of_records(record, example, unread):
    assert read_record(record, "a.jsonl, line 1") == (example, unread)
    kinds = {PAIR: "supervised", TALK: "supervised", CHOICE: "preference", CHOSEN: "preference"}
    assert example.kind == kinds.get(example, example.kind)


@pytest.mark.parametrize("record, word", [
    ({}, r"has the fields \[\]"),
    ({"chosen": "a", "rejected": "b"}, "needs .*{prompt, chosen, rejected}"),
    ({"prompt": "q", "chosen": [ASK, ANSWER], "rejected": "b"}, "differ in the last"),
    ({"prompt": "other", "chosen": [ASK, ANSWER], "rejected": [ASK, WORSE]}, "differ in the last"),
    ({"chosen": [ASK, ANSWER], "rejected": [{**ASK, "content": "x"}, WORSE]}, "differ in the last"),
    ({"chosen": [ASK, ANSWER, ASK, ANSWER], "rejected": [ASK, WORSE]}, "differ in the last"),
    ({"chosen": [ASK], "rejected": [ASK]}, "differ in the last"),
    ({"chosen": [ANSWER], "rejected": [WORSE]}, "after a prompt"),
    ({"chosen": [], "rejected": []}, "after a prompt"),
    ({"chosen": None, "rejected": "b", "prompt": "q"}, "'chosen' is NoneType"),
    ({"prompt": "q", "completion": 5}, "'completion' is int"),
    ({"instruction": "q", "input": 7, "output": "a"}, "'input' is int"),
    ({"instruction": None, "output": "a"}, "'instruction' is NoneType"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "observation", "value": "x"}]},
     "message 2 of conversations has the role 'observation'"),
    ({"conversations": [{"role": "user", "content": "q"}]}, "list of {from, value}"),
    ({"messages": [ASK, {"role": "tool" * 999, "content": "x"}]}, "message 2 of messages has the role"),
    ({"messages": {"role": "user"}}, "list of {role, content}"),
])
def test_records_of_no_form_are_refused_by_name(record, word):
    with pytest.raises(ValueError, match=f"a.jsonl, line 7.*{word}") as e:
        read_record(record, "a.jsonl, line 7")
    assert len(one_line(e.value)) < 600


def test_forms_that_mean_the_same_are_stored_alike(tmp_path, model_folder):
    def prepared(name: str, records: list):
        source = write_jsonl(tmp_path / f"{name}.jsonl", records)
        prepare(source, tmp_path / name, tokenizer=str(model_folder))
        return [(tmp_path / name / file).read_bytes() for file in ("train.bin", "train.mask.bin", "val.bin")]

    pairs = prepared("pairs", [{"prompt": f"q{i}", "response": "a"} for i in range(30)])
    lists = prepared("lists", [{"prompt": [ASK | {"content": f"q{i}"}], "completion": [ANSWER]}
                               for i in range(30)])
    assert pairs == lists
    choices = prepared("choices", [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(30)])
    talks = [[ASK | {"content": f"q{i}"}] for i in range(30)]
    assert choices == prepared("talks", [{"chosen": [*talk, ANSWER], "rejected": [*talk, WORSE]}
                                         for talk in talks])


def test_of_a_preference_of_conversations_only_the_last_answer_is_learnt(tmp_path, model_folder):
    enc = load_tokenizer(model_folder)
    talks = [[ASK, ANSWER, ASK | {"content": f"q{i}"}] for i in range(30)]
    records = [{"chosen": [*talk, ANSWER], "rejected": [*talk, WORSE]} for talk in talks]
    meta = prepare(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "out", tokenizer=str(model_folder))
    assert meta["kind"] == "preference"
    rows = stored(tmp_path / "out")
    for (chosen, mask), (rejected, other) in zip(rows[::2], rows[1::2]):
        pairs = ((chosen, mask), (rejected, other))
        answers = [enc.decode([t for t, yes in zip(*pair) if yes]) for pair in pairs]
        assert answers == ["a<|im_end|>", "b<|im_end|>"]
        assert enc.decode(chosen).count("<|im_start|>assistant") == 2


def test_alpaca_needs_no_template(tmp_path):
    records = [{"instruction": f"Add {i}", "input": "1", "output": f"{i + 1}"} for i in range(30)]
    prepare(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "out")
    both = examples(tmp_path / "out", "train") + examples(tmp_path / "out", "val")
    assert sorted(both) == sorted((f"Add {i}\n\n1", f"{i + 1}") for i in range(30))
