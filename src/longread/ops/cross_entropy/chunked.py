"""Linear layer and cross-entropy over chunks of the vocabulary, with both derivatives written out.

z = h Eᵀ, p = softmax(z), nll = logsumexp(z) − z[y]. The gradient for an adjoint w of nll is dz = w∘(p − onehot(y)),
dh = dz E, dE = dzᵀ h. Its own derivative, for cotangents u of dh and U of dE, needs the tangent ż = u Eᵀ + h Uᵀ:

    ŵ = ⟨p, ż⟩ − ż[y]        ẑ = w∘p∘(ż − ⟨p, ż⟩)        ĥ = ẑ E + dz U        Ê = ẑᵀ h + dzᵀ u

Only logsumexp(z) and ⟨p, ż⟩ couple the chunks, and one pass gives both. Where there is one chunk and dh may be asked
for, the *slope* (p − onehot(y)) E is made along with nll: dh is w times it, and the inner gradient makes z only once.

With a soft cap c, z = c tanh(r / c) of the raw logits r = h Eᵀ, with z' = 1 − (z / c)² and z'' = −2 z z' / c². Then
dr = z'∘dz takes the place of dz, ż = z'∘ṙ with ṙ = u Eᵀ + h Uᵀ, and r̂ = z'∘(ẑ − 2/c² z∘ṙ∘dz) that of ẑ.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longread.ops.needed import needed_inputs

CHUNK = 16_384
"""Vocabulary entries whose logits exist at a time."""


def chunked_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, soft_cap: float | None = None) -> Tensor:
    """The contract of `longread.ops.cross_entropy.cross_entropy`."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    learns = torch.is_grad_enabled() and hidden.requires_grad
    return _NLL.apply(flat, head.to(hidden.dtype), targets.reshape(-1), soft_cap, learns).view(targets.shape)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _chunks(vocab_size: int) -> Iterator[slice]:
    for start in range(0, vocab_size, CHUNK):
        yield slice(start, min(start + CHUNK, vocab_size))


def _capped(raw: Tensor, cap: float | None) -> Tensor:
    """z, in place of r."""
    return raw if cap is None else raw.div_(cap).tanh_().mul_(cap)


def _steepness(z: Tensor, cap: float | None) -> Tensor | None:
    """z' where the logits are capped."""
    return None if cap is None else (z / cap).square_().neg_().add_(1)


def _times(x: Tensor, steep: Tensor | None) -> Tensor:
    """x∘z', in place."""
    return x if steep is None else x.mul_(steep)


def _at_target(h: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """r[y]"""
    return torch.linalg.vecdot(_wide(h), _wide(head[targets]))


def _subtract_one_hot(p: Tensor, targets: Tensor, chunk: slice) -> Tensor:
    """p − onehot(targets), in place, where `p` holds the columns of `chunk`."""
    local = targets - chunk.start
    inside = (local >= 0) & (local < p.shape[-1])
    return p.scatter_add_(-1, local.where(inside, 0).unsqueeze(-1), -inside.to(p.dtype).unsqueeze(-1))


class _NLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, head: Tensor, targets: Tensor, cap: float | None, learns: bool) -> Tensor:
        log_sum = slope = None
        for chunk in _chunks(head.shape[0]):
            z = _capped(_wide(h @ head[chunk].t()), cap)
            partial = z.logsumexp(-1)
            log_sum = partial if log_sum is None else torch.logaddexp(log_sum, partial)
            if learns and z.shape[-1] == head.shape[0]:
                steep = _steepness(z, cap)
                residual = _subtract_one_hot(z.sub_(log_sum.unsqueeze(-1)).exp_(), targets, chunk)
                slope = _times(residual, steep).to(h.dtype) @ head
        if log_sum is None:
            raise ValueError("the vocabulary is empty")
        ctx.save_for_backward(h, head, targets, log_sum, slope)
        ctx.cap = cap
        return log_sum - _capped(_at_target(h, head, targets), cap)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        h, head, targets, log_sum, slope = ctx.saved_tensors
        dh, dhead = NLLGradient.apply(h, head, w, targets, log_sum, needed_inputs(ctx)[:2], ctx.cap, slope)
        return dh, dhead, None, None, None


class NLLGradient(torch.autograd.Function):
    """(h, head, w) -> (dh, dhead)"""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        head: Tensor,
        w: Tensor,
        targets: Tensor,
        log_sum: Tensor,
        needs: tuple[bool, bool],
        cap: float | None,
        slope: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        dh = None
        if needs[0]:
            dh = torch.zeros_like(h) if slope is None else (slope * w.unsqueeze(-1)).to(h.dtype)
        dhead = torch.empty_like(head) if needs[1] else None
        for chunk in _chunks(head.shape[0]) if slope is None or needs[1] else ():
            z = _capped(_wide(h @ head[chunk].t()), cap)
            steep = _steepness(z, cap)
            p = z.sub_(log_sum.unsqueeze(-1)).exp_()
            dz = _subtract_one_hot(p, targets, chunk).mul_(w.unsqueeze(-1))
            dr = _times(dz, steep).to(h.dtype)
            if dh is not None and slope is None:
                dh.addmm_(dr, head[chunk])
            if dhead is not None:
                torch.mm(dr.t(), h, out=dhead[chunk])
        ctx.save_for_backward(h, head, w, targets, log_sum)
        ctx.cap = cap
        ctx.set_materialize_grads(False)
        return dh, dhead

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor | None, U: Tensor | None) -> tuple[Any, ...]:
        h, head, w, targets, log_sum = ctx.saved_tensors
        cap = ctx.cap
        if u is None and U is None:
            return (None,) * 8

        def logits_and_tangent(chunk: slice) -> _Logits:
            tangent = None if u is None else u @ head[chunk].t()
            if U is not None:
                from_head = h @ U[chunk].t()
                tangent = from_head if tangent is None else tangent.add_(from_head)
            z, tangent = _capped(_wide(h @ head[chunk].t()), cap), _wide(tangent)  # type: ignore[arg-type]
            if cap is None:
                return _Logits(z, tangent, None, None)
            steep = _steepness(z, cap)
            turn = (z * tangent).mul_(2 / cap**2)
            return _Logits(z, _times(tangent, steep), steep, turn)

        chunks = list(_chunks(head.shape[0]))
        if len(chunks) == 1:
            kept = logits_and_tangent(chunks[0])
            mean_tangent = torch.linalg.vecdot((kept.z - log_sum.unsqueeze(-1)).exp_(), kept.tangent)
        else:
            kept = None
            mean_tangent = torch.zeros_like(log_sum)
            for chunk in chunks:
                z, z_dot, *_ = logits_and_tangent(chunk)
                mean_tangent += torch.linalg.vecdot(z.sub_(log_sum.unsqueeze(-1)).exp_(), z_dot)

        h_hat, head_hat = torch.zeros_like(h), torch.empty_like(head)
        for chunk in chunks:
            z, z_dot, steep, turn = kept if kept is not None else logits_and_tangent(chunk)
            p = z.sub_(log_sum.unsqueeze(-1)).exp_()
            z_hat = z_dot.sub_(mean_tangent.unsqueeze(-1)).mul_(p).mul_(w.unsqueeze(-1))
            dz = _subtract_one_hot(p, targets, chunk).mul_(w.unsqueeze(-1))
            if turn is not None:
                z_hat.sub_(turn.mul_(dz))
            r_hat, dr = _times(z_hat, steep).to(h.dtype), _times(dz, steep).to(h.dtype)
            h_hat.addmm_(r_hat, head[chunk])
            torch.mm(r_hat.t(), h, out=head_hat[chunk])
            if u is not None:
                head_hat[chunk].addmm_(dr.t(), u)
            if U is not None:
                h_hat.addmm_(dr, U[chunk])
        w_hat = None
        if ctx.needs_input_grad[2]:
            at_target = _tangent_at_target(u, U, h, head, targets)
            if cap is not None:
                steep = _steepness(_capped(_at_target(h, head, targets), cap), cap)
                at_target = _times(at_target, steep)
            w_hat = mean_tangent - at_target
        return h_hat, head_hat, w_hat, None, None, None, None, None


class _Logits(NamedTuple):
    """Of a chunk of the vocabulary, each [tokens, entries]."""

    z: Tensor
    tangent: Tensor
    """ż"""
    steep: Tensor | None
    """z', and"""
    turn: Tensor | None
    """2/c² z∘ṙ, where the logits are capped."""


def _tangent_at_target(u: Tensor | None, U: Tensor | None, h: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """ṙ[y]"""
    total = torch.zeros_like(_wide(h[:, 0]))
    if u is not None:
        total += torch.linalg.vecdot(_wide(u), _wide(head[targets]))
    if U is not None:
        total += torch.linalg.vecdot(_wide(h), _wide(U[targets]))
    return total
