"""`export`: a model as one folder that anything reads: adapter merged, precision changed; or on the Hub."""

import shutil
from pathlib import Path

from hfkit import console
from hfkit.errors import HfkitError, OptionError
from hfkit.models import load_tokenizer, load_weights
from hfkit.options import ExportOptions, ModelOptions
from hfkit.sources import find, reach_hub
from hfkit.storage import make_writable, publish

_KEPT = ("README.md", "loss.png", "report.html", "metrics.json")  # of a training run


def export(model: str | ModelOptions, options: ExportOptions | None = None, **overrides: object) -> str:
    """Write a model, with its adapter merged into it, to a folder of its own, to the Hub, or to both.

    Args:
        model: what `load` takes: a run of `finetune`, an adapter, a .gguf file ...
        options: every field of `ExportOptions` is a keyword, too.

    Returns:
        The folder, or the address on the Hub if there is no folder.

    Raises:
        HfkitError: the model cannot be loaded, or what it is written to is not free or cannot be reached.
    """
    options = ExportOptions.make(options, overrides)
    if not options.output_dir and not options.push_to_hub:
        raise OptionError("export needs a place: give --output-dir or --push-to-hub OWNER/NAME")
    chosen = model if isinstance(model, ModelOptions) else ModelOptions(model=model)
    target = Path(options.output_dir or f".hfkit-export-{Path(str(options.push_to_hub)).name}")
    source = find(chosen)
    if target.exists() and target.resolve() in {source.folder.resolve(), (source.adapter or source.folder).resolve()}:
        raise HfkitError(f"{target} is the model itself: name another --output-dir")
    if target.exists() and any(target.iterdir()) and not options.overwrite:
        raise HfkitError(f"{target} exists: --overwrite replaces it, or name another --output-dir")
    make_writable(target.parent)
    if options.push_to_hub:
        reach_hub(options.push_to_hub)
    kept = source.config.get("dtype") or source.config.get("torch_dtype") or "float32"
    dtype = kept if options.dtype == "auto" else options.dtype
    lm = load_weights(source, ModelOptions(device="cpu", dtype=dtype, trust_remote_code=chosen.trust_remote_code),
                      load_tokenizer(source))  # fmt: skip
    staging = target.with_name(f".{target.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with console.quiet_libraries():
            lm.model.save_pretrained(staging)
            lm.tokenizer.save_pretrained(staging)
        for name in _KEPT:
            if (file := (source.adapter or source.folder) / name).is_file():
                shutil.copy(file, staging)
        find(ModelOptions(model=str(staging)))  # what was written can be read
        if options.push_to_hub:
            _push(staging, options)
        if options.output_dir:
            publish(staging, target)
            return str(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return f"https://huggingface.co/{options.push_to_hub}"


def _push(folder: Path, options: ExportOptions) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    name = str(options.push_to_hub)
    try:
        api = HfApi()
        api.create_repo(name, private=options.private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export from hfkit")
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise HfkitError(f"cannot push to {name}: {reason}; 'hf auth login' gives the right to write") from error
