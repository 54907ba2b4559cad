"""Manifests on the wire: round trips, and whatever else arrives."""

from __future__ import annotations

import dataclasses

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from penstock.codec import manifest_from_wire, manifest_to_wire
from penstock.errors import ProtocolError
from penstock.trajectory import PolicyVersion
from penstock.v1 import weights_pb2
from penstock.weights.manifest import CollectiveMedium, SharedMemoryMedium, ZeromqMedium, check_manifest
from penstock.weights.staged import stage
from tests.unit.penstock.weights.test_manifest import tensor_tables
from tests.weight_fixtures import tensors

GOOD = dataclasses.replace(
    stage(PolicyVersion(2, 7), tensors()).manifest,
    media=(
        SharedMemoryMedium(name="penstock-1.0123456789abcdef", nonce="ab" * 16),
        ZeromqMedium(endpoint="tcp://127.0.0.1:7071"),
        CollectiveMedium(group="group-3-0123"),
    ),
)


def test_a_manifest_survives_the_wire() -> None:
    assert manifest_from_wire(_reparsed(manifest_to_wire(GOOD))) == GOOD


@given(table=tensor_tables())
def test_every_manifest_survives_the_wire(table: list) -> None:
    manifest = stage(PolicyVersion(1, 1), table).manifest
    assert manifest_from_wire(_reparsed(manifest_to_wire(manifest))) == manifest


def test_media_of_an_unknown_kind_are_left_out() -> None:
    message = manifest_to_wire(GOOD)
    message.media.add()
    assert manifest_from_wire(message).media == GOOD.media


def test_digests_of_a_broken_length_are_refused() -> None:
    message = manifest_to_wire(GOOD)
    message.chunk_digests = message.chunk_digests[:-1]
    with pytest.raises(ProtocolError, match="31 bytes; expected a multiple of 32"):
        manifest_from_wire(message)


@given(garbage=st.binary(max_size=300))
def test_garbage_is_an_error_that_is_expected(garbage: bytes) -> None:
    try:
        message = weights_pb2.WeightManifest.FromString(garbage)
    except DecodeError:
        return
    with pytest.raises(ProtocolError):
        manifest_from_wire(message)


@given(data=st.data())
def test_a_flipped_bit_is_noticed_or_harmless(data: st.DataObject) -> None:
    encoded = bytearray(manifest_to_wire(GOOD).SerializeToString(deterministic=True))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        received = manifest_from_wire(weights_pb2.WeightManifest.FromString(bytes(encoded)))
    except (DecodeError, ProtocolError):
        return
    # Only what no digest covers can differ: the version and the ways to the bytes.
    check_manifest(received)
    assert (received.tensors, received.chunk_digests) == (GOOD.tensors, GOOD.chunk_digests)


def _reparsed(message: weights_pb2.WeightManifest) -> weights_pb2.WeightManifest:
    return weights_pb2.WeightManifest.FromString(message.SerializeToString())
