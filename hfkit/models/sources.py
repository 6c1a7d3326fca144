"""From a model's name to a local folder that is safe to load. Imports neither torch nor transformers.

What is local or cached never touches the network; a Hub that cannot be reached fails within seconds.
"""

import json
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hfkit
from hfkit.console import detail
from hfkit.errors import HfkitError
from hfkit.hub import PROBE_SECONDS, endpoint, explain_hub_error, reach_hub
from hfkit.options import ModelOptions

BUNDLED = Path(hfkit.__file__).parent / "bundled"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "source.spm", "sentencepiece.bpe.model"),
)
_WANTED = (".json", ".model", ".spm", ".txt", ".jinja", ".py")
_SINGLE = ("model.safetensors", "adapter_model.safetensors")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model on this machine."""

    name: str  # as the user gave it
    folder: Path
    config: dict[str, Any]  # config.json; empty for a .gguf file
    gguf: str | None = None  # name of the .gguf file inside `folder`
    adapter: Path | None = None  # folder of a LoRA adapter on top of the model
    trust_remote_code: bool = False

    @property
    def size(self) -> int:
        """Bytes of the weight files."""
        files = [self.folder / self.gguf] if self.gguf else list(self.folder.glob("*.safetensors"))
        return sum(file.stat().st_size for file in files)

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer and the task: the adapter's own, if it has them, else the model's."""
        return self.adapter if self.adapter and _has_tokenizer(self.adapter) else self.folder


def find_model(options: ModelOptions | str | None = None) -> ModelFiles:
    """Find the model that `options` name, download it if it is not here, and check its files.

    Raises:
        HfkitError: there is no such model, it is damaged or unsafe, or the Hub cannot be reached.
    """
    options = ModelOptions.make(options)
    name = (os.environ.get("HFKIT_MODEL") or "bundled") if options.model is None else options.model
    path = BUNDLED if name == "bundled" else _local(name)
    if path and path.is_file():
        return _check_gguf(name, path)
    if path is None:
        if options.trust_remote_code and not re.fullmatch("[0-9a-f]{40}", options.revision or ""):
            raise HfkitError(
                f"--trust-remote-code runs the code of {name}: give --revision with the 40 characters of a commit "
                "that you have read, or use a local folder"
            )
        path = _from_hub(name, options.revision)
    if (path / "adapter_config.json").is_file():
        return _with_base(name, path, options)
    config = read_json(path / "config.json", name)
    source = ModelFiles(name, path, config, trust_remote_code=options.trust_remote_code)
    _check_folder(source)
    return source


def _local(name: str) -> Path | None:
    """The file or folder called `name`, or None."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError):  # too long for a path, a folder we may not read, ~nobody
        return None


def _with_base(name: str, path: Path, options: ModelOptions) -> ModelFiles:
    """The LoRA adapter in `path` and its base model."""
    adapter = read_json(path / "adapter_config.json", name)
    base, revision = adapter.get("base_model_name_or_path"), adapter.get("revision")
    if not isinstance(base, str) or not base:
        raise HfkitError(f"the adapter does not name its base model ({path}): set base_model_name_or_path")
    if not (path / "adapter_model.safetensors").is_file():
        raise HfkitError(f"no adapter_model.safetensors ({path}): only safetensors are loaded, save the adapter again")
    _check_header(path / "adapter_model.safetensors")
    folder = _local(base)
    if folder and (folder / "adapter_config.json").is_file():
        raise HfkitError(f"the base of the adapter is an adapter too ({path}: {base}): merge that one first")
    try:
        source = find_model(replace(options, model=base, revision=revision if isinstance(revision, str) else None))
    except HfkitError as error:
        raise HfkitError(f"no base model for the adapter ({path}): {error}") from error
    return replace(source, name=name, adapter=path)


def _check_gguf(name: str, path: Path) -> ModelFiles:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise HfkitError(f"{name} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise HfkitError(f"not a model ({name}): give a .gguf file or a folder with config.json")
    return ModelFiles(name, path.parent, {}, gguf=path.name)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _TOKENIZER_FILES)


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of the model called `name`."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise HfkitError(f"no {path.name} ({path.parent}): {name} is not a saved model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise HfkitError(f"{path.name} cannot be read ({path}): {error}; get the model again") from error
    if not isinstance(value, dict):
        raise HfkitError(f"{path.name} is not a JSON object ({path}): get the model again")
    return value


def _check_folder(source: ModelFiles) -> None:
    folder, name = source.folder, source.name
    if _names_kernel(source.config):
        raise HfkitError(f"config.json asks for code from the Hub ({folder}): remove its attn_implementation")
    if "transformers_weights" in source.config:
        # transformers would load that file, or the shards that it lists, unchecked.
        raise HfkitError(f"config.json names other weights ({folder}): remove its transformers_weights")
    _check_code(source)
    shards = _weights(folder, name)
    if shards == ["model.safetensors"] and not (folder / shards[0]).is_file():
        other = next((file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".h5")), None)
        what = f"only {other}, which is not safetensors and could run code" if other else "no model.safetensors"
        raise HfkitError(f"{what} ({folder}): save the model again with save_pretrained")
    for shard in shards:
        path = folder / shard
        if Path(shard).name != shard or not _inside(path, folder):
            raise HfkitError(f"weights outside of the model's folder ({folder}: {shard}): refused")
        if not path.is_file():
            raise HfkitError(f"a part of the weights is missing ({path}): get the model again")
        _check_header(path)
    if not _has_tokenizer(folder):
        raise HfkitError(f"no tokenizer files ({folder}): copy tokenizer.json of the model into it")


def _weights(folder: Path, name: str) -> list[str]:
    """Names of the weight files that transformers would read, whether they exist or not."""
    index = folder / _INDEX
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return ["model.safetensors"]
    weight_map = read_json(index, name).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise HfkitError(f"{_INDEX} has no weight_map ({folder}): get the model again")
    return sorted(set(weight_map.values()))


def _names_kernel(config: dict[str, Any]) -> bool:
    """Whether a config, or one of its sub-configs, names an attention implementation `owner/name`: code on the Hub."""
    configs = [config, *(value for value in config.values() if isinstance(value, dict))]
    return any("attn_implementation" in key and "/" in str(part[key]) for part in configs for key in part)


def _check_code(source: ModelFiles) -> None:
    """Refuse code, or with trust code outside the folder: `owner/name--module.Class` is whatever is there today."""
    auto_map = source.config.get("auto_map")
    if not source.trust_remote_code:
        if auto_map and "model_type" not in source.config:
            raise HfkitError(
                f"{source.name} needs its own Python code ({source.folder}): read it, then --trust-remote-code"
            )
        return
    if (source.folder / "tokenizer_config.json").is_file():
        auto_map = [auto_map, read_json(source.folder / "tokenizer_config.json", source.name).get("auto_map")]
    if "--" in str(auto_map):
        raise HfkitError(f"auto_map names code of another repository ({source.folder}): copy it here and read it")


def _inside(path: Path, folder: Path) -> bool:
    """Whether `path` leads into `folder`. Files of the Hub's cache are links to models--NAME/blobs."""
    real, folder = path.resolve(), folder.resolve()
    blobs = folder.parent.parent / "blobs"
    return real.is_relative_to(folder) or (folder.parent.name == "snapshots" and real.is_relative_to(blobs))


def _check_header(path: Path) -> None:
    """Let safetensors' parser check lengths, offsets and shapes against the file, without reading the data."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise HfkitError(f"the weights are damaged ({path}): {error}; get the model again") from error


def count_parameters(source: ModelFiles) -> int:
    """Number of parameters of a saved model, read from its files alone."""
    if source.gguf:
        from gguf import GGUFReader

        return sum(int(tensor.n_elements) for tensor in GGUFReader(source.folder / source.gguf).tensors)
    from safetensors import safe_open

    total = 0
    for path in source.folder.glob("model*.safetensors"):
        with safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return total


def _from_hub(name: str, revision: str | None) -> Path:
    """The folder of a Hub model, from the cache if it is complete there, else downloaded."""
    if re.match(r"[./~\\]|.*[\\:]|.*/.*/", name, re.DOTALL) or name.endswith("/"):
        raise HfkitError(f"no model at {name!r}: check the path (a Hub name looks like gpt2 or owner/name)")
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not listed

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise HfkitError(f"no model {name!r}: no such folder, and a Hub name looks like gpt2 or owner/name") from None
    for file in ("config.json", "adapter_config.json"):
        cached = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(cached, str) and _whole(Path(cached).parent):
            return Path(cached).parent
    if constants.is_offline_mode():
        raise HfkitError(
            f"{name} is not cached and HF_HUB_OFFLINE is set: unset it, or use -m bundled or a local folder"
        )
    return _download(name, revision)


def _whole(folder: Path) -> bool:
    """Whether a cached snapshot has everything that loading needs. An interrupted download leaves only parts."""
    if (folder / "adapter_config.json").is_file():
        return (folder / "adapter_model.safetensors").is_file()
    try:
        needed = ["config.json", *_weights(folder, folder.name)]
    except HfkitError:
        return False
    return _has_tokenizer(folder) and all((folder / file).is_file() for file in needed)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    reach_hub(name)
    try:
        info = HfApi().model_info(name, revision=revision, timeout=PROBE_SECONDS)
        files = [file.rfilename for file in info.siblings or [] if "/" not in file.rfilename]
    except Exception as error:  # whatever answers may not be a Hub, so more than httpx's errors
        raise HfkitError(explain_hub_error(error, name, revision)) from error
    if not any(file in files for file in (*_SINGLE, _INDEX)):
        raise HfkitError(f"{name} has no safetensors weights: choose a model that has, or another --revision")
    if not any(file in files for file in ("config.json", "adapter_config.json")):
        raise HfkitError(f"{name} has no config.json: choose a transformers model")
    detail(f"downloading {name} from {endpoint()}")
    try:
        # Not snapshot_download: it lists the files without a timeout and hides the Hub's errors. All files are of one
        # commit. Asking for one by the revision's name, once all are there, records the commit in the cache.
        small = [file for file in files if file.endswith(_WANTED)]
        folder = Path([hf_hub_download(name, file, revision=info.sha) for file in small][0]).parent
        # A repository may hold the weights in several layouts: one is enough.
        for file in [file for file in _SINGLE if file in files] or _weights(folder, name):
            hf_hub_download(name, file, revision=info.sha)
        return Path(hf_hub_download(name, small[0], revision=revision)).parent
    except HfkitError:
        raise
    except Exception as error:
        raise HfkitError(explain_hub_error(error, name, revision, started=True)) from error
