"""The loss of meta-training from what Transformers gives: padded rows, and labels that are not shifted.

Letters: B rows, T columns, M tokens of a mini-batch, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longread.config import InnerConfig, Recompute, UserError
from longread.model import Transformer
from longread.outer_loop import OuterLoss, end_to_end_loss, static_loss

IGNORED = -100
"""The label of a token that is no target."""


class Aligned(NamedTuple):
    """Rows from their first token on, as `end_to_end_loss` takes them; padding behind, up to whole mini-batches."""

    input_ids: Tensor
    target_ids: Tensor
    read: Tensor
    """Targets that are tokens of a row: what is learned from while reading, bool."""
    counts: Tensor
    """Those of them that have a label: what the loss is about."""


def align(input_ids: Tensor, mask: Tensor | None, labels: Tensor | None, size: int, *, whole: bool) -> Aligned:
    """Args:
        mask: which columns of input_ids [B, T] are tokens, bool; None: all.
        labels: [B, T], `IGNORED` where a token is no target; None: every token is one.
        size: M.
        whole: whether the last token of a row is an input too, which predicts nothing that is known.

    Raises:
        UserError: there is no token that another predicts, or a label is no token.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.to(input_ids.device)
    labels = input_ids if labels is None else labels
    if labels.shape != input_ids.shape:
        raise UserError(f"labels have shape {list(labels.shape)} and input_ids {list(input_ids.shape)}; give one each")
    if mask is not None:  # tokens first, in their order
        order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        input_ids, labels, real = (x.gather(1, order) for x in (input_ids, labels, real))
    longest = int(real.sum(1).max())
    if longest < 2:
        raise UserError(f"the longest text has {longest} tokens, none of which another predicts; give at least 2")
    inputs = longest if whole else longest - 1
    length = -(-inputs // size) * size

    def padded(x: Tensor) -> Tensor:
        return F.pad(x[:, : longest - 1], (0, length - longest + 1))

    read, following = padded(real[:, 1:]), labels[:, 1:]
    counts = read & padded(following != IGNORED)
    targets = torch.where(counts, padded(following), padded(input_ids[:, 1:]))
    tokens = F.pad(input_ids[:, :inputs], (0, length - inputs))
    return Aligned(
        tokens.masked_fill(F.pad(~real[:, :inputs], (0, length - inputs), value=True), 0), targets, read, counts
    )


def outer_loss(
    network: Transformer,
    inner: InnerConfig,
    rows: Aligned,
    *,
    learn: bool,
    rate: float,
    recompute: Recompute,
    outputs: bool,
) -> OuterLoss:
    """The loss of the model as it learns; of one that does not, the static loss."""
    ids, targets, counts = rows.input_ids, rows.target_ids, rows.counts
    if not learn or not network.config.num_suffix_blocks:
        return static_loss(network, ids, targets, counts, recompute=recompute, outputs=outputs)
    return end_to_end_loss(
        network,
        ids,
        targets,
        counts,
        inner_lr=rate,
        inner_clip=inner.clip,
        inner_optimizer=inner.optimizer,
        inner_surprise=inner.surprise,
        recompute=recompute,
        inner_mask=rows.read,
        outputs=outputs,
    )


def columns_of(output: Tensor, mask: Tensor | None, T: int) -> Tensor:
    """Outputs of aligned rows, [B, T', D], where their tokens stood: [B, T, D].

    In the place of padding is what the tokens before it predict; 0 before the first.
    """
    if mask is None:
        return output[:, :T]
    B, _, D = output.shape
    index = mask.cumsum(1).to(output.device)
    made = torch.cat((output.new_zeros(B, 1, D), output), dim=1)
    return made.gather(1, index.unsqueeze(-1).expand(B, T, D))
