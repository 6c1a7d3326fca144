"""The processes that `accelerate launch` or `torchrun` started: this one's rank, and how they exchange results."""

import contextlib
import os
import sys
from typing import Any

rank = int(os.environ.get("RANK", 0))
count = int(os.environ.get("WORLD_SIZE", 1))


def gather(items: list[Any]) -> list[Any]:
    """The items of all processes, in the order of their ranks. Every process must call it."""
    if count == 1:
        return items
    from accelerate.utils import gather_object

    _state()
    return list(gather_object(items))


def any_of(flag: bool) -> bool:
    """Whether `flag` is true in any process. Every process must call it."""
    if count == 1:
        return flag
    import torch
    from accelerate.utils import reduce

    return bool(reduce(torch.tensor(float(flag), device=_state().device), "sum").item())


def first_one_first() -> contextlib.AbstractContextManager[None]:
    """A block that the first process of each machine runs before the others, which then find its results cached."""
    return contextlib.nullcontext() if count == 1 else _state().local_main_process_first()


def _state() -> Any:
    """accelerate's PartialState. Without a GPU and without `cpu=True` it would take each process for the only one."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def leave() -> None:
    """Close the connections to the other processes. If they are open at exit, torch's threads abort the process."""
    if count > 1 and "torch" in sys.modules:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()
