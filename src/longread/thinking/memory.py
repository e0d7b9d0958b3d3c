"""Fast weights of an agent: what thinking about one board changes, and nothing else does.

Both memories take the same inner step at the same loss. With z_d the logits that a memory adds for marble d, π the
policy of the trial, a its signed rate and v the teaching signal,

    l = − Σ_d ( a_d log π_d(action_d) + ⟨v_d, z_d⟩ )

The first term is SGD on −log π of the imagined trial, the second moves the logits of actions that were not tried too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longread.ops.clipped_sgd import clipped_sgd
from longread.ops.fast_mlp import fast_mlp
from longread.thinking.draws import Draws
from longread.thinking.layers import EnsembleLinear
from longread.thinking.world import DROPS

Fast = tuple[Tensor, ...]
"""Fast weights of S agents, B boards and N copies; for each memory of its own kind."""
LONGEST_STEP = 5.0
"""Clip of the inner step of the fast MLP, over all its weights."""


class LinearMemory(nn.Module):
    """z_d = F_d key, F [S, B, N, D, A, W]: zero at the start, and its gradient written out."""

    def __init__(self, draws: Draws, actions: int, width: int) -> None:
        super().__init__()
        self.actions, self.width = actions, width

    def begin(self, key: Tensor, copies: int) -> Fast:
        """For boards with `key` [S, B, W]."""
        return (key.new_zeros(*key.shape[:2], copies, DROPS, self.actions, self.width),)

    def read(self, fast: Fast, key: Tensor) -> Tensor:
        """z: [S, B, N, D, A]"""
        return (fast[0] * key[:, :, None, None, None]).sum(-1)

    def step(
        self, fast: Fast, key: Tensor, *, policy: Tensor, slow: Tensor, scale: Tensor, chosen: Tensor, rate: Tensor,
        teaching: Tensor,
    ) -> Fast:  # fmt: skip
        """One inner step.

        Args:
            policy: π of the trial, [S, B, N, D, A]; softmax of scale · (slow + z).
            slow, scale: as the policy was made, [S, B, 1, D, A] and [S, 1, 1, 1, 1].
            chosen: the actions as one-hot, like `policy`.
            rate: a, [S, B, N, D, 1].
            teaching: v, like `policy`.
        """
        toward = rate * scale * (chosen - policy) + teaching
        return (fast[0] + toward[..., None] * key[:, :, None, None, None],)


class MLPMemory(nn.Module):
    """z = readout of a fast MLP at the key: the MLP that learns in TTT-E2E, and its clipped step.

    Its initial weights W_0 are meta-learned. With them unchanged, K = 0, it is one more part of the slow policy.
    """

    def __init__(self, draws: Draws, actions: int, width: int) -> None:
        super().__init__()
        self.actions, self.width = actions, width
        self.gate, self.up, self.down = (
            EnsembleLinear(draws.of(name), width, width).weight for name in ("gate", "up", "down")
        )  # square, so that inputs and outputs need no order
        self.readout = EnsembleLinear(draws.of("readout"), width, DROPS * actions)

    def begin(self, key: Tensor, copies: int) -> Fast:
        """Every board and copy begins with W_0; the weights are [S · B · N, W, W]."""
        count = key.shape[1] * copies
        return tuple(
            w[:, None].expand(-1, count, -1, -1).reshape(-1, self.width, self.width)
            for w in (self.gate, self.up, self.down)
        )

    def read(self, fast: Fast, key: Tensor) -> Tensor:
        """z: [S, B, N, D, A]"""
        copies = len(fast[0]) // (key.shape[0] * key.shape[1])
        x = key[:, :, None].expand(-1, -1, copies, -1)
        gate, up, down = fast
        hidden = fast_mlp(x.reshape(-1, 1, self.width), gate, up, down).view(x.shape)
        return self.readout(hidden).unflatten(-1, (DROPS, self.actions))

    def step(
        self, fast: Fast, key: Tensor, *, policy: Tensor, slow: Tensor, scale: Tensor, chosen: Tensor, rate: Tensor,
        teaching: Tensor,
    ) -> Fast:  # fmt: skip
        """One inner step, as that of `LinearMemory`; its gradient by autograd, and differentiable where asked for."""
        meta = torch.is_grad_enabled()
        with torch.enable_grad():
            weights = fast if meta else tuple(w.detach().requires_grad_() for w in fast)
            z = self.read(weights, key)
            log_policy = torch.log_softmax(scale * (slow + z), -1)
            loss = -(rate * chosen * log_policy + teaching * z).sum()
            gradients = torch.autograd.grad(loss, weights, create_graph=meta)
        return clipped_sgd(fast, gradients, lr=1.0, clip=LONGEST_STEP)[0]
