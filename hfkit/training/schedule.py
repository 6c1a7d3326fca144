"""How the learning rate changes: the arguments of the scheduler, checked early and completed."""

import inspect
import json
import math
from dataclasses import replace
from typing import Any

from hfkit.errors import OptionError, first_line
from hfkit.options import TrainOptions

# What a scheduler does not work without. The falling steps are a share of all steps, so that they fit every length.
_DEFAULTS = {"warmup_stable_decay": {"num_decay_steps": 0.2}, "cosine_with_min_lr": {"min_lr_rate": 0.1}}
_NEEDED = {"num_decay_steps", "min_lr_rate", "min_lr"}  # a scheduler takes the first of them, or one of the others
_FROM_TRAINER = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
_STEPS = 1000  # of the schedule that is made to check the arguments


def complete_schedule(options: TrainOptions) -> TrainOptions:
    """`options` with the arguments that their scheduler needs."""
    values = _read_arguments(options)
    if options.lr_scheduler_type not in _DEFAULTS or values.keys() & _NEEDED:
        return options
    return replace(options, lr_scheduler_kwargs=json.dumps(_DEFAULTS[options.lr_scheduler_type] | values))


def schedule_arguments(options: TrainOptions, steps: int) -> dict[str, Any]:
    """The arguments of the scheduler for a run of so many steps: a share of them becomes a number."""
    values = _read_arguments(options)
    decay = values.get("num_decay_steps")
    if isinstance(decay, float) and 0 < decay < 1:
        values["num_decay_steps"] = math.ceil(decay * steps)
    return values


def check_schedule(options: TrainOptions) -> None:
    """Raise OptionError if the scheduler does not take its arguments."""
    if not options.lr_scheduler_kwargs:  # only arguments are worth the import of torch
        return
    import torch
    from transformers import SchedulerType, get_scheduler
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    name, values = options.lr_scheduler_type, schedule_arguments(complete_schedule(options), _STEPS)
    function: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    known = [parameter for parameter in inspect.signature(function).parameters if parameter not in _FROM_TRAINER]
    if unknown := [value for value in values if value not in known]:
        names = ", ".join(known) or "no arguments"
        raise OptionError(f"--lr-scheduler-kwargs has {unknown[0]!r}: {name} takes {names}")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=options.learning_rate or 1.0)
    try:
        scheduler: Any = get_scheduler(name, optimizer, _STEPS // 20, _STEPS, values)
        for step in range(0, _STEPS, _STEPS // 20):
            scheduler.lr_lambdas[0](step)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise OptionError(f"--lr-scheduler-kwargs is {options.lr_scheduler_kwargs}: {first_line(error)}") from error


def _read_arguments(options: TrainOptions) -> dict[str, Any]:
    """What --lr-scheduler-kwargs holds."""
    example = """write an object, such as '{"num_cycles": 2}'"""
    try:
        values = json.loads(options.lr_scheduler_kwargs or "{}")
    except ValueError as error:
        raise OptionError(f"--lr-scheduler-kwargs is not valid JSON ({error}): {example}") from error
    if not isinstance(values, dict):
        raise OptionError(f"--lr-scheduler-kwargs is {options.lr_scheduler_kwargs}: {example}")
    return values
