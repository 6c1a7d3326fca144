"""Import torch and transformers without what a one-shot command never uses: half of the time of a cold start.

Each line below says what it saves, in seconds of processor time on a machine where the plain script takes 5.0.
`HFKIT_FULL_IMPORTS=1` switches all of it off. Whatever needs the missing parts later imports them then.
"""

import contextlib
import gc
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

_SCIPY = "is_scipy_available"  # 0.25: the losses of object detection import scipy.optimize
_DISTRIBUTED = "is_torch_distributed_available"  # 0.1 alone, 0.5 once nothing imports dynamo: shards, with sympy
_DYNAMO = "torch._dynamo"  # 0.6: for three decorators that mark functions for the compiler
_SHAPES = "torch.fx.experimental.symbolic_shapes"  # 0.3 from torch 2.15 on: sympy, for one function of flex attention


def import_lean(model_type: str) -> None:
    """Import what a model of this type needs, for a command that compiles nothing and runs in one process."""
    if "transformers" in sys.modules or os.environ.get("HFKIT_FULL_IMPORTS") == "1":
        return
    gc.disable()  # 0.4: imports make a million objects and no garbage
    try:
        with _lean():
            from transformers.models.auto.configuration_auto import model_type_to_module_name

            folder = model_type_to_module_name(model_type)
            import_module(f"transformers.models.{folder}.modeling_{folder}")
        _compile_patterns_late()
    except Exception:  # noqa: BLE001, a release of a library that needs what is left out here: import all of it
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]
    finally:
        gc.freeze()  # what is imported stays: no later collection looks at it
        gc.enable()


@contextlib.contextmanager
def _lean() -> Iterator[None]:
    import torch

    if _DYNAMO in sys.modules:
        raise ImportError("torch imports its compiler by itself")
    stub = ModuleType(_DYNAMO)
    stub.__path__ = []  # a package, whose submodules are those below
    mask, shapes = ModuleType(f"{_DYNAMO}._trace_wrapped_higher_order_op"), ModuleType(_SHAPES)
    # Of use to the compiler alone: none is called while a model is imported or runs.
    vars(stub).update(allow_in_graph=_same, assume_constant_result=_same, disable=_same)
    # A few attention masks use these when they run.
    vars(mask).update(TransformGetItemToIndex=_late(mask.__name__, "TransformGetItemToIndex"))
    vars(shapes).update(has_free_unbacked_symbols=_late(_SHAPES, "has_free_unbacked_symbols"))
    stubs = {module.__name__: module for module in (stub, mask, shapes)}
    sys.modules |= stubs
    vars(torch)["_dynamo"] = stub
    try:
        from transformers import utils
        from transformers.utils import import_utils

        flags = {name: getattr(utils, name) for name in (_SCIPY, _DISTRIBUTED)}
        for name in flags:
            setattr(utils, name, lambda: False)
            setattr(import_utils, name, lambda: False)
        _scan_once()
        try:
            yield
        finally:
            for name, flag in flags.items():
                setattr(utils, name, flag)
                setattr(import_utils, name, flag)
    finally:
        for name in stubs:
            del sys.modules[name]
        del vars(torch)["_dynamo"]


def _scan_once() -> None:
    """0.25: `transformers` and `transformers.models` both read all files of all models, to learn what is in them."""
    from transformers.utils import import_utils

    scanned, scan = vars(sys.modules["transformers"]), import_utils.define_import_structure
    names, missing = scanned["_import_structure"].items(), scanned["_object_missing_backend"].items()
    within = {name.removeprefix("models."): objects for name, objects in names if name.startswith("models.")}
    vars(import_utils)["define_import_structure"] = lambda *_: {frozenset(): within}
    try:
        models = import_module("transformers.models")
    finally:
        vars(import_utils)["define_import_structure"] = scan
    vars(models)["_object_missing_backend"] |= {name.removeprefix("models."): backends for name, backends in missing}


def _same(function: Any = None, *arguments: Any, **options: Any) -> Any:
    """What these decorators do without a compiler; also as `@disable(reason=...)`."""
    return _same if function is None else function


def _late(module: str, name: str) -> Callable[..., Any]:
    """A function or class of `module`, which is imported at the first call."""
    return lambda *arguments: getattr(import_module(module), name)(*arguments)


def _compile_patterns_late() -> None:
    """0.1: from_pretrained makes a thousand patterns, for the checkpoints of all architectures, and uses a few."""
    late = ModuleType("re")
    vars(late).update(vars(re), compile=_Pattern)
    vars(import_module("transformers.core_model_loading"))["re"] = late


class _Pattern:
    """A regular expression that is compiled on its first use."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __getattr__(self, name: str) -> Any:
        if name == "_arguments":  # while it is copied
            raise AttributeError(name)
        return getattr(re.compile(*self._arguments), name)
