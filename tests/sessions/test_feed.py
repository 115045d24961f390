"""Who reads along gets what happens, within bounds."""

import tracemalloc

import pytest

from htm_service.errors import Overloaded
from htm_service.records import AppendResult, Event
from htm_service.sessions.feed import EVENTS_KEPT, MAX_READERS, Feed
from storage.base import DEFAULT_NAMESPACE
from tests.names import named


def event(session_id: str = "a", start: int = 0) -> Event:
    return Event("append", named(session_id), 5.0, AppendResult(start, start + 1, 1))


async def test_a_reader_gets_what_happens_to_its_session() -> None:
    feed = Feed()
    assert not feed.is_read
    of_all, of_one = feed.read(DEFAULT_NAMESPACE, None), feed.read(DEFAULT_NAMESPACE, "b")
    elsewhere = feed.read("blue", "b")
    for name in ("a", "b"):
        feed.tell(event(name))
    assert [one.key.id for one in (await of_all.take(0.1))[0]] == ["a", "b"]
    assert [one.key.id for one in (await of_one.take(0.1))[0]] == ["b"]
    assert await of_all.take(0.01) == await elsewhere.take(0.01) == ([], 0)
    elsewhere.close()
    of_all.close()
    of_one.close()
    of_one.close()
    assert not feed.is_read


async def test_a_reader_that_does_not_read_keeps_the_last_ones_and_is_told_how_many_are_lost() -> None:
    feed = Feed()
    slow = feed.read(DEFAULT_NAMESPACE, None)
    tracemalloc.start()
    for start in range(20 * EVENTS_KEPT):
        feed.tell(event(start=start))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1 << 20
    events, num_dropped = await slow.take(0.1)
    assert [one.what.start for one in events] == list(range(19 * EVENTS_KEPT, 20 * EVENTS_KEPT))  # type: ignore[union-attr]
    assert num_dropped == 19 * EVENTS_KEPT
    feed.tell(event())
    assert await slow.take(0.1) == ([event()], 0)


def test_readers_have_a_limit() -> None:
    feed = Feed()
    readers = [feed.read(DEFAULT_NAMESPACE, None) for _ in range(MAX_READERS)]
    with pytest.raises(Overloaded, match=f"{MAX_READERS} read the events, the limit is {MAX_READERS}"):
        feed.read(DEFAULT_NAMESPACE, None)
    other = feed.read("blue", None)  # one namespace's many readers took the places of all others
    other.close()
    readers[0].close()
    assert feed.read(DEFAULT_NAMESPACE, None) is not None and feed.num_readers == MAX_READERS
