"""Where the time goes: one table by kind of kernel, one of the longest kernels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from longread.train.profiling import covered

_OF_ATTENTION = "forward|query_gradient|key_gradient|tangent|query_second|key_second|share|join"
KINDS = [
    ("attention", rf"attn|attention|flash|fmha|sdpa|^_({_OF_ATTENTION})_kernel"),
    ("matrix products", r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitK|wgmma|::(mm|bmm|addmm|baddbmm|mkldnn_linear)"),
    ("cross-entropy", r"nll|cross|logsumexp|softmax|one_hot"),
    ("optimizer", r"adam|multi_tensor|foreach|clipped|sgd"),
    ("norms and gates", r"norm|swiglu|silu|gelu|gate|rot"),
    ("copies", r"copy|cast|Memcpy|Memset|memset|memcpy|CatArray|fill|::cat\b"),
    ("elementwise", r"elementwise|reduce|vectorized|index|aten::"),
]
"""Kind, and what the names of its kernels look like; the first that matches."""
LONGEST = 15


def kind_of(name: str) -> str:
    """The kind of a kernel or operator, by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def profiled(device: torch.device, work: Callable[[], object], wall_ms: float) -> str:
    """Runs `work` once more, watched, and tells in Markdown where its time went.

    Args:
        wall_ms: what it takes unwatched; the part in which the device had nothing to do is called gaps.
    """
    gpu = device.type == "cuda"
    activity, every_thread = (ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU), not gpu
    watching = _ExperimentalConfig(profile_all_threads=every_thread)
    with profile(activities=[activity], experimental_config=watching) as found:
        work()
        if gpu:
            torch.cuda.synchronize(device)
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    if gpu:
        events = [event for event in found.events() if event.device_type.name == "CUDA"]
        for event in events:
            times[event.name] += event.device_time_total / 1e3
            calls[event.name] += 1
        busy = covered((event.time_range.start, event.time_range.end) for event in events) / 1e3
    else:
        for average in found.key_averages():
            times[average.key] += average.self_cpu_time_total / 1e3
            calls[average.key] += average.count
        busy = sum(times.values())
    return describe(times, calls, busy, wall_ms)


def describe(times: Counter[str], calls: Counter[str], busy_ms: float, wall_ms: float) -> str:
    """The two tables, from milliseconds and calls by kernel."""
    kinds: Counter[str] = Counter()
    for name, ms in times.items():
        kinds[kind_of(name)] += ms
    lines = ["| kind | ms | % |", "|---|--:|--:|"]
    lines += [f"| {kind} | {ms:.2f} | {100 * ms / wall_ms:.0f} |" for kind, ms in kinds.most_common()]
    gaps = max(0.0, wall_ms - busy_ms)
    lines += [f"| gaps | {gaps:.2f} | {100 * gaps / wall_ms:.0f} |", f"| wall | {wall_ms:.2f} | 100 |", ""]
    lines += ["| longest | kind | calls | ms |", "|---|---|--:|--:|"]
    for name, ms in times.most_common(LONGEST):
        shown = name[:80].replace("|", "/")
        lines.append(f"| `{shown}` | {kind_of(name)} | {calls[name]} | {ms:.2f} |")
    return "\n".join(lines)
