"""From a model's name to a local folder that is safe to load. Imports neither torch nor transformers.

What is local or cached never touches the network; a Hub that cannot be reached fails within seconds.
"""

import json
import os
import re
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hfkit.console import detail
from hfkit.errors import HfkitError
from hfkit.options import ModelOptions

BUNDLED = Path(__file__).parent / "bundled"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "source.spm", "vocab.txt")
_WANTED = ("*.json", "*.safetensors", "*.model", "*.spm", "*.txt", "*.jinja")
_UNWANTED = ("*/*", "training_args*", "optimizer*", "*.onnx*", "*.msgpack")
_SINGLE = ("model.safetensors", "adapter_model.safetensors")
_PROBE_SECONDS = 2


@dataclass(frozen=True)
class Source:
    """A model found on this machine."""

    name: str  # what the user calls it
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


def find(options: ModelOptions | None = None) -> Source:
    """Find the model that `options` names, download it if need be, and check its files.

    Raises:
        HfkitError: there is no such model, it is damaged or unsafe, or the Hub cannot be reached.
    """
    options = options or ModelOptions()
    name = options.model or os.environ.get("HFKIT_MODEL") or "bundled"
    path, local = Path(name).expanduser(), True
    if name == "bundled":
        path = BUNDLED
    elif path.is_file():
        return _check_gguf(name, path)
    elif not path.is_dir():
        path, local = _from_hub(name, options.revision), False
    if options.trust_remote_code and not local and not re.fullmatch("[0-9a-f]{40}", options.revision or ""):
        raise HfkitError(
            f"--trust-remote-code runs the code of {name}: give --revision with the 40 characters of a commit "
            "that you have read, or use a local folder"
        )
    if (path / "adapter_config.json").is_file():
        adapter = _read_json(path / "adapter_config.json", name)
        base = adapter.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise HfkitError(f"the adapter does not name its base model ({path}): set base_model_name_or_path")
        if not (path / "adapter_model.safetensors").is_file():
            raise HfkitError(f"no adapter_model.safetensors ({path}): only safetensors are loaded")
        found = find(replace(options, model=base, revision=adapter.get("revision")))
        return replace(found, name=name, adapter=path)
    source = Source(name, path, _read_json(path / "config.json", name), trust_remote_code=options.trust_remote_code)
    _check_folder(source, local)
    return source


def _check_gguf(name: str, path: Path) -> Source:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise HfkitError(f"not a model ({name}): give a .gguf file or a folder with config.json")
    return Source(name, path.parent, {}, gguf=path.name)


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise HfkitError(f"no {path.name} ({path.parent}): {name} is not a saved model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise HfkitError(f"{path.name} cannot be read ({path}): {error}; get the model again") from error
    if not isinstance(value, dict):
        raise HfkitError(f"{path.name} is not a JSON object ({path}): get the model again")
    return value


def _check_folder(source: Source, local: bool) -> None:
    folder, name = source.folder, source.name
    if "/" in str(
        source.config.get("attn_implementation") or source.config.get("_attn_implementation_internal") or ""
    ):
        raise HfkitError(f"config.json asks for code from the Hub ({folder}): remove its attn_implementation")
    if source.config.get("auto_map") and not source.trust_remote_code and "model_type" not in source.config:
        raise HfkitError(f"{name} needs its own Python code ({folder}): read it, then --trust-remote-code")
    shards = ["model.safetensors"]
    if not (folder / shards[0]).is_file():
        if not (folder / "model.safetensors.index.json").is_file():
            other = next((p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".h5")), None)
            what = f"only {other}, which is not safetensors and could run code" if other else "no model.safetensors"
            raise HfkitError(f"{what} ({folder}): save the model again with save_pretrained")
        weight_map = _read_json(folder / "model.safetensors.index.json", name).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise HfkitError(f"model.safetensors.index.json has no weight_map ({folder}): get the model again")
        shards = sorted(set(weight_map.values()))
    for shard in shards:
        path = folder / shard
        # Files of the Hub's cache are links by design, so only names are checked there.
        inside = Path(shard).name == shard and (not local or path.resolve().is_relative_to(folder.resolve()))
        if not inside:
            raise HfkitError(f"weights outside of the model's folder ({folder}: {shard}): refused")
        if not path.is_file():
            raise HfkitError(f"a part of the weights is missing ({path}): get the model again")
        _check_header(path)
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise HfkitError(f"no tokenizer files ({folder}): copy tokenizer.json of the model into it")


def _check_header(path: Path) -> None:
    """Lengths, offsets and shapes agree with the file, as safetensors' own parser sees it (without the data)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise HfkitError(f"the weights are damaged ({path}): {error}; get the model again") from error


def _from_hub(name: str, revision: str | None) -> Path:
    """The folder of a Hub model: cached if it is whole there, else downloaded."""
    if re.match(r"[./~\\]|.*[\\:]|.*/.*/", name, re.DOTALL) or name.endswith("/"):
        raise HfkitError(f"no model at {name!r}: check the path (a Hub name looks like gpt2 or owner/name)")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise HfkitError(f"no model {name!r}: no such folder, and a Hub name looks like gpt2 or owner/name") from None
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        if _whole(folder):
            return folder
    except LocalEntryNotFoundError:
        pass
    if constants.is_offline_mode():
        raise HfkitError(
            f"{name} is not cached and HF_HUB_OFFLINE is set: unset it, or use -m bundled or a local folder"
        )
    return _download(name, revision)


def _whole(folder: Path) -> bool:
    """Whether a cached snapshot has all that loading needs (an interrupted download leaves parts)."""
    if (folder / "adapter_config.json").is_file():
        return (folder / "adapter_model.safetensors").is_file()
    index = folder / "model.safetensors.index.json"
    try:
        shards = json.loads(index.read_text())["weight_map"].values() if index.is_file() else ["model.safetensors"]
        needed = [*set(shards), "config.json"]
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    has_tokenizer = any((folder / file).is_file() for file in _TOKENIZER_FILES)
    return has_tokenizer and all((folder / file).is_file() for file in needed)


def _download(name: str, revision: str | None) -> Path:
    import httpx2
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub import errors as hub_errors

    endpoint = constants.ENDPOINT
    unreachable = (
        f"the Hub cannot be reached ({endpoint}): go online, set HF_ENDPOINT to a mirror, "
        f"or use what is here: -m bundled, or a local folder ({name} is not cached)"
    )
    url = urlsplit(endpoint)
    try:
        # The Hub's client retries for 23 seconds: knock first, where no proxy stands between.
        if not any(os.environ.get(v) for v in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY")):
            address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
            socket.create_connection(address, timeout=_PROBE_SECONDS).close()
        info = HfApi().model_info(name, revision=revision, timeout=_PROBE_SECONDS)
    except hub_errors.GatedRepoError as error:
        raise HfkitError(
            f"{name} is gated: accept its terms on {endpoint}/{name} and log in with 'hf auth login'"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise HfkitError(f"{name} has no revision {revision!r}: see {endpoint}/{name}/tree/main") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise HfkitError(
            f"no model {name!r}: neither a folder here nor on {endpoint} (a private one needs 'hf auth login')"
        ) from error
    except hub_errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        raise HfkitError(f"the Hub answers with HTTP status {status} ({endpoint}, {name}): try again later") from error
    except (httpx2.HTTPError, OSError) as error:
        raise HfkitError(unreachable) from error
    files = [file.rfilename for file in info.siblings or []]
    if not any(file.endswith(".safetensors") for file in files):
        raise HfkitError(f"{name} has no safetensors weights: choose a model that has, or another --revision")
    wanted = [file for file in files if "/" not in file]
    detail(f"downloading {name} from {endpoint}")
    # One layout of the weights is enough: model.safetensors, or its shards.
    if "model.safetensors" in wanted:
        wanted = [file for file in wanted if not file.endswith(".safetensors") or file in _SINGLE]
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[file for file in wanted if any(Path(file).match(pattern) for pattern in _WANTED)],
            ignore_patterns=list(_UNWANTED),
        )
    except (httpx2.HTTPError, OSError, hub_errors.HfHubHTTPError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HfkitError(f"the download of {name} broke off ({endpoint}): {reason}; run it again to go on") from error
    return Path(folder)
