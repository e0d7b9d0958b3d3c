"""How a run is laid out over GPUs: which of them share sequences, and which divide parameters and their state.

Of parameters, their gradients and the two moments of AdamW a GPU holds, by `Parallelism.update`:

    replicated     all; gradients are summed by an all-reduce
    shared         parameters and its own gradients whole, and the moments of its rows: gradients are reduce-scattered,
                   each GPU updates its rows, and new values are all-gathered in place
    fully-sharded  its share; each prefix block is gathered while it runs, all else for the whole step

Nodes repeat each other: between them the gradients of a GPU's rows are all-reduced.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from longread.config import ModelConfig, Parallelism, RunConfig, UserError

MOST = 2**20
"""GPUs; more can only be a slip."""


@dataclass(frozen=True)
class Layout:
    """`nodes` of `gpus` each, that divide a run by `parallelism`; a group that shares sequences lies in one node.

    Raises `UserError` if that cannot be.
    """

    gpus: int = 1
    nodes: int = 1
    parallelism: Parallelism = field(default_factory=Parallelism)

    def __post_init__(self) -> None:
        for name in ("gpus", "nodes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.all_gpus > MOST:
            raise UserError(f"{self.nodes} nodes of {self.gpus} GPUs are more than {MOST} GPUs; lower them")
        if self.gpus % self.parallelism.state:
            raise UserError(
                f"{self.parallelism.state} GPUs that share sequences do not divide the {self.gpus} of a node; choose a "
                "divisor as --state-parallel"
            )

    @property
    def all_gpus(self) -> int:
        return self.gpus * self.nodes

    @property
    def data_ranks(self) -> int:
        """Groups of GPUs, each with sequences of its own."""
        return self.all_gpus // self.parallelism.state

    @property
    def shards(self) -> int:
        """Parts that the moments of AdamW are divided into."""
        return 1 if self.parallelism.update == "replicated" else self.gpus

    def share(self, config: RunConfig) -> int:
        """Sequences of a step on each GPU. Raises `UserError` if they do not divide."""
        ranks = self.data_ranks
        if config.batch_size % ranks:
            more = -(-config.batch_size // ranks) * ranks
            many = f" / {self.parallelism.state}" if self.parallelism.state > 1 else ""
            raise UserError(
                f"a batch of {config.batch_size} sequences does not divide among {ranks} data ranks "
                f"({self.all_gpus} GPUs{many}); use --batch-size {more}, fewer GPUs, or a higher --state-parallel"
            )
        return config.batch_size // ranks

    def local(self, model: ModelConfig) -> ModelConfig:
        """The network as one GPU computes it: 1 / P of the hidden units of each fast MLP, all else whole. What it holds
        of parameters and moments does not depend on P.

        Raises `UserError` if they do not divide, or there are none.
        """
        P = self.parallelism.state
        if P == 1:
            return model
        if not model.num_suffix_blocks:
            raise UserError("state parallel divides fast MLPs, and this model has none; leave --state-parallel out")
        if model.fast_mlp_hidden % P:
            raise UserError(
                f"{P} GPUs do not divide the {model.fast_mlp_hidden} hidden units of the fast MLPs; choose a divisor "
                "as --state-parallel"
            )
        return dataclasses.replace(model, fast_hidden=model.fast_mlp_hidden // P)
