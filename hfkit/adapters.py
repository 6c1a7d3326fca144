"""LoRA: a small adapter is trained, the model it belongs to stays as it is."""

from typing import Any

from hfkit.errors import HfkitError, OptionError, first_line
from hfkit.models.sources import ModelFiles
from hfkit.options import TrainOptions


def add_adapter(model: Any, source: ModelFiles, revision: str | None, options: TrainOptions) -> Any:
    """`model` with a new adapter around it, the only part that is trained."""
    try:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    except ImportError as error:
        raise HfkitError("--lora needs peft: pip install 'hfkit[lora]'") from error
    # What peft and transformers find the base by, from anywhere.
    hub = not source.folder.is_dir() or source.folder.parent.name == "snapshots"
    model.name_or_path = source.name if hub else str(source.folder.resolve())
    config = LoraConfig(
        revision=revision, r=options.lora_r, lora_alpha=options.lora_alpha, lora_dropout=options.lora_dropout,
        target_modules=options.lora_target_modules or "all-linear", task_type="CAUSAL_LM",
        fan_in_fan_out=model.config.model_type == "gpt2",  # its Conv1D keeps (in, out)
    )  # fmt: skip
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise OptionError(f"--lora-target-modules: {first_line(error)}") from error
