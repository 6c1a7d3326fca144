"""GPUs that are not there: what torch would say of them."""

import torch


def pretend(monkeypatch, count: int = 1, free: int = 10**9, bfloat16: bool = True) -> None:
    """Let torch speak of `count` GPUs with so many bytes free, with or without units for bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16)
