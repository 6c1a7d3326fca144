"""From a model's name to a local folder that is safe to load. Imports neither torch nor transformers.

What is cached never touches the network; a Hub that cannot be reached fails within seconds.
"""

import os
import re
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import hfkit
from hfkit.console import detail
from hfkit.errors import HfkitError
from hfkit.hub import PROBE_SECONDS, endpoint, explain_hub_error, reach_hub
from hfkit.models.folder import INDEX, ModelFiles, check_folder, check_header, has_tokenizer, read_json, weight_files
from hfkit.models.tensorflow import convert, find_checkpoint
from hfkit.options import ModelOptions
from hfkit.storage import check_home

BUNDLED = Path(hfkit.__file__).parent / "bundled"
# What is downloaded: these files and the weights, of which a repository may hold several layouts.
_SMALL_FILES = (".json", ".model", ".spm", ".txt", ".jinja", ".py")
_WHOLE_WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


def find_model(options: ModelOptions | str | None = None) -> ModelFiles:
    """Find the model that `options` name, download it if it is not here, and check its files.

    Raises:
        HfkitError: there is no such model, it is damaged or unsafe, or the Hub cannot be reached.
    """
    options = ModelOptions.make(options)
    name = (os.environ.get("HFKIT_MODEL") or "bundled") if options.model is None else options.model
    path = BUNDLED if name == "bundled" else _local(name)
    checkpoint = find_checkpoint(path) if path else None
    if checkpoint:
        path = convert(checkpoint, name)
    if path and not (path / "config.json").exists() and len(files := [*path.glob("*.gguf")]) == 1:
        path = files[0]
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
    source = ModelFiles(name, path, config, checkpoint=checkpoint, trust_remote_code=options.trust_remote_code)
    check_folder(source)
    return source


def _local(name: str) -> Path | None:
    """The file or folder called `name`, or NAME of a TensorFlow checkpoint's NAME.index; or None."""
    try:
        path = Path(name).expanduser()
        return path if name and (path.exists() or path.with_name(f"{path.name}.index").exists()) else None
    except (OSError, RuntimeError):  # too long for a path, a folder we may not read, ~nobody
        return None


def _check_gguf(name: str, path: Path) -> ModelFiles:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise HfkitError(f"{name} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise HfkitError(f"not a model ({name}): give a .gguf file or a folder with a model or TensorFlow checkpoint")
    return ModelFiles(name, path.parent, {}, gguf=path.name)


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
        hint = (
            " (which covers the model that -m names, not the base of an adapter)" if options.trust_remote_code else ""
        )
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


def from_hub(name: str, revision: str | None) -> Path:
    """The folder of a Hub model, from the cache if it is complete there, else downloaded."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not listed

    try:
        validate_repo_id(name)
    except HFValidationError:
        why = "no such file or folder, and a Hub name looks like gpt2 or owner/name"
        raise HfkitError(f"no model {name!r}: {why}") from None
    for file in ("config.json", "adapter_config.json"):
        cached = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(cached, str) and _is_whole(Path(cached).parent):
            return Path(cached).parent
    reason = f"no folder {name!r} here{_suggestion(name)}, and"
    if constants.is_offline_mode():
        raise HfkitError(
            f"{reason} of the Hub's models it is not cached and HF_HUB_OFFLINE is set: "
            "check the name, unset it, or use -m bundled or a local folder"
        )
    check_home(Path(constants.HF_HUB_CACHE))
    try:
        reach_hub(name)
    except HfkitError as error:
        raise HfkitError(f"{reason} {error}") from error
    return _download(name, revision)


def _suggestion(name: str) -> str:
    """The folder beside a missing one that it may be."""
    parent = Path(name).parent
    folders = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    close = get_close_matches(Path(name).name, folders, n=1)
    return f" (did you mean {parent / close[0]}?)" if close else ""


def _is_whole(folder: Path) -> bool:
    """Whether a cached snapshot has everything that loading needs. An interrupted download leaves only parts."""
    if (folder / "adapter_config.json").is_file():
        return (folder / "adapter_model.safetensors").is_file()
    try:
        needed = ["config.json", *weight_files(folder, folder.name)]
    except HfkitError:
        return False
    return has_tokenizer(folder) and all((folder / file).is_file() for file in needed)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    try:
        info = HfApi().model_info(name, revision=revision, timeout=PROBE_SECONDS)
        files = [file.rfilename for file in info.siblings or [] if "/" not in file.rfilename]
    except Exception as error:  # whatever answers may not be a Hub, so more than httpx's errors
        raise HfkitError(explain_hub_error(error, name, revision)) from error
    if not any(file in files for file in (*_WHOLE_WEIGHTS, INDEX)):
        raise HfkitError(f"{name} has no safetensors weights: choose a model that has, or another --revision")
    if not any(file in files for file in ("config.json", "adapter_config.json")):
        raise HfkitError(f"{name} has no config.json: choose a transformers model")
    detail(f"downloading {name} from {endpoint()}")
    try:
        # Not snapshot_download: it lists the files without a timeout and hides the Hub's errors. All files are of one
        # commit. Asking for one by the revision's name, once all are there, records the commit in the cache.
        small = [file for file in files if file.endswith(_SMALL_FILES)]
        folder = Path([hf_hub_download(name, file, revision=info.sha) for file in small][0]).parent
        for file in [file for file in _WHOLE_WEIGHTS if file in files] or weight_files(folder, name):
            hf_hub_download(name, file, revision=info.sha)
        return Path(hf_hub_download(name, small[0], revision=revision)).parent
    except HfkitError:
        raise
    except Exception as error:
        raise HfkitError(explain_hub_error(error, name, revision, started=True)) from error
