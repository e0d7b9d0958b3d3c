"""The inner loop: what a reader does with the tokens it reads.

optimizers.py  the rules of the inner step, and where another is registered
step.py        the loss of a mini-batch, one step on it, the scan over mini-batches (paper Eq. 2 and 5)
state.py       what is left of a text after it has been read; batches of such, and how far the weights have moved
kept.py        what has left the window and is seen all the same: the tokens that surprised most
reading.py     any text in any pieces: the same steps, taken as soon as their tokens have arrived; what is done when
               learning has broken a reader
halves.py      the two halves of the network side by side on a CPU
captured.py    long stretches of it on a GPU, as replays of CUDA graphs, and when it is worth to capture one
captured_kept.py  the same where tokens are kept, one mini-batch after the other
finishing.py   the step on a mini-batch that was complete before its last target was known
graphs.py      how a CUDA graph is captured, checked, and done without
decoding.py    one token after the other, for writing, and the pool of the places in which that is done
places.py      where that is done
rehearsal.py   what of it a GPU compiles, ahead
"""

from longread.inner_loop.decoding import Decoder
from longread.inner_loop.optimizers import InnerOptimizer, optimizer_named, register_inner_optimizer
from longread.inner_loop.reading import Reading, read, read_guarded, rescue
from longread.inner_loop.rehearsal import few_blocks, precompile_reading
from longread.inner_loop.state import ReadingState, begin, drift, next_token_logits
from longread.inner_loop.step import Carry, Scan, Step, inner_step, mini_batch_loss, scan, surprise_weights

__all__ = [
    "Carry",
    "Decoder",
    "InnerOptimizer",
    "Reading",
    "ReadingState",
    "Scan",
    "Step",
    "begin",
    "drift",
    "few_blocks",
    "inner_step",
    "mini_batch_loss",
    "next_token_logits",
    "optimizer_named",
    "precompile_reading",
    "read",
    "read_guarded",
    "register_inner_optimizer",
    "rescue",
    "scan",
    "surprise_weights",
]
