"""Models with a head that labels a text or finds an answer in it, BERT's above all: their rows, batches and scores."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from hfkit.scoring import Scores


@torch.inference_mode()
def score_items(model: Any, batches: Iterable[dict[str, torch.Tensor]]) -> Scores:
    """Loss and accuracy, each item a unit and a token: of its label, or of the two places of its answer."""
    found = Scores()
    for batch in batches:
        output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        if "labels" in batch:
            pairs = [(output.logits, batch["labels"])]
        else:
            pairs = [(output.start_logits, batch["start_positions"]), (output.end_logits, batch["end_positions"])]
            padding = batch["attention_mask"] == 0  # no answer is there, in whichever batch it is looked for
            pairs = [(logits.float().cpu().masked_fill(padding, -torch.inf), target) for logits, target in pairs]
        nll, right = 0.0, True
        for logits, target in pairs:
            logits = logits.float().cpu()
            nll = nll - logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)
            right = right & (logits.argmax(-1) == target)
        count = len(batch["input_ids"])
        part = Scores()
        part.add(np.arange(count), nll.double().numpy() / len(pairs), (~right).numpy().astype(int))
        found.join(part)
    return found
