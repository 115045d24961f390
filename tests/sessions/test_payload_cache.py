"""The payload cache against a dict of everything: what it says is so, within its bytes, and what is gone is gone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htm_service.sessions.payload_cache import ENTRY_BYTES, PayloadCache

SIDS, POSITIONS = st.integers(0, 3), st.integers(0, 20)
BODIES = st.one_of(st.none(), st.binary(max_size=40))
STEPS = st.one_of(
    st.tuples(st.just("append"), SIDS, st.lists(BODIES, max_size=5)),
    st.tuples(st.just("read"), SIDS, st.lists(POSITIONS, max_size=5)),
    st.tuples(st.just("find"), SIDS, st.lists(POSITIONS, max_size=5)),
    st.tuples(st.just("trim"), SIDS, POSITIONS),
    st.tuples(st.just("cut"), SIDS, POSITIONS),
    st.tuples(st.just("delete"), SIDS, st.just(0)),
)


@settings(deadline=None)
@given(st.lists(STEPS, max_size=40), st.sampled_from([0, 300, 2_000, 1 << 20]))
def test_what_is_found_is_so(steps: list[tuple[str, int, Any]], max_bytes: int) -> None:
    cache = PayloadCache(max_bytes)
    stored: dict[int, dict[int, bytes | None]] = {sid: {} for sid in range(4)}
    length, first = dict.fromkeys(range(4), 0), dict.fromkeys(range(4), 0)
    num_truncated = dict.fromkeys(range(4), 0)
    for what, sid, value in steps:
        held = stored[sid]
        if what == "append":
            held |= enumerate(value, length[sid])
            if not num_truncated[sid]:
                cache.append(sid, length[sid], value)
            length[sid] += len(value)
        elif what == "read":
            there = [position for position in value if position in held]
            cache.add(sid, num_truncated[sid], there, {at: body for at in there if (body := held[at]) is not None})
        elif what == "trim":
            first[sid] = max(first[sid], min(value, length[sid]))
            stored[sid] = {at: body for at, body in held.items() if at >= first[sid]}
            cache.trim(sid, first[sid])
        elif what == "cut" and value >= first[sid]:
            length[sid] = min(length[sid], value)
            stored[sid] = {at: body for at, body in held.items() if at < value}
            cache.forget(sid)
            num_truncated[sid] += 1
        elif what == "delete":
            stored[sid] = {}
            cache.forget(sid)
            length[sid] = first[sid] = 0
        found, missing = cache.find(sid, num_truncated[sid], range(25))
        assert cache.find(sid, num_truncated[sid] - 1, range(25)) == ({}, list(range(25)))
        known = set(range(25)) - set(missing)
        assert known <= stored[sid].keys()
        assert found == {at: body for at, body in stored[sid].items() if at in known and body is not None}
        assert 0 <= cache.num_bytes <= max_bytes
    if max_bytes == 1 << 20:
        assert cache.num_bytes == sum(
            ENTRY_BYTES + len(body or b"")
            for sid in stored
            for body in cached(cache, stored[sid], sid, num_truncated[sid])
        )


def cached(cache: PayloadCache, stored: dict[int, bytes | None], sid: int, num_truncated: int) -> list[bytes | None]:
    _, missing = cache.find(sid, num_truncated, list(stored))
    return [body for at, body in stored.items() if at not in missing]


def test_the_first_to_go_are_the_oldest_of_the_session_asked_for_longest_ago() -> None:
    cache = PayloadCache(10 * (ENTRY_BYTES + 10))
    cache.append(1, 0, [b"0123456789"] * 5)
    cache.append(2, 0, [b"0123456789"] * 5)
    cache.find(1, 0, [4])
    cache.append(3, 0, [b"0123456789"] * 2)
    assert cache.find(1, 0, range(5))[1] == [] and cache.find(2, 0, range(5))[1] == [0, 1]
    assert cache.num_hits == 1 + 5 + 3 and cache.num_misses == 2


@pytest.mark.parametrize("gone", [lambda cache: cache.trim(1, 2), lambda cache: cache.forget(1)])
def test_a_session_that_has_nothing_left_is_no_stumbling_block(gone: Any) -> None:
    """A session all of whose tokens were trimmed stayed as an empty entry, and the next one that was short of room
    failed on it."""
    cache = PayloadCache(3 * ENTRY_BYTES)
    cache.append(1, 0, [None, None])
    gone(cache)
    cache.append(2, 0, [None] * 5)
    assert cache.find(2, 0, range(5))[1] == [0, 1]
