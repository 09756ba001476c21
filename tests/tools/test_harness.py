"""tools.harness: its scores are those of lm_eval's own backend, and of plain logits."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import decoders, processors

from common import one_line, tiny_model
from common_bpe import MANUAL, save, train
from common_models import Oracle
from lib.folders import save_model
from lib.states import process
from tools import harness
from tools.convert import ImportConfig, import_model
from tools.harness import HarnessConfig, HarnessLM, load_tasks, main, measure

pytest.importorskip("lm_eval")
from common_convert import COMMON, original  # noqa: E402   (transformers)
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

CPU = torch.device("cpu")
WORDS = MANUAL[200_000:].split()
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
    train: {data}
test_split: test
fewshot_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
output_type: {kind}
metric_list:
"""
METRICS = {"multiple_choice": ["acc", "acc_norm"], "generate_until": ["exact_match", "bleu"],
           "loglikelihood_rolling": ["word_perplexity", "bits_per_byte"]}


def docs() -> list[dict]:
    """Questions of no words to more than 128 tokens, choices of one word to many."""
    rows = []
    for i, n in enumerate((0, 3, 7, 12, 30, 150, 8, 8, 60)):
        text = " ".join(WORDS[50 * i : 50 * i + n])
        choices = [" " + " ".join(WORDS[40 * i + j : 40 * i + j + m]) for j, m in enumerate((1, 5, 1, 12))]
        rows.append({"question": text, "choices": choices + [choices[0] + "s"], "answer": i % 5,
                     "text": " ".join(WORDS[30 * i : 30 * i + 4 * n])})
    return rows


def write_task(folder: Path, name: str, kind: str, target: str, rows: list[dict], more: str = "") -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TASK.format(name=name, kind=kind, target=target, data=folder / f"{name}.jsonl")
    text += "".join(f"  - metric: {metric}\n" for metric in METRICS[kind]) + more
    (folder / f"{name}.yaml").write_text(text)


@pytest.fixture(scope="module")
def quiz(tmp_path_factory):
    """A folder of local tasks, and nothing that asks the network."""
    folder = tmp_path_factory.mktemp("quiz")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_OFFLINE", "1"), ("HF_HOME", str(folder))):
            patch.setenv(name, value)
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()
        write_task(folder, "choice", "multiple_choice", "answer", docs(), 'doc_to_choice: "{{choices}}"\n')
        asked = [row for row in docs() if row["question"]]
        write_task(folder, "story", "generate_until", '"{{choices[0]}}"', asked,
                   'generation_kwargs: {until: ["e ", "\\n"], max_gen_toks: 20, do_sample: false}\n')
        write_task(folder, "page", "loglikelihood_rolling", '"{{text}}"', docs())
        yield folder


def opened(tokenizer):
    """A tokenizer that opens every text itself, as Llama 3's does."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))])
    return tokenizer


@pytest.fixture(scope="module", params=["plain", "opened"])
def llama(request, tmp_path_factory):
    """A random Llama as a Hugging Face folder, and imported."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = train("Llama 3")
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    config = {"eos_token": end, "bos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"}
    if request.param == "opened":
        tokenizer, config["bos_token"] = opened(tokenizer), "<|im_start|>"
    original("Llama", COMMON | dict(vocab_size=tokenizer.get_vocab_size())).save_pretrained(folder / "hf")
    save(tokenizer, folder / "hf", **config)
    import_model(ImportConfig(path=str(folder / "hf"), out=str(folder / "ours")))
    return folder


def answers(lm, quiz: Path, **settings) -> tuple[dict, dict]:
    """The scores, and what the model answered to every request."""
    tasks = load_tasks(HarnessConfig(tasks="*", tasks_folder=str(quiz), **settings), [128])
    results = evaluate(lm, tasks, log_samples=True, bootstrap_iters=0)
    samples = {name: [row["resps"] for row in rows] for name, rows in results["samples"].items()}
    return results["results"], samples


def numbers(tree) -> list[float]:
    """All in a nest of lists and tuples, in order."""
    if isinstance(tree, list | tuple):
        return [number for part in tree for number in numbers(part)]
    return [float(tree)]


def scores(results: dict) -> dict[str, float]:
    return {key: value for key, value in results.items() if isinstance(value, float)}


def test_scores_and_answers_are_those_of_its_own_backend_on_the_same_weights(llama, quiz):
    """Truncated, windowed, with and without a prompt; greedy text up to a stop."""
    shots = 2 if llama.name.endswith("1") else 0
    backend = HFLM(str(llama / "hf"), device="cpu", dtype="float32", batch_size=3)
    expected, their_samples = answers(backend, quiz, num_fewshot=shots)
    lm = HarnessLM(llama / "ours", CPU, HarnessConfig(batch_size=4))
    results, samples = answers(lm, quiz, num_fewshot=shots)
    assert lm.truncated and lm.max_length == backend.max_length == 128
    assert samples["story"] == their_samples["story"]
    for name in ("choice", "page"):
        rows, their_rows = numbers(samples[name]), numbers(their_samples[name])
        assert len(rows) == len(their_rows) > 8 and rows == pytest.approx(their_rows, abs=1e-4, rel=1e-6)
    assert results.keys() == expected.keys() == {"choice", "page", "story"}
    for name in results:
        assert scores(results[name]) == pytest.approx(scores(expected[name]), rel=1e-5), name


# ------------------------------------------------------------------------------------------
# Against plain logits of the whole text

TEXTS = [("", "alone"), ("the same prompt", " yes"), ("the same prompt", " no, and longer"), ("short", "r"),
         ("the same prompt", "."), ("ends in spaces  ", "x"), ("   ", "only spaces"), ("a" * 70, "b" * 30),
         ("empty", ""), ("", ""), ("é漢", "🙂é"), ("other", "w" * 150)]


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, 0, metadata=("a task", i, 1)) for i, args in enumerate(arguments)]


def harness_lm(folder: Path, **settings) -> HarnessLM:
    return HarnessLM(folder, CPU, HarnessConfig(**settings))


def plainly(model, prompt: list[int], ids: list[int]) -> tuple[float, bool]:
    """All tokens at once, as the definition of a log-likelihood has it."""
    with torch.no_grad():
        logp = model(torch.tensor([prompt + ids]))[0].double().log_softmax(-1)[0, len(prompt) - 1 : -1]
    chosen = logp[range(len(ids)), ids]
    return chosen.sum().item(), logp.argmax(-1).tolist() == ids


STUDENTS = {"student": {"mixer": "r"}, "RWKV-7": {"mixer": "r", "ffn": "channelmix", "positions": "none"},
            "hybrid": {"mixer": "ra"}, "learned": {"mixer": "ra", "positions": "learned"}}


@pytest.mark.parametrize("kind", STUDENTS)
def test_log_likelihoods_are_those_of_all_tokens_at_once(kind, tmp_path):
    """Shared prompts, lengths that differ, texts of several pieces, any batch size."""
    block = {} if kind == "student" else {"block_size": 800}
    save_model(tiny_model(**STUDENTS[kind] | block), tmp_path, {"tokenizer": "bytes"})
    lm = harness_lm(tmp_path)
    expected = []
    for context, continuation in TEXTS:
        kept = context.rstrip()
        ids = list((context[len(kept):] + continuation).encode())
        expected.append(plainly(lm.model, list(kept.encode()) or [256], ids) if ids else (0.0, True))
    for size in (1, 5) if kind == "student" else (5,):
        found = harness_lm(tmp_path, batch_size=size).loglikelihood(requests("loglikelihood", *TEXTS))
        assert numbers(found) == pytest.approx(numbers(expected), abs=1e-4, rel=1e-6)
    texts = [(text,) for _, text in TEXTS]
    whole = [plainly(lm.model, [256], list(text.encode()))[0] if text else 0.0 for text, in texts]
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    assert found == pytest.approx(whole, abs=1e-4, rel=1e-6)


def test_a_prompt_is_read_once_for_all_its_continuations(tmp_path, monkeypatch):
    save_model(tiny_model(mixer="r"), tmp_path, {"tokenizer": "bytes"})
    lm, read = harness_lm(tmp_path, batch_size=8), []
    plain = lm.model.hidden
    monkeypatch.setattr(lm.model, "hidden", lambda x, state=None: read.append(x.numel()) or plain(x, state))
    choices = [("p" * 100, " " + letter * n) for letter, n in zip("abcd", (2, 2, 2, 2))]
    lm.loglikelihood(requests("loglikelihood", *choices))
    assert sum(read) == 100 + 4 * 2                          # the last token of each is only foretold


def test_greedy_is_what_greedy_decoding_writes(tmp_path):
    save_model(tiny_model(mixer="r", std=1.0), tmp_path, {"tokenizer": "bytes"})
    lm = harness_lm(tmp_path)
    prompt, text = list(b"begin"), ""
    for _ in range(6):                                       # the likeliest byte that is a letter
        with torch.no_grad():
            logits = lm.model(torch.tensor([prompt + list(text.encode())]))[0][0, -1]
        text += chr(int(logits[:128].argmax()))
    found = lm.loglikelihood(requests("loglikelihood", *(("begin", text[:n]) for n in range(1, 7))))
    expected = [plainly(lm.model, prompt, list(text[:n].encode()))[1] for n in range(1, 7)]
    assert [greedy for _, greedy in found] == expected and not all(expected)


def test_attention_reads_the_end_of_what_is_too_long(tmp_path):
    """16 tokens of block_size; pure RWKV-7 reads all, and --max_length cuts it, too."""
    text = ("0123456789" * 5, "abc")
    for name, mixer in (("a", "a"), ("r", "r")):
        save_model(tiny_model(mixer=mixer), tmp_path / name, {"tokenizer": "bytes"})
        for limit in (None, 9):
            lm = harness_lm(tmp_path / name, max_length=limit)
            room = {("a", None): 14, ("r", None): 50}.get((mixer, limit), 7)    # and ab, of the answer
            expected = plainly(lm.model, list(text[0].encode())[-room:], list(b"abc"))
            found, = lm.loglikelihood(requests("loglikelihood", text))
            assert found == pytest.approx(expected, abs=1e-4)
            assert lm.truncated == (room < 50)


# ------------------------------------------------------------------------------------------
# Generated text

def speaker(monkeypatch, folder: Path, speech: str, **settings) -> HarnessLM:
    """A model that says `speech` behind every prompt that ends in a colon."""
    said = list(speech.encode()) + [256] * 99

    def rule(ids: list[int]) -> int:
        colon = max((i for i, b in enumerate(ids) if b == ord(":")), default=len(ids) - 1)
        return said[len(ids) - 1 - colon]

    folder.mkdir(exist_ok=True)
    (folder / "meta.json").write_text('{"tokenizer": "bytes"}')
    oracle = Oracle(rule)
    oracle.emb = torch.nn.Embedding(1, 1)
    monkeypatch.setattr(harness, "load_model", lambda *_: oracle)
    return harness_lm(folder, max_length=200, **settings)


@pytest.mark.parametrize("until, expected", [
    ([], "One, two.\n\nQ é Q"), (["\n\n"], "One, two."), ("two", "One, "), (["é"], "One, two.\n\nQ "),
    (["?", "Q", "two.\n"], "One, "), (["", None], "One, two.\n\nQ é Q"),
    (["<|endoftext|>"], "One, two.\n\nQ é Q"),
    (["wo.", "two"], "One, "), (["O"], "")])
def test_an_answer_ends_before_its_stop_string_across_tokens(until, expected, tmp_path, monkeypatch):
    lm = speaker(monkeypatch, tmp_path, "One, two.\n\nQ é Q")
    prompts = ("a:", "a longer prompt:", "b" * 300 + ":")
    asked = [(prompt, {"until": until, "max_gen_toks": 99}) for prompt in prompts]
    assert lm.generate_until(requests("generate_until", *asked)) == [expected] * 3
    assert lm.truncated == 1


def test_an_answer_ends_after_its_most_tokens_and_no_model_is_asked_for_more(tmp_path, monkeypatch):
    lm = speaker(monkeypatch, tmp_path, "One, two.")
    asked = [("a:", {"max_gen_toks": n}) for n in (1, 5)] + [("b:", {"until": ["n"], "max_new_tokens": 4})]
    assert lm.generate_until(requests("generate_until", *asked)) == ["O", "One, ", "O"]


def test_random_answers_depend_on_the_seed_and_not_on_the_batch(tmp_path):
    save_model(tiny_model(mixer="r"), tmp_path, {"tokenizer": "bytes"})
    draws = {"do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "max_gen_toks": 8}
    asked = requests("generate_until", *[("same", draws)] * 3, ("other one", draws),
                     ("third", {"max_gen_toks": 8}))
    first = harness_lm(tmp_path, batch_size=1).generate_until(asked)
    assert harness_lm(tmp_path, batch_size=8).generate_until(asked) == first
    assert len(set(first[:3])) == 3                          # repeats of one request differ
    assert harness_lm(tmp_path, seed=7).generate_until(asked)[:4] != first[:4]


# ------------------------------------------------------------------------------------------
# The command

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A teacher and a student of bytes that fit the tasks."""
    folder = tmp_path_factory.mktemp("pair")
    save_model(tiny_model(block_size=160), folder / "teacher", {"tokenizer": "bytes"})
    save_model(tiny_model(1, mixer="r"), folder / "student", {"tokenizer": "bytes"})
    return folder


def test_teacher_and_student_stand_side_by_side(pair, quiz, tmp_path, capsys):
    """A folder beside itself has the same numbers; what is written can be replaced."""
    out = tmp_path / "new" / "scores.json"
    flags = ["--tasks_folder", str(quiz), "--limit", "4", "--num_fewshot", "1", "--out", str(out)]
    for teacher in ("teacher", "student"):
        main(["--teacher", str(pair / teacher), "--ckpt", str(pair / "student"), "--tasks", "page,ch*",
              *flags])
        report = json.loads(out.read_text())
        assert report["settings"]["limit"] == 4 and list(report["student"]["results"]) == ["page", "choice"]
        same = report["teacher"]["results"] == report["student"]["results"]
        assert same == (teacher == "student")
        assert report["teacher"]["max_length"] == {"teacher": 160, "student": None}[teacher]
        printed = capsys.readouterr().out
        value = report["student"]["results"]["choice"]["acc,none"]
        row, = [line for line in printed.splitlines() if line.startswith("| choice | 1 | 4 | acc ↑ |")]
        assert f"{value:.4f}" in row.split("|")[-2] and ("was cut off" in printed) == (teacher == "teacher")
    main(["--ckpt", str(pair / "student"), "--tasks", "story", "--gen_kwargs", "max_gen_toks=3", *flags])
    assert "| teacher" not in capsys.readouterr().out and "teacher" not in json.loads(out.read_text())


def test_scores_are_saved_before_they_are_printed(pair, quiz, tmp_path, monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=gone, flush=lambda: None))
    with pytest.raises(BrokenPipeError):
        main(["--ckpt", str(pair / "student"), "--tasks", "choice", "--tasks_folder", str(quiz),
              "--limit", "1", "--out", str(tmp_path / "scores.json")])
    assert json.loads((tmp_path / "scores.json").read_text())["student"]["results"]["choice"]


def test_what_is_wrong_is_said_in_one_line_before_the_model_is_loaded(pair, quiz, tmp_path, monkeypatch):
    import lm_eval.tasks

    class OnlyLocal(lm_eval.tasks.TaskManager):              # the index of all takes many seconds
        def __init__(self, include_path=None, include_defaults=False):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", OnlyLocal)
    monkeypatch.setattr(harness, "load_model", None)
    save_model(tiny_model(), tmp_path / "mute", {})
    save_model(tiny_model(positions="learned"), tmp_path / "learned", {"tokenizer": "bytes"})
    (tmp_path / "other.json").write_text("{}")
    bad = tmp_path / "bad"
    bad.mkdir()
    write_task(bad, "beams", "generate_until", "answer", docs(), "generation_kwargs: {num_beams: 4}\n")
    write_task(bad, "hot", "generate_until", "answer", docs(),
               "generation_kwargs: {do_sample: true, temperature: -1}\n")
    write_task(bad, "endless", "generate_until", "answer", docs(), "generation_kwargs: {max_gen_toks: 160}\n")
    write_task(bad, "nodata", "multiple_choice", "answer", docs(), 'doc_to_choice: "{{choices}}"\n')
    (bad / "nodata.jsonl").unlink()
    write_task(bad, "empty", "multiple_choice", "answer", [], 'doc_to_choice: "{{choices}}"\n')
    write_task(bad, "fields", "multiple_choice", "answer", docs(), 'doc_to_choice: "{{nothing.of.it}}"\n')
    (bad / "hub.yaml").write_text((bad / "beams.yaml").read_text().replace("path: json", "path: a/dataset")
                                  .replace("task: beams", "task: hub"))
    ours, here = ["--ckpt", str(pair / "student")], ["--tasks_folder", str(quiz)]
    there = [*ours, "--tasks_folder", str(bad), "--tasks"]
    for flags, words in (
        ([*ours, *here], "--tasks is empty: .* are choice, page, story"),
        ([*ours, *here, "--tasks", "choise"], "no task is called 'choise': did you mean choice"),
        ([*ours, "--tasks", "choice", "--tasks_folder", "nowhere"], "tasks_folder = 'nowhere': there is no"),
        (["--ckpt", str(tmp_path / "none"), *here, "--tasks", "choice"], "no model at"),
        ([*ours, "--teacher", str(tmp_path / "none"), *here, "--tasks", "choice"], "no model at"),
        (["--ckpt", str(tmp_path / "mute"), *here, "--tasks", "choice"], 'meta.json has no "tokenizer": '),
        ([*ours, *here, "--tasks", "choice", "--apply_chat_template"], "--apply_chat_template: .* omit it"),
        ([*ours, *here, "--tasks", "choice", "--system-instruction=a"], "--system_instruction: .* omit it"),
        ([*ours, *here, "--tasks", "choice", "--out", str(tmp_path / "other.json")], "did not write it"),
        (["--ckpt", str(tmp_path / "learned"), *here, "--tasks", "choice", "--max_length", "17"],
         "has learned 16 positions"),
        ([*there, "beams"], "task beams: .*num_beams = 4.* not supported"),
        ([*there, "hot"], "task hot: .*temperature = -1"),
        (["--teacher", str(pair / "teacher"), *there, "endless"],
         "task endless: max_gen_toks = 160 .*less than the 160 .*--gen_kwargs"),
        ([*there, "nodata"], "task nodata can't be used"), ([*there, "empty"], "task empty can't be used"),
        ([*there, "fields"], "task fields can't be used"),
        ([*there, "hub"], "task hub .*may need a download"),
    ):
        with pytest.raises(ValueError, match=words) as e:
            main(flags)
        assert len(one_line(e.value)) < 600
    (bad / "broken.yaml").write_text("task: [broken\n")
    with pytest.raises(ValueError, match="broken.yaml can't be read"):
        main([*there, "broken"])
    monkeypatch.setattr(harness, "TemplateLM", object)
    with pytest.raises(ValueError, match="lm_eval is not installed: pip install"):
        main([*ours, *here, "--tasks", "choice"])


def test_a_chat_template_is_refused_where_it_would_be_used(pair):
    with pytest.raises(ValueError, match="not supported"):
        harness_lm(pair / "student").apply_chat_template([{"role": "user", "content": "hi"}])


def test_a_tokenizer_of_another_model_is_named(tmp_path):
    save_model(tiny_model(vocab_size=100), tmp_path, {"tokenizer": "bytes"})
    with pytest.raises(ValueError, match="bytes gives token 256, the model's vocabulary ends at 99"):
        harness_lm(tmp_path, add_bos_token=True).loglikelihood(requests("loglikelihood", ("a", "b")))
