"""TensorFlow checkpoints: found, checked, and converted once to a folder of safetensors in the cache.

What OpenAI's GPT-2 and gpt-2-simple write, what Google's BERT repository writes, and tf_model.h5 of transformers 4.
Every command imports this file, so it imports nothing heavy before there is something to convert.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkit.console import note
from hfkit.errors import HfkitError, first_line
from hfkit.hub import cache_folder
from hfkit.models.bundle import read_index
from hfkit.models.folder import INDEX, ModelFiles, check_config, read_json
from hfkit.storage import lock, make_writable, publish, temporary, write_text

if TYPE_CHECKING:
    import numpy as np

_H5 = "tf_model.h5"
_FAMILIES = ("gpt2", "bert", "roberta", "distilbert")  # whose tf_model.h5 gives what TensorFlow computed
_VOCABULARIES = {"hparams.json": ("encoder.json", "vocab.bpe"), "bert_config.json": ("vocab.txt",)}
_COPIED = ("*token*.json", "vocab.*", "merges.txt", "generation_config.json")  # from a folder of transformers
_STATE, _VERSION = "converted.json", 1  # what a folder of the cache was made from, and by which version
_OPTIMIZER = re.compile(r"(^|/)(global_step|beta\d_power(_\d)?|adam_[mv]|Adam(_\d)?)$")
# What turns a name in TensorFlow into one in transformers, by the file of settings.
_NAMES = {
    "hparams.json": (
        (r"^model/h(\d+)/", r"transformer/h/\1/"),
        (r"^model/", "transformer/"),
        (r"/(wte|wpe)$", r"/\1/weight"),
        (r"/[gw]$", "/weight"),
        (r"/b$", "/bias"),
    ),
    "bert_config.json": (
        (r"/layer_(\d+)/", r"/layer/\1/"),
        (r"^output_", "classifier/"),
        (r"^cls/squad/output_", "qa_outputs/"),
        (r"/output_(weights|bias)$", r"/\1"),
        (r"_embeddings$", r"\g<0>/weight"),
        (r"/(weights|kernel|gamma)$", "/weight"),
        (r"/beta$", "/bias"),
    ),
    "config.json": (
        (r":0$", ""),
        (r"^[^/]+/[^/]+/", ""),  # of the layer and the model
        (r"(^|/)[^/]*___", r"\1"),
        (r"_\._", "/"),
        (r"/(kernel|gamma|embeddings)$", "/weight"),
        (r"/beta$", "/bias"),
    ),
}


def find_checkpoint(path: Path) -> Path | None:
    """The TensorFlow checkpoint that `path` means: NAME of NAME.index, or tf_model.h5. None for another model.

    path: a folder, NAME, or one of the files.

    Raises:
        HfkitError: a folder lacks its checkpoint, or has several and does not say which is the newest.
    """
    if not path.is_dir():
        prefix = path.with_name(re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", path.name))
        is_checkpoint = path.name == _H5 or prefix != path or path.with_name(f"{path.name}.index").is_file()
        return prefix if is_checkpoint else None
    if any((path / name).is_file() for name in ("model.safetensors", INDEX, "adapter_config.json")):
        return None
    if (path / _H5).is_file():
        return path / _H5
    checkpoints = sorted(file.with_suffix("") for file in path.glob("*.index"))
    if (path / "config.json").is_file() or not (checkpoints or any((path / name).is_file() for name in _VOCABULARIES)):
        return None
    record = path / "checkpoint"  # TensorFlow's file, which names the newest one
    text = record.read_text("utf-8", "replace") if record.is_file() else ""
    if newest := re.search(r'^model_checkpoint_path: "(?:.*[\\/])?(.+)"', text, re.MULTILINE):
        return path / newest[1]
    if not checkpoints:
        raise HfkitError(f"no checkpoint ({path}): copy its .index and .data files there")
    if len(checkpoints) > 1:
        raise HfkitError(f"{len(checkpoints)} checkpoints ({path}): name one, such as {checkpoints[-1]}")
    return checkpoints[0]


def convert(checkpoint: Path, name: str) -> Path:
    """The folder of safetensors for a checkpoint of the model called `name`, from the cache or made now.

    Raises:
        HfkitError: a file is missing or damaged, or the tensors are not those of the model.
    """
    package = "h5py" if checkpoint.name == _H5 else "google_crc32c"
    if not importlib.util.find_spec(package):
        raise HfkitError(f"{name} needs {package.replace('_', '-')}: pip install 'hfkit[tensorflow]'")
    settings = "config.json" if checkpoint.name == _H5 else _find_settings(checkpoint)
    cache = cache_folder()
    place = checkpoint.resolve()
    folder = cache / f"{place.parent.name}-{hashlib.sha256(bytes(place)).hexdigest()[:16]}"
    state = _state_of(checkpoint)
    if _is_made_from(folder, state):
        return folder
    try:
        make_writable(cache)
    except HfkitError as error:
        raise HfkitError(f"cannot write to the cache ({cache}): set HF_HOME to another folder") from error
    with lock(cache, wait=True):
        if _is_made_from(folder, state):  # by another process, in the meantime
            return folder
        for leftover in cache.glob(".*.hfkit"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        staging = temporary(folder)
        try:
            _write_model(checkpoint, settings, name, staging)
            write_text(staging / _STATE, json.dumps(state))
            publish(staging, folder)
        except OSError as error:
            raise HfkitError(f"cannot convert {name} ({cache}): {first_line(error)}; fix that") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return folder


def _find_settings(checkpoint: Path) -> str:
    """The name of the file beside a checkpoint that says what the model is. The vocabulary must be there as well."""
    settings = next((name for name in _VOCABULARIES if checkpoint.with_name(name).is_file()), "")
    missing = [name for name in _VOCABULARIES.get(settings, ()) if not checkpoint.with_name(name).is_file()]
    if missing or not settings:
        what = missing[0] if missing else "hparams.json (GPT-2) or bert_config.json (BERT)"
        raise HfkitError(f"no {what} beside the checkpoint ({checkpoint}): copy it from the model it was trained from")
    return settings


def _state_of(checkpoint: Path) -> list[Any]:
    """Names, sizes and times of the files that a model is made from."""
    files = [file for file in sorted(checkpoint.parent.iterdir()) if file.suffix in (".json", ".txt", ".bpe")]
    files += sorted(file for file in checkpoint.parent.iterdir() if f"{file.name}.".startswith(f"{checkpoint.name}."))
    return [_VERSION, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]


def _is_made_from(folder: Path, state: list[Any]) -> bool:
    try:
        return bool(json.loads((folder / _STATE).read_text("utf-8")) == state)
    except (OSError, ValueError):
        return False


def _write_model(checkpoint: Path, settings: str, name: str, folder: Path) -> None:
    """Write config.json, weights and tokenizer to a new `folder`; note what was assumed or left out."""
    import torch

    from hfkit.models.integrity import calling_library, check_names

    tensors = _open(checkpoint)
    values = read_json(checkpoint.with_name(settings), name)
    check_config(ModelFiles(name, checkpoint.parent, values))
    if any(".ATTRIBUTES/" in tensor for tensor in tensors):
        raise HfkitError(f"the checkpoint is of a Keras model ({checkpoint}): only those of TensorFlow 1 are read")
    family = {"hparams.json": "gpt2", "bert_config.json": "bert"}.get(settings, values.get("model_type"))
    if family not in _FAMILIES:
        families = f"{', '.join(_FAMILIES)}, not {family}"
        raise HfkitError(f"{_H5} is read for {families} ({checkpoint.parent}): save it as safetensors instead")
    with calling_library(ModelFiles(name, checkpoint.parent, {"model_type": family})):
        with torch.device("meta"):
            make = {"hparams.json": _make_gpt2, "bert_config.json": _make_bert}.get(settings, _make_saved)
            model, tokenizer, remarks = make(checkpoint, values, tensors)
        wanted = dict(model.named_parameters())
        weights, unexpected, unused = {}, [], []
        for original in tensors:
            parameter = _rename(original, settings)
            if parameter not in wanted:
                parameter = parameter.removeprefix(f"{model.base_model_prefix}.")
            if parameter in wanted:
                weights[parameter] = torch.from_numpy(_read(tensors[original], original, wanted[parameter].ndim))
                if (shape := weights[parameter].shape) != wanted[parameter].shape:
                    what = f"{original} is {[*shape]}, by {settings} {[*wanted[parameter].shape]}"
                    raise HfkitError(f"the weights do not fit the model ({checkpoint}): {what}; get its {settings}")
            elif _OPTIMIZER.search(original) or "/pooler/" in original:  # some heads use no pooler
                unused.append(original)
            else:
                unexpected.append(original)
        check_names(checkpoint, missing=wanted.keys() - weights, unexpected=unexpected)
        model.load_state_dict(weights, assign=True, strict=False)
        model.tie_weights()
        model.save_pretrained(folder)
        if tokenizer:
            tokenizer.save_pretrained(folder)
        else:
            for file in [file for pattern in _COPIED for file in checkpoint.parent.glob(pattern)]:
                shutil.copy(file, folder)
    if unused:
        remarks += f"; left out: {len(unused)} tensors that the model does not use, such as {unused[0]}"
    note(f"{name}: converted from TensorFlow, once{remarks}")


def _open(checkpoint: Path) -> dict[str, Any]:
    """The tensors of a checkpoint by name, to be read with `numpy.asarray`."""
    tensors: dict[str, Any] = {}
    if checkpoint.name != _H5:
        return tensors | read_index(checkpoint)
    import h5py

    def add(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            tensors[name] = item

    try:
        h5py.File(checkpoint).visititems(add)
    except (OSError, RuntimeError) as error:
        raise HfkitError(f"the checkpoint is damaged ({checkpoint}): {first_line(error)}; copy it again") from error
    return tensors


def _rename(name: str, settings: str) -> str:
    for pattern, replacement in _NAMES[settings]:
        name = re.sub(pattern, replacement, name)
    return name.replace("/", ".")


def _read(tensor: Any, name: str, dimensions: int) -> np.ndarray[Any, Any]:
    """A tensor in float32 and with as many dimensions as transformers gives it."""
    import numpy as np

    array = np.asarray(tensor, np.float32)
    array = array.T if re.search("kernel(:0)?$", name) else array  # which Keras keeps as (in, out)
    is_convolution = array.ndim > dimensions and len(array) == 1  # of one position
    return np.ascontiguousarray(array[0] if is_convolution else array)


def _make_gpt2(checkpoint: Path, hparams: dict[str, Any], _: dict[str, Any]) -> tuple[Any, Any, str]:
    """The model of OpenAI's hparams.json, and its tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    if missing := [name for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer") if name not in hparams]:
        raise HfkitError(f"hparams.json does not say {missing[0]} ({checkpoint.parent}): get the original file")
    tokenizer = GPT2Tokenizer(*(str(checkpoint.with_name(name)) for name in _VOCABULARIES["hparams.json"]))
    end = tokenizer.eos_token_id
    sizes = {"vocab_size": hparams["n_vocab"], "n_positions": hparams["n_ctx"], "n_embd": hparams["n_embd"]}
    layers = {"n_layer": hparams["n_layer"], "n_head": hparams["n_head"]}
    return GPT2LMHeadModel(GPT2Config(**sizes, **layers, bos_token_id=end, eos_token_id=end)), tokenizer, ""


def _make_bert(checkpoint: Path, values: dict[str, Any], tensors: dict[str, Any]) -> tuple[Any, Any, str]:
    """The model of Google's bert_config.json with the head that the checkpoint has, and its tokenizer."""
    import transformers

    # Since February 2019 Google's code computes "gelu" by the formula that transformers calls gelu_new.
    if values.get("hidden_act") == "gelu":
        values = values | {"hidden_act": "gelu_new"}
    heads = {
        "output_bias": transformers.BertForSequenceClassification,
        "cls/squad/output_bias": transformers.BertForQuestionAnswering,
        "cls/seq_relationship/output_bias": transformers.BertForPreTraining,
        "cls/predictions/output_bias": transformers.BertForMaskedLM,
    }
    kind: Any = next((heads[name] for name in heads if name in tensors), transformers.BertModel)
    config: Any = transformers.BertConfig(**values)
    if "output_bias" in tensors:
        config.num_labels = tensors["output_bias"].shape[0]
    vocabulary = checkpoint.with_name("vocab.txt")
    words = re.sub(r"^\[.*\]$", "", vocabulary.read_text("utf-8"), flags=re.MULTILINE)
    is_cased = bool(re.search("[A-Z]", words))  # nothing else in the folder says it
    case = "has capital letters: text keeps its own" if is_cased else "has no capital letters: text is lower-cased"
    tokenizer = transformers.BertTokenizer(str(vocabulary), do_lower_case=not is_cased)
    return kind(config), tokenizer, f"; vocab.txt {case}"


def _make_saved(checkpoint: Path, config: dict[str, Any], _: dict[str, Any]) -> tuple[Any, Any, str]:
    """The model of a config.json. The tokenizer's files are there already."""
    import transformers

    kind = getattr(transformers, str(config["architectures"][0]).removeprefix("TF"))
    return kind(transformers.AutoConfig.from_pretrained(checkpoint.parent)), None, ""
