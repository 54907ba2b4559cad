"""What every benchmark prints and writes: one object, the same shape each time."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

_PACKAGES = ("penstock", "torch", "transformers", "grpcio", "protobuf", "pyzmq", "apsw", "uvloop")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=Path, help="write the results, the machine and the versions to this file"
    )


def write(results: Mapping[str, float], arguments: argparse.Namespace) -> None:
    """Prints the results; writes them with their circumstances if a file was named."""
    for name, value in results.items():
        print(f"{name:32s} {value:,.4g}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(_report(results, arguments), indent=2) + "\n", encoding="utf-8")


def _report(results: Mapping[str, float], arguments: argparse.Namespace) -> dict[str, object]:
    return {
        "results": dict(results),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS", ""),
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "command": " ".join(["python", *sys.argv]),
        "settings": {name: str(value) for name, value in vars(arguments).items() if name != "json"},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
