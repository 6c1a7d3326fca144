"""What is in the folder of a saved model, and whether it is safe to load. Needs neither torch nor transformers."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfkit.errors import HfkitError, first_line
from hfkit.storage import check_free, check_owned, check_regular, make_writable

INDEX = "model.safetensors.index.json"
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack")
_PLACE = 4096  # bytes
_TOKENIZERS = (
    "tokenizer.json tokenizer.model vocab.json vocab.txt spiece.model source.spm sentencepiece.bpe.model"
).split()


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model on this machine."""

    name: str  # as the user gave it
    folder: Path
    config: dict[str, Any]  # config.json; empty for a .gguf file
    gguf: str | None = None  # name of the .gguf file inside `folder`
    checkpoint: Path | None = None  # of TensorFlow, from which `folder` was made
    adapter: Path | None = None  # folder of a LoRA adapter on top of the model
    trust_remote_code: bool = False

    @property
    def path(self) -> Path:
        """The .gguf file, or the folder."""
        return self.folder / (self.gguf or "")

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
        return [self.path] if self.gguf else sorted(self.folder.glob("*.safetensors"))

    @property
    def is_causal(self) -> bool:
        """Whether config.json names a class that continues texts."""
        architectures = self.config.get("architectures") or []
        return any(part in name for name in architectures for part in ("CausalLM", "LMHead"))

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer and the task: the adapter's own, if it has them, else the model's."""
        return self.adapter if self.adapter and has_tokenizer(self.adapter) else self.folder


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


def has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _TOKENIZERS)


def weight_files(folder: Path, name: str) -> list[str]:
    """Names of the weight files that transformers would read, whether they exist or not."""
    index = folder / INDEX
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return ["model.safetensors"]
    weight_map = read_json(index, name).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise HfkitError(f"{INDEX} has no weight_map ({folder}): get the model again")
    return sorted(set(weight_map.values()))


def check_folder(source: ModelFiles) -> None:
    """Raise HfkitError unless a folder has everything that loading needs, and nothing that runs code unasked."""
    folder = source.folder
    check_config(source)
    shards = weight_files(folder, source.name)
    if shards == ["model.safetensors"] and not (folder / shards[0]).is_file():
        other = next((file.name for file in folder.iterdir() if file.suffix in _OTHER_WEIGHTS), None)
        risk = "" if other and other.endswith(".msgpack") else " and could run code"
        what = f"only {other}, which is not safetensors{risk}" if other else "no model.safetensors"
        raise HfkitError(f"{what} ({folder}): save the model again with save_pretrained")
    for shard in shards:
        path = folder / shard
        if not shard.isprintable() or Path(shard).name != shard or not _is_inside(path, folder):
            raise HfkitError(f"weights outside of the model's folder ({folder}: {shard}): refused")
        if not path.is_file():
            raise HfkitError(f"a part of the weights is missing ({path}): get the model again")
        check_header(path)
    if not has_tokenizer(folder):
        raise HfkitError(f"no tokenizer files ({folder}): copy tokenizer.json of the model into it")


def check_config(source: ModelFiles) -> None:
    """Raise HfkitError if a configuration is damaged, or would run code unasked."""
    folder, config = source.folder, source.config
    # An attention implementation called `owner/name` is code on the Hub.
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    if any("attn_implementation" in key and "/" in str(part[key]) for part in parts for key in part):
        raise HfkitError(f"config.json asks for code from the Hub ({folder}): remove its attn_implementation")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise HfkitError(f"config.json is damaged ({folder}): architectures is {architectures!r}; get the model again")
    if "transformers_weights" in config:
        # transformers would load that file, or the shards that it lists, unchecked.
        raise HfkitError(f"config.json names other weights ({folder}): remove its transformers_weights")
    _check_code(source)


def _check_code(source: ModelFiles) -> None:
    """Refuse a model that only its own code can load; if code is trusted, only code of another repository.

    Code of another repository, `owner/name--module.Class`, is whatever is there today.
    """
    auto_map = source.config.get("auto_map")
    if not source.trust_remote_code:
        if auto_map and "model_type" not in source.config:
            raise code_error(source)
        return
    if (source.folder / "tokenizer_config.json").is_file():
        auto_map = [auto_map, read_json(source.folder / "tokenizer_config.json", source.name).get("auto_map")]
    if "--" in str(auto_map):
        raise HfkitError(f"auto_map names code of another repository ({source.folder}): copy it here and read it")


def code_error(source: ModelFiles) -> HfkitError:
    """The error for a model that only its own code can load."""
    name = source.folder if source.adapter else source.name
    return HfkitError(f"{name} needs its own Python code ({source.folder}): read it, then --trust-remote-code")


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether `path` leads into `folder`. Files of the Hub's cache are links to models--NAME/blobs."""
    snapshots = [place for place in (folder.absolute(), folder.resolve()) if place.parent.name == "snapshots"]
    blobs = [(place.parent.parent / "blobs").resolve() for place in snapshots]  # may be a link to another disk
    return any(path.resolve().is_relative_to(place) for place in (folder.resolve(), *blobs))


def check_header(path: Path) -> None:
    """Let safetensors' parser check lengths, offsets and shapes against the file, without reading the data."""
    from safetensors import SafetensorError, safe_open

    try:
        path.open("rb").close()
    except OSError as error:
        raise HfkitError(f"the weights cannot be read ({path}): {error.strerror}; ask their owner") from error
    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise HfkitError(f"the weights are damaged ({path}): {error}; get the model again") from error


def count_parameters(source: ModelFiles) -> int:
    """Number of parameters of a saved model, read from its files alone."""
    if source.gguf:
        from gguf import GGUFReader

        return sum(int(tensor.n_elements) for tensor in GGUFReader(source.path).tensors)
    from safetensors import safe_open

    total = 0
    for path in source.folder.glob("model*.safetensors"):
        with safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
    return total


def check_target(target: Path, source: ModelFiles, *, overwrite: bool) -> None:
    """Raise HfkitError unless a model made from `source` can be written to `target` and nothing of value is lost."""
    make_writable(target.parent)
    if target.suffix == ".gguf":
        check_regular(target)
        check_free(target, overwrite=overwrite, flag="--output-dir")
        if source.gguf and target.exists() and target.samefile(source.path):
            raise HfkitError(f"{target} is the model itself: name another --output-dir")
        return
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
    if not (target / "config.json").is_file() and not any(target.glob("*.gguf")):
        raise HfkitError(f"{target} does not hold a model: name another --output-dir")
    check_free(target, overwrite=overwrite, flag="--output-dir")
