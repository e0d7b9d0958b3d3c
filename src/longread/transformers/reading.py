"""The input of a model, [B, T] with padding, as sessions read it: each row its own tokens, and no padding.

Letters: B rows, T columns, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longread.config import UserError
from longread.inner_loop import Reading, ReadingState, read, rescue
from longread.inner_loop.state import apart, shapes_of, together
from longread.transformers.cache import Row, SessionCache

PIECE = 65_536
"""Tokens after which it is looked whether learning has gone astray, as in `longread.Session.read`."""


def mask_of(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """Which of the tokens [B, T] are read, bool [B, T] on the CPU; None: all.

    `attention_mask` is that of the newest T columns, of whatever came before them as well, or None.
    """
    if attention_mask is None:
        return None
    B, T = input_ids.shape
    if attention_mask.dim() != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
        raise UserError(
            f"attention_mask has shape {list(attention_mask.shape)} for input_ids of shape {[B, T]}; give one entry "
            "for each token, and for each that the cache has read"
        )
    mask = attention_mask[:, -T:].bool().cpu()
    return None if bool(mask.all()) else mask


@torch.no_grad()
def read_next(cache: SessionCache, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
    """Reads one token of each row, int64 [B]; the logits of those after them, [B, V], float32 or wider.

    None, and nothing is read, where a row has read nothing yet: it has no place among those that are written.
    """
    if not all(cache.position(row) for row in range(len(cache.rows))):
        return None
    reads = [True] * len(tokens) if mask is None else mask.tolist()
    if any(goes_on and cache.has_left(row) for row, goes_on in enumerate(reads)):
        cache.settled()
    decoder = cache.decoder()
    for row, goes_on in enumerate(reads):
        if not goes_on:
            decoder.leave(row)
    decoder.read(tokens)
    for row, goes_on in enumerate(reads):
        if goes_on:
            cache.took(row, tokens[row : row + 1])
    return decoder.logits()


@torch.no_grad()
def read_columns(cache: SessionCache, input_ids: Tensor, mask: Tensor | None, *, all_outputs: bool) -> Tensor:
    """Reads tokens int64 [B, T], each row those that its mask names.

    Returns:
        [B, T, D], or [B, 1, D] of the last column only: what `Transformer.logits` turns into the logits of the token
        after all that a row has read up to a column; 0 where it has read nothing.
    """
    B = len(input_ids)
    cache.settled()
    device, network = cache.network.device, cache.network
    own = [input_ids[b] if mask is None else input_ids[b, mask[b].to(input_ids.device)] for b in range(B)]
    _check(own, network.config.vocab_size)
    own = [tokens.to(device) for tokens in own]
    outputs = [[_output(row, network.config.width)] for row in cache.rows]
    done = [0] * B
    while True:
        alike: dict[object, list[int]] = {}
        for b in range(B):
            if done[b] < len(own[b]):
                alike.setdefault(shapes_of(state_of(cache.rows[b])), []).append(b)
        if not alike:
            break
        group = max(alike.values(), key=len)
        count = _count([len(own[b]) - done[b] for b in group], cache, group[0])
        tokens = torch.stack([own[b][done[b] : done[b] + count] for b in group])
        for b, found in zip(group, _read(cache, [cache.rows[b] for b in group], tokens, all_outputs), strict=True):
            outputs[b] += [] if found is None else [found]
            done[b] += count
    for b in range(B):
        cache.took(b, own[b])
    if not all_outputs:
        return torch.stack([_output(row, network.config.width) for row in cache.rows])
    made = [torch.cat(parts) for parts in outputs]
    if mask is None:
        return torch.stack(made)[:, 1:]
    return torch.stack([x[counts] for x, counts in zip(made, mask.cumsum(1).to(device), strict=True)])


def _count(left: list[int], cache: SessionCache, row: int) -> int:
    """Tokens that a group reads next; where its rows part afterwards, up to the end of a mini-batch if one is near."""
    count, M = min(*left, PIECE), cache.network.config.mini_batch_size
    beyond = (state_of(cache.rows[row]).hidden.shape[1] + count) % M
    return count - beyond if len(left) > 1 and max(left) > count > beyond else count


def _read(cache: SessionCache, rows: list[Row], tokens: Tensor, outputs: bool) -> list[Tensor | None]:
    """Reads tokens [rows, n] into rows whose states have equal shapes; their outputs [n, D] if they are wanted."""
    network, inner, learn = cache.network, cache.inner, cache.learn
    before = [state_of(row) for row in rows]
    found = read(network, together(before), tokens, inner=inner, learn=learn, guard=True, outputs=outputs)
    after = [found.state] if len(rows) == 1 else apart(found.state)
    for i, (row, state) in enumerate(zip(rows, after, strict=True)):
        alone = slice(i, i + 1)
        reading = Reading(state, found.nll[alone], found.inner_grad_norm[alone], found.rolled_back[alone])
        rescued = rescue(network, before[i], tokens[alone], reading, inner=inner) if learn else None
        steps = found.rolled_back.shape[1]
        row.state, row.steps = state if rescued is None else rescued, row.steps + steps
        row.rolled_back = row.rolled_back + (found.rolled_back[i].sum() if rescued is None else steps)
    return [None] * len(rows) if found.outputs is None else list(found.outputs)


def state_of(row: Row) -> ReadingState:
    """The state of a row that no decoder has."""
    if row.state is None:
        raise LookupError("a decoder has the state")
    return row.state


def _output(row: Row, width: int) -> Tensor:
    """[1, D]"""
    output = state_of(row).output
    return output if output.shape[1] else output.new_zeros(1, width)


def _check(tokens: list[Tensor], vocab_size: int) -> None:
    given = torch.cat(tokens)
    wrong = given[(given < 0) | (given >= vocab_size)]
    if wrong.numel():
        raise UserError(
            f"token id {wrong[0].item()} is not in the vocabulary of {vocab_size}; use the tokenizer of the model"
        )
