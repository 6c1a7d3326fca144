"""The learning rate's scheduler gets what it needs, and what it does not take is refused before anything is read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from support import trials
from support.shell import call
from transformers import get_scheduler

import hfkit
from hfkit.errors import OptionError
from hfkit.options import TrainOptions
from hfkit.training.schedule import check_schedule, complete_schedule, schedule_arguments

pytestmark = pytest.mark.usefixtures("brisk")
SCHEDULERS = get_args(get_type_hints(TrainOptions)["lr_scheduler_type"])


def rates(options: TrainOptions, steps: int, warmup: int = 0) -> list[float]:
    """The learning rate of each step, and after the last one, as a share of the peak."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    arguments = schedule_arguments(complete_schedule(options), steps)
    scheduler = get_scheduler(options.lr_scheduler_type, optimizer, warmup, steps, arguments)
    return [scheduler.lr_lambdas[0](step) if scheduler.lr_lambdas[0] else 1.0 for step in range(steps + 1)]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_complete_schedule(name):
    """Every scheduler works without arguments; one that needs some gets them, and keeps those that were given."""
    options = TrainOptions(lr_scheduler_type=name)
    check_schedule(options)
    assert max(rates(options, 20, warmup=2)) <= 1
    needed = {"warmup_stable_decay": {"num_decay_steps": 0.2}, "cosine_with_min_lr": {"min_lr_rate": 0.1}}
    arguments = complete_schedule(options).lr_scheduler_kwargs
    assert arguments == (json.dumps(needed[name]) if name in needed else None)
    completed = replace(options, lr_scheduler_kwargs=arguments)
    assert complete_schedule(completed) == completed
    check_schedule(completed)


def test_complete_schedule_keeps_arguments():
    """The default joins other arguments, and does not replace the same one, or the other way to say it."""
    for name, given, completed in [
        ("warmup_stable_decay", '{"decay_type": "linear"}', '{"num_decay_steps": 0.2, "decay_type": "linear"}'),
        ("warmup_stable_decay", '{"num_decay_steps": 6}', '{"num_decay_steps": 6}'),
        ("cosine_with_min_lr", '{"min_lr": 1e-5}', '{"min_lr": 1e-5}'),
    ]:
        options = TrainOptions(lr_scheduler_type=name, lr_scheduler_kwargs=given)
        assert complete_schedule(options).lr_scheduler_kwargs == completed


def test_default_rates():
    """The last fifth of the steps falls to zero, at least one of them; a cosine ends at a tenth of the peak."""
    stable = TrainOptions(lr_scheduler_type="warmup_stable_decay")
    assert rates(stable, 20) == pytest.approx([1.0] * 17 + [0.853553, 0.5, 0.146447, 0.0], abs=1e-6)
    assert rates(stable, 3) == pytest.approx([1.0, 1.0, 1.0, 0.0])
    assert rates(TrainOptions(lr_scheduler_type="cosine_with_min_lr"), 20)[-1] == pytest.approx(0.1)


def test_finetune_with_the_default_schedule(tiny, corpus, tmp_path, capfdbinary):
    """The default is recorded, and the recipe repeats the run."""
    options = trials.SMALL | {"max_steps": 10, "lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 0}
    run = hfkit.finetune(corpus, model=tiny, output_dir=tmp_path / "run", **options)
    learning = [entry["learning_rate"] for entry in run.metrics["history"] if "learning_rate" in entry]
    assert learning == pytest.approx([1e-3] * 9 + [5e-4])
    recipe = str(tmp_path / "run" / "recipe.yaml")
    assert """lr_scheduler_kwargs: "{\\"num_decay_steps\\": 0.2}"\n""" in Path(recipe).read_text()
    result = call(capfdbinary, "finetune", "--config", recipe, "-o", tmp_path / "again", "-q")
    assert result.returncode == 0, result.stderr
    assert trials.outcome(tmp_path / "again") == trials.outcome(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("linear", '{"num_cycles": 2', "--lr-scheduler-kwargs is not valid JSON"),
        ("linear", "2", "--lr-scheduler-kwargs is 2: write an object, such as '{\"num_cycles\": 2}'"),
        ("linear", '{"power": 2}', "--lr-scheduler-kwargs has 'power': linear takes no arguments"),
        ("constant", '{"power": 2}', "--lr-scheduler-kwargs has 'power': constant takes no arguments"),
        ("warmup_stable_decay", '{"num_decay": 2}', "has 'num_decay': warmup_stable_decay takes num_decay_steps, "),
        ("warmup_stable_decay", '{"decay_type": "x"}', '--lr-scheduler-kwargs is {"decay_type": "x"}: Unknown decay'),
        ("warmup_stable_decay", '{"num_decay_steps": "4"}', '--lr-scheduler-kwargs is {"num_decay_steps": "4"}: '),
        ("polynomial", '{"power": "2"}', '--lr-scheduler-kwargs is {"power": "2"}: '),
    ],
)
def test_finetune_refuses_arguments(tiny, tmp_path, name, arguments, words):
    """The flag is named before the corpus is read, and the folder is not begun."""
    options = trials.SMALL | {"lr_scheduler_type": name, "lr_scheduler_kwargs": arguments}
    with pytest.raises(OptionError) as error:
        hfkit.finetune(str(tmp_path / "missing.txt"), model=tiny, output_dir=tmp_path / "run", **options)
    assert words in str(error.value)
    assert not (tmp_path / "run").exists()
