"""Makes versions of a base and factors, for a receiver on another host.

The base is fetched once and kept as it is, so that no version depends on the one before it.
What is made is verified against the manifest, chunk by chunk.
"""

from __future__ import annotations

import logging

from penstock.errors import WeightTransferError
from penstock.weights.buffer import ChunkBuffer
from penstock.weights.manifest import Blob, Manifest, Medium
from penstock.weights.media.base import Patience, WeightReceiver

_log = logging.getLogger(__name__)


class Adapting:
    """The base that versions are made of, and the factors of the newest."""

    def __init__(self) -> None:
        self._base = ChunkBuffer()
        self._factors = ChunkBuffer()

    def advance(
        self,
        receiver: WeightReceiver,
        medium: Medium,
        newest: ChunkBuffer,
        staging: ChunkBuffer,
        patience: Patience,
    ) -> None:
        """Makes the version that `staging` is prepared for; its manifest has an adapter.

        newest: the version that is held. It is not changed. Chunks that do not turn out as the
        manifest says stay missing. Raises WeightTransferError when the transfer breaks.
        """
        manifest = staging.blob
        assert isinstance(manifest, Manifest)
        assert manifest.adapter is not None
        if not staging.missing():
            return
        self._base.prepare(manifest.adapter.base, newest)
        _fetch(receiver, medium, manifest.adapter.base, self._base, patience)
        self._factors.prepare(manifest.adapter)
        _fetch(receiver, medium, manifest.adapter, self._factors, patience)
        patience.check("factors to be added")
        self._merge(manifest, staging)
        if staging.missing():
            _log.warning(
                "factors did not make version %s of its base: %d chunks differ; fetching those whole",
                manifest.version, len(staging.missing()),
            )  # fmt: skip

    def _merge(self, manifest: Manifest, staging: ChunkBuffer) -> None:
        from penstock.weights.adapters import merge, unpack_factors

        assert manifest.adapter is not None
        parts = unpack_factors(self._factors.packed, manifest.adapter.factors, manifest.tensors)
        staging.invalidate(0, manifest.num_bytes)
        merge(self._base.packed, manifest.tensors, parts, staging.packed)
        staging.verify(staging.missing())


def _fetch(
    receiver: WeightReceiver, medium: Medium, blob: Blob, into: ChunkBuffer, patience: Patience
) -> None:
    missing = into.missing()
    if missing:
        for index, data in receiver.chunks(blob, medium, missing, patience):
            into.put(index, data)
    if into.missing():
        raise WeightTransferError(
            f"{len(into.missing())} chunks for version {blob.version} arrived with another digest"
        )
