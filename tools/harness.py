"""The tasks of lm-evaluation-harness for any model folder, teacher and student.

    python -m tools.harness --ckpt out/rnn --tasks lambada_openai,arc_easy
    python -m tools.harness --ckpt out/rnn --teacher out/gpt --tasks "arc_*" --limit 100
    python -m tools.harness --ckpt out/rnn --tasks_folder quiz --tasks quiz

The package lm_eval (pip install -e '.[harness]') has the tasks and computes the scores.
It asks a model three things: how likely a continuation is, how likely a text is, and
what comes next. A prompt is read once: all its continuations go on from its state.
Pure RWKV-7 reads texts of any length; a model with attention reads block_size tokens,
and longer prompts lose their beginning, as with lm_eval's own backend for transformers.
"""

import contextlib
import functools
import json
import logging
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from config import at_least, cli, nearest, run, settings
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data.foreign import brief
from data.tokenizer import TextStream, load_tokenizer, opening, stops
from lib.decode import Decoder
from lib.folders import load_model, open_model, write_json
from lib.owned import check_place, contents
from lib.processes import pick_device
from lib.states import PIECE, join, process_rows, select
from model import ModelConfig, State
from sample import Sampling
from tools.batch import generate_rows

try:
    from lm_eval.api.model import TemplateLM
except ImportError:                                # `main` says so
    TemplateLM = object

MAX_GEN_TOKS = 256                                 # where a task does not say, as in lm_eval's backend
LENGTHS = {"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}
GENERATION = LENGTHS | {"until", "do_sample", "temperature", "top_k", "top_p"}
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1}        # what tasks say although it changes nothing
CHAT = ("apply_chat_template", "chat_template_args", "enable_thinking", "fewshot_as_multiturn",
        "system_instruction")
NO_CHAT = "chat templates are not supported; omit it, and the model continues the tasks' plain text"

Score = tuple[float, bool]                         # log-likelihood, and whether greedy decoding writes it


@settings
class HarnessConfig:
    ckpt: str = "out/rwkv"                         # a model folder
    teacher: str | None = None                     # another, whose scores stand beside it
    tasks: str = ""                                # names or patterns (arc_*), with commas between them
    tasks_folder: str | None = None                # tasks of your own: a folder of .yaml files
    limit: int | None = at_least(1, None)          # documents of each task; None = all
    # examples before each question; None = the task's
    num_fewshot: int | None = at_least(0, None, below=2**16)
    gen_kwargs: str = ""                           # max_gen_toks=64,do_sample=True: instead of the tasks' own
    batch_size: int = at_least(1, 16, below=2**20)
    # tokens of prompt and answer; None = block_size, and for pure RWKV-7 no limit
    max_length: int | None = at_least(1, None)
    # whether prompts begin with what opens documents; None = as the tokenizer has it
    add_bos_token: bool | None = None
    seed: int = at_least(0, 1234, below=2**32)
    device: str = "auto"
    out: str | None = None                         # a .json file for the scores; None = print only


# ------------------------------------------------------------------------------------------
# Our model as one of the harness'

class HarnessLM(TemplateLM):
    """The model of a folder as an `lm_eval.api.model.LM`; cfg is a HarnessConfig.

    Raises ValueError as `load_model`, `load_tokenizer` and `longest`.
    """

    def __init__(self, folder: str | Path, device: torch.device, cfg: HarnessConfig):
        super().__init__()
        self.model, self.enc = load_model(folder, device).eval(), load_tokenizer(folder)
        self._device, self.batch_size, self.seed = device, cfg.batch_size, cfg.seed
        self.max_length = longest(self.model.cfg, cfg.max_length)
        by_itself = getattr(self.enc, "spec", {}).get("start") is not None
        self.opens = by_itself if cfg.add_bos_token is None else cfg.add_bos_token
        self.truncated = 0                         # prompts that did not fit

    @functools.cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.model)

    @property
    def eot_token_id(self) -> int:
        return self.enc.eot_token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no other prompt."""
        return opening(self.enc)[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a text, which spells no special token.

        Raises ValueError for ids that the model does not have.
        """
        opens, V = self.opens if add_special_tokens is None else add_special_tokens, self.model.cfg.vocab_size
        ids = [self.prefix_token_id] * opens + self.enc.encode_ordinary(string)
        if max(ids, default=0) >= V:
            raise ValueError(f"the tokenizer {self.enc.name} gives token {max(ids)}, the model's vocabulary "
                             f"ends at {V - 1}: its meta.json names another than it was trained with")
        return ids

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both. For an empty context stands what opens a document."""
        if context:
            prompt, ids = self._encode_pair(context, continuation)
        else:
            prompt, ids = [], self.tok_encode(continuation, add_special_tokens=False)
        if prompt:
            return prompt, ids
        has_own = ids[:1] == [self.prefix_token_id]
        return (ids[:1], ids[1:]) if has_own else ([self.prefix_token_id], ids)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[Score]:
        """Of each request's continuation behind its context; 0 and True for none."""
        rows = [(None, *self.encode_pair(*request.args)) for request in requests]
        return self._loglikelihood_tokens(rows, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts; where the model has a limit, in windows."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        owners, rows = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            longest_window = self.max_length or max(1, len(ids))
            for window in get_rolling_token_windows(ids, self.prefix_token_id, longest_window, context_len=1):
                owners.append(i)
                rows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for i, (logp, _) in zip(owners, self._loglikelihood_tokens(rows, disable_tqdm=disable_tqdm)):
            totals[i] += logp
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False, **_) -> list[Score]:
        """Of (anything, ids of a prompt, ids of its continuation) each."""
        answers: list[Score] = [(0.0, True)] * len(requests)
        prompts: dict[tuple[int, ...], list[int]] = {}
        for i, (_, prompt, ids) in enumerate(requests):
            if ids:
                prompts.setdefault(tuple(self.cut(prompt, len(ids) - 1)), []).append(i)
        for batch in self.batches(prompts, len, "log-likelihoods", disable_tqdm):
            logits, states = process_rows(self.model, [self.tensor(prompt) for prompt in batch])
            asked = [(j, i) for j, prompt in enumerate(batch) for i in prompts[prompt]]
            for start in range(0, len(asked), self.batch_size):
                whose, which = zip(*asked[start : start + self.batch_size])
                rows = [self.tensor(requests[i][2]) for i in which]
                scores = self.read_on(logits[list(whose)], [states[j] for j in whose], rows)
                for i, score in zip(which, scores):
                    answers[i] = score
        return answers

    def read_on(self, logits: Tensor, states: Sequence[State], rows: list[Tensor]) -> list[Score]:
        """Score rows (T_i,) behind `states` of one text each, with these logits (B, V).

        They are padded behind their ends, where nothing is looked at.
        """
        targets = pad_sequence(rows, batch_first=True, padding_value=-1)                 # (B, T)
        logp, greedy = score(logits[:, None], targets[:, :1])
        longer = [i for i, row in enumerate(rows) if len(row) > 1]
        for members, state in join(self.model.cfg, [states[i] for i in longer]):
            reading, start = [longer[j] for j in members], 0
            piece = max(16, PIECE // len(reading))
            while reading:
                end = min(start + piece, max(len(rows[i]) for i in reading) - 1)
                out, state = self.model(targets[reading, start:end].clamp(min=0), state)
                more, same = score(out, targets[reading, start + 1 : end + 1])
                logp[reading] += more
                greedy[reading] &= same
                stay = [j for j, i in enumerate(reading) if len(rows[i]) - 1 > end]
                reading, state, start = [reading[j] for j in stay], select(state, stay), end
        return list(zip(logp.tolist(), greedy.tolist()))

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to a stop string or end token.

        Each draws random numbers of its own, whatever stands beside it.
        """
        texts, groups = [""] * len(requests), {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        for group in groups.values():
            first = requests[group[0]]
            until, n, how = generation(first.task_name, first.args[1], self.max_length)
            ids = {i: self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in group}
            prompts = {i: self.cut(prompt, n) for i, prompt in ids.items()}
            for batch in self.batches(group, lambda i: len(prompts[i]), "answers", disable_tqdm):
                generators = [torch.Generator(self._device).manual_seed(self.seed + i) for i in batch]
                answers = [Answer(self.enc, until) for _ in batch]
                for tokens, _ in generate_rows(self.decoder, [prompts[i] for i in batch], n,
                                               stop=stops(self.enc), generators=generators, **vars(how)):
                    # a list: each must hear of its token
                    if all([answer.add(token) for answer, token in zip(answers, tokens.tolist())]):
                        break
                for i, answer in zip(batch, answers):
                    texts[i] = answer.text()
        return texts

    def cut(self, prompt: list[int], n: int) -> list[int]:
        """The end of a prompt that leaves room to read n tokens more.

        Raises ValueError where that leaves none.
        """
        room = math.inf if self.max_length is None else self.max_length - n
        if room < 1:
            raise ValueError(f"an answer of {n + 1} tokens does not fit into the {self.max_length} that the "
                             "model reads: raise --max_length as far as the model goes, or omit the task")
        self.truncated += len(prompt) > room
        return prompt if len(prompt) <= room else prompt[-int(room):]

    def batches(self, items: Iterable, size: Callable, what: str, quiet: bool) -> Iterator[list]:
        """Of similar sizes, the longest first: memory runs out at once, or never."""
        ordered = sorted(items, key=size, reverse=True)
        starts = range(0, len(ordered), self.batch_size)
        for start in tqdm(starts, desc=what, disable=quiet or not starts):
            yield ordered[start : start + self.batch_size]

    def tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self._device)

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        raise ValueError(f"apply_chat_template: {NO_CHAT}")


def score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of log p(target) (B,), and whether all targets are the likeliest (B,).

    logits (B, T, V), targets (B, T); -1 is none.
    """
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1,
                           reduction="none")
    same = (logits.argmax(-1) == targets) | (targets < 0)
    return -loss.view_as(targets).double().sum(-1), same.all(-1)


def longest(cfg: ModelConfig, max_length: int | None) -> int | None:
    """Most tokens that the model is given at once; None = any number.

    Raises ValueError for more than it has learned positions.
    """
    if max_length and cfg.longest and max_length > cfg.longest:
        raise ValueError(f"--max_length {max_length}: the model has learned {cfg.longest} positions; omit "
                         "it, or give at most as many")
    return max_length or (cfg.block_size if "a" in cfg.mixers else None)


# ------------------------------------------------------------------------------------------
# Generated text

class Answer:
    """A text as it grows, until it ends, or one of the strings `until` stands in it.

    Special tokens count for these, and are not part of the text.
    """

    def __init__(self, enc, until: list[str]):
        self.enc, self.until, self.stream = enc, until, TextStream(enc)
        self.ids, self.seen, self.done = [], "", False

    def add(self, token: int) -> bool:
        """Take the next token, unless the text is done. Returns whether it is now."""
        if self.done:
            return True
        if token < 0 or token in stops(self.enc):
            self.done = True
            return True
        self.ids.append(token)
        reach = max(map(len, self.until), default=0)
        tail = self.seen[max(0, len(self.seen) - reach):] + self.stream(token)
        self.seen, self.done = tail, any(stop in tail for stop in self.until)
        return self.done

    def text(self) -> str:
        """Up to the first of `until`."""
        from lm_eval.models.utils import postprocess_generated_text

        special, stream = special_ids(self.enc), TextStream(self.enc)
        text = "".join(map(stream, [*(i for i in self.ids if i not in special), None]))
        return postprocess_generated_text(text, self.until, None)


def special_ids(enc) -> set[int]:
    """The tokens that control and say nothing."""
    if hasattr(enc, "spec"):
        return set(enc.spec["special"].values())
    return {enc.encode_single_token(name) for name in enc.special_tokens_set}


def generation(task: str, kwargs: dict, max_length: int | None) -> tuple[list[str], int, Sampling]:
    """A task's settings: strings that end an answer, its most tokens, how to draw them.

    Raises ValueError for those that this program does not have.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    foreign = [f"{key} = {value!r}" for key, value in kwargs.items()
               if key not in GENERATION and NEUTRAL.get(key, ...) != value]
    if foreign:
        raise ValueError(f"task {task}: generation with {brief(', '.join(foreign))} is not supported; there "
                         f"are {', '.join(sorted(GENERATION))}; omit the task")
    try:
        values, how = normalize_gen_kwargs(kwargs, MAX_GEN_TOKS), Sampling(temperature=0.0)
        if values["do_sample"]:
            how = Sampling(temperature=float(values.get("temperature", 1.0)),
                           top_k=values.get("top_k") or None, top_p=values.get("top_p"))
    except (TypeError, ValueError) as e:
        raise ValueError(f"task {task}: its generation_kwargs can't be used ({brief(e)}): correct them, or "
                         "give others by --gen_kwargs") from None
    n, until = values["max_gen_toks"], [str(stop) for stop in values["until"] if stop]
    if n < 1 or max_length and n >= max_length:
        most = f" and less than the {max_length} tokens that the model reads" if max_length else ""
        raise ValueError(f"task {task}: max_gen_toks = {n} must be at least 1{most}; give another by "
                         "--gen_kwargs max_gen_toks=..., or raise --max_length")
    return until, n, how


# ------------------------------------------------------------------------------------------
# Tasks

def find_tasks(cfg: HarnessConfig):
    """lm_eval's TaskManager, and the names in it.

    Of the thousands of tasks that come with it an index takes many seconds, so those of
    the folder come first. Raises ValueError for unknown ones.
    """
    from lm_eval.tasks import TaskManager

    folder, wanted = cfg.tasks_folder, [name.strip() for name in cfg.tasks.split(",") if name.strip()]
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"tasks_folder = {folder!r}: there is no such folder; give the one that holds the "
                         "tasks' .yaml files")
    own = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if not wanted:
        known = f": those of {folder} are {', '.join(own.all_tasks) or 'none'}" if own else ""
        raise ValueError(f"--tasks is empty: name some, with commas between them{known}")
    # a group may have members that come with lm_eval
    alone = [own] if own and not own.all_groups else []
    for manager in (*alone, None):
        manager = manager or TaskManager(include_path=folder)
        names = {name: manager.match_tasks([name]) for name in wanted}
        if all(names.values()):
            return manager, list(dict.fromkeys(name for found in names.values() for name in found))
    unknown = next(name for name, found in names.items() if not found)
    raise ValueError(f"no task is called {unknown!r}: {hint(unknown, manager.all_tasks, folder)}")


def hint(unknown: str, known: list[str], folder: str | None) -> str:
    """What may be wrong with the name of a task."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for file in sorted(Path(folder).rglob("*.yaml")) if folder else ():
        try:
            load_yaml(file, resolve_func=False)
        except Exception as e:  # whatever a stranger's file makes the reader of YAML raise
            return f"{file} can't be read ({brief(' '.join(str(e).split()))}), correct it"
    close = nearest(unknown, known)
    return close if close.startswith("did") else "`lm_eval ls tasks` lists all; your own need --tasks_folder"


def load_tasks(cfg: HarnessConfig, limits: list[int | None]) -> dict:
    """The tasks with their data, as TaskManager.load has them, ready to be asked.

    `limits` are the models' max_length. Raises ValueError where one can't be had.
    """
    from lm_eval.utils import simple_parse_args_string

    manager, names = find_tasks(cfg)
    built = []
    for name in names:
        with task_errors(name):
            loaded = manager.load([name])
        built += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    loaded = manager.load(built)
    gen_kwargs = simple_parse_args_string(cfg.gen_kwargs)
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise ValueError(f"task {name} runs code that a model wrote, or shows pictures: omit it")
        if task.OUTPUT_TYPE == "generate_until":
            if gen_kwargs:
                task.set_config("generation_kwargs", gen_kwargs, update=True)
            for limit in limits:
                generation(name, task.config.generation_kwargs or {}, limit)
        shots = task.get_config("num_fewshot")
        if shots is None or cfg.num_fewshot is not None and shots != 0:    # 0: it wants no examples
            task.set_config("num_fewshot", cfg.num_fewshot or 0)
        with task_errors(name):                                            # `evaluate` builds them again
            task.set_fewshot_seed(seed=cfg.seed)
            task.build_all_requests(limit=cfg.limit, rank=0, world_size=1)
    return loaded


@contextlib.contextmanager
def task_errors(name: str):
    """Makes one ValueError of whatever a task's file, its code or its data raise."""
    try:
        yield
    except Exception as e:
        raise ValueError(f"task {name} can't be used ({type(e).__name__}: {brief(e)}): its data may need a "
                         "download, once, with a network; those of your own are named in its .yaml by "
                         "dataset_path: json and dataset_kwargs: data_files") from None


# ------------------------------------------------------------------------------------------
# The scores

def measure(lm: HarnessLM, tasks: dict, cfg: HarnessConfig) -> dict:
    """A model's part of the report. The random numbers are the same for every model."""
    from lm_eval.evaluator import evaluate

    random.seed(cfg.seed)
    np.random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=cfg.seed)
    results = evaluate(lm, tasks, limit=cfg.limit, log_samples=False)
    scores = results["results"] | results.get("groups", {})
    return {"max_length": lm.max_length, "truncated": lm.truncated,
            "results": {name: plain(values) for name, values in scores.items()},
            **{key: plain(results[key]) for key in ("versions", "n-shot", "n-samples", "higher_is_better")}}


def plain(value):
    """As JSON has it: what is no finite number is None."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, str | bool | int | None):
        return value
    try:
        return float(value) if math.isfinite(value) else None
    except (TypeError, ValueError):
        return str(value)


def as_markdown(report: dict) -> str:
    """All models' scores in one table; an arrow says which way is better."""
    models = [who for who in ("teacher", "student") if who in report]
    first = report[models[-1]]
    lines = ["| task | shots | documents | metric | " + " | ".join(models) + " |",
             "|---|---:|---:|---|" + "---:|" * len(models)]
    for name, values in first["results"].items():
        for key in values:
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            arrow = {True: " ↑", False: " ↓"}.get(first["higher_is_better"].get(name, {}).get(metric), "")
            title = metric + (f" ({kind})" if kind != "none" else "") + arrow
            shots = first["n-shot"].get(name, "")
            count = first["n-samples"].get(name, {}).get("effective", "")
            cells = [cell(report[who]["results"][name], metric, kind) for who in models]
            lines.append(f"| {name} | {shots} | {count} | {title} | {' | '.join(cells)} |")
    cut = [f"The {who} reads {report[who]['max_length']} tokens: the beginning of {report[who]['truncated']} "
           "longer prompts was cut off." for who in models if report[who]["truncated"]]
    return "\n".join([*lines, *([""] if cut else []), *cut])


def cell(values: dict, metric: str, kind: str) -> str:
    """A score and, where it has one, its standard error."""
    value, error = values.get(f"{metric},{kind}"), values.get(f"{metric}_stderr,{kind}")
    if not isinstance(value, int | float):
        return str(value or "-")
    return f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")


def is_report(file: Path) -> bool:
    return {"lm_eval", "student"} <= contents(file).keys()


def refuse_chat(argv: list[str]) -> None:
    """Raises ValueError for options of lm_eval that are not those of this program."""
    for argument in argv:
        name = argument.lstrip("-").partition("=")[0].replace("-", "_").removeprefix("no_")
        if argument.startswith("--") and name in CHAT:
            raise ValueError(f"--{name}: {NO_CHAT}")


def main(argv: list[str] | None = None) -> None:
    refuse_chat(sys.argv[1:] if argv is None else argv)
    cfg = cli(HarnessConfig, argv)
    device = pick_device(cfg.device)
    if TemplateLM is object:
        raise ValueError("the package lm_eval is not installed: pip install -c constraints.txt -e "
                         "'.[harness]'")
    import lm_eval

    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    folders = ({"teacher": cfg.teacher} if cfg.teacher else {}) | {"student": cfg.ckpt}
    if cfg.out:                                    # all that can be wrong before all the measuring
        check_place([Path(cfg.out)], is_report, "--out")
    shapes = [open_model(folder)[0].cfg for folder in folders.values()]
    for folder in folders.values():
        load_tokenizer(folder)
    tasks = load_tasks(cfg, [longest(shape, cfg.max_length) for shape in shapes])
    report = {"lm_eval": lm_eval.__version__, "settings": vars(cfg)}
    for who, folder in folders.items():
        report[who] = {"folder": folder} | measure(HarnessLM(folder, device, cfg), tasks, cfg)
    if cfg.out:
        write_json(Path(cfg.out), report)
    print(as_markdown(report))


if __name__ == "__main__":
    run(main)
