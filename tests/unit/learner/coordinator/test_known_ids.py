import uuid

import pytest

from learner.coordinator import known_ids
from learner.coordinator.known_ids import KnownIds


def test_an_id_is_known_once_it_was_added():
    known, name = KnownIds(), uuid.uuid4().hex
    assert name not in known
    known.add(name)
    assert name in known
    assert len(known) == 1


def test_ids_stay_known_through_merges(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(known_ids, "_MERGE_AT", 8)
    known = KnownIds()
    names = [uuid.uuid4().hex for _ in range(100)]
    known.update(names)
    assert all(name in known for name in names)
    assert not any(uuid.uuid4().hex in known for _ in range(100))
    known.update(names)
    assert len(known) == 100


def test_ids_that_are_small_numbers_are_told_apart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(known_ids, "_MERGE_AT", 16)
    known = KnownIds()
    known.update(f"{number:032x}" for number in range(0, 200, 2))
    assert [f"{number:032x}" in known for number in range(200)] == [number % 2 == 0 for number in range(200)]
