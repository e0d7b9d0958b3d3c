"""One training run, from an empty directory or from its newest checkpoint to a finished model.

    RUN/run.json          what was run, with which code, where and when (longread.record)
    RUN/metrics.jsonl     a row per step
    RUN/tokenizer.json    the tokenizer of the data
    RUN/checkpoints/      where training resumes (longread.checkpoint.training)
    RUN/model/            the finished model

Everything that a step depends on is its number, the weights and the optimizer's moments: data, rates and masks are
functions of the step. So a resumed run computes bit for bit what an uninterrupted one computes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longread import checkpoint, files, record
from longread.config import RunConfig, UserError
from longread.data import Batch, Sampler, TokenDataset
from longread.model import Transformer, find_device, initialize, is_out_of_memory, undrawn
from longread.train.agreement import RUN_FILE, data_identity, refuse_other_config, refuse_other_data
from longread.train.beginning import TOKENIZER_FILES, begin_with, copy_tokenizer, keep_tokenizer
from longread.train.captured import CapturedGradient
from longread.train.card import origin_of, write_card
from longread.train.divergence import SAID_AFTER, DivergenceWatch
from longread.train.gradient import BatchGradient, accumulate_gradient, inner_steps
from longread.train.optimizer import (
    freeze_below,
    gradient_norm,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    update,
)
from longread.train.settling import leaner, out_of_memory, precision_of, settled, settled_before
from longread.train.stopping import StopSignal, diverged, halt, not_finite_in, not_finite_weight
from longread.train.validation import validation_losses

Row = dict[str, Any]

METRICS_FILE, MODEL_DIRECTORY = "metrics.jsonl", "model"
_VALIDATION_SEED = 0
LONGEST_UNSAVED = 600.0
"""Seconds between checkpoints where `checkpoint_every` does not say when."""
_UNKNOWN: dict[str, Any] = {}
"""What a run without a record of it began with."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    model: Transformer
    step: int
    """Finished steps, over all starts of the run."""
    saved_step: int
    """Of the newest checkpoint, from which the run can go on; fewer than `step` where the last steps were bad."""
    tokens: int
    """Targets trained on, over all starts."""
    seconds: float
    """Since this start."""
    row: Row | None
    """The last row of metrics; None if there was nothing left to do."""
    model_directory: Path | None
    """None if the run was interrupted: it can be resumed."""
    signal: int | None = None
    """That interrupted it."""

    @property
    def interrupted(self) -> bool:
        return self.model_directory is None


def train(
    config: RunConfig,
    data: TokenDataset,
    out: str | Path,
    *,
    validation: TokenDataset | None = None,
    initial: str | Path | None = None,
    device: str | torch.device = "auto",
    resume: bool = False,
    trackers: Sequence[str] = (),
    on_step: Callable[[Row], None] | None = None,
) -> TrainResult:
    """Trains the model of `config` on `data` and leaves the run in the directory `out`.

    Args:
        validation: held-out tokens, evaluated every `config.evaluate_every` steps and at the end.
        initial: a trained model whose weights the run begins with, to extend it to a longer context for instance; its
            network must be that of `config`, but for the rotary base.
        device: "auto" is a GPU if there is one.
        resume: go on from the newest checkpoint in `out`; from the beginning if there is none. `initial` may then be
            left out, and must not be other weights than the run began with. `recompute` and `micro_batch_size` may
            differ from what the run began with: the rest is then as good, but no longer bit for bit the same.
        trackers: names from `longread.record.TRACKERS`.
        on_step: called with each row of metrics.jsonl once it is written.

    Returns when the last step is done, or when SIGTERM, SIGINT or SIGHUP arrives: after the current step, or on a GPU
    without it; either way with a checkpoint, of the last good step if the run had begun to diverge. Where memory runs
    out it goes on with less at a time. Raises `UserError` when data, config, `out` and device do not go together,
    another process trains in `out`, or nothing takes less memory, and `TrainingHalted` when a number is not finite or
    the run diverges for `config.max_bad_steps` steps.
    """
    started, out = time.monotonic(), Path(out)
    with contextlib.ExitStack() as stack:
        if new := not os.path.exists(out):  # what is refused leaves no directory
            run = _Run(config, data, out, validation, initial, find_device(device), resume)
        stack.enter_context(files.held(out))
        if new:
            run.refuse_or_clear(resume)  # another process may have been faster
        else:
            run = _Run(config, data, out, validation, initial, find_device(device), resume)
        stop = stack.enter_context(StopSignal())
        stack.enter_context(run.recording(trackers))
        row = None
        while run.step < config.steps and not stop.requested:
            advanced = run.advance_within_memory(stop)
            if advanced is None:
                break
            row, last = advanced, run.step == config.steps
            if validation is not None and (last or _due(run.step, config.evaluate_every)):
                run.validate(row, stop)
            run.record(row)
            run.refuse_to_diverge(row)
            if last or run.should_save:
                run.save()
            if on_step is not None:
                on_step(row)
        if run.step > run.saved_step and not run.is_bad:
            run.save()
        finished = run.finish() if run.step >= config.steps else None
    seconds = time.monotonic() - started
    return TrainResult(run.model, run.step, run.saved_step, run.tokens, seconds, row, finished, stop.number)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class _Run:
    """The state of a run and what can be done with it, in the order in which it is done."""

    def __init__(
        self,
        config: RunConfig,
        data: TokenDataset,
        out: Path,
        validation: TokenDataset | None,
        initial: str | Path | None,
        device: torch.device,
        resume: bool,
    ) -> None:
        self.config, self.data, self.out, self.device = config, data, out, device
        for name, dataset in (("data", data), ("validation data", validation)):
            if dataset is not None and dataset.vocab_size > config.model.vocab_size:
                raise UserError(
                    f"the model has vocab_size {config.model.vocab_size}, but the {name} has {dataset.vocab_size}; "
                    "set the model's to that of the data, or more"
                )
        if validation is not None:
            if validation.tokenizer_fingerprint != data.tokenizer_fingerprint:
                raise UserError("the validation data has another tokenizer than the data; prepare both with one")
            self.validation_sampler = Sampler(validation, config.context_length, config.batch_size, _VALIDATION_SEED)
        self.sampler = Sampler(data, config.context_length, config.batch_size, config.seed)
        self.log = record.MetricsLog(out / METRICS_FILE)
        self.step = self.saved_step = 0
        self.tokens = 0
        self.saved_at = time.monotonic()
        self.last_checkpoint: Path | None = None
        self.last_good: Path | None = None
        """The newest checkpoint whose weights are known to be good, by the loss of the step after it."""
        self._next_batch: Batch | None = None
        self._left_step = self._updating = False
        self.refuse_or_clear(resume)
        newest = self._newest_checkpoint() if resume else None
        if resume and newest is None and os.path.exists(out / RUN_FILE):
            refuse_other_config(files.read_json(out / RUN_FILE, kind="run")["config"], config)
        begun = _UNKNOWN
        if os.path.exists(out / RUN_FILE):
            begun = files.read_json(out / RUN_FILE, kind="run").get("initial", _UNKNOWN)
        self._knows = bool(initial or begun)
        self.divergence = DivergenceWatch(config.model.vocab_size, knows=self._knows)
        self.model = self._new_model(drawn=not (self._knows or newest))
        self.initial = self._begin(initial, begun, has_checkpoint=newest is not None)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.exact = settled(config, device)
        if resume:
            self._restore(newest)
        self.gradient = self._gradient()

    def refuse_or_clear(self, resume: bool) -> None:
        names = (RUN_FILE, METRICS_FILE, MODEL_DIRECTORY, checkpoint.CHECKPOINTS)
        if not resume and any(os.path.exists(self.out / name) for name in names):  # Path.exists may raise
            raise UserError(f"{self.out} already holds a run; resume it, or choose another directory")
        if resume:
            for directory in (self.out, self.out / MODEL_DIRECTORY, self.out / checkpoint.CHECKPOINTS):
                files.remove_temporaries(directory)

    def _newest_checkpoint(self) -> Path | None:
        path = checkpoint.newest_checkpoint(self.out)
        if path is None and (self.out / MODEL_DIRECTORY).exists():
            raise UserError(f"{self.out} holds a model but no checkpoint to resume from; train into another directory")
        return path

    def _new_model(self, *, drawn: bool) -> Transformer:
        """Of drawn weights, or of none yet: drawing billions that nobody reads takes minutes."""
        model = Transformer(self.config.model) if drawn else undrawn(self.config.model)
        if drawn:
            initialize(model, self.config.seed)
        freeze_below(model, self.config.trained_blocks)
        precision = precision_of(self.config, self.device)
        if precision == "bfloat16":
            model.compute_dtype = torch.bfloat16
        model.to(torch.float64 if precision == "float64" else torch.float32)
        return model.to(self.device) if drawn else model.to_empty(device=self.device)

    def _begin(
        self, given: str | Path | None, begun: dict[str, Any] | None, *, has_checkpoint: bool
    ) -> dict[str, Any] | None:
        """Fills the model with the weights that the run begins with, and says for run.json which they are.

        A run that was begun keeps to them: given others, it is refused; given none, it reads those that run.json names
        if there is no checkpoint yet.
        """
        path = given
        if given is None and begun and not has_checkpoint:
            path = begun["path"]
        if path is None:
            return None
        loaded = checkpoint.load_model(path)
        if begun is not _UNKNOWN and (begun is None or begun["fingerprint"] != loaded.fingerprint):
            weights = "new weights" if begun is None else f"the weights of {begun['path']} ({begun['fingerprint'][:8]})"
            remedy = "" if given is None else "resume without it, or "
            raise UserError(
                f"{self.out} began with {weights}, and {path} holds others ({loaded.fingerprint[:8]}); "
                f"{remedy}train into another directory"
            )
        begin_with(self.model, loaded, path, self.data.tokenizer_fingerprint)
        found = {"path": os.path.realpath(path), "fingerprint": loaded.fingerprint}
        provenance = loaded.metadata.get("provenance")
        return found | ({"provenance": provenance} if provenance else {})

    def _restore(self, path: Path | None) -> None:
        size = 0
        if path is not None:
            found = checkpoint.read_checkpoint(path)
            refuse_other_config(found.state["config"], self.config)
            refuse_other_data(found.state["data"], self.data)
            if found.state["precision"] != self.exact.precision:
                raise UserError(
                    f"this run was computed in {found.state['precision']}, but auto means {self.exact.precision} on "
                    f"{self.device}; resume on the device that it began on"
                )
            self.exact = settled_before(self.config, self.exact, found.state)
            checkpoint.fill(self.model, found.model, where=path)
            restore_optimizer(self.model, self.optimizer, found.optimizer, path)
            self.step = self.saved_step = found.step
            self.tokens = found.state["tokens"]
            self.last_checkpoint, size = path, found.state["metrics_bytes"]
            if good := found.state.get("last_good"):
                self.last_good = path.parent / good
        else:
            warnings.warn(f"{self.out} has no checkpoint: training begins at the first step", stacklevel=4)
        if not self.log.truncate(size):
            warnings.warn(f"{self.log.path} lacks rows from before step {self.step}; training goes on", stacklevel=2)
        self.divergence = DivergenceWatch(self.config.model.vocab_size, self.log.rows(), knows=self._knows)

    @contextlib.contextmanager
    def recording(self, trackers: Sequence[str]) -> Iterator[None]:
        """Opens the trackers, then leaves run.json, to which each resumption adds itself, and the tokenizer."""
        path, now = self.out / RUN_FILE, record.describe_run(self.config, sys.argv)
        if os.path.exists(path):
            run = files.read_json(path, kind="run")
            run["config"] = now.pop("config")
            run["resumed"] = [*run["resumed"], now | {"step": self.step}]
        else:
            run = {"id": uuid.uuid4().hex[:8], **now, "resumed": []}
            if self.last_checkpoint is None:  # else run.json was lost, and with it what the run began with
                run["initial"] = self.initial
        with contextlib.ExitStack() as stack:
            self._trackers = []
            for name in dict.fromkeys(trackers):
                tracker = record.open_tracker(name, directory=self.out, run_id=run["id"], run=run, step=self.step + 1)
                stack.callback(tracker.close)
                self._trackers.append(tracker)
            files.write_json_atomically(path, run, kind="run")
            keep_tokenizer(run.get("initial"), self.data.directory, self.out)
            try:
                yield
            except BaseException:
                if self.step == 0 and not run["resumed"]:  # nothing to go on with: the place is free again
                    for name in (RUN_FILE, *TOKENIZER_FILES):
                        (self.out / name).unlink(missing_ok=True)
                raise

    def _gradient(self) -> Callable[..., BatchGradient]:
        if self.device.type == "cuda":
            return CapturedGradient(self.model, self.exact)
        return functools.partial(accumulate_gradient, self.model, self.exact)

    def advance_within_memory(self, stop: StopSignal) -> Row | None:
        """`advance`, with less at a time where memory runs out. Raises `UserError` if there is nothing less."""
        while True:
            try:
                return self.advance(stop)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            self._make_room()  # only here, where nothing holds the tensors of the step any more

    def _make_room(self) -> None:
        less = None if self._updating else leaner(self.config, self.exact, self.device)
        self.model.zero_grad(set_to_none=True)
        before = self.exact
        del self.gradient  # and with it what a graph has captured
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if less is None:
            if self.step > self.saved_step and not (self.is_bad or self._updating):
                self.save()
            kept = f"--resume goes on from step {self.saved_step}" if self.saved_step else "nothing was trained yet"
            raise out_of_memory(self.exact, self.step + 1, kept)
        self.exact, size = less, less.micro_batch_size
        warnings.warn(
            f"out of memory at step {self.step + 1} with micro_batch_size {before.micro_batch_size} and recompute "
            f"{before.recompute}: goes on with {size} and {less.recompute}; sums round differently from there on",
            stacklevel=3,
        )
        self.gradient = self._gradient()

    def advance(self, stop: StopSignal) -> Row | None:
        """Takes one step and returns its row. Raises `TrainingHalted` before the weights could be spoiled.

        On a GPU a signal leaves the step as if it had not begun: it may be long, and the weights do not change before
        its end. None then.
        """
        started = time.monotonic()
        inner_lr = self.config.inner.lr_at(self.step)
        batch = self._next_batch or self.sampler.batch(self.step)
        found = self.gradient(batch.to(self.device), inner_lr=inner_lr)
        norm = gradient_norm(self.model.parameters())
        self._next_batch = self.sampler.batch(self.step + 1)  # drawn while a GPU is still at work
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.device))
            if stop.comes_before(done.query):
                self._left_step = True
                return None
        problem = not_finite_in(self.model, found, norm)
        if problem is not None:
            raise halt(self.config, self.step + 1, problem, self.last_checkpoint)
        self._updating = True
        lr = update(self.model, self.optimizer, self.config.optimizer, self.step, norm)
        self.step, self._updating = self.step + 1, False
        tokens = int(batch.loss_mask.sum())
        self.tokens += tokens
        row: Row = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": found.loss.item(),
            "grad_norm": norm.item(),
            "lr": lr,
        }
        if found.inner_grad_norm.numel():
            row["inner_lr"] = inner_lr
            row |= inner_steps(found.inner_grad_norm.cpu(), batch.loss_mask, self.config.inner.clip)
        self.divergence.see(row["loss"], row["grad_norm"])
        if self.divergence.bad_steps:
            row["bad_steps"] = self.divergence.bad_steps
        elif self.last_checkpoint is not None and self.saved_step == self.step - 1:
            self.last_good = self.last_checkpoint
        row["seconds"] = time.monotonic() - started
        row["tokens_per_second"] = tokens / row["seconds"]
        if self.device.type == "cuda":  # reserved, not allocated: what lies in the pools of graphs must be there too
            row["peak_memory_bytes"] = torch.cuda.max_memory_reserved(self.device)
        return row

    def validate(self, row: Row, stop: StopSignal) -> None:
        """Adds the losses on held-out text to a row, unless a signal comes. If it fails, what was trained is saved."""
        try:
            row |= validation_losses(self.model, self.exact, self.validation_sampler, stopped=lambda: stop.requested)
        except BaseException:
            self.record(row)
            if not self.is_bad:
                self.save()
            raise

    def refuse_to_diverge(self, row: Row) -> None:
        """Warns when several steps in a row were bad, and raises `TrainingHalted` when they are too many."""
        bad, most = self.divergence.bad_steps, self.config.max_bad_steps
        numbers = self.divergence.describe(row["loss"], row["grad_norm"]) if bad else ""
        if most is not None and bad >= most:
            raise diverged(self.config, self.step, bad, numbers, self.last_good)
        if bad == SAID_AFTER:
            outlook = "goes on, as max_bad_steps is none" if most is None else f"halts at {most} such steps in a row"
            warnings.warn(f"training diverges since step {self.step - bad + 1}: {numbers}; it {outlook}", stacklevel=3)

    @property
    def is_bad(self) -> bool:
        """Whether the run may be about to halt, so that its weights must not be what it resumes from."""
        return self.divergence.bad_steps > 0 and self.config.max_bad_steps is not None

    @property
    def should_save(self) -> bool:
        """Whether a checkpoint is due, by number or by the clock. One that falls on bad weights waits for good ones."""
        if self.is_bad:
            return False
        every = self.config.checkpoint_every
        if every is None:
            return time.monotonic() - self.saved_at > LONGEST_UNSAVED
        return self.step // every > self.saved_step // every

    def record(self, row: Row) -> None:
        """Writes a row to metrics.jsonl and to the trackers."""
        self.log.append(row)
        for tracker in self._trackers:
            tracker.log(self.step, {name: value for name, value in row.items() if name != "step"})

    def save(self) -> None:
        """Writes a checkpoint of finite weights."""
        # A step that was left still runs on the stream of this thread, and nothing there would come before its end.
        beside = torch.cuda.stream(torch.cuda.Stream(self.device)) if self._left_step else contextlib.nullcontext()
        with beside:
            self._save()

    def _save(self) -> None:
        problem = not_finite_weight(self.model)
        if problem is not None:
            raise halt(self.config, self.step, problem, self.last_checkpoint)
        self.log.make_durable()
        state = {
            "config": self.config.as_dict(),
            "data": data_identity(self.data),
            "sampler_seed": self.config.seed,
            "precision": self.exact.precision,
            "recompute": self.exact.recompute,
            "micro_batch_size": self.exact.micro_batch_size,
            "tokens": self.tokens,
            "metrics_bytes": self.log.size,
            "last_good": self.last_good and self.last_good.name,
        }
        if self.divergence.bad_steps:
            kept = f"the last good one, {self.last_good}, is kept" if self.last_good else "there is no good one"
            warnings.warn(f"the checkpoint of step {self.step} is of weights that diverge; {kept}", stacklevel=3)
        self.last_checkpoint = checkpoint.write_checkpoint(
            self.out,
            self.step,
            model=self.model,
            inner=self.config.inner,
            optimizer=optimizer_tensors(self.model, self.optimizer),
            state=state,
            tokenizer_fingerprint=self.data.tokenizer_fingerprint,
            spare=self.last_good,
        )
        self.saved_step, self.saved_at = self.step, time.monotonic()

    def finish(self) -> Path:
        """Writes the finished model."""
        directory = self.out / MODEL_DIRECTORY
        copy_tokenizer(self.out, directory)
        provenance: dict[str, Any] = {"run": self.config.name, "step": self.step, "tokens": self.tokens}
        initial = files.read_json(self.out / RUN_FILE, kind="run").get("initial")
        if initial:
            provenance["adapted_from"] = origin_of(initial)
            write_card(directory, self.config, self.tokens, initial)
        checkpoint.save_model(directory, self.model, self.config.inner, self.data.tokenizer_fingerprint, provenance)
        return directory
