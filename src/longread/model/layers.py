"""Linear, RMSNorm and SwiGLU over float32 parameters; products run in the type of their input."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from longread.config import Gate
from longread.ops.collective import part
from longread.ops.fast_mlp import fast_mlp, fast_mlp_of_halves
from longread.ops.linear import SharedWeight, casts_for_a_gradient, linear
from longread.ops.rms_norm import SharedGain, rms_norm, rms_norm_and_input
from longread.ops.rotary import rotate
from longread.ops.swiglu import swiglu, swiglu_of_halves


class Linear(nn.Module):
    """y = x Wᵀ, plus a bias [out] if wanted. W [out, in] and bias keep their own precision; their casts are as x is."""

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)
        self.undecayed = ("bias",) if bias else ()
        """For the outer optimizer."""
        self.shared: SharedWeight | None = None
        """Set while many products with this weight share a cast and a gradient (`Transformer.sharing_weights`); of
        layers that are one then, the first has it for all (`product_of_all`)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.shared is not None:
            return self.shared(x)
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return "{1} → {0}".format(*self.weight.shape) + ("" if self.bias is None else ", with bias")


def product_of_all(layers: Sequence[Linear], x: Tensor) -> Tensor | None:
    """x through all of the layers, one output behind the other, where they are one: if casts would copy them anyway.

    Of x one gradient comes back then, and a wide product fills a GPU better than narrow ones.
    """
    first, *_, last = layers
    if first.shared is not None:
        return first.shared(x) if last.shared is None else None
    if not casts_for_a_gradient(x, first.weight):
        return None
    weights, biases = stacked(layers)
    return linear(x, weights, biases)


def stacked(layers: Sequence[Linear]) -> tuple[list[Tensor], list[Tensor] | None]:
    """Weights and biases of layers that become one; zeros where only others have a bias."""
    weights: list[Tensor] = [layer.weight for layer in layers]
    if all(layer.bias is None for layer in layers):
        return weights, None
    return weights, [w.new_zeros(len(w)) if x.bias is None else x.bias for w, x in zip(weights, layers, strict=True)]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a gain; it can turn or add to a residual in the same pass."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.shared: SharedGain | None = None
        """Set while many norms by this gain share a gradient (`Transformer.sharing_weights`)."""

    def forward(self, x: Tensor, *, residual: Tensor | None = None, rotary: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.shared or self.weight, self.eps, residual=residual, rotary=rotary)

    def and_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x, and x for the residual connection around what follows."""
        return rms_norm_and_input(x, self.shared or self.weight, self.eps)

    def extra_repr(self) -> str:
        return str(len(self.weight))


class NoNorm(nn.Module):
    """Stands where a norm is switched off."""

    def forward(self, x: Tensor, *, residual: Tensor | None = None, rotary: Tensor | None = None) -> Tensor:
        if rotary is not None:
            x = rotate(x, rotary)
        return x if residual is None else residual + x

    def and_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


Norm = RMSNorm | NoNorm


class SwiGLU(NamedTuple):
    """The three matrices of one fast MLP, a set per sequence: gate and up [B, F, D], down [B, D, F]."""

    gate: Tensor
    up: Tensor
    down: Tensor


class JoinedSwiGLU(NamedTuple):
    """The same with gate and up as one matrix, as the scan of a training step has them: both [B, 2F, D]."""

    both: Tensor
    down: Tensor


class MLP(nn.Module):
    """down · (act(gate · x) ∘ (up · x)) between the norms of its sub-layer, added to x; act is silu or tanh-GELU.

    The same parameters serve as static MLP, or as the initial weights W_0 of a fast one: then `weights` holds
    each sequence's own matrices and only the norms are the module's.
    """

    def __init__(self, width: int, hidden: int, pre_norm: Norm, post_norm: Norm, activation: Gate = "silu") -> None:
        super().__init__()
        self.pre_norm, self.post_norm, self.activation = pre_norm, post_norm, activation
        self.gate, self.up, self.down = Linear(width, hidden), Linear(width, hidden), Linear(hidden, width)

    def forward(
        self, x: Tensor, weights: SwiGLU | JoinedSwiGLU | None = None, group: ProcessGroup | None = None
    ) -> Tensor:
        """x: [B, T, D], `weights` as in `SwiGLU`, with a `group` this rank's part of them; returns [B, T, D]."""
        normed, x = self.pre_norm.and_input(x)
        if weights is None:
            both = product_of_all(self.stacks[0], normed)
            if both is None:
                hidden = swiglu(self.gate(normed), self.up(normed), activation=self.activation)
            else:
                hidden = swiglu_of_halves(both, activation=self.activation)
            out = self.down(hidden)
        elif isinstance(weights, JoinedSwiGLU):
            out = fast_mlp_of_halves(normed, *weights, activation=self.activation, group=group)
        else:
            out = fast_mlp(normed, *weights, activation=self.activation, group=group)
        return self.post_norm(out, residual=x)

    @property
    def stacks(self) -> tuple[tuple[Linear, ...], ...]:
        """Its layers; those that multiply the same vectors together."""
        return (self.gate, self.up), (self.down,)

    def initial_weights(self, batch_size: int, group: ProcessGroup | None = None) -> SwiGLU:
        """W_0 for every sequence: views of the parameters, or float32 copies of half-precision ones.

        With a `group` this rank's part of the hidden units, see `longread.ops.collective.part`.
        """
        matrices: list[Tensor] = [layer.weight for layer in (self.gate, self.up, self.down)]
        if group is not None:
            matrices = [part(w, dim, group) for w, dim in zip(matrices, (0, 0, 1), strict=True)]
        return SwiGLU(*((w.float() if w.dtype.itemsize < 4 else w).expand(batch_size, -1, -1) for w in matrices))

    def joined_initial_weights(self, batch_size: int, group: ProcessGroup | None = None) -> JoinedSwiGLU:
        """The same; gate and up are copies."""
        gate, up, down = (w[0] for w in self.initial_weights(1, group))
        return JoinedSwiGLU(*(w.expand(batch_size, -1, -1) for w in (torch.cat((gate, up)), down)))
