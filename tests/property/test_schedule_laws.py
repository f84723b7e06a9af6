"""Laws of pages and of the schedule: nothing has two owners, everything comes back, everyone's turn comes."""

from __future__ import annotations

import types
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_jax.errors import CapacityError
from ferrum_jax.pages import PageAllocator
from ferrum_jax.sampling import SamplerPlan, SamplingParams
from ferrum_jax.schedule import Schedule, Sequence

OWNERS = range(4)
actions = st.lists(st.tuples(st.sampled_from(OWNERS), st.integers(0, 9) | st.none()), max_size=40)
# (when it arrives, tokens of its prompt, tokens it wants, after how many of them it stops by itself)
arrivals = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=8
)


def check(pages: PageAllocator) -> None:
    owned = [page for owner in OWNERS for page in pages.owned(owner)]
    assert len(set(owned)) == len(owned) and set(owned) <= set(range(pages.pages))
    assert pages.free == pages.pages - len(owned)


@given(size=st.integers(1, 12), actions=actions)
def test_a_page_has_one_owner_and_all_come_back(size: int, actions: list[tuple[int, int | None]]) -> None:
    pages = PageAllocator(size)
    for owner, wanted in actions:
        before, free = list(pages.owned(owner)), pages.free
        if wanted is None:
            assert pages.release(owner) == len(before) and pages.owned(owner) == []
        elif pages.grow(owner, wanted):
            assert pages.owned(owner)[: len(before)] == before  # what is written stays where it is
            assert len(pages.owned(owner)) == max(len(before), wanted)
        else:
            assert wanted - len(before) > free
            assert pages.owned(owner) == before and pages.free == free
        check(pages)
    for owner in OWNERS:
        pages.release(owner)
    assert pages.free == size
    assert pages.grow("all", size) and sorted(pages.owned("all")) == list(range(size))


def sequence(number: int, prompt: int, limit: int) -> Sequence:
    answer: Any = types.SimpleNamespace(count=0, limit=limit)
    return Sequence(number, SamplingParams(), SamplerPlan(), answer, [0] * prompt, prompt)


@given(
    arrivals=arrivals, slots=st.integers(1, 3), page=st.integers(1, 4), spare=st.integers(0, 4), piece=st.integers(1, 5)
)
def test_everyone_ends_whatever_the_pages(
    arrivals: list[tuple[int, int, int, int]], slots: int, page: int, spare: int, piece: int
) -> None:
    longest = max(prompt + limit - 1 for _, prompt, limit, _ in arrivals)
    schedule = Schedule(slots, -(-longest // page) + spare, page)
    stops, ended, time = {}, [], 0
    waiting = sorted(arrivals, key=lambda arrival: arrival[0])
    while waiting or schedule.queue or schedule.running:
        while waiting and waiting[0][0] <= time:
            _, prompt, limit, stop = waiting.pop(0)
            one = sequence(len(stops), prompt, limit)
            stops[one.id] = min(limit, stop)
            schedule.add(one)
        schedule.let_in()
        said = []
        for one in schedule.readers()[:1]:
            one.held += min(piece, one.remaining)
            if not one.reading:
                one.ahead = 1
                said.append(one)
        for one in schedule.decoders():
            assert len(schedule.pages.owned(one.id)) * page > one.held  # there is a slot for its token
            if not one.ahead:
                one.held, one.ahead = one.held + 1, 1
                said.append(one)
        ids = [one.id for one in schedule.running]
        assert ids == sorted(ids) and all(one.id > id for one in schedule.queue for id in ids)
        assert len({one.slot for one in schedule.running}) == len(ids) <= slots
        owned = [page for one in schedule.running for page in schedule.pages.owned(one.id)]
        assert len(set(owned)) == len(owned) == schedule.pages.pages - schedule.pages.free
        for one in said:
            if one.slot < 0:
                continue  # it gave way after it had spoken
            one.ahead = 0
            one.tokens.append(0)
            one.answer.count += 1
            if one.generated == stops[one.id]:
                schedule.leave(one)
                ended.append(one.id)
        time += 1
        assert time < 2000, "somebody waits for ever"
    assert sorted(ended) == list(stops) and schedule.pages.free == schedule.pages.pages


def test_the_newest_gives_way_and_comes_back_first() -> None:
    schedule = Schedule(slots=3, pages=4, page=1)
    for number in range(3):
        schedule.add(sequence(number, 1, 4))
    assert [one.id for one in schedule.let_in()] == [0, 1]  # each takes a page for its prompt and one more
    for one in schedule.running:
        one.held = one.target
    assert [one.id for one in schedule.decoders()] == [0, 1]
    for one in schedule.running:
        one.held += 1
    assert [one.id for one in schedule.decoders()] == [0]
    assert [one.id for one in schedule.queue] == [1, 2] and schedule.preemptions == 1


def test_what_could_never_fit_is_refused() -> None:
    schedule = Schedule(slots=1, pages=2, page=4)
    schedule.add(sequence(0, 5, 4))  # eight tokens are held, the ninth is only given out
    with pytest.raises(CapacityError, match=r"a prompt of 5 tokens and an answer of up to 5 need 3 pages of 4"):
        schedule.add(sequence(1, 5, 5))
    with pytest.raises(CapacityError, match=r"a pool of 0 pages holds nothing; it needs at least 1"):
        Schedule(slots=1, pages=0, page=4)


def test_cancelling_frees_slot_and_pages() -> None:
    schedule = Schedule(slots=1, pages=4, page=4)
    for number in range(2):
        schedule.add(sequence(number, 5, 4))
    schedule.let_in()
    assert schedule.pages.free == 2
    assert schedule.cancel(1) and not schedule.queue
    assert schedule.cancel(0) and schedule.pages.free == 4
    assert not schedule.cancel(0)
    schedule.add(sequence(2, 5, 4))
    assert [one.slot for one in schedule.let_in()] == [0]
