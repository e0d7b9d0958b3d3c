"""The outer loop: losses whose gradient trains the model (paper Eq. 3, 4 and 6), and memory for it.

losses.py     the loss of the model as it learns, whose gradient runs through every inner step, and the static loss
segments.py   inner steps that are run again when their gradient is due
memory.py     how much of a batch is computed at a time, and how much of it again: what fits

Kept whole, the graph of one outer step holds the activations of every block and of all n = T / M inner steps. A block
that runs over whole sequences (the prefix and the first suffix attention; with the static loss all) can keep its input
and attention's result instead, and a segment of inner steps the carry at its start; they run again, with a graph, when
their gradient is due. That of the last k steps is due first: their graph is kept, and gone before another segment runs
again, which may be as long. Each schedule but the last does what those before it do, and more:

    none       all activations are kept                                        no extra work
    N-blocks   of the lowest N blocks inputs and attention's results           one more forward of these, less attention
    blocks     of all of them                                                  the same
    N-steps    and of the last k = n - N steps alone activations: n/k carries  and of the first N inner steps
    sqrt       k = √n                                                          the same
    step       k = 1                                                           the same
    all        as sqrt, and of all blocks inputs alone                         as sqrt, and their attention too

A carry is the fast weights plus the suffix's window. `auto` takes the first that fits in memory. All give the same
gradient; all but `none` let a loss be differentiated only once.
"""

from longread.outer_loop.losses import OuterLoss, end_to_end_loss, mean_loss, num_counted, static_loss
from longread.outer_loop.memory import (
    UPDATE_BYTES,
    Fit,
    activation_budget,
    choose_recompute,
    fit,
    graph_bytes,
    num_trained,
)

__all__ = [
    "UPDATE_BYTES",
    "Fit",
    "OuterLoss",
    "activation_budget",
    "choose_recompute",
    "end_to_end_loss",
    "fit",
    "graph_bytes",
    "mean_loss",
    "num_counted",
    "num_trained",
    "static_loss",
]
