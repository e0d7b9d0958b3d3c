"""One training run, from an empty directory or from its newest checkpoint to a finished model.

    RUN/run.json          what was run, with which code, where and when (longread.record)
    RUN/metrics.jsonl     a row per step; what it cost is explained in longread.train.throughput
    RUN/logs/             what each rank has to say, where there are several (longread.train.rank_log)
    RUN/profile/          traces of steps, if asked for (longread.train.profiling)
    RUN/quarantine/       batches that were not finite (longread.train.quarantine)
    RUN/tokenizer.json    the tokenizer of the data
    RUN/checkpoints/      where training resumes (longread.checkpoint.training)
    RUN/model/            the finished model

Everything that a step depends on is its number, the weights and the optimizer's moments: data, rates and masks are
functions of the step. So a resumed run computes bit for bit what an uninterrupted one computes.

Several ranks (`longread.parallel`) read shares of each batch and take every decision together: rank 0 alone writes the
files above, and one process is a world of its own.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from longread import checkpoint, files, record
from longread.config import Parallelism, RunConfig, UserError
from longread.data import Sampler, TokenDataset
from longread.model import Transformer, find_device
from longread.parallel import (
    DEADLINE,
    FullySharded,
    World,
    agreed,
    divide_state,
    fill_rows,
    is_agreed,
    joined,
    whole_tensors,
)
from longread.train.agreement import (
    RUN_FILE,
    data_identity,
    refuse_differences,
    refuse_other_config,
    refuse_other_data,
    refuse_other_directories,
)
from longread.train.beginning import (
    UNKNOWN,
    copy_tokenizer,
    fill_first_weights,
    new_model,
    training_sampler,
)
from longread.train.card import provenance_of, write_card
from longread.train.divergence import SAID_AFTER, DivergenceWatch
from longread.train.meta_step import whole_model
from longread.train.optimizer import make_optimizer, optimizer_tensors, restore_optimizer
from longread.train.outer_step import NotFinite, NothingLess, OuterStep, Row
from longread.train.profiling import ProfiledSteps, profiling
from longread.train.rank_log import rank_log
from longread.train.recording import recording
from longread.train.rehearsal import precompile_step
from longread.train.result import TrainResult
from longread.train.settling import out_of_memory, precision_of, settled, settled_before
from longread.train.sharing import Share, divided
from longread.train.stopping import StopSignal, diverged, halt, not_finite_weight
from longread.train.validation import validation_losses

METRICS_FILE, MODEL_DIRECTORY = "metrics.jsonl", "model"
_VALIDATION_SEED = 0
LONGEST_UNSAVED = 600.0
"""Seconds between checkpoints where `checkpoint_every` does not say when."""


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
    parallelism: Parallelism | None = None,
    deadline: float = DEADLINE,
    profiled: ProfiledSteps | None = None,
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
        parallelism: how the processes that `torchrun` has started divide the work; alone it says nothing.
        deadline: seconds that a rank waits for the others, and for what GPUs compute together: a step at most.
        profiled: steps of which each rank leaves a trace in RUN/profile (see `longread.train.profiling`).

    Started again by torchrun after a failure, a run resumes without being asked to.

    Returns when the last step is done, or when SIGTERM, SIGINT or SIGHUP arrives: after the current step, or on a GPU
    without it; either way with a checkpoint, of the last good step if the run had begun to diverge. Where memory runs
    out it goes on with less at a time. Raises `UserError` when data, config, `out` and device do not go together,
    another process trains in `out`, or nothing takes less memory, and `TrainingHalted` when a number is not finite or
    the run diverges for `config.max_bad_steps` steps.
    """
    started, out = time.monotonic(), Path(out)
    with contextlib.ExitStack() as stack:
        world, place = stack.enter_context(joined(device, deadline=deadline))
        resume = any((resume, *world.agree(world.launch.restarts, at="the beginning")))  # each machine counts its own
        with world.together("the beginning of the run"):
            run = _Run(config, data, out, validation, find_device(place), world, parallelism or Parallelism())
            held = files.held(out) if world.is_first else contextlib.nullcontext()
            if new := not os.path.exists(out):  # what is refused leaves no directory
                run.refuse_or_clear(resume)
            else:
                stack.enter_context(held)
                run.refuse_or_clear(resume)
        run.begin(initial, resume)
        profile = stack.enter_context(profiling(profiled, run.step, config, out, world, run.device))
        with world.together("holding the directory of the run"):
            if new:
                stack.enter_context(held)
                run.refuse_or_clear(resume)  # another process may have been faster
        refuse_other_directories(world, out)
        stop = stack.enter_context(StopSignal(passed_on=world.size > 1))
        with world.together("opening the logs"):
            stack.enter_context(rank_log(world, out))
            stack.enter_context(run.recording(trackers))
        stack.callback(run.outer.release)
        stack.enter_context(run.writer)
        row = None
        while run.step < config.steps and not run.is_stopped(stop):
            advanced = run.advance(stop)
            if advanced is None:
                break
            profile()
            row, last = advanced, run.step == config.steps
            if run.validation_sampler and (last or _due(run.step, config.evaluate_every)):
                run.validate(row, run.validation_sampler, stop)
            with world.together("recording the step"):
                run.record(row)
            run.refuse_to_diverge(row)
            if last or run.should_save:
                run.save()
            with world.together("what is called after each step"):
                if on_step is not None:
                    on_step(row)
        run.is_stopped(stop)
        if run.step > run.saved_step and not run.is_bad:
            run.save()
        run.writer.wait()
        finished = run.finish() if run.step >= config.steps else None
    seconds = time.monotonic() - started
    return TrainResult(run.model, run.step, run.saved_step, run.tokens, seconds, row, finished, run.signal)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class _Run:
    """The state of a run and what can be done with it, in the order in which it is done. All ranks do it together."""

    def __init__(
        self,
        config: RunConfig,
        data: TokenDataset,
        out: Path,
        validation: TokenDataset | None,
        device: torch.device,
        world: World,
        parallelism: Parallelism,
    ) -> None:
        self.config, self.data, self.out, self.device = config, data, out, device
        self.world, self.parallelism = world, parallelism
        for name, dataset in (("data", data), ("validation data", validation)):
            if dataset is not None and dataset.vocab_size > config.model.vocab_size:
                raise UserError(
                    f"the model has vocab_size {config.model.vocab_size}, but the {name} has {dataset.vocab_size}; "
                    "set the model's to that of the data, or more"
                )
        self.share = Share.of(world.launch, parallelism, config)
        self.validation_sampler: Sampler | None = None
        if validation is not None:
            if validation.tokenizer_fingerprint != data.tokenizer_fingerprint:
                raise UserError("the validation data has another tokenizer than the data; prepare both with one")
            self.validation_sampler = Sampler(validation, config.context_length, config.batch_size, _VALIDATION_SEED)
        self.sampler = training_sampler(config, data)
        self.log = record.MetricsLog(out / METRICS_FILE)
        self.step = self.saved_step = 0
        self.tokens = 0
        self.signal: int | None = None
        """That any rank has received."""
        self.saved_at = time.monotonic()
        self.last_checkpoint: Path | None = None
        self.last_good: Path | None = None
        """The newest checkpoint whose weights are known to be good, by the loss of the step after it."""

    def refuse_or_clear(self, resume: bool) -> None:
        """On the rank that writes."""
        names = (RUN_FILE, METRICS_FILE, MODEL_DIRECTORY, checkpoint.CHECKPOINTS)
        if not self.world.is_first:
            return
        if not resume and any(os.path.exists(self.out / name) for name in names):  # Path.exists may raise
            raise UserError(f"{self.out} already holds a run; resume it, or choose another directory")
        if resume:
            for directory in (self.out, self.out / MODEL_DIRECTORY, self.out / checkpoint.CHECKPOINTS):
                files.remove_temporaries(directory)

    def begin(self, initial: str | Path | None, resume: bool) -> None:
        """Makes model and optimizer, new or as they were."""
        newest, record = checkpoint.newest_checkpoint(self.out, self.world) if resume else None, {}
        with self.world.together("reading what the run began with"):
            if self.world.is_first:
                if resume and newest is None and (self.out / MODEL_DIRECTORY).exists():
                    raise UserError(
                        f"{self.out} holds a model but no checkpoint to resume from; train into another directory"
                    )
                if os.path.exists(self.out / RUN_FILE):
                    record = files.read_json(self.out / RUN_FILE, kind="run")
                    if resume and newest is None:
                        refuse_other_config(record["config"], self.config)
        begun = self.world.first(record).get("initial", UNKNOWN)
        self._knows = bool(initial or begun)
        with self.world.together("making the model"):
            precision = precision_of(self.config, self.device)
            self.model = new_model(self.config, precision, self.device, drawn=not (self._knows or newest))
            fingerprint, there = self.data.tokenizer_fingerprint, newest is not None
            self.initial = fill_first_weights(
                self.model, initial, begun, out=self.out, tokenizer_fingerprint=fingerprint, has_checkpoint=there
            )
        given = {
            "parallelism": self.parallelism.as_dict(),
            "initial weights": self.initial and self.initial["fingerprint"],
        }
        given |= {"config": self.config.as_dict(), "data": data_identity(self.data), "torch": str(torch.__version__)}
        refuse_differences(self.world, given)
        self.model.state_group = divide_state(self.world, self.config.model, self.parallelism.state, self.device)
        self.rows = divided(self.model, self.parallelism, self.world, self.device)
        self.optimizer = make_optimizer(self.model, self.config.optimizer, self.rows)
        self.exact = settled(
            self.share.of_config(self.config),
            self.device,
            self.world,
            whole=self.config.model,
            divided=self.rows.count,
        )
        precompile_step(self.exact, self.device)
        found = None if newest is None else checkpoint.read_checkpoint(newest, self.world, self.rows)
        with self.world.together("going on from the checkpoint"):
            if found is not None:
                self._restore(found)
            elif resume:
                warnings.warn(f"{self.out} has no checkpoint: training begins at the first step", stacklevel=3)
            if resume and self.world.is_first and not self.log.truncate(found.state["metrics_bytes"] if found else 0):
                missing = f"{self.log.path} lacks rows from before step {self.step}"
                warnings.warn(f"{missing}; training goes on", stacklevel=3)
        rows = list(self.log.rows()) if resume and self.world.is_first else []
        known = ("loss", "grad_norm", "skipped")
        rows = self.world.first([{name: row[name] for name in known if name in row} for row in rows])
        self.divergence = DivergenceWatch(self.config.model.vocab_size, rows, knows=self._knows)
        if self.device.type == "cuda":  # the first use loads kernels, which later would wait for a step that is left
            not_finite_weight(self.rows.own)
        self.writer = checkpoint.CheckpointWriter(
            self.out,
            self.world,
            self.rows,
            keep=self.config.keep_checkpoints,
            milestone_every=self.config.milestone_every,
            newest=newest,
            spare=self.last_good,
        )
        self.outer = OuterStep(
            self.config,
            self.exact,
            self.model,
            self.optimizer,
            self.rows,
            sampler=self.sampler,
            share=self.share,
            world=self.world,
            device=self.device,
            out=self.out,
        )

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        refuse_other_config(found.state["config"], self.config)
        refuse_other_data(found.state["data"], self.data)
        if found.state["precision"] != self.exact.precision:
            raise UserError(
                f"this run was computed in {found.state['precision']}, but auto means {self.exact.precision} on "
                f"{self.device}; resume on the device that it began on"
            )
        self.exact = settled_before(self.config, self.exact, found.state)
        if isinstance(self.rows, FullySharded):
            fill_rows(self.model, found.model)
        else:
            checkpoint.fill(self.model, found.model, where=found.path)
        restore_optimizer(self.rows, self.optimizer, found.optimizer, found.path)
        self.step = self.saved_step = found.step
        self.tokens = found.state["tokens"]
        self.last_checkpoint = found.path
        if good := found.state.get("last_good"):
            self.last_good = found.path.parent / good

    @contextlib.contextmanager
    def recording(self, trackers: Sequence[str]) -> Iterator[None]:
        """On the rank that writes."""
        if not self.world.is_first:
            yield
            return
        begun: dict[str, Any] = {}
        if self.last_checkpoint is None:  # else run.json was lost, and with it what the run began with
            begun["initial"] = self.initial
        if self.world.size > 1:
            begun |= {"ranks": self.world.size, "parallelism": self.parallelism.as_dict()}
        with recording(
            self.out, self.config, self.data.directory, begun=begun, step=lambda: self.step, trackers=trackers
        ) as self._trackers:
            yield

    def is_stopped(self, stop: StopSignal) -> bool:
        """Whether a rank was asked to stop."""
        (number,) = self.world.agree(stop.number or 0, at="the end of a step")
        self.signal = int(number) or None
        return self.signal is not None

    def advance(self, stop: StopSignal) -> Row | None:
        """Takes one step and returns its row; None if a signal came first.

        Raises `TrainingHalted` before the weights could be spoiled, and `UserError` where memory is too small.
        """
        try:
            row = self.outer.take(self.step, stop, is_due=self._is_unsaved_for_long)
        except NotFinite as problem:
            raise self._of_all(halt(self.config, self.step + 1, str(problem), self.last_checkpoint)) from None
        except NothingLess:
            if self.step > self.saved_step and not (self.is_bad or self.outer.is_updating):
                self.save()
            kept = f"--resume goes on from step {self.saved_step}" if self.saved_step else "nothing was trained yet"
            raise out_of_memory(self.outer.exact, self.step + 1, kept) from None
        if row is None:
            return None
        self.step, self.tokens = self.step + 1, self.tokens + row["tokens"]
        row["tokens"] = self.tokens
        self._judge(row)
        return row

    def _of_all(self, error: UserError) -> UserError:
        """An error that all ranks raise alike, and rank 0 says."""
        vars(error)["is_said_elsewhere"] = not self.world.is_first
        return agreed(error)

    def _is_unsaved_for_long(self) -> bool:
        return time.monotonic() - self.saved_at > LONGEST_UNSAVED

    def _judge(self, row: Row) -> None:
        """Whether the run diverges."""
        if "loss" in row:
            self.divergence.see(row["loss"], row["grad_norm"])
        else:
            self.divergence.see_skipped()
        if self.divergence.bad_steps:
            row["bad_steps"] = self.divergence.bad_steps
        elif self.last_checkpoint is not None and self.saved_step == self.step - 1:
            self.last_good = self.last_checkpoint

    def validate(self, row: Row, sampler: Sampler, stop: StopSignal) -> None:
        """Adds the losses on held-out text to a row, unless a signal comes. If it fails, what was trained is saved."""
        try:
            row |= validation_losses(
                self._whole_model(),
                self.outer.exact,
                sampler,
                self.share,
                self.world,
                stopped=lambda: stop.requested,
            )
        except BaseException as error:
            self.record(row)
            if not self.is_bad and (self.world.size == 1 or is_agreed(error)):
                self.save()
            raise

    def refuse_to_diverge(self, row: Row) -> None:
        """Warns when several steps in a row were bad, and raises `TrainingHalted` when they are too many."""
        bad, most = self.divergence.bad_steps, self.config.max_bad_steps
        numbers = str(row.get("skipped", ""))
        if bad and "loss" in row:
            numbers = self.divergence.describe(row["loss"], row["grad_norm"])
        if most is not None and bad >= most:
            raise self._of_all(diverged(self.config, self.step, bad, numbers, self.last_good))
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
            return self.outer.clock_is_due
        return self.step // every > self.saved_step // every

    def record(self, row: Row) -> None:
        """Writes a row to metrics.jsonl and to the trackers, on the rank that writes."""
        if not self.world.is_first:
            return
        self.log.append(row)
        for tracker in self._trackers:
            numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
            tracker.log(self.step, {name: value for name, value in numbers.items() if name != "step"})

    def save(self) -> None:
        """Writes a checkpoint of finite weights."""
        # A step that was left still runs on the stream of this thread, and nothing there would come before its end.
        beside = torch.cuda.stream(torch.cuda.Stream(self.device)) if self.outer.was_left else contextlib.nullcontext()
        with beside:
            self._save()

    def _save(self) -> None:
        said = self.world.word(not_finite_weight(self.rows.own), at="looking at the weights")
        if said is not None:
            raise self._of_all(halt(self.config, self.step, said[1], self.last_checkpoint))
        with self.world.together("making the metrics durable"):
            self.log.make_durable()
        state = {
            "config": self.config.as_dict(),
            "data": data_identity(self.data),
            "sampler_seed": self.config.seed,
            "precision": self.outer.exact.precision,
            "recompute": self.outer.exact.recompute,
            "micro_batch_size": self.outer.exact.micro_batch_size,
            "tokens": self.tokens,
            "metrics_bytes": self.log.size,
            "last_good": self.last_good and self.last_good.name,
        }
        if self.divergence.bad_steps:
            kept = f"the last good one, {self.last_good}, is kept" if self.last_good else "there is no good one"
            warnings.warn(f"the checkpoint of step {self.step} is of weights that diverge; {kept}", stacklevel=3)
        self.writer.wait()  # else its weights and the next ones are held twice
        weights = whole_tensors(self.model, "cpu", on_all=False) if isinstance(self.rows, FullySharded) else None
        self.writer.save(
            self.step,
            model=self.model,
            inner=self.config.inner,
            optimizer=optimizer_tensors(self.rows, self.optimizer),
            state=state,
            tokenizer_fingerprint=self.data.tokenizer_fingerprint,
            spare=self.last_good,
            weights=weights,
        )
        self.last_checkpoint = checkpoint.place_of(self.out, self.step)
        self.saved_step, self.saved_at = self.step, time.monotonic()

    def _whole_model(self, *, on_all: bool = True) -> Transformer:
        """The model, or a copy with whole parameters: on this device, or on rank 0's CPU."""
        if not isinstance(self.rows, FullySharded):
            return self.model
        return whole_model(self.model, self.device if on_all else "cpu", on_all=on_all) or self.model

    def finish(self) -> Path:
        """Writes the finished model, on the rank that writes."""
        directory = self.out / MODEL_DIRECTORY
        model = self._whole_model(on_all=False)
        with self.world.together("writing the model"):
            if self.world.is_first:
                self._write_model(model, directory)
        return directory

    def _write_model(self, model: Transformer, directory: Path) -> None:
        copy_tokenizer(self.out, directory)
        initial = files.read_json(self.out / RUN_FILE, kind="run").get("initial")
        if initial:
            write_card(directory, self.config, self.tokens, initial)
        provenance = provenance_of(self.config, self.step, self.tokens, initial)
        checkpoint.save_model(directory, model, self.config.inner, self.data.tokenizer_fingerprint, provenance)
