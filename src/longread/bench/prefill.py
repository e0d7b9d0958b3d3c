"""The time of reading a context: in constant memory; for full attention in one pass, or by one block for all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longread.bench.by_block import pass_block, read_by_block
from longread.bench.cases import Case
from longread.bench.gate import GateFailed, refusing_fallbacks, relative
from longread.bench.machine import free_memory, peak_gib, precision_on, seconds
from longread.bench.profile import profiled
from longread.bench.rows import Row, make_row
from longread.config import InnerConfig
from longread.inner_loop import Reading, begin, next_token_logits, read
from longread.inner_loop.captured import WORTH
from longread.model import Transformer, initialize

INNER = InnerConfig()
WARMING = 1 << 17
"""Tokens of the first reading, which compiles and captures and is not timed, and of a profiled one; at most."""
COMPARED = 9
"""Mini-batches at the start of the text that are also read one by one, without graphs."""
SCORES_OFF = {"bfloat16": 0.05, "float32": 1e-3}
"""Mean difference of two orders of the same sums, in nats."""
LOGITS_OFF = {"bfloat16": 0.1, "float32": 1e-3}
"""L2 difference of the logits of one token as a share of their norm; of two different texts it is above 1."""


def reading_model(case: Case, device: torch.device) -> Transformer:
    """Drawn weights in the timed precision. Fast weights are float32 all the same."""
    with device:
        model = Transformer(case.config.model)
    initialize(model, seed=0)
    return model.to(getattr(torch, precision_on(device))).requires_grad_(False)


@torch.no_grad()
def read_whole(model: Transformer, text: Tensor) -> tuple[Tensor, object]:
    """Full attention's prefill: one pass, the last token's logits [B, V], and the keys and values it has made."""
    lower, _ = model.empty_pasts(text.shape[0])
    hidden, kept = model.lower(text, lower, start=0)
    output, _ = model.upper(hidden[:, -1:], None, (), start=text.shape[1] - 1, order=0)
    return model.logits(output[:, -1]), kept


def measure_prefill(case: Case, device: torch.device, *, repeats: int, profile: bool = False) -> tuple[Row, str | None]:
    """Milliseconds per 1024 tokens of a context; the profile of a reading of at most `WARMING` tokens, if wanted.

    What learns reads one token more: it is the target of the last one, without which the last mini-batch would teach
    nothing. A context of more than `WARMING` tokens is read once. Full attention over more than its cache is meant to
    hold passes one block, which counts for all of them; embedding and head are left out.

    Raises:
        GateFailed: the text is scored differently than mini-batch by mini-batch.
        torch.OutOfMemoryError: it does not fit.
    """
    free_memory(device)
    model = reading_model(case, device)
    target = 1 if model.config.num_suffix_blocks else 0
    text = torch.randint(case.config.model.vocab_size, (1, case.context + target), device=device)
    work: Callable[[Tensor], object]
    blocks = case.network.num_blocks if case.is_beyond_cache else None
    if blocks:
        work = lambda part: pass_block(model, model.prefix[0], model.embed(part))  # noqa: E731 - one line says it
    elif case.method == "full":
        work = lambda part: read_whole(model, part)  # noqa: E731
    else:
        work = lambda part: read(model, begin(model), part, inner=INNER)  # noqa: E731
    check_text(case, model, text[:, : COMPARED * model.config.mini_batch_size + 1])
    free_memory(device)
    warming = text[:, : WARMING + target]
    with refusing_fallbacks():
        work(warming)
    times = [seconds(device, lambda: work(text)) for _ in range(repeats if case.context <= WARMING else 1)]
    per_1k = [(blocks or 1) * s * 1e3 / case.context * 1024 for s in times]
    row = make_row(case, per_1k, peak_gib(device), device, blocks=blocks)
    wall = row["value"] * warming.shape[1] / 1024 / (blocks or 1)
    return row, profiled(device, lambda: work(warming), wall) if profile else None


def check_text(case: Case, model: Transformer, text: Tensor) -> None:
    """Raises `GateFailed` unless the text is scored at once as it is mini-batch by mini-batch."""
    M, tolerance = model.config.mini_batch_size, (LOGITS_OFF if case.method == "full" else SCORES_OFF)
    nll, state = [], begin(model)
    for first in range(0, text.shape[1], M):
        found: Reading = read(model, state, text[:, first : first + M], inner=INNER, outputs=True)  # by no graph
        nll.append(found.nll)
        state = found.state
    if case.method == "full":
        at_once = read_by_block(model, text) if case.is_beyond_cache else read_whole(model, text)[0]
        difference = relative(at_once, next_token_logits(model, state))
    else:
        with refusing_fallbacks():
            for _ in range(WORTH):  # from then on all of it is replayed
                at_once = read(model, begin(model), text, inner=INNER).nll
        difference = (at_once - torch.cat(nll, 1))[:, 1:].abs().mean().item() if text.shape[1] > 1 else 0.0
    allowed = tolerance[precision_on(model.device)]
    if not difference <= allowed:
        raise GateFailed(f"the text is scored {difference:.2g} off what it is in pieces, allowed {allowed:g}")
