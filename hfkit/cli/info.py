"""`hfkit info`: what is installed, what this machine has, what a model needs, and what is wrong."""

import importlib.metadata
import os
import platform
import shutil
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hfkit import console
from hfkit.cli.flags import Json, flags
from hfkit.hub import endpoint
from hfkit.models.sources import ModelFiles, count_parameters, find_model
from hfkit.options import ModelOptions


@flags
def info(model: ModelOptions, json: Json = False) -> None:
    """Show versions, devices, caches and, with -m, a model's size and limits; say what is wrong and how to mend it."""

    show_info(model, json=json)


_PACKAGES = ("hfkit", "torch", "transformers", "accelerate", "datasets", "evaluate", "tokenizers", "safetensors",
             "huggingface-hub", "peft", "gguf", "bitsandbytes")  # fmt: skip
_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def show_info(options: ModelOptions, *, json: bool) -> None:
    """Print the report; HfkitError (exit code 1) where a named model cannot be had."""
    source = find_model(options)
    report = {"versions": versions(), **describe_machine(), "model": describe_model(source)}
    report["problems"] = find_problems(report)
    if json:
        import json as json_module

        console.write(json_module.dumps(report, ensure_ascii=False) + "\n")
        return
    for title, part in report.items():
        if title == "problems":
            continue
        rows = part.items() if isinstance(part, dict) else [("", part)]
        console.write(f"{title}\n" + "".join(f"  {name:<16} {_readable(name, value)}\n" for name, value in rows))
    if not report["problems"]:
        console.write("no problems found\n")
    for problem in report["problems"]:
        console.write(f"problem: {problem}\n")


def versions() -> dict[str, str | None]:
    """Installed version of each package that matters; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def describe_machine() -> dict[str, Any]:
    """Processor, memory, GPUs, caches and the Hub. Sizes are in bytes."""
    import torch
    from huggingface_hub import constants

    features = torch.cpu.get_capabilities()
    units = [
        name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "amx_int8", "sve_bf16") if features.get(name)
    ]
    cache = Path(constants.HF_HUB_CACHE)
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append({"name": torch.cuda.get_device_name(index), "memory": total, "free": free})
    return {
        "machine": {
            "system": platform.platform(),
            "processor": features.get("cpu_name") or platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "matrix_units": units,
            "memory": _memory("MemTotal"),
            "memory_free": _memory("MemAvailable"),
            "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
        },
        "devices": {"gpus": gpus, "cuda": torch.version.cuda, "mps": torch.backends.mps.is_available()},
        "hub": {
            "endpoint": endpoint(),
            "offline": constants.is_offline_mode(),
            "reachable": not constants.is_offline_mode() and _reachable(constants.ENDPOINT),
            "cache": str(cache),
            "cache_free": shutil.disk_usage(_existing(cache)).free,
            "cached_models": _cached_models(cache),
        },
    }


def describe_model(source: ModelFiles) -> dict[str, Any]:
    """Size and limits of a model, from its files alone. Memory is that of the weights, in bytes."""
    if source.gguf:
        return {"name": source.name, "file": str(source.folder / source.gguf), "file_bytes": source.size}
    parameters = count_parameters(source)
    config = source.config

    def first(*names: str) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), None)

    return {
        "name": source.name,
        "folder": str(source.folder),
        "architecture": first("architectures", "model_type"),
        "parameters": parameters,
        "layers": first("n_layer", "num_hidden_layers", "num_layers"),
        "width": first("n_embd", "hidden_size", "d_model"),
        "context": first("n_positions", "max_position_embeddings"),
        "vocabulary": config.get("vocab_size"),
        "file_bytes": source.size,
        "memory": {name: size * parameters for name, size in _BYTES.items()},
        "adapter": str(source.adapter) if source.adapter else None,
    }


def find_problems(report: dict[str, Any]) -> list[str]:
    """What is wrong, each with how to mend it."""
    from packaging.requirements import Requirement

    problems = []
    for line in importlib.metadata.requires("hfkit") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = report["versions"].get(requirement.name)
        if installed and not requirement.specifier.contains(installed, prereleases=True):
            problems.append(
                f"{requirement.name} {installed} is not {requirement.specifier}: pip install '{requirement}'"
            )
    machine, devices, hub, model = report["machine"], report["devices"], report["hub"], report["model"]
    if devices["cuda"] and not devices["gpus"]:
        problems.append(
            "torch is built for CUDA but sees no GPU: check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
        )
    if not machine["compiler"]:
        problems.append("no C++ compiler, so nothing is compiled for speed: install g++")
    needed = model.get("memory", {}).get("float32", model["file_bytes"])
    if machine["memory_free"] is not None and needed > machine["memory_free"] and not devices["gpus"]:
        problems.append(
            f"{model['name']} needs {_size(needed)}, free are {_size(machine['memory_free'])}: --quantize int8"
        )
    if hub["cache_free"] < 2**30:
        problems.append(f"{_size(hub['cache_free'])} free for downloads ({hub['cache']}): make room, or set HF_HOME")
    if not os.access(_existing(Path(hub["cache"])), os.W_OK):
        problems.append(f"the cache cannot be written ({hub['cache']}): set HF_HOME to a folder of yours")
    if not hub["offline"] and not hub["reachable"]:
        problems.append(
            f"the Hub cannot be reached ({hub['endpoint']}): bundled, cached and local models work; "
            "set HF_ENDPOINT to a mirror for others"
        )
    return problems


def _reachable(endpoint: str) -> bool:
    url = urlsplit(endpoint)
    try:
        socket.create_connection((url.hostname or "", url.port or (443 if url.scheme == "https" else 80)), 2).close()
    except OSError:
        return False
    return True


def _existing(path: Path) -> Path:
    return next(parent for parent in [path, *path.parents] if parent.exists())


def _cached_models(cache: Path) -> list[str]:
    from huggingface_hub import scan_cache_dir

    if not cache.is_dir():
        return []
    return sorted(repo.repo_id for repo in scan_cache_dir(cache).repos if repo.repo_type == "model")


def _memory(name: str) -> int | None:
    """Bytes that Linux reports under `name`; None elsewhere."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _readable(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(name, part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(_readable(name, part) for part in value) or "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return _size(value) if name.endswith(("memory", "free", "bytes")) else f"{value:,}"
    return {None: "-", True: "yes", False: "no"}.get(value, str(value))


def _size(number: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.1f} {unit}" if unit != "B" else f"{number} B"
        number /= 1000  # type: ignore[assignment]
    raise AssertionError
