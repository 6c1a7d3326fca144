"""Every option, declared once (standard library only).

A field is a flag (`--top-p`), a recipe key (`top_p:`) and a Python argument (`top_p=`) at the same time. Names are
those of transformers, so that `GenerationConfig` and `TrainingArguments` receive them unchanged. None means "not set":
then the model's own default applies, or what the help text says in brackets.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from hfkit.declaration import Options, option

_Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
                    "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay"]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Which model, in which precision, on which device. `ModelOptions.make("gpt2")` takes a bare name."""

    named_by: ClassVar[str] = "model"
    model: str | None = option(
        None, "bundled, a Hub name, a folder, a .gguf or TensorFlow file. [default: $HFKIT_MODEL, bundled]", short="-m"
    )
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps ...")
    dtype: _Dtype = option("auto", "Precision of the weights.")
    device_map: str | None = option(None, "Spread the model over devices: auto, balanced, sequential ...")
    quantize: Literal["auto", "int8", "int4"] | None = option(
        None, "Weights in 8 or 4 bits: less memory, faster. auto: int8 if whole ones fill half of the free memory."
    )
    trust_remote_code: bool = option(False, "Run code that comes with a local model, or one with --revision COMMIT.")


@dataclass(frozen=True, kw_only=True)
class ServerOptions(Options):
    """Which server does the work, in place of this machine."""

    server: str | None = option(None, "URL of a server, or openai. [default: $HFKIT_SERVER]", envvar="HFKIT_SERVER")
    api_key: str | None = option(None, "Its key. [default: $HFKIT_API_KEY, for openai $OPENAI_API_KEY]", secret=True)


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Options):
    """How text is generated. `inference.controls` says which of these transformers does not know."""

    max_new_tokens: int | None = option(None, "Most tokens to add. [default: 100, or what fits]", short="-n", min=1)
    min_new_tokens: int | None = option(None, "Fewest tokens to add.", min=0)
    do_sample: bool | None = option(None, "Sample (the default), or always take the most likely token.")
    temperature: float | None = option(
        None, "Below 1 sharpens the distribution, above 1 flattens it; 0 is greedy.", short="-t", min=0, max=100
    )
    top_k: int | None = option(None, "Sample among the k most likely tokens; 0: all.", min=0)
    top_p: float | None = option(None, "Sample among the most likely tokens that add up to p.", above=0, max=1)
    min_p: float | None = option(None, "Drop tokens below this share of the highest probability.", min=0, max=1)
    top_h: float | None = option(None, "Keep tokens up to this share of the entropy.", above=0, max=1)
    typical_p: float | None = option(None, "Probability mass of locally typical tokens to keep.", above=0, max=1)
    epsilon_cutoff: float | None = option(None, "Drop tokens below this probability.", min=0, max=1)
    eta_cutoff: float | None = option(None, "Drop unlikely tokens, adapted to the entropy.", min=0, max=1)
    repetition_penalty: float | None = option(None, "Above 1 makes tokens that already occurred less likely.", above=0)
    encoder_repetition_penalty: float | None = option(None, "Above 1 stays close to the prompt.", above=0)
    no_repeat_ngram_size: int | None = option(None, "Never repeat this many tokens in a row.", min=0)
    num_beams: int | None = option(None, "Beam search with this many beams.", min=1)
    length_penalty: float | None = option(None, "Beam search: above 0 favours long texts, below 0 short ones.")
    early_stopping: bool | None = option(None, "Beam search: stop as soon as enough beams have ended.")
    num_return_sequences: int | None = option(None, "Continuations of each prompt.", min=1, max=10_000)
    guidance_scale: float | None = option(None, "Classifier-free guidance: above 1 follows the prompt more.", above=0)
    prompt_lookup_num_tokens: int | None = option(None, "Guess ahead by copying this many prompt tokens.", min=1)
    num_assistant_tokens: int | None = option(None, "Tokens that --assistant-model guesses at a time.", min=1)
    suppress_tokens: list[int] | None = option(None, "Never produce this token id; may be repeated.")
    begin_suppress_tokens: list[int] | None = option(None, "Never begin with this token id; may be repeated.")
    forced_bos_token_id: int | None = option(None, "First token to produce (language codes of translators).", min=0)
    src_lang: str | None = option(None, "Language of the text, for translators with language codes: eng_Latn.")
    tgt_lang: str | None = option(None, "Language to translate to: fra_Latn.")
    renormalize_logits: bool | None = option(None, "Renormalise after the last processor.")
    use_cache: bool | None = option(None, "Reuse keys and values of earlier tokens.")
    max_time: float | None = option(None, "Stop after this many seconds.", above=0)
    stop_strings: list[str] | None = option(None, r"End before this text (\n: newline); repeatable.", short="--stop")
    bad_words: list[str] | None = option(None, "Never produce this text; may be repeated.")
    sequence_bias: list[str] | None = option(None, "TEXT=BIAS: add BIAS to the logit of TEXT; may be repeated.")
    negative_prompt: str | None = option(None, "What --guidance-scale moves away from. [default: the last token]")
    watermark: bool | None = option(None, "Mark the text so that transformers' WatermarkDetector recognises it.")
    assistant_model: str | None = option(None, "A smaller model that guesses ahead, for speed.")
    novel: list[str] | None = option(None, "Generate again where the text copies from this corpus; may be repeated.")
    novel_words: int | None = option(None, "Words in a row that may be copied from it. [default: 8]", min=1, max=1000)
    raw: bool = option(False, "Use the prompt as it is, without the template that the model was trained with.")
    truncate: bool = option(False, "Cut the beginning of a prompt that is too long.")
    seed: int | None = option(None, "Random seed. [default: random, printed]", short="-s", min=0, max=2**63 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature is not None and 0 < self.temperature < 1e-3:
            self._refuse("temperature", "it must be 0 (greedy) or at least 0.001")
        if self.max_new_tokens and (self.min_new_tokens or 0) > self.max_new_tokens:
            self._refuse("min_new_tokens", "it must be at most --max-new-tokens")
        if self.prompt_lookup_num_tokens or self.assistant_model:
            for name in ("num_beams", "num_return_sequences"):
                if (getattr(self, name) or 1) > 1:
                    self._refuse(name, "guessing ahead works for one text at a time: leave one of the two out")
        self.biases()

    def biases(self) -> list[tuple[str, float]]:
        """The (text, bias) pairs of `sequence_bias`."""
        pairs = []
        for item in self.sequence_bias or []:
            text, _, number = item.rpartition("=")
            try:
                bias = float(number)
            except ValueError:
                bias = math.nan
            if not text or not math.isfinite(bias):
                self._refuse("sequence_bias", "write TEXT=BIAS, such as ' rain=-2.5'")
            pairs.append((text, bias))
        return pairs


@dataclass(frozen=True, kw_only=True)
class TaskOptions(Options):
    """What a model is asked and how it answers. A model keeps the task that it was trained for."""

    template: str | None = option(None, r"Prompt and answer from a row's columns: 'English: {en}\nFrench: {fr}'.")
    labels: list[str] | None = option(None, "A possible answer; repeat it for all of them.")
    metric: list[str] | None = option(None, "accuracy, f1, bleu, chrf ...; may be repeated. [default: by the task]")


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(TaskOptions):
    """How a corpus is read."""

    exclude: list[str] | None = option(None, "Leave out files or folders by name (*.md, drafts); may be repeated.")
    text_column: str | None = option(None, "Column that holds the text. [default: found, if it is clear]")
    label_column: str = option("label", "Column of the label, for a classification head.")
    errors: Literal["strict", "replace"] = option("strict", "Bytes that are not UTF-8: refuse, or replace and count.")
    dataset_config_name: str | None = option(None, "Configuration of an hf:// data set.")
    dataset_split: str = option("train", "Split of an hf:// data set, or of a file or folder with several.")


@dataclass(frozen=True, kw_only=True)
class DataOptions(CorpusOptions):
    """How a corpus is read and cut into training sequences."""

    block_size: int | None = option(None, "Tokens in a sequence. [default: the context, at most 1024]", min=2)
    eval_file: list[str] | None = option(None, "Held-out corpus to measure on; may be repeated.")
    eval_fraction: float = option(0.05, "Without --eval-file: share to hold out, chosen by --seed.", min=0, max=0.5)
    streaming: bool = option(False, "Read while training and keep nothing on disk; needs --max-steps.")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """How a model is trained. Names are those of `TrainingArguments` and, for LoRA, of TRL, where these have one."""

    output_dir: str | None = option(None, "Folder of the run. [default: runs/ and the corpus's name]", short="-o")
    num_train_epochs: float | None = option(None, "Passes over the corpus. [default: 3, if small up to 30]", above=0)
    max_steps: int | None = option(None, "Optimizer steps, instead of epochs.", min=1)
    per_device_train_batch_size: int | None = option(None, "Sequences at a time. [default: 8, fewer if short]", min=1)
    per_device_eval_batch_size: int | None = option(None, "Sequences at a time when evaluating. [default: 8]", min=1)
    gradient_accumulation_steps: int = option(1, "Batches in an optimizer step.", min=1)
    learning_rate: float | None = option(None, "Peak learning rate. [default: by size, and for LoRA]", above=0)
    lr_scheduler_type: _Schedule = option("cosine", "How the learning rate changes.")
    lr_scheduler_kwargs: str | None = option(None, "Scheduler arguments, as JSON; num_decay_steps below 1: a share.")
    warmup_steps: float = option(0.05, "Steps of rising learning rate; below 1: a share of all steps.", min=0)
    optim: str | None = option(None, "Optimizer of transformers, or muon. [default: adamw_torch_fused; new: muon]")
    optim_args: str | None = option(None, "Arguments of the optimizer: name=value,...")
    weight_decay: float | None = option(None, "Weight decay. [default: 0.01; a new model: 0.1]", min=0)
    adam_beta1: float | None = option(None, "Adam's first decay rate.", min=0, max=1)
    adam_beta2: float | None = option(None, "Adam's second decay rate.", min=0, max=1)
    adam_epsilon: float | None = option(None, "Adam's epsilon.", above=0)
    max_grad_norm: float | None = option(None, "Clip gradients to this norm; 0: never.", min=0)
    label_smoothing_factor: float | None = option(None, "Label smoothing.", min=0, max=1)
    neftune_noise_alpha: float | None = option(None, "Noise on the embeddings (NEFTune).", above=0)
    activation_checkpointing: bool | None = option(None, "Compute activations twice: less memory, slower.")
    dropout: float | None = option(None, "Dropout of all layers. [default: the model's own]", min=0, max=1)
    bf16: bool | None = option(None, "bfloat16 arithmetic. [default: if the machine has units for it]")
    fp16: bool | None = option(None, "float16 arithmetic, on a GPU.")
    torch_compile: bool | None = option(None, "Compile the model. [default: if the run is long enough]")
    eval_steps: int | None = option(None, "Steps between evaluations. [default: a tenth of the run]", min=1)
    save_steps: int | None = option(None, "Steps between checkpoints, besides one at each evaluation.", min=1)
    save_total_limit: int = option(2, "Newest checkpoints to keep while training, in addition to the best.", min=1)
    logging_steps: int | None = option(None, "Steps between losses of the curve. [default: 1; GPU: up to 10]", min=1)
    load_best_model_at_end: bool = option(True, "Keep the state with the best held-out score, not the last one.")
    early_stopping_patience: int | None = option(None, "Evaluations without gain to allow. [small corpus: 3]", min=1)
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] | None = option(
        None, "Order of the sequences. [default: random]"
    )
    dataloader_num_workers: int | None = option(None, "Processes that load batches.", min=0)
    report_to: list[str] | None = option(None, "Tracker: tensorboard, wandb, mlflow ...; may be repeated.")
    run_name: str | None = option(None, "Name of the run in the tracker.")
    fsdp_config: str | None = option(None, "JSON file of transformers' FSDP settings, for models larger than a GPU.")
    deepspeed: str | None = option(None, "JSON file of DeepSpeed settings.")
    full_determinism: bool | None = option(None, "Use deterministic kernels, which are slower.")
    head: Literal["classification", "question-answering"] | None = option(None, "Head to train. [default: its own]")
    seed: int = option(42, "Random seed of hold-out, order and dropout.", short="-s", min=0, max=2**32 - 1)
    lora: bool = option(False, "Train a LoRA adapter instead of all weights.")
    lora_r: int = option(16, "LoRA: rank.", min=1)
    lora_alpha: int | None = option(None, "LoRA: scale. [default: twice the rank]", min=1)
    lora_dropout: float = option(0.05, "LoRA: dropout.", min=0, max=1)
    lora_target_modules: list[str] | None = option(None, "LoRA: layers; may be repeated. [default: all linear layers]")
    sample_prompt: str | None = option(None, "Continue this at each evaluation. [default: words of the corpus]")
    resume: bool = option(False, "Continue the run in --output-dir.")
    overwrite: bool = option(False, "Replace the run in --output-dir.")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """How a model is evaluated."""

    max_length: int | None = option(None, "Window, in tokens. [default: the model's context]", min=1)
    stride: int | None = option(None, "New tokens in each window: fewer, more context. [default: all]", min=1)


@dataclass(frozen=True, kw_only=True)
class ModelsOptions(ModelOptions):
    """`ModelOptions` of a command that takes several models."""

    model: list[str] | None = option(None, "A model, as for `generate`; may be repeated.", short="-m")  # type: ignore[assignment]

    def each(self) -> list[ModelOptions]:
        """The options of every model."""
        return [ModelOptions(**{**vars(self), "model": name}) for name in self.model or (None,)]


@dataclass(frozen=True, kw_only=True)
class SizeOptions(Options):
    """A new model and its tokenizer. All but the first two are fields of `transformers.GPT2Config`."""

    named_by: ClassVar[str] = "size"
    architecture: Literal["gpt2", "bert"] = option("gpt2", "gpt2, or bert with a --head.")
    size: Literal["tiny", "mini", "small", "medium", "large", "xl"] = option(
        "mini", "tiny 1 million parameters, mini 9, then GPT-2's: small 124, medium 355, large 774, xl 1558."
    )
    vocab_size: int | None = option(None, "Tokens. [default: by size, fewer for a small corpus]", min=257)
    n_positions: int | None = option(None, "Longest text, in tokens.", min=2)
    n_embd: int | None = option(None, "Width.", min=1)
    n_layer: int | None = option(None, "Layers.", min=1)
    n_head: int | None = option(None, "Attention heads.", min=1)
    resid_pdrop: float | None = option(None, "Dropout of the layers.", min=0, max=1)
    embd_pdrop: float | None = option(None, "Dropout of the embeddings.", min=0, max=1)
    attn_pdrop: float | None = option(None, "Dropout of the attention (slow on a CPU).", min=0, max=1)


@dataclass(frozen=True, kw_only=True)
class LaunchOptions(Options):
    """How many processes share the work, one for each GPU. The names are accelerate's."""

    num_processes: int = option(1, "Processes on all machines together.", min=1)
    num_machines: int = option(1, "Machines.", min=1)
    machine_rank: int = option(0, "Number of this machine, from 0.", min=0)
    main_process_ip: str | None = option(None, "Address of machine 0.")
    main_process_port: int = option(29500, "Port on machine 0.", min=1, max=65535)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Where a model is exported to, and how."""

    output_dir: str | None = option(None, "Folder to write to, or NAME.gguf.", short="-o")
    format: Literal["safetensors", "gguf"] = option("safetensors", "gguf: a file for llama.cpp and ollama.")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float8_e4m3fn"] = option(
        "auto", "Precision; float8_e4m3fn: matrices of a byte a weight. [default: unchanged]"
    )
    quantize: Literal["q8_0", "q4_0", "f16", "bf16", "f32"] | None = option(None, "The same, or fewer bits, in GGUF.")
    push_to_hub: str | None = option(None, "OWNER/NAME on the Hub to push to.")
    private: bool = option(True, "Make a new repository private.")
    overwrite: bool = option(False, "Replace the folder or file if it exists.")


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Options):
    """What `inspect` shows of a text."""

    temperature: float | None = option(None, "Show next-token probabilities at this temperature.", above=0, max=100)
    top_k: int | None = option(None, "Show them after top-k.", min=1)
    top_p: float | None = option(None, "Show them after top-p.", above=0, max=1)
    min_p: float | None = option(None, "Show them after min-p. [default: an example of all four]", min=0, max=1)
    top: int = option(10, "Next tokens to list.", min=1, max=1000)
    attention: bool = option(False, "Draw the attention of each head.")
    layer: int | None = option(None, "Only this layer, from 0. [default: all]", min=0)
    output: str | None = option(None, "Write a picture (.png) or a page (.html).", short="-o")
    overwrite: bool = option(False, "Replace that file if it exists.")


@dataclass(frozen=True, kw_only=True)
class TuneOptions(Options):
    """What `tune` searches, and how long."""

    n_trials: int = option(20, "Trials in total, including those of an interrupted search.", short="-n", min=1)
    timeout: float | None = option(None, "Start no trial after this many seconds.", above=0)
    search: list[str] | None = option(
        None,
        "NAME=LOW..HIGH or NAME=A,B,C of a training option; may be repeated. [default: learning rate, weight decay, "
        "warm-up, batch, epochs and dropout; rank and dropout of LoRA]",
    )
    prune: bool = option(True, "Stop a trial that is worse than most others at the same point.")
    train_best: bool = option(False, "Copy the best trial to OUTPUT-DIR/best, as a run of its own.")
