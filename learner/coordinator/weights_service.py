"""Manifests, and the policy's files: protos/penstock/v1/weights.proto."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from learner.coordinator.core import Coordinator
from learner.coordinator.publications import Publications
from learner.coordinator.refusals import refusals
from penstock.codec import version_from_wire
from penstock.policy_files import PolicyFolder
from penstock.v1 import weights_pb2 as pb
from penstock.v1 import weights_pb2_grpc


class WeightsService(weights_pb2_grpc.WeightsServiceServicer):
    def __init__(self, coordinator: Coordinator, publications: Publications, policy: PolicyFolder) -> None:
        self._coordinator = coordinator
        self._publications = publications
        self._policy = policy

    async def GetManifest(  # noqa: N802
        self, request: pb.GetManifestRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetManifestResponse:
        version = version_from_wire(request.version) if request.HasField("version") else None
        manifest = self._publications.get(version)
        if manifest is None:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"version {version or '(newest)'} is not held here"
            )
        return pb.GetManifestResponse(manifest=manifest)

    async def FetchPolicyFiles(  # noqa: N802
        self, request: pb.FetchPolicyFilesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.FetchPolicyFilesResponse]:
        async with refusals(context):
            self._coordinator.scheduler.fleet.require(request.session_id, self._coordinator.clock())
            for name, data in self._policy.pieces():
                yield pb.FetchPolicyFilesResponse(name=name, data=data)
