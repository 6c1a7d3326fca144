"""What `tune` searches: options and the values that they may take."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, get_type_hints

from hfkit.errors import OptionError
from hfkit.options import TrainOptions
from hfkit.recipes import read_value

_LORA = {"lora_r": [4, 8, 16, 32], "lora_dropout": (0.0, 0.2)}
# They do not say how good a training is; the seed draws what is held out, too.
_NOT_SEARCHED = ("output_dir", "resume", "overwrite", "seed")


def read_space(search: Sequence[str] | None, train: TrainOptions) -> dict[str, Any]:
    """Option -> (low, high), or the list of its values.

    Raises:
        OptionError: there is no such training option, or it does not take such values.
    """
    if not search:
        return _default_space(train)
    space: dict[str, Any] = {}
    for given in search:
        name, _, values = given.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        space[name] = _read_values(given, name, values, train)
    if not (train.lora or "lora" in space) and (of_lora := [name for name in space if name.startswith("lora_")]):
        raise OptionError(f"--search has {of_lora[0]}, which nothing comes of without LoRA: add --lora")
    return space


def _default_space(train: TrainOptions) -> dict[str, Any]:
    rate = train.learning_rate
    space: dict[str, Any] = {
        "learning_rate": (rate / 10, rate * 10) if rate else (5e-5, 5e-3) if train.lora else (1e-5, 1e-3),
        "weight_decay": (0.0, 0.2),
        "warmup_steps": (0.0, 0.2),
        "per_device_train_batch_size": [2, 4, 8, 16],
        "num_train_epochs": [1.0, 2.0, 3.0, 5.0],
        "dropout": (0.0, 0.3),
    }
    space |= _LORA if train.lora else {}
    # What was set stays as it is; around a learning rate is searched.
    chosen = {f.name for f in fields(train) if getattr(train, f.name) != f.default} - {"learning_rate"}
    chosen |= {"num_train_epochs"} if train.max_steps else set()
    return {name: values for name, values in space.items() if name not in chosen}


def _read_values(given: str, name: str, values: str, train: TrainOptions) -> Any:
    if name not in TrainOptions.names() or name in _NOT_SEARCHED:
        why = "is not to be searched" if name in _NOT_SEARCHED else "is no training option"
        raise OptionError(f"--search is {given!r}: {name!r} {why}")
    low, dots, high = values.partition("..")
    read = [read_value(part) for part in ((low, high) if dots else values.split(","))]
    for value in read:  # so that a bad range is told before the first trial
        replace(train, **{name: value})
    if not values or (dots and not (all(type(value) in (int, float) for value in read) and read[0] < read[1])):
        raise OptionError(f"--search is {given!r}: write NAME=LOW..HIGH or NAME=A,B,C")
    if not dots:
        return read
    # 0..1 of a weight decay are all numbers between them; 1..5 epochs, or 0..100 steps, are whole ones.
    counts = get_type_hints(TrainOptions)[name] in (int, int | None)
    whole = type(read[0]) is type(read[1]) is int and (counts or read[1] > 1)
    return tuple(read) if whole else tuple(map(float, read))


def suggest(trial: Any, name: str, values: Any) -> Any:
    """A value for an Optuna trial."""
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    low, high = values
    draw = trial.suggest_int if isinstance(low, int) else trial.suggest_float
    return draw(name, low, high, log=low > 0 and high / low >= 20)
