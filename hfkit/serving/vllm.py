"""`hfkit serve --engine vllm`: make a folder that vLLM reads, and let vLLM serve it from an environment of its own."""

import hashlib
import os
import shlex
import shutil
from pathlib import Path
from typing import NoReturn

from safetensors import safe_open

from hfkit.console import note, write
from hfkit.errors import HfkitError, OptionError
from hfkit.hub import cache_folder
from hfkit.models.folder import ModelFiles, weight_files
from hfkit.models.sources import find_model
from hfkit.options import ModelOptions

_READ_BY_VLLM = {"F32", "F16", "BF16"}
_POSITIONS = ("n_positions", "max_position_embeddings", "n_ctx")  # names of the context in config.json


def serve_with_vllm(model: ModelOptions, host: str, port: int, api_key: str | None) -> NoReturn:
    """Become `vllm serve` for this model. It shares no environment with hfkit: each pins its own torch.

    HfkitError if there is no vLLM; then the line to run is printed.
    """
    source = find_model(model)
    if not source.gguf and not source.is_causal:
        raise OptionError(f"{source.name} does not continue texts: leave --engine vllm out")
    if model.quantize or model.trust_remote_code or model.device_map:
        raise OptionError(
            "vLLM gets whole weights and no code: leave --quantize, --trust-remote-code, --device-map out"
        )
    folder = _readable_folder(source, model)
    command = ["vllm", "serve", str(folder), "--served-model-name", source.name, "--generation-config", "vllm"]
    command += ["--host", host, "--port", str(port), "--dtype", model.dtype]
    if positions := next((source.config[name] for name in _POSITIONS if name in source.config), None):
        command += ["--max-model-len", str(positions)]
    if api_key:
        os.environ["VLLM_API_KEY"] = api_key  # everybody can read the arguments of a process
    for words in (command, ["uvx", *command]):
        if program := shutil.which(words[0]):
            note(f"starting {shlex.join(words)}")
            os.environ.pop("PYTHONPATH", None)  # of this environment
            os.execv(program, words)  # noqa: S606, no shell
    write(shlex.join(command) + "\n")
    raise HfkitError("there is neither vllm nor uvx here: run the line above where vLLM is installed")


def _readable_folder(source: ModelFiles, model: ModelOptions) -> Path:
    """The model's own folder; if vLLM cannot read that, a copy with the adapter merged and a usual precision."""
    if not (source.adapter or source.gguf) and _precisions(source) <= _READ_BY_VLLM:
        return source.folder.absolute()
    parts = [source.path] if source.gguf else [source.folder, source.adapter or source.folder]
    files = [file for part in parts for file in ([part] if part.is_file() else sorted(part.glob("*.*")))]
    stamps = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file()]
    target = cache_folder() / "vllm" / hashlib.sha256(f"{model.dtype}{stamps}".encode()).hexdigest()[:16]
    if not target.exists():
        from hfkit.models.exporting import export

        note(f"writing {source.name} to {target}, as vLLM reads it")
        export(model, output_dir=str(target), dtype=model.dtype)
    return target


def _precisions(source: ModelFiles) -> set[str]:
    """Names that safetensors gives to the precisions of the weights."""
    names = set()
    for shard in weight_files(source.folder, source.name):
        with safe_open(source.folder / shard, framework="np") as file:
            names |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    return names
