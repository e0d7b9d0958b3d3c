"""The state of a session as the tensors of a file, and the check of a file that may come from anywhere.

exact       every number as it is: the session goes on as if it had never been saved
bfloat16    every number rounded to bfloat16: half the size where the state is float32
delta       the same, but of the fast weights what reading has added: rounded relative to that, not to the weights

How much the rounded ones lose is measured by `python -m benchmarks.session_storage`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from longread.config import UserError
from longread.files import Layout
from longread.inner_loop import ReadingState, begin
from longread.inner_loop.kept import Kept
from longread.inner_loop.step import from_matrices, matrices
from longread.model import Attention, MixerPast, Past, Transformer

Storage = Literal["exact", "bfloat16", "delta"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
_FLOATS = {"BF16", "F16", "F32", "F64"}
_PARTS = ("hidden", "targets", "targets_mask", "output")
_Shapes = dict[str, tuple[set[str], tuple[int, ...]]]


def packed(state: ReadingState, recent: list[int], model: Transformer, storage: Storage) -> dict[str, Tensor]:
    """The tensors of a session file.

    Raises:
        UserError: there is no such storage, or the state holds numbers that are not finite.
    """
    if storage not in STORAGES:
        raise UserError(f"storage is {storage!r}; it must be one of {', '.join(STORAGES)}")
    fast = matrices(state.fast)
    if storage == "delta":
        fast = [w - w0.detach() for w, w0 in zip(fast, matrices(model.initial_fast_weights(1)), strict=True)]
    tensors = {f"fast.{i}": w for i, w in enumerate(fast)}
    for half, pasts in (("lower", state.lower_pasts), ("upper", state.upper_pasts)):
        for i, past in enumerate(pasts):
            tensors |= {f"{half}.{i}.{name}": x for name, x in zip(past._fields, past, strict=True)}
    tensors |= {name: getattr(state, name) for name in _PARTS}
    if state.kept is not None:
        tensors |= dict(zip(_kept_names(model), state.kept.tensors, strict=True))
    for name, x in tensors.items():
        if not _finite(x):
            raise UserError(f"the session's {name} holds numbers that are not finite; go on from an older file instead")
    if storage != "exact":
        tensors = {name: x.bfloat16() if x.is_floating_point() else x for name, x in tensors.items()}
    return tensors | {"recent": torch.tensor(recent, dtype=torch.long)}


def check_layout(path: object, layout: Layout, model: Transformer, position: int) -> None:
    """Raises `UserError` unless a file holds exactly the tensors of a session of `model` at `position`.

    Only names, types and shapes are looked at, so a file that lies about its contents costs no memory.
    """
    waiting = layout["hidden"][1][1] if "hidden" in layout and len(layout["hidden"][1]) == 3 else 0
    M = model.config.mini_batch_size
    if waiting > min(M, position):
        raise UserError(f"{path} is no valid session: {waiting} tokens wait in it; a mini-batch has {M}")
    expected = _shapes(model, position, waiting)
    if model.config.kept_tokens:
        expected |= _shapes_of_kept(path, layout, model, position)
    if unknown := sorted(layout.keys() - expected.keys()):
        raise UserError(f"{path} is no valid session of this model: {unknown[0]!r:.60} is no part of one")
    for name, (kinds, shape) in expected.items():
        if name not in layout:
            raise UserError(f"{path} is no complete session of this model: it has no {name!r}; restore it from a copy")
        kind, found = layout[name]
        if found != shape or kind not in kinds:
            wanted = f"{'/'.join(sorted(kinds))} {list(shape)}"
            raise UserError(f"{path} is no valid session: {name} is {kind} {list(found)!s:.60}, not {wanted}")


def unpacked(
    path: object,
    tensors: Mapping[str, Tensor],
    model: Transformer,
    position: int,
    storage: Storage,
    device: torch.device,
) -> tuple[ReadingState, list[int]]:
    """What `packed` took apart, after `check_layout`: the state, on `device`, and the newest tokens.

    Raises:
        UserError: a number is not finite, or a token is not in the vocabulary.
    """
    V, empty = model.config.vocab_size, begin(model)
    for name in ("recent", "targets"):
        if tensors[name].numel() and not 0 <= tensors[name].min() <= tensors[name].max() < V:
            raise UserError(f"{path} is no valid session: its {name} are not in the vocabulary of {V}")

    def part(name: str, like: Tensor) -> Tensor:
        x = tensors[name].to(like.dtype)  # the model may compute in another type than the one that saved
        if not _finite(x):
            raise UserError(f"{path} is no valid session: {name} holds numbers that are not finite")
        if x.dtype == torch.bool:  # a byte that is neither 0 nor 1 would be no truth value
            x = x.view(torch.uint8) != 0
        return x.to(device)

    def pasts(half: str, like: tuple[MixerPast, ...]) -> tuple[MixerPast, ...]:
        return tuple(
            type(past)(*(part(f"{half}.{i}.{name}", x) for name, x in zip(past._fields, past, strict=True)))
            for i, past in enumerate(like)
        )

    initial = matrices(empty.fast)
    fast = [part(f"fast.{i}", w) for i, w in enumerate(initial)]
    if storage == "delta":
        fast = [w0.to(device) + w for w0, w in zip(initial, fast, strict=True)]
    rest: dict[str, Any] = {name: part(name, getattr(empty, name)) for name in _PARTS}
    if empty.kept is not None:
        positions = tensors["kept.position"]
        if ((positions < 0) | (positions >= position)).any():
            raise UserError(f"{path} is no valid session: it keeps tokens that are none of its {position}")
        names = iter(_kept_names(model))
        rest["kept"] = empty.kept.mapped(lambda like: part(next(names), like))
    state = ReadingState(
        position=position,
        fast=from_matrices(fast),
        lower_pasts=pasts("lower", empty.lower_pasts),
        upper_pasts=pasts("upper", empty.upper_pasts),
        **rest,
    )
    return state, tensors["recent"].tolist()


def _finite(x: Tensor) -> bool:
    return not x.is_floating_point() or bool(x.isfinite().all())


def _kept_names(model: Transformer) -> list[str]:
    """Of the tensors of what is kept, in the order of `Kept.tensors`."""
    pasts = [f"kept.{i}.{name}" for i in range(model.config.num_blocks) for name in Past._fields]
    return [*pasts, *(f"kept.{name}" for name in Kept._fields[2:])]


def _shapes_of_kept(path: object, layout: Layout, model: Transformer, position: int) -> _Shapes:
    """As `_shapes`, of what is kept. About how many tokens nothing is decided yet, only the file says."""
    config, older = model.config, model.config.kept_run - 1
    _, found = layout.get("kept.nll", ("", ()))
    undecided = (found[-1] if found else 0) - older
    fewest = min(position, config.window_size - config.mini_batch_size)
    if not fewest <= undecided <= min(position, config.window_size):
        raise UserError(
            f"{path} is no valid session: {undecided} tokens of it wait to be kept or not; they may be {fewest} to "
            f"{min(position, config.window_size)}"
        )
    n = min(config.kept_tokens, position - undecided)
    vectors = (1, config.num_kv_heads, n, config.head_dim)
    shapes: _Shapes = dict.fromkeys(_kept_names(model), (_FLOATS, vectors))
    shapes |= {"kept.position": ({"I64"}, (1, n)), "kept.surprise": (_FLOATS, (1, n))}
    return shapes | {"kept.nll": (_FLOATS, (1, older + undecided))}


def _shapes(model: Transformer, position: int, waiting: int) -> _Shapes:
    """Of each tensor of a session file: the types it may have, and its shape."""
    empty = begin(model)
    floats = {f"fast.{i}": tuple(w.shape) for i, w in enumerate(matrices(empty.fast))}
    mixers = [mixer for block in (*model.prefix, *model.suffix) for mixer in block.mixers]
    halves = [("lower", i, past) for i, past in enumerate(empty.lower_pasts)]
    halves += [("upper", i, past) for i, past in enumerate(empty.upper_pasts)]
    for (half, i, past), mixer in zip(halves, mixers, strict=True):
        if not isinstance(mixer, Attention):
            kept = position % model.config.mini_batch_size  # tokens that wait in a mixer with an inner loop of its own
        elif mixer.window is None:
            kept = position
        else:
            kept = min(position, mixer.window + (waiting if half == "upper" else 0))
        for name, x in zip(past._fields, past, strict=True):
            floats[f"{half}.{i}.{name}"] = tuple(size or kept for size in x.shape)  # where nothing is, tokens come
    D = model.config.width
    floats |= {"hidden": (1, waiting, D), "output": (1, D if position else 0)}
    known = (1, max(0, waiting - 1))
    recent = (min(position, model.config.window_size),)
    return {name: (_FLOATS, shape) for name, shape in floats.items()} | {
        "targets": ({"I64"}, known),
        "targets_mask": ({"BOOL"}, known),
        "recent": ({"I64"}, recent),
    }
