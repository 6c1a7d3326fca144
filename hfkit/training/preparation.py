"""`prepare`: tokenize a corpus once, say what is in it, and what training on it would cost here."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hfkit.console import counted
from hfkit.corpus.cache import Prepared, corpus_lines, encode_corpus
from hfkit.corpus.documents import Corpora, find_corpus, is_prepared
from hfkit.corpus.sequences import cut_sequences, show_examples
from hfkit.declaration import divide
from hfkit.models.architecture import choose_device, context_length
from hfkit.models.loading import load_config, load_tokenizer
from hfkit.models.sources import count_parameters, find_model
from hfkit.options import DataOptions, ModelOptions, TrainOptions
from hfkit.storage import check_owned, make_writable
from hfkit.training.plan import Plan, block_size_for, make_plan, plan_lines


@dataclass(frozen=True)
class Preparation:
    """A tokenized corpus: `finetune` takes its folder."""

    prepared: Prepared
    plan: Plan  # of training on all of it with the default options
    blocks: int
    block_size: int
    examples: list[str] = field(default_factory=list)  # as the model sees them

    @property
    def folder(self) -> str:
        return str(self.prepared.folder)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints. Seconds and bytes of memory are estimates for this machine."""
        names = ("parameters", "steps", "seconds", "memory", "precision")
        cost = {name: getattr(self.plan, name) for name in names} | {"device": self.plan.device.type}
        sizes = {"blocks": self.blocks, "block_size": self.block_size, "folder": self.folder}
        shown = {"examples": self.examples} if self.examples else {}
        return {**asdict(self.prepared.report), **sizes, "training": cost, **shown}

    def lines(self) -> list[str]:
        """The same figures for people."""
        blocks = f"{counted(self.blocks, 'sequence')} of at most {self.block_size:,} tokens, in {self.folder}"
        lines = [*corpus_lines(self.prepared.report), blocks, *plan_lines(self.plan)]
        for number, example in enumerate(self.examples, 1):
            lines += [f"--- sequence {number}: what stands between ⟦ and ⟧ is learned", example]
        return lines


def prepare(
    corpus: Corpora,
    *,
    model: str | Path | ModelOptions | None = None,
    data: DataOptions | None = None,
    output_dir: str | Path | None = None,
    show: int = 0,
    **overrides: Any,
) -> Preparation:
    """Tokenize a corpus for a model, into `output_dir` or into the cache, where `finetune` finds it again.

    Args:
        corpus: files, folders, globs or `hf://NAME`.
        model: the model whose tokenizer to use, as `load` takes it.
        data: options; every field of `ModelOptions` and `DataOptions` is a keyword, too.
        output_dir: a new folder; `datasets.load_from_disk` reads it, too.
        show: how many sequences the result has in `examples`, as the model sees them.

    Raises:
        HfkitError: the corpus or the model cannot be read, or the folder is not free.
    """
    options: ModelOptions
    options, data = divide(overrides, (ModelOptions, model), (DataOptions, data))
    folder = Path(output_dir) if output_dir else None
    if folder:
        make_writable(folder)
        if not is_prepared(folder):
            check_owned(folder)
    files, source = find_corpus(corpus), find_model(options)
    tokenizer, config = load_tokenizer(source), load_config(source)
    prepared = encode_corpus(files, tokenizer, data, folder)
    block_size = block_size_for(context_length(config), data.block_size)
    sequences = cut_sequences(prepared, block_size)
    plan = make_plan(
        config, count_parameters(source), len(sequences), sequences.tokens / max(1, len(sequences)), TrainOptions(),
        choose_device(options),
    )  # fmt: skip
    return Preparation(prepared, plan, len(sequences), block_size, show_examples(sequences, tokenizer, show))
