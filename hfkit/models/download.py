"""A model of the Hub in the local cache. What is cached never touches the network; a Hub that cannot be reached fails
within seconds.
"""

import re
from difflib import get_close_matches
from pathlib import Path

from hfkit.console import detail
from hfkit.errors import HfkitError
from hfkit.hub import PROBE_SECONDS, endpoint, explain_hub_error, reach_hub
from hfkit.models.folder import INDEX, has_tokenizer, weight_files
from hfkit.storage import check_home

_WANTED = (".json", ".model", ".spm", ".txt", ".jinja", ".py")
_SINGLE = ("model.safetensors", "adapter_model.safetensors")


def from_hub(name: str, revision: str | None) -> Path:
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
        if isinstance(cached, str) and _is_whole(Path(cached).parent):
            return Path(cached).parent
    if constants.is_offline_mode():
        raise HfkitError(
            f"no folder {name!r} here{_suggestion(name)}, and of the Hub's models it is not cached and HF_HUB_OFFLINE "
            "is set: check the name, unset it, or use -m bundled or a local folder"
        )
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
    from huggingface_hub import HfApi, constants, hf_hub_download

    check_home(Path(constants.HF_HUB_CACHE))
    try:
        reach_hub(name)
    except HfkitError as error:
        raise HfkitError(f"no folder {name!r} here{_suggestion(name)}, and {error}") from error
    try:
        info = HfApi().model_info(name, revision=revision, timeout=PROBE_SECONDS)
        files = [file.rfilename for file in info.siblings or [] if "/" not in file.rfilename]
    except Exception as error:  # whatever answers may not be a Hub, so more than httpx's errors
        raise HfkitError(explain_hub_error(error, name, revision)) from error
    if not any(file in files for file in (*_SINGLE, INDEX)):
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
        for file in [file for file in _SINGLE if file in files] or weight_files(folder, name):
            hf_hub_download(name, file, revision=info.sha)
        return Path(hf_hub_download(name, small[0], revision=revision)).parent
    except HfkitError:
        raise
    except Exception as error:
        raise HfkitError(explain_hub_error(error, name, revision, started=True)) from error
