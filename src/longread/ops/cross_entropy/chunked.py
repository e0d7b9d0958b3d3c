"""Linear layer and cross-entropy over chunks of the vocabulary, with both derivatives written out.

z = h Eᵀ, p = softmax(z), nll = logsumexp(z) − z[y]. The gradient for an adjoint w of nll is dz = w∘(p − onehot(y)),
dh = dz E, dE = dzᵀ h. Its own derivative, for cotangents u of dh and U of dE, needs the tangent ż = u Eᵀ + h Uᵀ:

    ŵ = ⟨p, ż⟩ − ż[y]        ẑ = w∘p∘(ż − ⟨p, ż⟩)        ĥ = ẑ E + dz U        Ê = ẑᵀ h + dzᵀ u

Only logsumexp(z) and ⟨p, ż⟩ couple the chunks, and one pass gives both.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longread.ops.needed import needed_inputs

CHUNK = 16_384
"""Vocabulary entries whose logits exist at a time."""


def chunked_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The contract of `longread.ops.cross_entropy.cross_entropy`."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _NLL.apply(flat, head.to(hidden.dtype), targets.reshape(-1)).view(targets.shape)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _chunks(vocab_size: int) -> Iterator[slice]:
    for start in range(0, vocab_size, CHUNK):
        yield slice(start, min(start + CHUNK, vocab_size))


def _subtract_one_hot(p: Tensor, targets: Tensor, chunk: slice) -> Tensor:
    """p − onehot(targets), in place, where `p` holds the columns of `chunk`."""
    local = targets - chunk.start
    inside = (local >= 0) & (local < p.shape[-1])
    return p.scatter_add_(-1, local.where(inside, 0).unsqueeze(-1), -inside.to(p.dtype).unsqueeze(-1))


class _NLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        log_sum = None
        for chunk in _chunks(head.shape[0]):
            partial = _wide(h @ head[chunk].t()).logsumexp(-1)
            log_sum = partial if log_sum is None else torch.logaddexp(log_sum, partial)
        if log_sum is None:
            raise ValueError("the vocabulary is empty")
        ctx.save_for_backward(h, head, targets, log_sum)
        return log_sum - _wide(torch.linalg.vecdot(_wide(h), _wide(head[targets])))

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        h, head, targets, log_sum = ctx.saved_tensors
        dh, dhead = NLLGradient.apply(h, head, w, targets, log_sum, needed_inputs(ctx)[:2])
        return dh, dhead, None


class NLLGradient(torch.autograd.Function):
    """(h, head, w) -> (dh, dhead)"""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, head: Tensor, w: Tensor, targets: Tensor, log_sum: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        dh = torch.zeros_like(h) if needs[0] else None
        dhead = torch.empty_like(head) if needs[1] else None
        for chunk in _chunks(head.shape[0]):
            p = _wide(h @ head[chunk].t()).sub_(log_sum.unsqueeze(-1)).exp_()
            dz = _subtract_one_hot(p, targets, chunk).mul_(w.unsqueeze(-1)).to(h.dtype)
            if dh is not None:
                dh.addmm_(dz, head[chunk])
            if dhead is not None:
                torch.mm(dz.t(), h, out=dhead[chunk])
        ctx.save_for_backward(h, head, w, targets, log_sum)
        ctx.set_materialize_grads(False)
        return dh, dhead

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor | None, U: Tensor | None) -> tuple[Any, ...]:
        h, head, w, targets, log_sum = ctx.saved_tensors
        if u is None and U is None:
            return None, None, None, None, None, None

        def logits_and_tangent(chunk: slice) -> tuple[Tensor, Tensor]:
            tangent = None if u is None else u @ head[chunk].t()
            if U is not None:
                from_head = h @ U[chunk].t()
                tangent = from_head if tangent is None else tangent.add_(from_head)
            return _wide(h @ head[chunk].t()), _wide(tangent)  # type: ignore[arg-type]

        chunks = list(_chunks(head.shape[0]))
        if len(chunks) == 1:
            kept = logits_and_tangent(chunks[0])
            mean_tangent = torch.linalg.vecdot((kept[0] - log_sum.unsqueeze(-1)).exp_(), kept[1])
        else:
            kept = None
            mean_tangent = torch.zeros_like(log_sum)
            for chunk in chunks:
                z, z_dot = logits_and_tangent(chunk)
                mean_tangent += torch.linalg.vecdot(z.sub_(log_sum.unsqueeze(-1)).exp_(), z_dot)

        h_hat, head_hat = torch.zeros_like(h), torch.empty_like(head)
        for chunk in chunks:
            z, z_dot = kept if kept is not None else logits_and_tangent(chunk)
            p = z.sub_(log_sum.unsqueeze(-1)).exp_()
            z_hat = z_dot.sub_(mean_tangent.unsqueeze(-1)).mul_(p).mul_(w.unsqueeze(-1)).to(h.dtype)
            dz = _subtract_one_hot(p, targets, chunk).mul_(w.unsqueeze(-1)).to(h.dtype)
            h_hat.addmm_(z_hat, head[chunk])
            torch.mm(z_hat.t(), h, out=head_hat[chunk])
            if u is not None:
                head_hat[chunk].addmm_(dz.t(), u)
            if U is not None:
                h_hat.addmm_(dz, U[chunk])
        w_hat = None
        if ctx.needs_input_grad[2]:
            w_hat = mean_tangent - _tangent_at_target(u, U, h, head, targets)
        return h_hat, head_hat, w_hat, None, None, None


def _tangent_at_target(u: Tensor | None, U: Tensor | None, h: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """ż[y]"""
    total = torch.zeros_like(_wide(h[:, 0]))
    if u is not None:
        total += torch.linalg.vecdot(_wide(u), _wide(head[targets]))
    if U is not None:
        total += torch.linalg.vecdot(_wide(h), _wide(U[targets]))
    return total
