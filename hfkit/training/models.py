"""The models that are trained: one that was trained before, with a head or an adapter if asked for, or a new one."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
)

from hfkit.corpus.training_data import TrainingData
from hfkit.declaration import set_fields
from hfkit.errors import OptionError, first_line, needing
from hfkit.models.folder import ModelFiles
from hfkit.models.integrity import LOADING_LOCK
from hfkit.models.kernels import attend_in_blocks, attend_without_mask, fuse_activations, prepare_training
from hfkit.models.loading import HEADS, load_weights, load_with_head
from hfkit.options import ModelOptions, SizeOptions, TrainOptions
from hfkit.training.plan import Plan

# n_layer, n_embd, n_head, n_positions, vocab_size
SIZES = {
    "tiny": (4, 128, 4, 256, 2048),
    "mini": (6, 320, 5, 512, 4096),
    "small": (12, 768, 12, 1024, 50257),
    "medium": (24, 1024, 16, 1024, 50257),
    "large": (36, 1280, 20, 1024, 50257),
    "xl": (48, 1600, 25, 1024, 50257),
}


def make_trainable(
    source: ModelFiles, options: ModelOptions, plan: Plan, tokenizer: PreTrainedTokenizerBase, dataset: TrainingData
) -> Any:
    """The model of `source` in float32, with its head, or with an adapter around it if the plan has LoRA."""
    if dataset.head:
        model = load_with_head(source, options, tokenizer, dataset.head, dataset.labels)
    else:
        model = load_weights(source, replace(options, dtype="float32"), tokenizer).model
    model.name_or_path = source.name if source.name == "bundled" else str(source.folder)
    model.requires_grad_(not plan.options.lora)  # merging an adapter has frozen the weights
    _set_training_mode(model, plan, is_joined=dataset.is_joined)
    return _add_adapter(model, source, options.revision, plan.options) if plan.options.lora else model


def make_new(config: Any, plan: Plan) -> Any:
    """A model with random weights, on the device of the plan."""
    model = new_model(config, plan.options.head).to(plan.device)
    _set_training_mode(model, plan, is_joined=not plan.options.head)
    return model


def new_model(config: Any, head: str | None) -> Any:
    """A model with random weights."""
    with LOADING_LOCK:
        if not head:
            return GPT2LMHeadModel(config)
        return HEADS[head].from_config(config)


def _set_training_mode(model: Any, plan: Plan, *, is_joined: bool) -> None:
    """Set what is not in a model's weights: how its loss is counted, its attention, its dropout.

    is_joined: all sequences have one length.
    """
    if not plan.options.head:
        # Without this, Trainer counts the labels unshifted: loss and gradients come out too small.
        model.loss_type = "ForCausalLM"
    if plan.device.type == "cuda":
        fuse_activations(model)
        if not (plan.options.head or plan.options.label_smoothing_factor):  # which Trainer computes from the logits
            prepare_training(model)
    if plan.plain_attention and is_joined:
        attend_in_blocks(model)
    elif plan.plain_attention:  # the number of blocks depends on the length: each one would be compiled anew
        model.set_attn_implementation("eager")
    elif plan.compile:
        attend_without_mask(model)
    for module in model.modules():
        if plan.options.dropout is not None and isinstance(module, torch.nn.Dropout):
            module.p = plan.options.dropout
        if not plan.attention_dropout and isinstance(getattr(module, "attn_dropout", None), torch.nn.Dropout):
            module.attn_dropout.p = 0.0


def _add_adapter(model: Any, source: ModelFiles, revision: str | None, options: TrainOptions) -> Any:
    """`model` with a new adapter around it; only the adapter is trained."""
    with needing("--lora needs peft", "lora"):
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    # Record the base so that peft and transformers find it from any folder.
    is_on_hub = not source.folder.is_dir() or source.folder.parent.name == "snapshots"
    model.name_or_path = source.name if is_on_hub else str(source.folder.resolve())
    config = LoraConfig(
        revision=revision,
        r=options.lora_r,
        lora_alpha=options.lora_alpha or 2 * options.lora_r,
        lora_dropout=options.lora_dropout,
        target_modules=options.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=model.config.model_type == "gpt2",  # its Conv1D keeps (in, out)
    )
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model)  # type: ignore[no-untyped-call]
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise OptionError(f"--lora-target-modules: {first_line(error)}") from error


def shape_of(size: SizeOptions) -> dict[str, Any]:
    """The sizes by GPT-2's names; no dropout unless asked for.

    Raises:
        OptionError: they do not go together.
    """
    shape: dict[str, Any] = dict(zip(("n_layer", "n_embd", "n_head", "n_positions"), SIZES[size.size], strict=False))
    shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape |= {name: value for name, value in set_fields(size).items() if name in shape}
    if shape["n_embd"] % shape["n_head"]:
        raise OptionError(f"--n-embd is {shape['n_embd']}: it must be a multiple of --n-head, {shape['n_head']}")
    return shape


def make_gpt2(shape: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> GPT2Config:
    """GPT-2's configuration of these sizes."""
    end = tokenizer.eos_token_id
    return GPT2Config(**shape, vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end)


def make_bert(shape: dict[str, Any], tokenizer: PreTrainedTokenizerBase, labels: Iterable[str]) -> BertConfig:
    """BERT's configuration of the sizes that GPT-2 calls n_layer, n_embd, n_head and n_positions."""
    names: Any = dict(enumerate(labels))
    return BertConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=shape["n_layer"],
        hidden_size=shape["n_embd"],
        num_attention_heads=shape["n_head"],
        intermediate_size=4 * shape["n_embd"],
        max_position_embeddings=shape["n_positions"],
        hidden_dropout_prob=shape["resid_pdrop"],
        attention_probs_dropout_prob=shape["attn_pdrop"],
        pad_token_id=tokenizer.pad_token_id,
        **({"id2label": names, "label2id": {label: index for index, label in names.items()}} if names else {}),
    )
