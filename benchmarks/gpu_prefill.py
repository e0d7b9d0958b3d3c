"""Milliseconds per 1K tokens of reading on a GPU: TTT-E2E beside full attention and SWA, in one run.

    python -m benchmarks.gpu_prefill 3b --contexts 8192 131072 [--methods full swa e2e] [--profile]

Full attention reads its context in one pass, keeping keys and values; the others read in stretches, in constant
memory. Weights are bf16, fast weights float32. The gate: what is read in bf16 must score tokens as float32 does.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from typing import Any

import torch

from benchmarks.gpu_outer_step import profile_kernels
from longread.config import InnerConfig
from longread.inner_loop import begin, read, reading
from longread.model import Transformer, initialize
from longread.recipes import Method, pretrain

INNER = InnerConfig()
PIECE = 1 << 17


def build(size: str, method: Method) -> Transformer:
    with torch.device("cuda"):
        model = Transformer(pretrain(size, method).model)
    initialize(model, seed=0)
    return model.bfloat16().requires_grad_(False)


def gate(size: str, tokens: int = 4096) -> None:
    """bf16 reading against float32 reading of the same weights: mean absolute difference of the NLL, in nats."""
    config = pretrain(size).model
    with torch.device("cuda"):
        model = Transformer(config)
    initialize(model, seed=0)
    model.requires_grad_(False)
    text = torch.randint(config.vocab_size, (1, tokens), device="cuda")
    wide = read(model, begin(model), text, inner=INNER).nll[:, 1:]
    narrow = read(model.bfloat16(), begin(model), text, inner=INNER).nll[:, 1:]
    difference = (wide - narrow).abs().mean().item()
    print(
        f"gate {size}: mean |NLL difference| {difference:.4f} nats: {'ok' if difference < 0.05 else 'RED'}", flush=True
    )


@torch.no_grad()
def whole(model: Transformer, text: torch.Tensor) -> None:
    """Full attention's prefill: one pass, the last token's logits, keys and values kept."""
    lower, _ = model.empty_pasts(1)
    hidden, kept = model.lower(text, lower, start=0)
    output, _ = model.upper(hidden[:, -1:], None, (), start=text.shape[1] - 1, order=0)
    model.logits(output)
    del kept


def run(size: str, method: Method, contexts: list[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    model = build(size, method)
    rows = []
    for context in contexts:
        text = torch.randint(model.config.vocab_size, (1, context), device="cuda")
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(options.repeats + 1 if context <= 131072 else 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            if method == "full":
                whole(model, text)
            else:
                state = begin(model)
                for first in range(0, context, PIECE):
                    state = read(model, state, text[:, first : first + PIECE], inner=INNER).state
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e3 / context * 1024)
        times = times[1:] or times  # the first captures and compiles
        row = {
            "measure": "prefill_ms_per_1k",
            "method": method,
            "size": size,
            "context": context,
            "sequences": 1,
            "value": statistics.median(times),
            "unit": "ms",
            "n": len(times),
            "spread": [min(times), max(times)],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
        rows.append(row)
        print(
            f"{size} {method} {context}: {row['value']:.2f} ms per 1K ({min(times):.2f}–{max(times):.2f}), "
            f"peak {row['peak_gib']:.1f} GiB",
            flush=True,
        )
    if options.profile and method != "full":
        state = read(model, begin(model), torch.randint(1000, (1, 16385), device="cuda"), inner=INNER).state
        text = torch.randint(1000, (1, 65536 + 1024), device="cuda")
        profile_kernels(lambda: read(model, state, text, inner=INNER), rows[-1]["value"] * 65)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size")
    parser.add_argument("--contexts", nargs="*", type=int, default=[8192, 131072])
    parser.add_argument("--methods", nargs="*", default=["full", "swa", "e2e"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--stretch", type=int, default=None)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.stretch:
        reading.STRETCH = options.stretch
    rows: list[dict[str, Any]] = []
    gate(options.size)
    for method in options.methods:
        gc.collect()
        torch.cuda.empty_cache()
        contexts = [c for c in options.contexts if method != "full" or c <= 131072]  # its cache ends there
        try:
            rows += run(options.size, method, contexts, options)
        except Exception:
            traceback.print_exc()
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
