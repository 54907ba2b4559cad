"""float32 matrix products on CPUs where MKL is slow.

MKL uses its AVX-512 kernels on Intel's CPUs only; elsewhere oneDNN's take half the time.
torch calls oneDNN for float32 only when bfloat16 arithmetic is allowed for it, which
oneDNN then uses only where there are AMX units. So: allow it where there are none, and
measure that products are still those of float32.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

import torch

_log = logging.getLogger(__name__)

_PROBES = ((64, 384, 96), (512, 128, 512), (1000, 33, 7))
"""(rows, inner size, columns)."""
_TOLERANCE = 1e-5
"""Of the largest product. float32 errs by about 1e-6 here, bfloat16 by more than 1e-3."""


@cache
def use_fast_float32() -> bool:
    """Turns oneDNN's float32 products on where they are exact and MKL is slow. Returns whether it did."""
    flags = _processor_flags()
    if "avx512f" not in flags or "amx_bf16" in flags or "GenuineIntel" in flags:
        return False
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    if all(_is_exact(*shape) for shape in _PROBES):
        return True
    matmul.fp32_precision = before
    _log.warning("oneDNN's products are not those of float32 on this CPU; MKL's are used")
    return False


def _processor_flags() -> frozenset[str]:
    """The first processor's vendor and flags, as Linux names them; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return frozenset()
    first = path.read_text(encoding="utf-8").partition("\n\n")[0]
    return frozenset(word for line in first.splitlines() for word in line.partition(":")[2].split())


def _is_exact(rows: int, inner: int, columns: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, inner, generator=generator)
    right = torch.randn(inner, columns, generator=generator)
    expected = left.double() @ right.double()
    error = (left @ right - expected).abs().max() / expected.abs().max()
    return bool(error < _TOLERANCE)
