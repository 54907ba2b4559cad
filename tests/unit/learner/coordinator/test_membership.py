"""Groups that versions are broadcast to: who is in one, when the next one forms, and what faults cost."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from learner.config import WeightsConfig
from learner.coordinator.membership import Candidate, Group, Membership, wants_broadcasts
from penstock.broadcast.words import Backend, Reason
from penstock.errors import ConfigError
from penstock.weights.manifest import WeightsMedium

CONFIG = WeightsConfig(medium=WeightsMedium.COLLECTIVE, stable_seconds=10.0, regroup_seconds=30.0)


def actor(name: str, **changes: object) -> Candidate:
    made = Candidate(
        session_id=f"session of {name}",
        actor_id=name,
        medium=WeightsMedium.AUTO,
        device="cpu",
        is_ready=True,
        is_local=False,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def make(config: WeightsConfig = CONFIG) -> Membership:
    numbers = itertools.count(1)
    return Membership(config, make_secret=lambda: f"secret{next(numbers)}")


def names(group: Group | None) -> list[str]:
    assert group is not None
    return [seat.actor_id for seat in group.seats]


def stand(membership: Membership, candidates: list[Candidate], now: float, device: str = "cpu") -> Group:
    """A group of these, who are steady by `now`."""
    membership.look(candidates, now - CONFIG.stable_seconds)
    membership.look(candidates, now)
    assert membership.wants_group(now)
    group = membership.form(device, now)
    assert group is not None
    membership.formed(now)
    return group


def test_actors_that_were_ready_for_a_while_form_a_group() -> None:
    membership, actors = make(), [actor("a"), actor("b")]
    membership.look(actors, 0.0)
    assert not membership.wants_group(9.9)
    membership.look(actors, 10.0)
    assert membership.wants_group(10.0)
    group = membership.form("cpu", 10.0)
    assert names(group) == ["a", "b"]
    assert group is not None
    assert (group.size, group.rank("session of a"), group.rank("session of b")) == (3, 1, 2)
    assert group.rank("somebody else's") is None
    assert membership.standing is None, "nothing is broadcast before the members have come"
    assert not membership.wants_group(10.1), "one group forms at a time"
    membership.formed(12.0)
    assert membership.standing is group


def test_a_group_s_name_is_known_to_those_alone_who_were_told() -> None:
    first, second = Membership(CONFIG), Membership(CONFIG)
    assert stand(first, [actor("a")], 10.0).name != stand(second, [actor("a")], 10.0).name


def test_an_actor_that_is_not_ready_in_between_begins_anew() -> None:
    membership = make()
    membership.look([actor("a")], 0.0)
    membership.look([actor("a", is_ready=False)], 8.0)
    membership.look([actor("a")], 9.0)
    assert not membership.wants_group(18.9)
    assert membership.wants_group(19.0)


def test_a_newcomer_is_in_the_next_group_and_the_one_that_stands_goes_on_meanwhile() -> None:
    membership = make()
    first = stand(membership, [actor("a")], 10.0)
    both = [actor("a"), actor("b")]
    membership.look(both, 11.0)
    membership.look(both, 25.0)
    assert not membership.wants_group(25.0), "groups do not follow each other for every single newcomer"
    assert membership.wants_group(40.0)
    second = membership.form("cpu", 40.0)
    assert names(second) == ["a", "b"]
    assert membership.standing is first
    membership.formed(42.0)
    assert membership.standing is second
    assert membership.num_groups == 2


def test_a_newcomer_who_does_not_come_leaves_the_group_that_stands_alone() -> None:
    membership = make()
    first = stand(membership, [actor("a")], 10.0)
    both = [actor("a"), actor("b")]
    membership.look(both, 20.0)
    membership.look(both, 40.0)
    second = membership.form("cpu", 40.0)
    membership.failed(second, Reason.FORMING, "b did not come", 100.0)
    assert membership.standing is first
    assert membership.forming is None
    assert membership.fallbacks == {Reason.FORMING: 1}


def test_a_failure_ends_the_group_and_the_next_one_is_formed_after_ever_longer_whiles() -> None:
    membership, actors = make(), [actor("a")]
    waits = []
    now = 10.0
    stand(membership, actors, now)
    for _ in range(8):
        membership.failed(membership.standing, Reason.TIMEOUT, "a piece took long", now)
        assert membership.standing is None
        start = now
        while not membership.wants_group(now):
            now += 0.5
        waits.append(now - start)
        membership.form("cpu", now)
        membership.formed(now)
    assert waits == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    membership.broadcast()
    membership.failed(membership.standing, Reason.LOST, "", now)
    assert membership.wants_group(now + 2.0), "a broadcast that worked begins it anew"
    assert membership.fallbacks == {Reason.TIMEOUT: 8, Reason.LOST: 1}


def test_who_was_at_fault_twice_only_pulls() -> None:
    membership, actors = make(), [actor("a"), actor("b"), actor("c")]
    group = stand(membership, actors, 10.0)
    membership.failed(group, Reason.LOST, "", 11.0)
    assert membership.at_fault(group, [2]) == []
    group = membership.form("cpu", 20.0)
    assert names(group) == ["a", "b", "c"]
    membership.failed(group, Reason.FORMING, "", 21.0)
    assert group is not None
    assert membership.at_fault(group, [2, 7]) == ["b"], "a rank that nobody has is nobody's fault"
    assert names(membership.form("cpu", 40.0)) == ["a", "c"]


def test_a_member_that_leaves_ends_the_group_without_a_fault() -> None:
    membership = make()
    group = stand(membership, [actor("a"), actor("b")], 10.0)
    membership.look([actor("a"), actor("b", is_ready=False)], 10.5)
    assert not membership.has_left(group), "it is silent for a moment"
    membership.look([actor("a")], 11.0)
    assert membership.has_left(group) == ["b"]
    membership.retired(group)
    assert membership.standing is None
    assert membership.wants_group(11.0), "the others need not wait"
    assert names(membership.form("cpu", 11.0)) == ["a"]
    assert not membership.fallbacks


def test_an_actor_that_joined_anew_is_another_member() -> None:
    membership = make()
    group = stand(membership, [actor("a")], 10.0)
    membership.look([actor("a", session_id="a later one")], 11.0)
    assert membership.has_left(group) == ["a"]


def test_gpus_form_a_group_of_their_own_if_the_learner_has_one() -> None:
    actors = [actor("a", device="cuda"), actor("b"), actor("c", device="cuda:1")]
    with_gpu = stand(make(), actors, 10.0, device="cuda")
    assert names(with_gpu) == ["a", "c"]
    assert with_gpu.backend is Backend.NCCL
    without = stand(make(), actors, 10.0, device="cpu")
    assert names(without) == ["a", "b", "c"]
    assert without.backend is Backend.GLOO
    assert stand(make(), [actor("b")], 10.0, device="cuda").backend is Backend.GLOO


def test_nobody_is_left_when_the_sender_listens() -> None:
    membership = make()
    membership.look([actor("a")], 0.0)
    membership.look([actor("a")], 10.0)
    assert membership.wants_group(10.0)
    membership.look([], 11.0)
    assert membership.form("cpu", 11.0) is None
    assert membership.forming is None


@pytest.mark.parametrize(
    ("run", "asked", "device", "is_local", "learner", "wanted"),
    [
        ("collective", "auto", "cpu", True, "cpu", True),
        ("collective", "pull", "cuda", False, "cuda", False),
        ("pull", "collective", "cuda", False, "cuda", False),
        ("auto", "collective", "cpu", True, "cpu", True),
        ("auto", "auto", "cuda", False, "cuda", True),
        ("auto", "auto", "cuda", True, "cuda", False),
        ("auto", "auto", "cuda", False, "cpu", False),
        ("auto", "auto", "cpu", False, "cuda", False),
    ],
)
def test_who_is_asked_and_what_it_has_decide(
    run: str, asked: str, device: str, is_local: bool, learner: str, wanted: bool
) -> None:
    candidate = actor("a", medium=WeightsMedium(asked), device=device, is_local=is_local)
    assert wants_broadcasts(WeightsMedium(run), candidate, learner) is wanted


def test_a_learner_without_a_gpu_is_asked_once_by_those_who_have_one() -> None:
    """Under auto they pull then, and no sender is started again and again."""
    membership = make(WeightsConfig(medium=WeightsMedium.AUTO, stable_seconds=0.0))
    membership.look([actor("a", device="cuda")], 0.0)
    assert membership.wants_group(0.0)
    assert membership.form("cpu", 1.0) is None
    assert not membership.wants_group(2.0)


@pytest.mark.parametrize("name", ["timeout_seconds", "forming_seconds"])
def test_a_wait_needs_a_deadline(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        WeightsConfig(**{name: 0.0})
