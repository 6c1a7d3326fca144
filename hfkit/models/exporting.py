"""`export`: write a model to a folder, a GGUF file or the Hub, with its adapter merged and its precision changed."""

import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from hfkit import console
from hfkit.declaration import divide
from hfkit.errors import HfkitError, OptionError, first_line
from hfkit.hub import endpoint, reach_hub
from hfkit.models.folder import check_target
from hfkit.models.gguf_export import check_gguf, write_gguf
from hfkit.models.loading import LanguageModel, load_config, load_tokenizer, load_weights
from hfkit.models.modelfile import modelfile_of, write_modelfile
from hfkit.models.sources import find_model
from hfkit.options import ExportOptions, ModelOptions
from hfkit.storage import add_owned, check_space, make_durable, publish, sync_folder, temporary

_FLOAT8 = "float8_e4m3fn"
_GGUF_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_KEPT = ("README.md", "loss.png", "report.html", "metrics.json")  # files of a training run to copy


def export(
    model: str | os.PathLike[str] | ModelOptions, options: ExportOptions | None = None, **overrides: object
) -> str:
    """Write a model, with its adapter merged into it, to a folder or a GGUF file, to the Hub, or to both.

    Args:
        model: what `load` takes: a run of `finetune`, an adapter, a .gguf file ...
        options: where and how to write it. Every field of it and of `ModelOptions` is a keyword, too; `dtype` and
            `quantize` are the precision to write.

    Returns:
        The folder, the GGUF file in it, or the address on the Hub if there is no folder.

    Raises:
        HfkitError: the model cannot be loaded, the folder is not free, the Hub cannot be reached, or llama.cpp could
            not run it.
    """
    chosen, options = divide(overrides, (ModelOptions, model), (ExportOptions, options))
    if chosen.quantize:
        raise OptionError("an export has whole weights: leave --quantize out, and quantize when you load it")
    is_gguf = options.format == "gguf" or str(options.output_dir).endswith(".gguf")
    _check_precision(options, is_gguf)
    if not options.output_dir and not options.push_to_hub:
        raise OptionError("export needs a place: give --output-dir or --push-to-hub OWNER/NAME")
    target = Path(options.output_dir or f".hfkit-export-{Path(str(options.push_to_hub)).name}")
    source = find_model(chosen)
    check_target(target, source, overwrite=options.overwrite)
    check_space(target.parent, source.size)
    if options.push_to_hub:
        reach_hub(options.push_to_hub)
    saved = source.config.get("dtype") or source.config.get("torch_dtype")
    dtype = options.dtype if options.dtype != "auto" else saved if saved in ("bfloat16", "float16") else "float32"
    loaded = "float32" if dtype == _FLOAT8 else dtype
    whole = replace(chosen, device="cpu", dtype=loaded, device_map=None, quantize=None)
    tokenizer = load_tokenizer(source)
    if is_gguf:
        check_gguf(source.name, load_config(source), tokenizer)
    lm = load_weights(source, whole, tokenizer)
    # A name that only this process uses: another export into this folder may be under way.
    staging = temporary(target.with_name(target.name[:40]))
    file = f"{Path(str(options.output_dir or options.push_to_hub)).name.removesuffix('.gguf')}.gguf"
    is_single_file = is_gguf and target.suffix == ".gguf"
    place = target / file if is_gguf and not is_single_file else target
    try:
        name = options.push_to_hub or str(place)
        if is_gguf:
            staging.mkdir()
            write_gguf(lm, staging / file, options.quantize or _GGUF_NAMES[dtype])
            write_modelfile(lm, modelfile_of(staging / file, is_alone=False), file)
            _copy_card(source.adapter or source.folder, staging, name)
        else:
            _write(lm, source.adapter or source.folder, staging, name, dtype)
        if options.push_to_hub:
            _push(staging, options)
        if options.output_dir and is_single_file:
            _publish_files(staging, target)
            return str(target)
        if options.output_dir:
            add_owned(staging, [path.name for path in staging.iterdir()], weights=staging)
            publish(staging, target)
            return str(place)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise HfkitError(
            f"cannot write {target}: {first_line(error)}; fix that, or name another --output-dir"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return f"{endpoint()}/{options.push_to_hub}"


def _check_precision(options: ExportOptions, is_gguf: bool) -> None:
    if options.quantize and not is_gguf:
        raise OptionError("--quantize is for GGUF files: add --format gguf, or quantize the model when you load it")
    if options.quantize and options.dtype != "auto":
        raise OptionError("--quantize and --dtype say the same: leave one of the two out")
    if is_gguf and options.dtype == _FLOAT8:
        raise OptionError(f"GGUF has no {_FLOAT8}: --quantize q8_0 is as small")


def _publish_files(staging: Path, target: Path) -> None:
    """Rename a finished GGUF file to `target`, and its Modelfile after it."""
    make_durable(staging)
    os.replace(staging / target.name, target)
    os.replace(modelfile_of(staging / target.name, is_alone=False), modelfile_of(target, is_alone=True))
    sync_folder(target.parent)


def _write(lm: LanguageModel, source: Path, folder: Path, name: str, dtype: str) -> None:
    """Write the model, and what its run left, to `folder`."""
    with console.quiet_libraries():
        lm.model.save_pretrained(folder, state_dict=_float8_weights(lm.model) if dtype == _FLOAT8 else None)
        lm.tokenizer.save_pretrained(folder)
    _copy_card(source, folder, name)
    find_model(str(folder))  # raises if it cannot be read


def _copy_card(source: Path, folder: Path, name: str) -> None:
    """Copy what a run left in `source`; the card calls the model `name`."""
    for kept in _KEPT:
        if (source / kept).is_file():
            shutil.copy(source / kept, folder)
    if (card := folder / "README.md").is_file():
        text = card.read_text("utf-8").replace("library_name: peft", "library_name: transformers")  # merged
        own_name = re.compile(r"^(    hfkit \w+ -m )(?:'[^']*'|[^\s'])+", re.MULTILINE)
        card.write_text(own_name.sub(lambda command: command[1] + shlex.quote(name), text), "utf-8")


def _float8_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A model's weights with a byte for each number of a matrix, and bfloat16 for the rest.

    The model is left in bfloat16: config.json names the precision to compute in, to which transformers casts what the
    file holds.
    """
    rounded: dict[int, torch.Tensor] = {}  # by address: tied weights must stay one tensor to be written once
    weights = model.state_dict()
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.ndim > 1:
            if tensor.data_ptr() not in rounded:
                limit = torch.finfo(torch.float8_e4m3fn).max  # beyond it a cast gives NaN
                rounded[tensor.data_ptr()] = tensor.clamp(-limit, limit).to(torch.float8_e4m3fn)
            weights[name] = rounded[tensor.data_ptr()]
        elif tensor.is_floating_point():
            weights[name] = tensor.bfloat16()
    model.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers' wrapper hides torch's signature
    return weights


def _push(folder: Path, options: ExportOptions) -> None:
    from huggingface_hub import HfApi

    name = str(options.push_to_hub)
    try:
        api = HfApi()
        api.create_repo(name, private=options.private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export from hfkit")
    except Exception as error:  # whatever answers may not be a Hub
        why = f"cannot push to {name}: {first_line(error)}"
        raise HfkitError(f"{why}; 'hf auth login' gives the right to write") from error
