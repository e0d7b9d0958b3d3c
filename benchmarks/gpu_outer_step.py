"""Time, memory and profile of one whole outer step on a GPU: TTT-E2E beside full attention, in one run.

    python -m benchmarks.gpu_outer_step 125m:8192:4 3b:8192:1 [--methods full e2e swa] [--profile]

Each case is size:context:sequences. The step is forward, backward, clipping and AdamW over random tokens, captured in
one CUDA graph after its gate: loss and gradient norm of the captured step must be those of the eager one, and for the
gate's small model every gradient must agree with float64.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import re
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from longread.config import ModelConfig, RunConfig
from longread.model import Transformer, initialize
from longread.outer_loop import end_to_end_loss, static_loss
from longread.recipes import SIZES, extend, pretrain

KINDS = [
    ("attention", r"attn|attention|flash|fmha|cudnn.*sdpa|_row|_column|_dkdv|_dq|_forward_kernel"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|splitK|wgmma"),
    ("cross-entropy", r"nll|cross|logsumexp|softmax|one_hot"),
    ("norms and gates", r"norm|swiglu|gate|rot"),
    ("optimizer", r"adam|multi_tensor|foreach|clipped|sgd"),
    ("copies and casts", r"copy|cast|Memcpy|Memset|memset|memcpy|CatArray|fill"),
    ("elementwise", r"elementwise|reduce|vectorized|index"),
]


def config_of(size: str, context: int, sequences: int, method: str) -> RunConfig:
    if size in SIZES:
        make = pretrain if context == 8192 else lambda s, m: extend(s, m, context_length=context)
        return make(size, method)  # type: ignore[arg-type]
    raise SystemExit(f"no size {size}")


class Case:
    """A model, an optimizer and a batch, and the step over them."""

    def __init__(self, size: str, context: int, sequences: int, method: str, recompute: str = "none") -> None:
        self.config = config_of(size, context, sequences, method)
        self.recompute = recompute
        with torch.device("cuda"):
            self.model = Transformer(self.config.model)
        initialize(self.model, seed=0)
        self.model.compute_dtype = torch.bfloat16
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=torch.tensor(1e-4, device="cuda"),
            betas=(0.9, 0.95),
            weight_decay=0.1,
            fused=True,
            capturable=True,
        )
        tokens = torch.randint(self.config.model.vocab_size, (sequences, context + 1), device="cuda")
        self.data = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.mask = torch.ones_like(self.data[0], dtype=torch.bool)
        self.tokens = sequences * context

    def loss(self) -> torch.Tensor:
        if self.config.loss == "static":
            return static_loss(self.model, *self.data, self.mask).loss
        return end_to_end_loss(
            self.model,
            *self.data,
            self.mask,
            inner_lr=1.0,
            inner_clip=1.0,
            recompute=self.recompute,  # type: ignore[arg-type]
        ).loss

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        loss = self.loss()
        loss.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, torch.where(norm > 1.0, 1.0 / norm, 1.0))
        self.optimizer.step()
        return loss.detach(), norm

    def captured(self) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, torch.Tensor], float]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        begun = time.perf_counter()
        with torch.cuda.stream(side):
            self.optimizer.zero_grad(set_to_none=True)
            self.step()
            torch.cuda.synchronize()
            first = time.perf_counter() - begun
            self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = self.step()
        return graph, found, first


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def gate() -> None:
    """Every outer gradient of a small model in bf16 and float32 against float64, on the kernels that will run."""
    for head_dim, heads in ((64, 4), (80, 2), (96, 2)):
        begun = time.perf_counter()
        config = ModelConfig(
            vocab_size=1000,
            width=heads * head_dim,
            num_blocks=4,
            num_heads=heads,
            mlp_hidden=256,
            window_size=192,
            mini_batch_size=128,
            num_suffix_blocks=2,
        )
        gradients: dict[str, list[torch.Tensor]] = {}
        ways = [
            ("float64", torch.float64, "cpu"),
            ("bfloat16", torch.bfloat16, "cuda"),
            ("bf16 reference", torch.bfloat16, "cpu"),
        ]
        if head_dim == 64:
            ways.append(("float32", torch.float32, "cuda"))
        for name, dtype, device in ways:
            model = Transformer(config)
            initialize(model, seed=1)
            model = model.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
            if dtype == torch.bfloat16:
                model.compute_dtype = dtype
            tokens = torch.randint(1000, (2, 513), generator=torch.Generator().manual_seed(0)).to(device)
            mask = torch.ones(2, 512, dtype=torch.bool, device=device)
            loss = end_to_end_loss(
                model, tokens[:, :-1], tokens[:, 1:], mask, inner_lr=1.0, inner_clip=1.0, recompute="none"
            ).loss
            gradients[name] = [g.cpu() for g in torch.autograd.grad(loss, list(model.parameters()))]
        reference = gradients.pop("float64")
        errors = {
            name: max(relative(a, e) for a, e in zip(found, reference, strict=True))
            for name, found in gradients.items()
        }
        ok = errors.get("float32", 0.0) <= 1e-4 and errors["bfloat16"] <= 2 * errors["bf16 reference"]
        text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        seconds = time.perf_counter() - begun
        print(f"gate, head dim {head_dim}: {'ok' if ok else 'RED'}, worst tensor: {text} [{seconds:.0f} s]", flush=True)
        if not ok:
            raise SystemExit("no speed on red")


def profile_kernels(work: Callable[[], object], wall_ms: float) -> None:
    """Where the GPU's time goes in `work`, by kind and by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    total: dict[str, float] = collections.Counter()
    kernels: dict[str, list[float]] = {}
    for event in found.events():
        if event.device_type.name != "CUDA":
            continue
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, event.name, re.IGNORECASE)), "other")
        ms = event.device_time_total / 1e3
        total[kind] += ms
        kernels.setdefault(f"{kind}: {event.name[:90]}", []).append(ms)
    busy = sum(total.values())
    print(
        f"    busy {busy:.1f} ms of {wall_ms:.1f}; "
        + ", ".join(f"{k} {v:.1f}" for k, v in sorted(total.items(), key=lambda x: -x[1]))
    )
    for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:22]:
        print(f"      {sum(times):8.2f} ms {len(times):5d} × {name}")


def run(size: str, context: int, sequences: int, method: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats()
    case = Case(size, context, sequences, method, options.recompute)
    eager = case.loss().item()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    graph, (loss, norm), first = case.captured()
    graph.replay()
    torch.cuda.synchronize()
    start = time.perf_counter() - begun
    found = loss.item(), norm.item()
    times = []
    for _ in range(options.steps):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    ms = statistics.median(times)
    row = {
        "method": method,
        "size": size,
        "context": context,
        "sequences": sequences,
        "ms": ms,
        "spread": (min(times), max(times)),
        "tokens_per_s": case.tokens / ms * 1e3,
        "peak_gib": torch.cuda.max_memory_reserved() / 2**30,
        "first_s": first,
        "to_first_replay_s": start,
        "loss_eager": eager,
        "loss_captured": found[0],
        "norm": found[1],
    }
    print(
        f"{size} {context}×{sequences} {method}: {ms:.1f} ms ({min(times):.1f}–{max(times):.1f}), "
        f"{row['tokens_per_s'] / 1e3:.1f}K tok/s, peak {row['peak_gib']:.1f} GiB, first step {first:.1f} s, "
        f"loss {eager:.4f} / {found[0]:.4f}, norm {found[1]:.3f}",
        flush=True,
    )
    if options.profile:
        del graph
        case.optimizer.zero_grad(set_to_none=True)
        profile_kernels(case.step, ms)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["125m:8192:4"])
    parser.add_argument("--methods", nargs="*", default=["full", "e2e"])
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no-gate", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    if not options.no_gate:
        gate()
    rows = []
    for text in options.cases:
        size, context, sequences = text.split(":")
        for method in options.methods:
            try:
                rows.append(run(size, int(context), int(sequences), method, options))
            except Exception:
                traceback.print_exc()
            gc.collect()
            torch.cuda.empty_cache()
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
