"""Generates penstock/v1 from protos/, or checks that it is up to date.

python tools/protos.py            writes penstock/v1
python tools/protos.py --check    generates elsewhere, compares byte for byte; status 1 if they differ
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("penstock", "v1")


def generate(protos: Path, out: Path) -> None:
    """Writes messages, services and their stubs for every proto under out/penstock/v1."""
    sources = sorted(str(path) for path in (protos / PACKAGE).glob("*.proto"))
    scripts = Path(sys.executable).parent
    status = protoc.main(
        [
            "protoc",
            f"-I{protos}",
            f"-I{files('grpc_tools') / '_proto'}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            *(f"--plugin={scripts}/protoc-gen-{stubs}" for stubs in ("mypy", "mypy_grpc")),
            *(f"--{stubs}_out=quiet:{out}" for stubs in ("mypy", "mypy_grpc")),
            *sources,
        ]
    )
    if status != 0:
        raise SystemExit(status)


def differences(fresh: Path, committed: Path) -> list[str]:
    """Names each generated file that is missing, superfluous or different."""
    fresh_files, committed_files = _contents(fresh), _contents(committed)
    return [
        f"{name}: {_verdict(fresh_files.get(name), committed_files.get(name))}"
        for name in sorted(fresh_files.keys() | committed_files.keys())
        if fresh_files.get(name) != committed_files.get(name)
    ]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*_pb2*.py*") if path.is_file()}


def _verdict(fresh: bytes | None, committed: bytes | None) -> str:
    if committed is None:
        return "missing"
    return "no proto generates it" if fresh is None else "differs from its proto"


def main(argv: Sequence[str]) -> int:
    if list(argv) not in ([], ["--check"]):
        print(f"protos.py: got {' '.join(argv)}; expected nothing, or --check", file=sys.stderr)
        return 2
    if not argv:
        generate(ROOT / "protos", ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(ROOT / "protos", Path(folder))
        stale = differences(Path(folder) / PACKAGE, ROOT / PACKAGE)
    if stale:
        print(
            "generated code is stale: run `make protos` and commit the result",
            *stale,
            sep="\n  ",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
