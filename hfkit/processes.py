"""The processes that `accelerate launch` or `torchrun` started: who am I, and how do results come together."""

import os
from typing import Any

rank = int(os.environ.get("RANK", 0))
count = int(os.environ.get("WORLD_SIZE", 1))


def gather(items: list[Any]) -> list[Any]:
    """The items of all processes, in the order of their ranks; every process must call it."""
    if count == 1:
        return items
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState()
    return gather_object(items)
