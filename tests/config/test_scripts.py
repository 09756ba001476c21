"""The settings of the scripts: what they refuse, and which preset is for which."""

from pathlib import Path

import pytest

import config
from common import REPO, one_line, start
from distill import DistillConfig
from lib.runs import RunConfig
from model import ModelConfig
from tools.demo import DemoConfig
from train import FitConfig, TrainConfig

TRAIN = {"gpt2-124m", "qwen2-7b", "rwkv7-124m", "rwkv7-1b5", "rwkv7-3b", "shakespeare-cpu"}
DISTILL = {"results", "smollm2"}  # and tools.demo, which has distill.py's settings


@pytest.mark.parametrize("path", sorted((REPO / "config").glob("*.toml")), ids=lambda p: p.name)
def test_every_preset_fits_the_scripts_it_is_for_and_no_other(path):
    fits = set()
    for cls in (TrainConfig, DistillConfig, DemoConfig):
        try:
            config.cli(cls, [str(path)])
            fits.add(cls)
        except ValueError as e:
            assert "unknown setting" in str(e)
    assert path.stem in TRAIN | DISTILL
    assert fits == ({TrainConfig} if path.stem in TRAIN else {DistillConfig, DemoConfig})


RATES = [
    "learning_rate",
    "learning_rate_end",
    "weight_decay",
    "weight_decay_end",
    "att_weight_decay",
    "ffn_weight_decay",
    "rwkv_lr_multiplier",
    "beta1",
    "beta2",
    "eps",
    "clip",
    "max_minutes",
    "terminate_at_loss",
    "save_minutes",
]
COUNTS = [
    "batch_size",
    "accum",
    "keep_last",
    "log_every",
    "save_every",
    "eval_every",
    "max_tokens",
    "bptt_chunk",
]
OF_THE_RUN = {"save_minutes", "keep_last", "log_every", "save_every"}


@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize("name", RATES)
def test_a_rate_that_is_negative_or_not_finite_is_refused_by_name(name, value):
    cls = RunConfig if name in OF_THE_RUN else FitConfig
    with pytest.raises(ValueError, match=f"^{name} = "):
        cls(**{name: value})


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_of_zero_is_refused_by_name(name):
    cls = RunConfig if name in OF_THE_RUN else FitConfig
    with pytest.raises(ValueError, match=f"^{name} = 0"):
        cls(**{name: 0})


@pytest.mark.parametrize(
    "cls, wrong",
    [
        (FitConfig, {"max_steps": -1}),
        (FitConfig, {"warmup_steps": -1}),
        (FitConfig, {"schedule": "step"}),
        (FitConfig, {"beta1": 1.0}),
        (FitConfig, {"beta2": 1.0}),
        (RunConfig, {"seed": -1}),
        (TrainConfig, {"eval_tokens": 0}),
        (DistillConfig, {"eval_tokens": 0}),
        (DistillConfig, {"block_size": 0}),
    ],
)
def test_other_numbers_and_choices_are_refused_by_name(cls, wrong):
    with pytest.raises(ValueError, match="^{} = ".format(*wrong)) as error:
        cls(**wrong)
    one_line(error.value)


def test_no_steps_and_what_is_off_are_allowed():
    FitConfig(max_steps=0, warmup_steps=0, clip=None, eval_every=None, bptt_chunk=None)
    RunConfig(save_every=None, save_minutes=None)


def test_what_is_about_the_run_is_no_setting_of_the_loop():
    for name in ("out", "resume", "overwrite", "device", "seed", "compile", "wandb", *OF_THE_RUN):
        assert not hasattr(FitConfig(), name) and hasattr(RunConfig(), name)
    assert config.cli(TrainConfig, ["--save_every", "7", "--out", "x"]).run == RunConfig(
        out="x", save_every=7
    )
    flags = ["--keep_last", "3", "--match.max_steps", "5"]
    assert config.cli(DistillConfig, flags).run == RunConfig(out="out/rwkv", keep_last=3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kl_weight": -1.0},
        {"kl_weight": float("nan")},
        {"ce_weight": float("inf")},
        {"kl_weight": 0.0},
        {"dpo_smoothing": 0.5},
        {"dpo_beta": -0.1},
        {"dpo_beta": 0.0},
        {"stages": "match,align"},
        {"stages": ""},
        {"stages": "align,align"},
        {"kl_kind": "sideways"},
        {"align_kind": "l1"},
        {"dpo_kind": "ipo"},
    ],
)
def test_a_distillation_that_cannot_be_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DistillConfig(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"align": FitConfig(bptt_chunk=4)},
        {"match": FitConfig(bptt_truncate=True)},
        {"stages": "distil"},
        {"stages": "align,distil"},
    ],
)
def test_a_distillation_refuses_what_its_stages_cannot_do(wrong):
    for cls in (DistillConfig, DemoConfig):  # which extends it
        with pytest.raises(ValueError) as error:
            cls(**wrong)
        one_line(error.value)


def test_a_demo_has_the_settings_of_a_distillation_and_those_of_a_teacher():
    flags = [
        "--kl_weight",
        "0.5",
        "--teacher_model.n_layer",
        "2",
        "--teacher_fit.max_steps",
        "3",
        "--controls",
    ]
    cfg = config.cli(DemoConfig, flags)
    assert cfg.teacher_model == ModelConfig(n_layer=2) and cfg.teacher_fit.max_steps == 3
    assert cfg.kl_weight == 0.5 and cfg.controls


def preset(folder: Path, text: str) -> str:
    (folder / "preset.toml").write_text(text)
    return str(folder / "preset.toml")


def test_scripts_refuse_nonsense_with_its_remedy_and_a_failing_status(tmp_path):
    """From the shell: unknown key, no teacher, no data, rate below zero, odd heads."""
    empty = tmp_path / "empty"
    empty.mkdir()
    folders = ["--teacher", tmp_path / "teacher", "--out", tmp_path / "out"]
    cases = [
        (["train.py", preset(tmp_path, "max_stepz = 3\n[fit]\n")], "unknown setting max_stepz"),
        (["distill.py", "--data", empty, *folders], f"no teacher at {tmp_path / 'teacher'}"),
        (["-m", "tools.demo", "--data", empty, *folders], f"{empty}"),
        (["train.py", "--learning_rate=-1"], "learning_rate = -1.0: it must be a number of at least 0"),
        (
            ["train.py", "--n_embd", "30", "--n_head", "4"],
            "n_embd = 30 is not divisible by n_head = 4: change one, or set head_size",
        ),
    ]
    for process, (args, says) in [(start(*args), (args, says)) for args, says in cases]:  # all at once
        err = process.communicate(timeout=120)[1]
        assert process.returncode not in (0, None) and "Traceback" not in err, (args, err)
        if "╭" in err:  # what flags got wrong, tyro puts in a box
            err = " ".join(err.replace("│", " ").split())
        assert says in one_line(err), (args, err)
