"""Where a GPU's time goes: kernels by kind, and the share of the time in which none ran."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "attention": ("flash", "fmha", "cudnn_generated"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk"),
    "optimizer and clipping": ("multi_tensor", "fusedadam", "lpnorm"),
    "log-probabilities": ("_score", "_to_gradient"),
    "compiled elementwise": ("triton_",),
    "communication": ("nccl",),
    "copies and casts": ("memcpy", "memset", "copy", "cat", "chunk", "split_with_sizes"),
}
"""By what a kernel's name contains, in this order; all others are 'other elementwise'."""


def print_profile(step: Callable[[], object], *, num_kernels: int = 14) -> None:
    """Runs the step once under torch's profiler, and prints kinds of kernels and the longest ones."""
    if not torch.cuda.is_available():
        print("no profile: there is no CUDA device")
        return
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - started
    events = [
        event
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    busy = busy_time(spans) / 1e6
    print(
        f"one step under the profiler: {wall * 1e3:.0f} ms, GPU busy {busy / wall:.1%}, {len(spans)} kernels"
    )
    kinds: Counter[str] = Counter()
    names: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event, (start, end) in zip(events, spans, strict=True):
        kinds[kind_of(event.name)] += end - start
        names[event.name] += end - start
        calls[event.name] += 1
    for kind, microseconds in kinds.most_common():
        print(f"  {microseconds / 1e3:8.1f} ms  {microseconds / 1e6 / wall:6.1%}  {kind}")
    for name, microseconds in names.most_common(num_kernels):
        print(f"  {microseconds / 1e3:8.1f} ms  {calls[name]:5d} x  {name[:90]}")


def kind_of(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "other")


def busy_time(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of intervals: streams overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
