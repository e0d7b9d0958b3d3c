"""Windowed attention beside FlashAttention-4, cuDNN's window, FlexAttention and PyTorch's own on an NVIDIA GPU.

    PYTHONPATH=src python3 -m benchmarks.gpu_attention_peers

Peers are the packages `flash-attn-4` and `nvidia-cudnn-frontend`, and PyTorch's FlexAttention with its Triton and its
FLASH backend (which needs the first). Each must agree with ours before it is timed, in its output, and for the backward
pass in its gradients; who is not installed, refuses or is wrong is named with the reason. Attention with a past gets
keys and values of both in one tensor where a peer has no other way; its gradient is then that of the past too, which
ours is asked for as well. FlashAttention-4 gets its own layout, tokens before heads. They take turns. TFLOP/s count
useful products, as in `benchmarks.gpu_attention`. No peer has a second derivative: there the reference in plain PyTorch
stands beside ours.
"""

from __future__ import annotations

import functools
import importlib.metadata
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.gpu_attention import SIZES, Case, draw
from longread.ops.attention import triton as kernels
from longread.ops.attention.banded import banded_attention
from longread.ops.attention.reference import reference_attention

ROUNDS = 5
TOLERANCE = 0.02
"""Of the norm of what ours computes."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query [B, N, T, H], keys and values [B, N, P + T, H], a past's first -> [B, N, T, H]."""


def main() -> None:
    """Prints one table a case."""
    torch._functorch.config.donated_buffer = False  # the backward pass of one graph is timed many times
    names = "torch", "triton", "flash-attn-4", "nvidia-cudnn-frontend"
    print(torch.cuda.get_device_name(), ", ".join(f"{name} {version(name)}" for name in names))
    print("useful TFLOP/s forward and backward, medians of", ROUNDS, "(range)")
    for name, (B, N, H) in SIZES.items():
        for case in (Case(f"{name}, {T} tokens after {P}", B if P else 1, N, T, P, H, 8192) for T, P in SHAPES):
            compare(case)
    compare_second_order(Case("3B, 1024 tokens after 7168", 1, 32, 1024, 7168, 80, 8192))


SHAPES = (32768, 0), (4096, 8192), (1024, 7168), (8192, 0)


def version(package: str) -> str:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def compare(case: Case) -> None:
    """Checks all on random tensors, then times them in turns."""
    print(f"\n{case.name}, head size {case.H}, window {case.window}")
    torch.manual_seed(0)
    q, k, v, past_k, past_v = draw(case)
    leaves = [q.contiguous(), *(torch.cat(x, 2) for x in ((past_k, k), (past_v, v)))]
    leaves = [x.detach().requires_grad_() for x in leaves]
    upstream = torch.randn_like(leaves[0])
    ours = functools.partial(longread, case)
    expected = results(ours, leaves, upstream)
    passes: dict[str, list[Callable[[], object]]] = {}
    for name, make in (("Longread", lambda case: ours), *PEERS.items()):
        own, above = leaves, upstream
        if name == FLASH:
            own, above = [tokens_first(x).requires_grad_() for x in leaves], tokens_first(upstream)
        try:
            passes[name] = passes_of(make(case), own, above, expected, name)
        except Exception as error:
            print(f"    {name:24} not compared: {type(error).__name__}: {str(error).strip()[:160]}")
    times: dict[str, list[list[float]]] = {name: [[] for _ in runs] for name, runs in passes.items()}
    for _ in range(ROUNDS):
        for name, runs in passes.items():
            for run, taken in zip(runs, times[name], strict=True):
                taken.append(milliseconds(run))
    flops = 2.0 * case.H * sum(case.pairs) / 1e9
    for name, both in times.items():
        cells = [spread([products * flops / ms for ms in taken]) for products, taken in zip((2, 5), both, strict=False)]
        print(f"    {name:24} forward {'   backward '.join(cells)}", flush=True)
    torch.cuda.empty_cache()


def tokens_first(x: Tensor) -> Tensor:
    """The same of [B, N, T, H], in memory [B, T, N, H]."""
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2)


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):4.0f} ({min(values):.0f}-{max(values):.0f})"


def milliseconds(run: Callable[[], object]) -> float:
    """Of one of many in a row, the launches included."""
    import triton

    return float(triton.testing.do_bench(run, warmup=3, rep=15, return_mode="median"))


def results(attend: Attend, leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Output and gradients."""
    out = attend(*leaves)
    return [x.detach().float() for x in (out, *torch.autograd.grad(out, leaves, upstream))]


def passes_of(
    attend: Attend, leaves: list[Tensor], upstream: Tensor, expected: list[Tensor], name: str
) -> list[Callable[[], object]]:
    """The forward pass without a graph and, if gradients are right, the backward pass of one that was made.

    Raises:
        ValueError: the output is not the expected one.
    """
    off = [float((a - b).norm() / b.norm()) for a, b in zip(results(attend, leaves, upstream), expected, strict=True)]
    if not off[0] < TOLERANCE:
        raise ValueError(f"the output is {off[0]:.1e} off")

    @torch.no_grad()
    def forward() -> object:
        return attend(*leaves)

    if not max(off) < TOLERANCE:
        print(f"    {name:24} backward not compared: gradients of q, k, v {', '.join(f'{x:.1e}' for x in off[1:])} off")
        return [forward]
    out = attend(*leaves)
    return [forward, lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)]


def longread(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ours, of views: the past apart."""
    past = (k[:, :, : case.P], v[:, :, : case.P]) if case.P else None
    return kernels.triton_attention(q, k[:, :, case.P :], v[:, :, case.P :], past=past, window=case.window)


def pytorch_attention(case: Case) -> Attend:
    """PyTorch's fused kernels with a causal mask, where nobody sees less than the window allows."""
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.functional import scaled_dot_product_attention

    if case.window < case.T + case.P:
        raise ValueError("it has no window")
    if not case.P:
        return functools.partial(scaled_dot_product_attention, is_causal=True)
    return functools.partial(scaled_dot_product_attention, attn_mask=causal_lower_right(case.T, case.T + case.P))


def bands(case: Case) -> Attend:
    """PyTorch's fused kernels over bands of keys, what answers where there are no kernels of ours."""
    return lambda q, k, v: banded_attention(
        q, k[:, :, case.P :], v[:, :, case.P :], past=(k[:, :, : case.P], v[:, :, : case.P]), window=case.window
    )


def flash_attention(case: Case) -> Attend:
    """FlashAttention-4."""
    from flash_attn.cute import flash_attn_func

    def attend(*qkv: Tensor) -> Tensor:
        out = flash_attn_func(*(x.transpose(1, 2) for x in qkv), window_size=(case.window - 1, 0))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def flex_attention(backend: str, case: Case) -> Attend:
    """PyTorch's, compiled for the case."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention as flex

    def visible(b: Tensor, n: Tensor, query: Tensor, key: Tensor) -> Tensor:
        age = query + case.P - key
        return (age >= 0) & (age < case.window)

    torch._dynamo.reset()  # past its limit of shapes it would run uncompiled
    blocks = (128, 128) if backend == "TRITON" else (256, 128)
    mask = create_block_mask(visible, None, None, case.T, case.T + case.P, device="cuda", BLOCK_SIZE=blocks)
    compiled = torch.compile(flex, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, kernel_options={"BACKEND": backend})  # type: ignore[arg-type]


def cudnn_attention(case: Case) -> Attend:
    """cuDNN's graphs with a sliding window."""
    import cudnn

    types = {"io_data_type": cudnn.data_type.BFLOAT16, "compute_data_type": cudnn.data_type.FLOAT}
    types["intermediate_data_type"] = cudnn.data_type.FLOAT
    band = {
        "attn_scale": case.H**-0.5,
        "diagonal_alignment": cudnn.diagonal_alignment.BOTTOM_RIGHT,
        "diagonal_band_left_bound": case.window,
        "diagonal_band_right_bound": 0,
    }
    handle = cudnn.create_handle()

    def built(graph: Any) -> Tensor:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        return torch.empty(graph.get_workspace_size(), device="cuda", dtype=torch.uint8)

    def declared(graph: Any, tensors: list[Tensor]) -> list[Any]:
        return [graph.tensor(dim=list(x.shape), stride=list(x.stride()), data_type=KINDS[x.dtype]) for x in tensors]

    KINDS = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float32: cudnn.data_type.FLOAT}
    graphs: dict[str, tuple[Any, list[Any], Tensor]] = {}

    def execute(name: str, tensors: list[Tensor], outs: list[Tensor]) -> None:
        if name not in graphs:
            graph = cudnn.pygraph(**types, handle=handle)
            made = declared(graph, tensors)
            if name == "forward":
                results = graph.sdpa(*made, generate_stats=True, **band)
            else:
                results = graph.sdpa_backward(*made, **band)
            for tensor, out in zip(results, outs, strict=True):
                tensor.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride()))
                tensor.set_data_type(KINDS[out.dtype])
            workspace = built(graph)
            graphs[name] = graph, [*made, *results], workspace
        graph, places, workspace = graphs[name]
        cudnn.set_stream(handle, torch.cuda.current_stream().cuda_stream)
        graph.execute(dict(zip(places, (*tensors, *outs), strict=True)), workspace, handle=handle)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *qkv: Tensor) -> Tensor:
            out = torch.empty_like(qkv[0])
            stats = torch.empty(*out.shape[:-1], 1, device="cuda")
            execute("forward", list(qkv), [out, stats])
            ctx.save_for_backward(*qkv, out, stats)
            return out

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
            *qkv, out, stats = ctx.saved_tensors
            gradients = [torch.empty_like(x) for x in qkv]
            execute("backward", [*qkv, out, upstream.contiguous(), stats], gradients)
            return tuple(gradients)

    return lambda q, k, v: Attention.apply(q, k, v)


FLASH = "FlashAttention-4"
PEERS: dict[str, Callable[[Case], Attend]] = {
    FLASH: flash_attention,
    "cuDNN": cudnn_attention,
    "FlexAttention, Triton": functools.partial(flex_attention, "TRITON"),
    "FlexAttention, FLASH": functools.partial(flex_attention, "FLASH"),
    "PyTorch's": pytorch_attention,
    "PyTorch's, by bands": bands,
}


def compare_second_order(case: Case) -> None:
    """Forward, inner backward without the past, and outer backward through both, launched one by one."""
    import triton

    print(f"\n{case.name}: forward, inner and outer backward, ms")
    tensors = draw(case)
    for name, f in (("Longread", kernels.triton_attention), ("reference", reference_attention)):

        def run(f: Callable[..., Tensor] = f) -> object:
            leaves = [x.detach().requires_grad_() for x in tensors]
            out = f(*leaves[:3], past=(leaves[3], leaves[4]), window=case.window)
            first = torch.autograd.grad(out, leaves[:3], out.detach(), create_graph=True)
            return torch.autograd.grad((out, *first), leaves, (out.detach(), *(x.detach() for x in first)))

        taken = [triton.testing.do_bench(run, warmup=5, rep=30, return_mode="median") for _ in range(ROUNDS)]
        print(f"    {name:24} {statistics.median(taken):6.2f} ({min(taken):.2f}-{max(taken):.2f})", flush=True)


if __name__ == "__main__":
    main()
