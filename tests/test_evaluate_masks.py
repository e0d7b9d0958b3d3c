"""What counts for nothing in the inner loss of evaluation: targets that are BOS, and padding beside longer texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longread import train as training
from longread.config import InnerConfig, OptimizerConfig, RunConfig
from longread.data import Batch
from longread.evaluate import Document, bin_edges, measure
from longread.inner_loop import begin, read
from longread.outer_loop import end_to_end_loss
from tests import tiny

BOS = 0
INNER = InnerConfig(lr=0.7, clip=0.5)


def with_bos(length: int, seed: int) -> list[int]:
    """A text in which every third token or so begins a document."""
    draw = np.random.default_rng(seed)
    return [BOS, *(BOS if draw.random() < 0.3 else int(draw.integers(1, 19)) for _ in range(length - 1))]


@pytest.mark.parametrize("lengths", [(41,), (41, 23, 6)], ids=["alone", "padded"])
def test_evaluation_learns_from_no_bos_and_no_padding(lengths: tuple[int, ...]) -> None:
    model = tiny.make(1, torch.float64)
    texts = [with_bos(n, i) for i, n in enumerate(lengths)]
    documents = [Document(f"text {i}", np.array(text)) for i, text in enumerate(texts)]
    edges = bin_edges(indices=range(40))
    found = measure("m", model, INNER, documents, edges, learn=True, batch_size=3, bos_id=BOS)
    for text, losses in zip(texts, found.losses, strict=True):
        tokens = torch.tensor([text])
        counts = tokens != BOS
        alone = read(model, begin(model), tokens, inner=INNER, loss_mask=counts)
        everything = read(model, begin(model), tokens, inner=INNER)
        expected = np.where(counts[0, 1:], alone.nll[0, 1:], 0.0)
        by_position = [losses.between(t, t + 1)[0] for t in range(len(text) - 1)]
        np.testing.assert_allclose(by_position, expected, rtol=1e-9)
        if len(text) > 2 * tiny.M:  # and it would be another reading if BOS were learned
            assert (alone.nll - everything.nll)[0, 2 * tiny.M :].abs().max() > 1e-3
    norms = [
        read(model, begin(model), torch.tensor([t]), inner=INNER, loss_mask=torch.tensor([t]) != BOS).inner_grad_norm
        for t in texts
    ]
    assert found.inner_steps.mean == pytest.approx(torch.cat(norms, dim=1).mean().item(), rel=1e-9)


def test_neither_does_the_validation_of_a_run() -> None:
    model = tiny.make(1, torch.float64)
    config = RunConfig(
        name="masks",
        model=model.config,
        inner=INNER,
        optimizer=OptimizerConfig(lr=1e-3),
        context_length=40,
        batch_size=3,
        steps=1,
    )
    tokens = torch.tensor([with_bos(41, seed) for seed in range(3)])
    batch = Batch(tokens[:, :-1], tokens[:, 1:], tokens[:, 1:] != BOS)
    batch.loss_mask[1, 18:] = False
    batch.loss_mask[2] = False

    class Fixed:
        def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
            return batch

    found = training.validation_losses(model, config, Fixed())  # type: ignore[arg-type]
    expected = end_to_end_loss(model, *batch, inner_lr=0.7, inner_clip=0.5).loss.item()
    everything = batch._replace(loss_mask=torch.ones_like(batch.loss_mask))
    assert found["validation_loss"] == pytest.approx(expected, rel=1e-12)
    assert abs(end_to_end_loss(model, *everything, inner_lr=0.7, inner_clip=0.5).loss.item() - expected) > 1e-3
