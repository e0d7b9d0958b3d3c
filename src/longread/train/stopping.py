"""How a run ends before its last step: asked to, or because its numbers are no longer finite, or it diverges."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor

from longread.config import RunConfig, TrainingHalted
from longread.parallel.world import BETWEEN_QUESTIONS
from longread.signals import Requests
from longread.train.gradient import BatchGradient

logger = logging.getLogger(__name__)


class StopSignal:
    """While it is entered, SIGTERM, SIGINT and SIGHUP set `requested`, and the run ends; a second SIGINT aborts.

    It says so at once. A signal and its echo are one; one that the process ignores (nohup) stays ignored. Outside the
    main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self, *, passed_on: bool = False) -> None:
        """`passed_on`: a launcher passes on what a terminal has sent already, so that a second SIGINT says nothing."""
        self._passed_on = passed_on
        self.requested = False
        self.number: int | None = None
        """Of the signal that came first."""
        self._requests = Requests()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def comes_before(self, done: Callable[[], bool]) -> bool:
        """Waits until `done()`, or for a signal; whether that came first.

        A call of C that waits, like that for a GPU, keeps Python from handling a signal until it returns: many seconds,
        where a step is long. So this asks again and again.
        """
        while not (self.requested or done()):
            time.sleep(BETWEEN_QUESTIONS)
        return not done()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if not self._requests.is_new(number):
            return
        if self.requested and number == signal.SIGINT and not self._passed_on:
            raise KeyboardInterrupt
        self.number = self.number or number
        self.requested = True
        with contextlib.suppress(OSError, RuntimeError):  # stderr is gone, or in use by what is interrupted
            logger.warning("%s: saving a checkpoint, then ending", signal.Signals(number).name)


def not_finite_in(gradients: Mapping[str, Tensor], found: BatchGradient, norm: Tensor) -> str | None:
    """Names the first quantity of a step that is not finite; None when all is well.

    `norm` is that of the gradients, which go by the names of their parameters.
    """
    if norm.isfinite() and found.loss.isfinite() and found.inner_grad_norm.isfinite().all():
        return None
    if not found.loss.isfinite():
        return f"the loss is {found.loss.item()}"
    for name, gradient in gradients.items():
        if not gradient.isfinite().all():
            return f"the gradient of {name} is not finite (the loss is {found.loss.item():.4g})"
    if norm.isfinite():
        return "the norm of an inner gradient is not finite"
    return f"the gradients are too large for their norm (the loss is {found.loss.item():.4g})"


def not_finite_weight(weights: Mapping[str, Tensor]) -> str | None:
    """Names the first parameter that is not finite; None when all are."""
    for name, parameter in weights.items():
        if parameter.numel() and not all(
            end.isfinite() for end in torch.aminmax(parameter.detach())
        ):  # no copy is made
            return f"{name} is not finite after the update"
    return None


def halt(config: RunConfig, step: int, problem: str, last_good: object) -> TrainingHalted:
    """The exception for `problem` at `step`, counted from 1."""
    kept = f"the last good checkpoint is {last_good}" if last_good else "there is no earlier checkpoint"
    return TrainingHalted(
        f"training halted at step {step}: {problem}; nothing of this step was saved, {kept}; train again with a lower "
        f"optimizer.lr (it is {config.optimizer.lr:g}), a longer warm-up, a smaller inner.lr ({config.inner.lr:g}) or "
        "precision float32"
    )


def diverged(config: RunConfig, step: int, bad_steps: int, numbers: str, last_good: Path | None) -> TrainingHalted:
    """The exception for a run whose last `bad_steps` steps, up to `step`, were bad; `numbers` are those of the last."""
    first = step - bad_steps + 1
    kept = f"--init {last_good} begins with the last good checkpoint" if last_good else "there is no good checkpoint"
    return TrainingHalted(
        f"training halted at step {step}: it diverges since step {first}: {numbers}; nothing was saved since then, "
        f"{kept}; train into another directory with a lower optimizer.lr (it is {config.optimizer.lr:g}), a longer "
        f"warm-up or a smaller inner.lr ({config.inner.lr:g}); max_bad_steps, {config.max_bad_steps}, sets when to halt"
    )
