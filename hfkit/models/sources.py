"""From a model's name to a local folder that is safe to load. Imports neither torch nor transformers."""

import hashlib
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hfkit
from hfkit.errors import HfkitError, first_line
from hfkit.models.download import from_hub
from hfkit.models.folder import check_header, has_tokenizer, is_inside, read_json, weight_files
from hfkit.options import ModelOptions
from hfkit.storage import check_free, check_owned, make_writable

BUNDLED = Path(hfkit.__file__).parent / "bundled"
_PLACE = 4096  # bytes


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
        return sum(path.stat().st_size for path in self._weights)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells these weights from others: their size, and a hash of a thousand places in each file.

        Training changes every weight, so these places are enough.
        """
        digest = hashlib.sha256()
        for path in self._weights:
            size = path.stat().st_size
            with path.open("rb") as file:
                for start in range(0, size, max(_PLACE, size // 1000)):
                    file.seek(start)
                    digest.update(file.read(_PLACE))
        return {"model_bytes": self.size, "model_sha256": digest.hexdigest()}

    @property
    def _weights(self) -> list[Path]:
        return [self.folder / self.gguf] if self.gguf else sorted(self.folder.glob("*.safetensors"))

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer and the task: the adapter's own, if it has them, else the model's."""
        return self.adapter if self.adapter and has_tokenizer(self.adapter) else self.folder


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
        path = from_hub(name, options.revision)
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
    check_header(path / "adapter_model.safetensors")
    folder = _local(base)
    if folder and (folder / "adapter_config.json").is_file():
        raise HfkitError(f"the base of the adapter is an adapter too ({path}: {base}): merge that one first")
    # The adapter chose this base, not the user: trust in the code of one is not trust in that of the other.
    revision = revision if isinstance(revision, str) else None
    try:
        source = find_model(replace(options, model=base, revision=revision, trust_remote_code=False))
    except HfkitError as error:
        hint = ", which runs for a model that is named itself" if options.trust_remote_code else ""
        raise HfkitError(f"no base model for the adapter ({path}): {error}{hint}") from error
    if folder:
        _check_base(path, source)
    return replace(source, name=name, adapter=path)


def _check_base(adapter: Path, base: ModelFiles) -> None:
    """Raise HfkitError if the weights of an adapter's local base are not those that the adapter was trained on."""
    run = read_json(adapter / "run.json", base.name) if (adapter / "run.json").is_file() else {}
    # A run of an old version recorded only the size.
    if any(run.get(name, value) != value for name, value in base.fingerprint.items()):
        raise HfkitError(
            f"the base of the adapter has changed since it was trained ({adapter}: {base.folder}): train the adapter "
            "again, or put the old base back"
        )


def _check_gguf(name: str, path: Path) -> ModelFiles:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise HfkitError(f"{name} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise HfkitError(f"not a model ({name}): give a .gguf file or a folder with config.json")
    return ModelFiles(name, path.parent, {}, gguf=path.name)


def _check_folder(source: ModelFiles) -> None:
    folder, name = source.folder, source.name
    if _names_kernel(source.config):
        raise HfkitError(f"config.json asks for code from the Hub ({folder}): remove its attn_implementation")
    architectures = source.config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise HfkitError(f"config.json is damaged ({folder}): architectures is {architectures!r}; get the model again")
    if "transformers_weights" in source.config:
        # transformers would load that file, or the shards that it lists, unchecked.
        raise HfkitError(f"config.json names other weights ({folder}): remove its transformers_weights")
    _check_code(source)
    shards = weight_files(folder, name)
    if shards == ["model.safetensors"] and not (folder / shards[0]).is_file():
        other = next((file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".h5")), None)
        what = f"only {other}, which is not safetensors and could run code" if other else "no model.safetensors"
        raise HfkitError(f"{what} ({folder}): save the model again with save_pretrained")
    for shard in shards:
        path = folder / shard
        if not shard.isprintable() or Path(shard).name != shard or not is_inside(path, folder):
            raise HfkitError(f"weights outside of the model's folder ({folder}: {shard}): refused")
        if not path.is_file():
            raise HfkitError(f"a part of the weights is missing ({path}): get the model again")
        check_header(path)
    if not has_tokenizer(folder):
        raise HfkitError(f"no tokenizer files ({folder}): copy tokenizer.json of the model into it")


def _names_kernel(config: dict[str, Any]) -> bool:
    """Whether a config, or one of its sub-configs, names an attention implementation `owner/name`: code on the Hub."""
    configs = [config, *(value for value in config.values() if isinstance(value, dict))]
    return any("attn_implementation" in key and "/" in str(part[key]) for part in configs for key in part)


def needs_code(source: ModelFiles) -> HfkitError:
    """The error for a model that only its own code can load."""
    name = source.folder if source.adapter else source.name
    return HfkitError(f"{name} needs its own Python code ({source.folder}): read it, then --trust-remote-code")


def _check_code(source: ModelFiles) -> None:
    """Refuse code, or with trust code outside the folder: `owner/name--module.Class` is whatever is there today."""
    auto_map = source.config.get("auto_map")
    if not source.trust_remote_code:
        if auto_map and "model_type" not in source.config:
            raise needs_code(source)
        return
    if (source.folder / "tokenizer_config.json").is_file():
        auto_map = [auto_map, read_json(source.folder / "tokenizer_config.json", source.name).get("auto_map")]
    if "--" in str(auto_map):
        raise HfkitError(f"auto_map names code of another repository ({source.folder}): copy it here and read it")


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


def check_target(target: Path, source: ModelFiles, *, overwrite: bool) -> None:
    """Raise HfkitError unless a model made from `source` can be written to `target` and nothing of value is lost."""
    make_writable(target.parent)
    try:
        target.lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # a folder cannot have this name
        raise HfkitError(f"cannot write to {target}: {first_line(error)}; name another --output-dir") from error
    if target.is_symlink() or not target.is_dir():
        raise HfkitError(f"{target} is not a folder: name another --output-dir")
    if not any(target.iterdir()):
        return
    for folder in (source.folder, source.adapter or source.folder):
        if folder.resolve().is_relative_to(target.resolve()):
            raise HfkitError(f"{target} holds the model itself: name another --output-dir")
    check_owned(target, hidden=True)  # the whole folder is replaced
    if not (target / "config.json").is_file():
        raise HfkitError(f"{target} does not hold a model: name another --output-dir")
    check_free(target, overwrite=overwrite, flag="--output-dir")
