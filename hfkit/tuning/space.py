"""What a search may change: for each training option a range, or a list of values."""

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, get_type_hints

from hfkit.declaration import field_of
from hfkit.errors import OptionError
from hfkit.options import TrainOptions

# They say nothing about how good a training is; the seed also chooses what is held out.
_NOT_SEARCHED = ("output_dir", "resume", "overwrite", "seed")

Space = dict[str, Any]  # option -> (low, high), or the list of its values


def read_space(search: Sequence[str], train: TrainOptions) -> Space:
    """What the `search` options say to search.

    Raises:
        OptionError: there is no such training option, or it does not take such values.
    """
    space: Space = {}
    for text in search:
        name, _, values = text.partition("=")
        name = field_of(name)
        space[name] = _read_values(text, name, values, train)
    for name in space:
        if name.startswith("lora_") and not (train.lora or "lora" in space):
            raise OptionError(f"--search has {name}, which has no effect without LoRA: add --lora")
    return space


def _read_values(text: str, name: str, values: str, train: TrainOptions) -> Any:
    if name not in TrainOptions.names() or name in _NOT_SEARCHED:
        why = "cannot be searched" if name in _NOT_SEARCHED else "is not a training option"
        raise OptionError(f"--search is {text!r}: {name!r} {why}")
    low, dots, high = values.partition("..")
    if not dots and re.fullmatch(r"[^,]*\d-[\d.][^,]*", values):
        raise OptionError(f"--search is {text!r}: a range is written with two dots, such as {name}=1e-5..1e-3")
    parts = (low, high) if dots else values.split(",") if values else []
    parsed = [TrainOptions.read_value(name, part.strip()) for part in parts]
    for value in parsed:  # report a bad value before the first trial
        replace(train, **{name: value})
    if not parsed or (dots and not (all(type(value) in (int, float) for value in parsed) and parsed[0] < parsed[1])):
        raise OptionError(f"--search is {text!r}: write NAME=LOW..HIGH or NAME=A,B,C")
    if not dots:
        return parsed
    # 0..1 of a weight decay means all numbers in between; 1..5 epochs and 0..100 steps are whole numbers.
    counts = get_type_hints(TrainOptions)[name] in (int, int | None)
    whole = type(parsed[0]) is type(parsed[1]) is int and (counts or parsed[1] > 1)
    return tuple(parsed) if whole else tuple(map(float, parsed))


def default_space(train: TrainOptions, plan: TrainOptions) -> Space:
    """What to search without a `search` option: values around those that `finetune` would take.

    train: the user's options; one that is set stays as it is, but for the learning rate.
    plan: the same options, with everything decided that they leave open.
    """
    rate, batch, epochs = plan.learning_rate or 0.0, plan.per_device_train_batch_size, plan.num_train_epochs
    space: Space = {
        "learning_rate": (rate / 10, rate * 10),
        "weight_decay": (0.0, 0.2),
        "warmup_steps": (0.0, 0.2),
        "per_device_train_batch_size": sorted({2, 4, 8, 16, batch}),
        "num_train_epochs": sorted({max(1.0, float(round((epochs or 3) * share / 3))) for share in (1, 2, 3, 5)}),
        "dropout": (0.0, 0.3),
    }
    space |= {"lora_r": [4, 8, 16, 32], "lora_dropout": (0.0, 0.2)} if train.lora else {}
    chosen = {f.name for f in fields(train) if getattr(train, f.name) != f.default} - {"learning_rate"}
    chosen |= {"num_train_epochs"} if train.max_steps else set()
    return {name: values for name, values in space.items() if name not in chosen}


def suggest(trial: Any, name: str, values: Any) -> Any:
    """Have an Optuna trial choose a value."""
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    low, high = values
    choose = trial.suggest_int if isinstance(low, int) else trial.suggest_float
    return choose(name, low, high, log=low > 0 and high / low >= 20)


def contains(values: Any, value: Any) -> bool:
    """Whether a trial may choose `value` among these values."""
    return value in values if isinstance(values, list) else value is not None and values[0] <= value <= values[1]
