"""Linear layer and cross-entropy on a GPU: products by cuBLAS, everything else in few passes over the logits.

z = h Eᵀ, p = softmax(z), nll = logsumexp(z) − z[y]. Since dz = w∘(p − onehot(y)) for any adjoint w of nll, the product
s = (p − onehot(y)) E, the *slope*, is made along with nll: then dh = w∘s costs nothing, and as s is an output like
nll, the second derivative of nll is the first of (nll, s). For adjoints w of nll and a of s (a = w∘u, where u comes
for the dh of the inner step), with ż = a Eᵀ and ⟨p, ż⟩ = ⟨a, s⟩ + ż[y],

    ẑ = w∘(p − onehot(y)) + p∘(ż − ⟨p, ż⟩)        ĥ = ẑ E        Ê = ẑᵀ h + (p − onehot(y))ᵀ a

so the ordinary and the second-order adjoint share every product, and nothing but elementwise work remains. One product
makes z, one s, one ż, one ĥ, two Ê; a seventh makes z again if `LOGITS_BYTES` is too little to keep p − onehot(y).

In bfloat16, p[y] − 1 says little about p[y], and s little about s + E[y]. So p[y] and s are kept in float32.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longread.ops.cross_entropy.chunked import NLLGradient
from longread.ops.needed import needed_inputs

LOGITS_BYTES = 1 << 30
"""Of the logits of a chunk of tokens. A call whose tokens fit in one chunk keeps p − onehot(y) for its derivatives."""
LOSS_BLOCK, LOSS_WARPS = 8192, 8
"""Vocabulary entries a program takes at a time, where it walks along a row of logits."""
BLOCK, WARPS = 4096, 8
"""The same where each program takes one block."""
WIDTH_BLOCK = 1024


def triton_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The contract of `longread.ops.cross_entropy.cross_entropy`."""
    flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    learns = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    nll, _ = _NLL.apply(flat, head.to(hidden.dtype).contiguous(), targets.reshape(-1).contiguous(), learns)
    return nll.view(targets.shape)


def _chunks(count: int, row_bytes: int) -> list[slice]:
    """Equal parts of the tokens, none with more than LOGITS_BYTES of logits; their length suits the products."""
    most = max(1, LOGITS_BYTES // max(1, row_bytes))
    parts = max(1, triton.cdiv(count, most))
    length = triton.cdiv(count, parts)
    aligned = triton.cdiv(length, 128) * 128
    length = aligned if aligned <= most else length
    return [slice(first, min(first + length, count)) for first in range(0, count, max(1, length))]


class _NLL(torch.autograd.Function):
    """(h [T, D], head [V, D]) -> (nll [T], slope [T, D]), both float32; no slope where nothing will be learned."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, head: Tensor, targets: Tensor, learns: bool) -> tuple[Tensor, Tensor | None]:
        count = h.shape[0]
        nll, log_sum, p_target = (torch.empty(count, device=h.device, dtype=torch.float32) for _ in range(3))
        slope = torch.empty_like(h, dtype=torch.float32) if learns else None
        chunks = _chunks(count, head.shape[0] * head.itemsize)
        kept = None
        for part in chunks:
            logits = h[part] @ head.t()
            _losses(logits, h[part], head, targets[part], nll[part], log_sum[part], p_target[part], learns)
            if slope is not None:
                slope[part] = _product_in_float32(logits, head)
                kept = logits if len(chunks) == 1 else None
        if learns:
            ctx.save_for_backward(h, head, targets, log_sum, p_target, slope, kept)
            ctx.set_materialize_grads(False)
        return nll, slope

    @staticmethod
    def backward(ctx: Any, w: Tensor | None, a: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        h, head, targets, log_sum, p_target, slope, kept = ctx.saved_tensors
        needs = needed_inputs(ctx)[:2]
        if torch.is_grad_enabled():  # this gradient will be differentiated again
            if a is not None:
                raise RuntimeError("the fused cross-entropy has no third derivative")
            if w is None:
                return None, None, None, None
            if needs[1]:
                return *NLLGradient.apply(h, head, w, targets, log_sum, needs, None), None, None
            return _ScaledSlope.apply(slope, w, h.dtype), None, None, None
        if a is not None:
            w = torch.zeros_like(log_sum) if w is None else w.contiguous()
            a = a.to(h.dtype).contiguous()
            return *_second_order(h, head, targets, log_sum, p_target, slope, kept, w, a, needs[1]), None, None
        if w is None:
            return None, None, None, None
        dh = _scaled(slope, w, h.dtype) if needs[0] else None
        dhead = _head_gradient(h, head, targets, log_sum, kept, w) if needs[1] else None
        return dh, dhead, None, None


def _losses(
    logits: Tensor,
    h: Tensor,
    head: Tensor,
    targets: Tensor,
    nll: Tensor,
    log_sum: Tensor,
    p_target: Tensor,
    to_residuals: bool,
) -> None:
    """Fills nll, logsumexp(z) and p[y] of each token; turns logits into p − onehot(y) in place if that is wanted."""
    _nll_forward[(len(logits),)](
        logits,
        h,
        head,
        targets,
        nll,
        log_sum,
        p_target,
        *head.shape,
        BLOCK=min(LOSS_BLOCK, triton.next_power_of_2(head.shape[0])),
        WIDTH_BLOCK=min(WIDTH_BLOCK, triton.next_power_of_2(head.shape[1])),
        TO_RESIDUALS=to_residuals,
        num_warps=LOSS_WARPS,
    )


class _ScaledSlope(torch.autograd.Function):
    """(slope [T, D], w [T]) -> dh in the given type"""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(slope, w)
        return _scaled(slope, w, dtype)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        slope, w = ctx.saved_tensors
        a = u * w.unsqueeze(-1) if ctx.needs_input_grad[0] else None
        return a, torch.linalg.vecdot(u.float(), slope) if ctx.needs_input_grad[1] else None, None


def _scaled(rows: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Each row times its factor, rounded once."""
    return torch.mul(rows, factors.unsqueeze(-1), out=torch.empty_like(rows, dtype=dtype))


def _product_in_float32(left: Tensor, right: Tensor) -> Tensor:
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _residuals(h: Tensor, head: Tensor, targets: Tensor, log_sum: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """p − onehot(y), chunk by chunk of the tokens."""
    for part in _chunks(h.shape[0], head.shape[0] * head.itemsize):
        logits = h[part] @ head.t()
        _adjoints(logits, logits, targets[part], log_sum[part], None, None, None)
        yield part, logits


def _head_gradient(h: Tensor, head: Tensor, targets: Tensor, log_sum: Tensor, kept: Tensor | None, w: Tensor) -> Tensor:
    """dzᵀ h, with w moved from dz to h"""
    weighted = _scaled(h, w, h.dtype)
    if kept is not None:
        return kept.t() @ weighted
    dhead = torch.zeros_like(head)
    for part, residuals in _residuals(h, head, targets, log_sum):
        dhead.addmm_(residuals.t(), weighted[part])
    return dhead


def _second_order(
    h: Tensor,
    head: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    p_target: Tensor,
    slope: Tensor,
    kept: Tensor | None,
    w: Tensor,
    a: Tensor,
    with_head: bool,
) -> tuple[Tensor, Tensor | None]:
    """(ĥ, Ê) as at the top of this file."""
    mean_tangent = torch.empty_like(log_sum)
    if len(h):
        width = min(WIDTH_BLOCK, triton.next_power_of_2(h.shape[1]))
        _nll_mean_tangent[(len(h),)](
            a, slope, head, targets, p_target, mean_tangent, h.shape[1], WIDTH_BLOCK=width, num_warps=4
        )
    if kept is not None:
        z_hat = a @ head.t()
        _adjoints(kept, z_hat, targets, None, p_target, w, mean_tangent)
        return z_hat @ head, (z_hat.t() @ h).addmm_(kept.t(), a) if with_head else None
    h_hat, head_hat = torch.empty_like(h), torch.zeros_like(head) if with_head else None
    for part in _chunks(h.shape[0], 2 * head.shape[0] * head.itemsize):
        both = torch.cat((h[part], a[part])) @ head.t()
        residuals, z_hat = both.chunk(2)
        _adjoints(residuals, z_hat, targets[part], log_sum[part], None, w[part], mean_tangent[part])
        torch.mm(z_hat, head, out=h_hat[part])
        if head_hat is not None:
            head_hat.addmm_(both.t(), torch.cat((a[part], h[part])))
    return h_hat, head_hat


def _adjoints(
    residuals: Tensor,
    tangents: Tensor,
    targets: Tensor,
    log_sum: Tensor | None,
    p_target: Tensor | None,
    w: Tensor | None,
    mean_tangent: Tensor | None,
) -> None:
    """Turns logits into p − onehot(y) in place, if `log_sum` is given, and ż into ẑ in place, if w is given."""
    count, vocab_size = residuals.shape
    block = min(BLOCK, triton.next_power_of_2(vocab_size))
    blocks = triton.cdiv(vocab_size, block)
    if count:
        _nll_adjoint[(count * blocks,)](
            residuals,
            tangents,
            targets,
            *(targets if x is None else x for x in (log_sum, p_target, w, mean_tangent)),
            vocab_size,
            blocks,
            BLOCK=block,
            FROM_LOGITS=log_sum is not None,
            WITH_TANGENT=w is not None,
            num_warps=WARPS,
        )


@triton.jit
def _nll_forward(
    logits_ptr,
    h_ptr,
    head_ptr,
    targets_ptr,
    nll_ptr,
    log_sum_ptr,
    p_target_ptr,
    vocab_size,
    width,
    BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    TO_RESIDUALS: tl.constexpr,
):
    """One row: logsumexp and nll; then, if wanted, p − onehot(y) in place of the logits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logits_ptr += row * vocab_size
    h_ptr += row * width
    head_ptr += target * width
    columns = tl.arange(0, BLOCK)
    z_target = tl.load(logits_ptr + target).to(tl.float32)

    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocab_size, BLOCK):
        z = tl.load(logits_ptr + first + columns, mask=first + columns < vocab_size, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(z, axis=0))
        total = total * tl.exp(largest - larger) + tl.exp(z - larger)
        largest = larger
    log_sum = largest + tl.log(tl.sum(total, axis=0))
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(p_target_ptr + row, tl.exp(z_target - log_sum))

    features = tl.arange(0, WIDTH_BLOCK)
    at_target = tl.zeros((WIDTH_BLOCK,), tl.float32)
    for first in range(0, width, WIDTH_BLOCK):
        inside = first + features < width
        h = tl.load(h_ptr + first + features, mask=inside, other=0.0).to(tl.float32)
        at_target += h * tl.load(head_ptr + first + features, mask=inside, other=0.0).to(tl.float32)
    tl.store(nll_ptr + row, log_sum - tl.sum(at_target, axis=0))

    if TO_RESIDUALS:
        for first in range(0, vocab_size, BLOCK):
            inside = first + columns < vocab_size
            p = tl.exp(tl.load(logits_ptr + first + columns, mask=inside).to(tl.float32) - log_sum)
            residual = tl.where(first + columns == target, p - 1, p)
            tl.store(logits_ptr + first + columns, residual, mask=inside)


@triton.jit
def _nll_mean_tangent(a_ptr, slope_ptr, head_ptr, targets_ptr, p_target_ptr, out_ptr, width, WIDTH_BLOCK: tl.constexpr):
    """⟨p, ż⟩ of one row. The slope was made with p[y] − 1 as it was rounded, so that is what is taken off it again."""
    row = tl.program_id(0).to(tl.int64)
    head_ptr += tl.load(targets_ptr + row) * width
    features = tl.arange(0, WIDTH_BLOCK)
    p_target = tl.load(p_target_ptr + row)
    correction = p_target - (p_target - 1).to(a_ptr.dtype.element_ty).to(tl.float32)
    total = tl.zeros((WIDTH_BLOCK,), tl.float32)
    for first in range(0, width, WIDTH_BLOCK):
        inside = first + features < width
        a = tl.load(a_ptr + row * width + first + features, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(slope_ptr + row * width + first + features, mask=inside, other=0.0)
        total += a * (slope + correction * tl.load(head_ptr + first + features, mask=inside, other=0.0).to(tl.float32))
    tl.store(out_ptr + row, tl.sum(total, axis=0))


@triton.jit
def _nll_adjoint(
    residual_ptr,
    tangent_ptr,
    targets_ptr,
    log_sum_ptr,
    p_target_ptr,
    w_ptr,
    mean_tangent_ptr,
    vocab_size,
    blocks,
    BLOCK: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
    WITH_TANGENT: tl.constexpr,
):
    """One block of one row of `_adjoints`."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab_size
    hit = columns == tl.load(targets_ptr + row)
    residual = tl.load(residual_ptr + row * vocab_size + columns, mask=inside, other=0.0).to(tl.float32)
    if FROM_LOGITS:
        p = tl.exp(residual - tl.load(log_sum_ptr + row))
        residual = tl.where(hit, p - 1, p)
        tl.store(residual_ptr + row * vocab_size + columns, residual, mask=inside)
    else:
        p = tl.where(hit, tl.load(p_target_ptr + row), residual)
    if WITH_TANGENT:
        tangent = tl.load(tangent_ptr + row * vocab_size + columns, mask=inside, other=0.0).to(tl.float32)
        bend = p * (tangent - tl.load(mean_tangent_ptr + row))
        z_hat = tl.load(w_ptr + row) * residual + bend
        tl.store(tangent_ptr + row * vocab_size + columns, z_hat, mask=inside)
