"""Compares Longread with numbers of the official implementation.

    python tests/parity/check.py CASE_DIR... [--float64]

A case is a folder with config.json, weights.safetensors, batch.safetensors and expected.safetensors, in the
layout that tests/parity/README.md describes. One line a case gives the worst error of each kind beside its
tolerance; the exit status is 1 when a case is out of tolerance, 2 when one cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from longread.checkpoint import from_official, import_official
from longread.config import InnerConfig, OptimizerConfig, UserError
from longread.inner_loop import Carry, scan
from longread.inner_loop.step import matrices
from longread.model import Transformer
from longread.ops.rotary import frequencies, rotation
from longread.outer_loop import OuterLoss, end_to_end_loss, static_loss
from longread.train.optimizer import gradient_norm, make_optimizer, update

TOLERANCES = {
    "loss": 1e-5,  # absolute
    "nll": 1e-4,  # absolute, the worst token
    "gradient": 1e-4,  # relative L2, the worst tensor
    "update": 5e-5,  # of the fast weights, relative L2
    "inner norm": 5e-5,  # relative, the worst step
    "prefix": 1e-4,  # relative L2
    "adamw": 1e-6,  # absolute, the worst parameter after one outer step from the given gradients
    "trajectory": 1e-3,  # absolute, the worst of four losses
}
FLOAT64_TOLERANCES = TOLERANCES | {"gradient": 2e-5, "nll": 2e-5, "update": 1e-5}
REFERENCE_NOISE = 1e-7  # gradients smaller than this, in absolute L2, are zero in the official numbers too


@dataclass
class Case:
    """One folder of official numbers."""

    name: str
    fields: dict
    model: Transformer
    inner: InnerConfig
    batch: tuple[Tensor, Tensor, Tensor]
    expected: dict[str, Tensor]

    @classmethod
    def read(cls, directory: Path, dtype: torch.dtype) -> Case:
        model, inner = import_official(directory)
        fields = json.loads((directory / "config.json").read_text())
        batch = load_file(directory / "batch.safetensors")
        ids, targets, mask = (batch[name].long() for name in ("input_ids", "target_tokens", "loss_masks"))
        return cls(
            name=fields.get("name", directory.name),
            fields=fields,
            model=model.to(dtype),
            inner=inner,
            batch=(ids, targets, mask.bool()),
            expected={name: t.to(dtype) for name, t in load_file(directory / "expected.safetensors").items()},
        )

    @property
    def learns(self) -> bool:
        return self.fields["training"]["train_mode"] == "meta"

    def loss(self, step: int, *, lr: float | None = None) -> OuterLoss:
        if not self.learns:
            return static_loss(self.model, *self.batch)
        rate = self.inner.lr_at(step) if lr is None else lr
        return end_to_end_loss(self.model, *self.batch, inner_lr=rate, inner_clip=self.inner.clip)

    @property
    def optimizer_config(self) -> OptimizerConfig:
        outer = self.fields["training"]["optimizer_outer"]
        return OptimizerConfig(
            lr=outer["lr"],
            initial_lr=outer["init_lr"],
            end_lr=outer["end_lr"],
            warmup_steps=outer["lr_warmup_steps"],
            decay_steps=outer["lr_decay_steps"],
            beta1=outer["b1"],
            beta2=outer["b2"],
            eps=outer["eps"],
            weight_decay=outer["weight_decay"],
            decay_embedding=outer["emb_wd"],
            clip=outer["clip_gradient"],
        )

    def named(self, prefix: str) -> dict[str, Tensor]:
        """The official tensors `prefix.*`, under our names."""
        theirs = {name.removeprefix(prefix): t for name, t in self.expected.items() if name.startswith(prefix)}
        return from_official(theirs, self.model.config)


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; absolute where the expected is nothing but rounding."""
    scale = expected.norm().item()
    return (actual - expected).norm().item() / (scale if scale > REFERENCE_NOISE else 1.0)


def largest(actual: Tensor, expected: Tensor) -> float:
    return (actual - expected).abs().max().item()


def check_losses(case: Case) -> dict[str, float]:
    result = case.loss(case.fields["step"])
    losses = {
        "loss": result.loss.reshape(1),
        "loss_per_sequence": result.mini_batch_loss.mean(1),
        "chunk_loss": result.mini_batch_loss,
    }
    errors = {
        "loss": max(largest(ours, case.expected[name]) for name, ours in losses.items() if name in case.expected),
        "nll": largest(result.nll, case.expected["nll"]),
    }
    if case.learns and "nll_inner_lr_0" in case.expected:
        frozen = case.loss(case.fields["step"], lr=0.0)
        errors["nll"] = max(errors["nll"], largest(frozen.nll, case.expected["nll_inner_lr_0"]))
    result.loss.backward()
    expected = case.named("grad.")
    parameters = dict(case.model.named_parameters())
    if missing := sorted(set(parameters) - set(expected)):
        raise UserError(f"expected.safetensors has no gradient of {missing[0]}")
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in parameters.items()
    }
    # the official layout stacks the blocks: its gradient tensors are the unit of the tolerance
    errors["gradient"] = max(
        relative(torch.stack([gradients[n] for n in group]), torch.stack([expected[n] for n in group]))
        for group in stacks(list(parameters))
    )
    if "outer_grad_norm" in case.expected:
        total = torch.stack([g.norm() for g in gradients.values()]).norm().reshape(1)
        errors["gradient"] = max(errors["gradient"], relative(total, case.expected["outer_grad_norm"]))
    return errors


def stacks(names: list[str]) -> list[list[str]]:
    """Parameters that differ only in their block, together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        key = ".".join(parts[2:]) if parts[0] == "blocks" else name
        groups.setdefault(key, []).append(name)
    return list(groups.values())


@torch.no_grad()
def check_inner_loop(case: Case) -> dict[str, float]:
    model, (ids, targets, mask) = case.model, case.batch
    initial = model.initial_fast_weights(ids.shape[0])
    lower, upper = model.empty_pasts(ids.shape[0])
    hidden, _ = model.lower(ids, lower, start=0)
    lr, clip = case.inner.lr_at(case.fields["step"]), case.inner.clip
    result = scan(model, Carry(initial, upper), hidden, targets, mask, start=0, lr=lr, clip=clip, order=0)
    S = model.config.num_suffix_blocks
    # float32 weights that should be equal differ by this share of themselves, however small their update
    rounding = torch.finfo(torch.float32).eps * result.grad_norm.shape[1] ** 0.5
    smallest = rounding / FLOAT64_TOLERANCES["update"]
    errors_of_blocks = []
    for index, official in enumerate(("w1", "w3", "w2")):
        final = case.expected[f"final.prime.{official}"].transpose(-1, -2)
        for block in range(S):
            start = matrices(initial)[3 * block + index]
            error = (matrices(result.carry.fast)[3 * block + index] - final[:, block]).norm()
            scale = torch.maximum((final[:, block] - start).norm(), smallest * start.norm())
            errors_of_blocks.append(error / scale)
    errors = {"update": torch.stack(errors_of_blocks).max().item()}
    if "inner_grad_norm" in case.expected:
        norms = case.expected["inner_grad_norm"]
        # a mini-batch without targets has no gradient
        scale = norms.where(norms > REFERENCE_NOISE, 1.0)
        errors["inner norm"] = ((result.grad_norm - norms).abs() / scale).max().item()
    return errors


@torch.no_grad()
def check_prefix(case: Case) -> dict[str, float]:
    """The official prefix ends before the first suffix attention, which ours has already run."""
    model, (ids, _, _) = case.model, case.batch
    x, c = model.embedding(ids), model.config
    rotary = rotation(0, x.shape[1], frequencies(c.head_dim, c.rope_base), x)
    blocks = c.num_blocks - case.fields["model"]["suffix_len"]  # counted so without fast weights too
    for block in model.prefix[:blocks]:
        x = block.static_mlp(block.attention(x, block.attention.empty_past(x), rotary=rotary, order=0)[0])
    return {"prefix": relative(x, case.expected["prefix_output"])}


def check_optimizer(case: Case) -> dict[str, float]:
    config = case.optimizer_config
    optimizer = make_optimizer(case.model, config)
    gradients = case.named("grad.")
    for name, parameter in case.model.named_parameters():
        parameter.grad = gradients[name].clone()
    update(case.model, optimizer, config, 0, gradient_norm(case.model.parameters()))
    after = case.named("after.")
    return {"adamw": max(largest(p.detach(), after[name]) for name, p in case.model.named_parameters())}


def check_trajectory(case: Case) -> dict[str, float]:
    config, first = case.optimizer_config, case.fields["step"]
    optimizer = make_optimizer(case.model, config)
    worst = 0.0
    for step, expected in enumerate(case.expected["trajectory.loss"].tolist()):
        loss = case.loss(first + step).loss
        worst = max(worst, abs(loss.item() - expected))
        loss.backward()
        update(case.model, optimizer, config, step, gradient_norm(case.model.parameters()))
    return {"trajectory": worst}


def check(directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """The worst error of each kind that the case's numbers allow to compare."""
    wanted: list[tuple[bool, Callable[[Case], dict[str, float]]]] = [
        (True, check_losses),
        ("final.prime.w1" in _names(directory), check_inner_loop),
        ("prefix_output" in _names(directory), check_prefix),
        ("after.embed.weight" in _names(directory), check_optimizer),
        ("trajectory.loss" in _names(directory), check_trajectory),
    ]
    errors: dict[str, float] = {}
    for applies, part in wanted:
        if applies:
            errors |= part(Case.read(directory, dtype))  # each part trains: a fresh model for each
    return errors


def _names(directory: Path) -> set[str]:
    return set(load_file(directory / "expected.safetensors"))


def out_of_tolerance(errors: dict[str, float], dtype: torch.dtype = torch.float32) -> list[str]:
    """The kinds of error that are too large, or not a number."""
    limits = FLOAT64_TOLERANCES if dtype == torch.float64 else TOLERANCES
    return [kind for kind, error in errors.items() if not error <= limits[kind]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE_DIR")
    parser.add_argument("--float64", action="store_true", help="compute in float64, with tighter tolerances")
    options = parser.parse_args(arguments)
    dtype = torch.float64 if options.float64 else torch.float32
    status = 0
    for directory in options.cases:
        try:
            errors = check(directory, dtype)
        except (ValueError, LookupError, RuntimeError, OSError, SafetensorError) as error:
            print(f"{directory.name:28} cannot be read: {error}")
            status = 2
            continue
        failed = out_of_tolerance(errors, dtype)
        line = "  ".join(f"{kind} {error:.1e}{'!' if kind in failed else ''}" for kind, error in errors.items())
        print(f"{directory.name:28} {'FAILED' if failed else 'ok':7} {line}")
        if failed:
            status = max(status, 1)
    return status


if __name__ == "__main__":
    sys.exit(main())
