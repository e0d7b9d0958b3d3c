"""Another mixer: registered in one place, and then read, trained, saved and counted like those that are built in."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from longread.config import InnerConfig, ModelConfig, UserError
from longread.inner_loop import begin, read
from longread.model import RecurrentMixer, register_mixer
from longread.model.layers import Linear
from longread.outer_loop import graph_bytes, static_loss
from longread.session import Session
from tests.tiny import M, make, text


class Memory(NamedTuple):
    mean: Tensor
    count: Tensor


class Averaging(RecurrentMixer):
    """x + post_norm(output(mean of all inputs so far))."""

    def __init__(self, config: ModelConfig, pre_norm: nn.Module, post_norm: nn.Module) -> None:
        super().__init__()
        self.pre_norm, self.post_norm = pre_norm, post_norm
        self.input, self.output = Linear(config.width, config.width), Linear(config.width, config.width)

    def forward(self, x: Tensor, past: Memory, *, rotary: Tensor, order: int) -> tuple[Tensor, Memory]:
        counts = past.count + torch.arange(1, x.shape[1] + 1, dtype=past.count.dtype)
        new = self.input(self.pre_norm(x)).to(past.mean.dtype)
        means = ((past.mean * past.count)[:, None] + new.cumsum(1)) / counts[..., None]
        after = Memory(means[:, -1], counts[:, -1:])
        return self.post_norm(self.output(means.to(x.dtype)), residual=x), after

    def empty_past(self, like: Tensor) -> Memory:
        wide = torch.promote_types(like.dtype, torch.float32)
        width = self.input.weight.shape[0]
        return Memory(like.new_zeros(like.shape[0], width, dtype=wide), like.new_zeros(like.shape[0], 1, dtype=wide))


register_mixer("averaging", Averaging, kept_numbers=(7, 3))


def test_the_mixer_reads_in_any_split_and_learns(tmp_path: Path) -> None:
    model = make(5, torch.float64, mixer="averaging", num_suffix_blocks=0)
    assert model.config.mixers_of(0) == ("averaging",)
    assert model.config.mixers_of(1) == ("attention",)
    assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters
    tokens = torch.tensor([text(5 * M + 1, seed) for seed in range(2)])
    ids, targets, mask = tokens[:, :-1], tokens[:, 1:], torch.ones(2, 5 * M, dtype=torch.bool)
    outer = static_loss(model, ids, targets, mask, recompute="none")
    outer.loss.backward()
    assert model.blocks[0].averaging.input.weight.grad.abs().max() > 0
    again = static_loss(model, ids, targets, mask, recompute="blocks")
    torch.testing.assert_close(again.loss, outer.loss)
    model.requires_grad_(False)
    for splits in ([20], [1] * 20, [3, 6, 11]):
        state, nll = begin(model, 2), []
        for part in ids.split(splits, dim=1):
            found = read(model, state, part, inner=InnerConfig())
            state = found.state
            nll.append(found.nll)
        torch.testing.assert_close(torch.cat(nll, 1)[:, 1:], outer.nll[:, :-1])
    session = Session(model, InnerConfig())
    session.read(ids[0])
    session.save(tmp_path / "session")
    restored = Session.restore(tmp_path / "session", model)
    assert restored.generate(8, temperature=0) is not None
    assert list(restored.generate(8, temperature=0)) == list(session.generate(8, temperature=0))
    lean = graph_bytes(model.config, "static", batch_size=1, context_length=8, itemsize=4, kernels=False)
    attention = dataclasses.replace(model.config, mixer="attention")
    other = graph_bytes(attention, "static", batch_size=1, context_length=8, itemsize=4, kernels=False)
    assert lean["none"] < other["none"]  # 7 + 3 numbers a token instead of 13 + 13


def test_names_that_cannot_be_mixers_are_refused() -> None:
    for name in ("attention", "mamba2", "averaging", "static_mlp", "forward", "not a name"):
        with pytest.raises(UserError, match="cannot name a mixer"):
            register_mixer(name, type("Other", (RecurrentMixer,), {}))
    with pytest.raises(UserError, match=r"Linear is no mixer; derive it from longread\.model\.RecurrentMixer"):
        register_mixer("linear", Linear)
    register_mixer("averaging", Averaging)
