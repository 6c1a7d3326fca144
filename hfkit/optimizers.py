"""Muon for the matrices of a transformer, AdamW for everything else, as one optimizer for Trainer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """torch's Muon and AdamW side by side; one learning rate serves both, since Muon's step is scaled to AdamW's."""

    def __init__(self, matrices: Iterable[nn.Parameter], groups: list[dict[str, Any]], **options: Any) -> None:
        """matrices: (in, out) or (out, in) weights of hidden layers. groups: AdamW's parameter groups."""
        lr, decay = options["lr"], options["weight_decay"]
        muon = torch.optim.Muon(list(matrices), lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        self._parts = [muon, torch.optim.AdamW(groups, lr=lr, betas=options["betas"], eps=options["eps"], fused=True)]
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """A scheduler sets the learning rate in these groups, so they are the parts' own."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, own in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(own)
        self._share()


class MuonFactory:
    """What Trainer's `optimizer_cls_and_kwargs` takes for an optimizer that must see the model."""

    def __call__(self, model: nn.Module, **options: Any) -> Muon:
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is not None:
            embeddings.add(id(head.weight))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [p for p in trained if p.ndim == 2 and id(p) not in embeddings]
        others = [p for p in trained if p.ndim != 2 or id(p) in embeddings]
        return Muon(matrices, [{"params": others, "weight_decay": 0.0}], **options)
