"""What transformers leaves out when it reads a .gguf file."""

import json
import re
from pathlib import Path
from typing import Any

import transformers

from hfkit.console import note
from hfkit.errors import HfkitError
from hfkit.models.folder import ModelFiles


def _metadata(source: ModelFiles) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The entries of a .gguf file, arrays of texts without their items, and the names of its tensors."""
    from transformers.integrations.gguf.reader import read_gguf_metadata

    entries, names = read_gguf_metadata(str(source.path))
    return entries, names


def unpack_tokenizer(source: ModelFiles, folder: Path) -> ModelFiles | None:
    """Write the tokenizer that hfkit put into a .gguf file to `folder`. None if there is only llama.cpp's form of it.

    From that form transformers rebuilds a tokenizer that cuts most texts, but not all of them, as the original does.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import get_gguf_tokenizer

    entries, _ = _metadata(source)
    if (whole := entries.get("tokenizer.huggingface.json")) is None:
        return None
    architecture, _, settings = get_gguf_tokenizer(str(source.path))
    settings = {name: value for name, value in settings.items() if not name.startswith("add_")}  # in `whole`
    if architecture != "gpt2":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if task := entries.get("hfkit.task"):
        settings["task"] = json.loads(task)
    (folder / "tokenizer.json").write_text(whole, "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return ModelFiles(source.name, folder, {"model_type": architecture})


def complete_config(source: ModelFiles, config: Any) -> None:
    """Set the fields that transformers does not read from a .gguf file, or reads into names that the model ignores.

    Raises:
        HfkitError: the file has more blocks than it says. transformers would leave the last ones out.
    """
    entries, names = _metadata(source)
    matches = [re.match(r"blk\.(\d+)\.", name) for name in names]
    blocks = 1 + max((int(match[1]) for match in matches if match), default=-1)
    if blocks > (said := config.num_hidden_layers):
        what = f"{blocks} blocks, but block_count is {said}"
        raise HfkitError(f"the weights do not fit the model ({source.path}): {what}; get the model again")
    if config.model_type == "gpt2":
        config.n_positions = getattr(config, "n_ctx", None) or config.n_positions
        config.n_inner = getattr(config, "feed_forward_length", None)
    if hasattr(config, "head_dim"):
        config.head_dim = entries.get(f"{entries['general.architecture']}.attention.key_length", config.head_dim)
    if rope := entries.get("hfkit.rope_parameters"):
        config.rope_parameters = json.loads(rope)
    elif "rope_freqs.weight" in names:
        note(f"{source.name}: transformers cannot read its rope_freqs, so texts come out a little different")


def complete_settings(source: ModelFiles, settings: Any) -> None:
    """Copy the sampling options of a .gguf file into the model's generation config, `settings`."""
    entries, _ = _metadata(source)
    prefix = "general.sampling."
    sampling = {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
    for name in ("temp", "top_k", "top_p", "min_p"):
        if value := sampling.get(name):
            settings.do_sample = True
            setattr(settings, "temperature" if name == "temp" else name, round(value, 6))  # it was a 32-bit float


def loading_arguments(source: ModelFiles) -> dict[str, Any]:
    """What `from_pretrained` takes for a .gguf file."""
    from transformers import modeling_gguf_pytorch_utils as reader

    reader.tqdm = lambda tensors, **_: tensors  # type: ignore[assignment, attr-defined]  # nothing else hides this progress bar
    # Without dequantize=True the model could not be saved.
    return {"gguf_file": source.gguf, "quantization_config": transformers.GgufConfig(dequantize=True)}
