"""The likeliest next token of each lane, on its way to the host as soon as it is known."""

from __future__ import annotations

import torch
from torch import Tensor

from longread.ops.likeliest import likeliest


class LikeliestTokens:
    """Of so many lanes the likeliest token and its log-probability; each has a fixed address, on the host too."""

    def __init__(self, logits: Tensor) -> None:
        lanes, gpu = len(logits), logits.is_cuda
        self._found = torch.zeros(lanes, dtype=torch.long, device=logits.device), torch.zeros_like(logits[:, 0])
        self._on_host = [torch.zeros(lanes, dtype=x.dtype, pin_memory=gpu) for x in self._found]
        self._arrived = torch.cuda.Event() if gpu else None
        self._sent = 0

    def find(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Looks at the logits of the first lanes, [count, V]; the device is not waited for."""
        found = likeliest(logits)
        for place, x in zip(self._found, found, strict=True):
            place[: len(x)].copy_(x)
        return found

    def send(self, count: int) -> None:
        """Lets what was found of the first `count` lanes go to the host."""
        for place, x in zip(self._on_host, self._found, strict=True):
            place[:count].copy_(x[:count], non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(self._found[0].device))
        self._sent = count

    def forget(self) -> None:
        """Logits have changed since."""
        self._sent = 0

    def wait(self, logits: Tensor) -> list[tuple[int, float]]:
        """Those of the first lanes, whose logits these are, [count, V]."""
        count = len(logits)
        if count > self._sent:
            self.find(logits)
            self.send(count)
        if self._arrived is not None:
            self._arrived.synchronize()
        ids, log_p = (x[:count].tolist() for x in self._on_host)
        return list(zip(ids, log_p, strict=True))
