"""How many held-out examples a model answers right, where it chooses among labels."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hfkit.corpus.encoding import IGNORED, encode_answers
from hfkit.corpus.sequences import group
from hfkit.corpus.templates import task_of
from hfkit.corpus.training_data import TrainingData
from hfkit.inference.classification import label_scores
from hfkit.models.loading import LanguageModel

_BATCH_TOKENS = 4096  # of prompts, with the labels behind each


@dataclass(frozen=True)
class Answers:
    """The right answers to held-out examples, as numbers of labels."""

    names: Sequence[str]
    right: Sequence[int]
    prompts: Sequence[list[int]] = ()  # token ids; none for a model with a head
    labels: Sequence[list[int]] = ()  # token ids of each label

    @property
    def baseline(self) -> dict[str, Any]:
        """The most frequent answer, and the accuracy of always giving it."""
        label, count = Counter(self.right).most_common(1)[0]
        return {"label": self.names[label], "accuracy": count / len(self.right)}

    def count_right(self, lm: LanguageModel, share: slice) -> int:
        """How many prompts in a share of them the model answers right."""
        count, labels = 0, list(self.labels)
        items = [{"input_ids": np.array(ids)} for ids in self.prompts[share]]
        right = iter(self.right[share])
        for batch in group(items, _BATCH_TOKENS // len(labels)):
            chosen = label_scores(lm, [item["input_ids"].tolist() for item in batch], labels).argmax(-1)
            count += sum(label == next(right) for label in chosen.tolist())
        return count


def find_answers(
    dataset: TrainingData, held_out: Any, tokenizer: PreTrainedTokenizerBase, length: int
) -> Answers | None:
    """The answers to `held_out`; None where nothing is held out, or any text may be an answer.

    length: tokens that the model takes: prompts that do not fit with every label are left out.
    """
    task = task_of(tokenizer)
    if not len(held_out) or not (dataset.head == "classification" or (task and task.labels)):
        return None
    items = [held_out[number] for number in range(len(held_out))]
    if dataset.head or not task:
        return Answers(dataset.labels, [item["labels"] for item in items])
    whole = [task.complete(label) for label in task.labels]
    endings = encode_answers(whole, tokenizer)
    bare = encode_answers([text.removesuffix(task.end) for text in whole], tokenizer)
    nested = any(short is not long and long[: len(short)] == short for short in bare for long in bare)
    prompts, right, room = [], [], length - max(map(len, endings))
    for item in items:
        ids, start = item["input_ids"].tolist(), int((item["labels"] != IGNORED).argmax())
        matches = [number for number, ending in enumerate(endings) if ids[start : start + len(ending)] == ending]
        if matches and 0 < start <= room:
            prompts.append(ids[:start])
            right.append(matches[0])
    return Answers(task.labels, right, prompts, endings if nested else bare) if right else None
