"""`hfkit info`: what is installed, what this machine has, what a model needs, and what is wrong."""

import contextlib
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from hfkit import console
from hfkit.cli.flags import JSON, flags
from hfkit.errors import HfkitError
from hfkit.hub import endpoint, reach_hub
from hfkit.models.folder import ModelFiles, count_parameters
from hfkit.models.sources import find_model
from hfkit.options import ModelOptions

_PACKAGES = (
    *("hfkit", "torch", "transformers", "accelerate", "datasets", "evaluate", "tokenizers", "safetensors"),
    *("huggingface-hub", "peft", "gguf", "bitsandbytes"),
)
_UNITS = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "amx_int8", "sve_bf16")
_PARAMETER_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@flags
def info(model: ModelOptions, json: bool = JSON) -> None:
    """Show versions, devices and a model's size; say what is wrong.

    Each problem comes with the way to fix it.

    Examples:
        hfkit info
        hfkit info -m gpt2
    """
    source = find_model(model)
    report: dict[str, Any] = {"versions": find_versions(), **describe_machine(), "model": describe_model(source)}
    report["problems"] = find_problems(report)
    if json:
        console.write_json(report)
        return
    for title in ("versions", "machine", "devices", "hub", "model"):
        lines = (f"  {name:<16} {_readable(name, value)}\n" for name, value in report[title].items())
        console.write(f"{title}\n" + "".join(lines))
    console.write("".join(f"problem: {problem}\n" for problem in report["problems"]) or "no problems found\n")


def find_versions() -> dict[str, str | None]:
    """Return the version of Python and of each package that matters; None if it is not installed."""
    from importlib import metadata

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        versions[package] = None
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def describe_machine() -> dict[str, dict[str, Any]]:
    """Return processor, memory, GPUs, caches and the Hub. Sizes are in bytes."""
    import psutil
    import torch
    from huggingface_hub import constants, scan_cache_dir

    from hfkit.models.architecture import find_compiler

    features = torch.cpu.get_capabilities()
    memory = psutil.virtual_memory()
    cache = Path(constants.HF_HUB_CACHE)
    cached = scan_cache_dir(cache).repos if cache.is_dir() else ()
    is_offline, is_reachable = constants.is_offline_mode(), False
    with contextlib.suppress(HfkitError):
        if not is_offline:
            reach_hub("a model")
            is_reachable = True
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append({"name": torch.cuda.get_device_name(index), "memory": total, "free": free})
    return {
        "machine": {
            "system": platform.platform(),
            "processor": features.get("cpu_name") or platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "matrix_units": [name for name in _UNITS if features.get(name)],
            "memory": memory.total,
            "memory_free": memory.available,
            "compiler": find_compiler(),
        },
        "devices": {"gpus": gpus, "cuda": torch.version.cuda, "mps": torch.backends.mps.is_available()},
        "hub": {
            "endpoint": endpoint(),
            "offline": is_offline,
            "reachable": is_reachable,
            "cache": str(cache),
            "cache_free": shutil.disk_usage(_nearest_existing(cache)).free,
            "cached_models": sorted(repo.repo_id for repo in cached if repo.repo_type == "model"),
        },
    }


def describe_model(source: ModelFiles) -> dict[str, Any]:
    """Return size and limits of a model from its files alone. `memory` is that of the weights, in bytes."""
    if source.gguf:
        return {"name": source.name, "file": str(source.path), "file_bytes": source.size}
    parameters = count_parameters(source)
    config = source.config

    def first_of(*names: str) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), None)

    return {
        "name": source.name,
        "folder": str(source.folder),
        "architecture": first_of("architectures", "model_type"),
        "parameters": parameters,
        "layers": first_of("n_layer", "num_hidden_layers", "num_layers"),
        "width": first_of("n_embd", "hidden_size", "d_model"),
        "context": first_of("n_positions", "max_position_embeddings"),
        "vocabulary": config.get("vocab_size"),
        "file_bytes": source.size,
        "memory": {name: size * parameters for name, size in _PARAMETER_BYTES.items()},
        "adapter": str(source.adapter) if source.adapter else None,
    }


def find_problems(report: dict[str, Any]) -> list[str]:
    """Return what is wrong, each line with the way to fix it."""
    machine, devices, hub, model = report["machine"], report["devices"], report["hub"], report["model"]
    problems = _version_problems(report["versions"])
    if devices["cuda"] and not devices["gpus"]:
        problems.append("torch is built for CUDA but sees no GPU: check nvidia-smi, the driver, CUDA_VISIBLE_DEVICES")
    if not machine["compiler"]:
        problems.append("no C++ compiler, so nothing is compiled for speed: install g++")
    needed, free = model.get("memory", {}).get("float32", model["file_bytes"]), machine["memory_free"]
    if needed > free and not devices["gpus"]:
        sizes = f"{model['name']} needs {_readable_size(needed)}, {_readable_size(free)} are free"
        problems.append(f"{sizes}: use --quantize int8")
    cache = Path(hub["cache"])
    if hub["cache_free"] < 2**30:
        free = _readable_size(hub["cache_free"])
        problems.append(f"{free} are free for downloads ({cache}): make room, or set HF_HOME")
    if not os.access(_nearest_existing(cache), os.W_OK):
        problems.append(f"the cache cannot be written ({cache}): set HF_HOME to a folder of yours")
    if not hub["offline"] and not hub["reachable"]:
        reason = f"the Hub cannot be reached ({hub['endpoint']})"
        problems.append(f"{reason}: bundled, cached and local models work; HF_ENDPOINT names a mirror for others")
    return problems


def _version_problems(versions: dict[str, str | None]) -> list[str]:
    """Compare what is installed with what hfkit requires; extras do not count."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    problems = []
    for requirement in map(Requirement, requires("hfkit") or []):
        installed = versions.get(requirement.name)
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if needed and installed and not requirement.specifier.contains(installed, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            problems.append(f"{requirement.name} {installed} is not {requirement.specifier}: pip install '{wanted}'")
    return problems


def _nearest_existing(path: Path) -> Path:
    return next(parent for parent in [path, *path.parents] if parent.exists())


def _readable(name: str, value: Any) -> str:
    """Format the value of the field `name`: lists and mappings on one line, bytes with their unit."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(name, part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(_readable(name, part) for part in value) or "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return _readable_size(value) if name.endswith(("memory", "free", "bytes")) else f"{value:,}"
    return {None: "-", True: "yes", False: "no"}.get(value, str(value))


def _readable_size(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.{0 if unit == 'B' else 1}f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"
