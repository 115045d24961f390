"""Who may write: leases that last, end and are renewed; a stale owner writes nothing."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, NullPool, create_engine, select, text, update

from storage.base import Appended, StoreFenced
from storage.databases import postgresql, sqlite
from storage.resolve import open_store
from storage.sql.ownership import Holder, Ownership
from storage.sql.tables import owners
from tests.storage.contract import append, create, read, token

LONG_S, SHORT_S = 1_000.0, 0.03


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, path: Path) -> Iterator[tuple[Engine, str]]:
    """A database with the tables, and its clock."""
    is_sqlite = request.param == "sqlite"
    url = f"sqlite:///{path}" if is_sqlite else request.getfixturevalue("postgresql_url")
    open_store(url).close()
    engine = create_engine(url, poolclass=NullPool)
    yield engine, sqlite.CLOCK if is_sqlite else postgresql.CLOCK
    engine.dispose()


@pytest.fixture
def make(database: tuple[Engine, str]) -> Iterator[Callable[[float | None], Ownership]]:
    """`make(lease_s)`: an ownership that was taken."""
    engine, clock = database
    made: list[Ownership] = []

    def take(lease_s: float | None = LONG_S) -> Ownership:
        made.append(Ownership(engine, clock, lease_s))
        with engine.begin() as connection:
            made[-1].take(connection)
        return made[-1]

    yield take
    for ownership in made:
        ownership.release()


@pytest.fixture
def engine(database: tuple[Engine, str]) -> Engine:
    return database[0]


def holder(engine: Engine, ownership: Ownership) -> Holder | None:
    with engine.begin() as connection:
        return ownership.holder(connection)


def check(engine: Engine, ownership: Ownership) -> None:
    with engine.begin() as connection:
        ownership.check(connection)


def expiry(engine: Engine) -> float:
    with engine.begin() as connection:
        return float(connection.execute(select(owners.c.expires_at)).scalar_one())


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_lease_names_its_holder_and_how_long_to_watch_it(engine: Engine, make: Callable[..., Ownership]) -> None:
    """The clock is believed between half a lease and a lease: it may have been stepped."""
    first = make()
    held = holder(engine, first)
    assert held is not None and 0 < held.remaining_s <= held.lease_s == LONG_S
    assert str(held).startswith("process ") and "whose lease ends at 20" in str(held)
    for step, watched in ((86_400, LONG_S / 2), (0.3 * LONG_S, 0.7 * LONG_S), (-86_400, LONG_S)):
        with engine.begin() as connection:
            connection.execute(update(owners).values(expires_at=held.expires_at - step))
        stepped = holder(engine, first)
        assert stepped is not None and stepped != held
        assert stepped.watch_s == pytest.approx(watched, abs=10)
    check(engine, first)  # nobody has come in between, so it goes on


def test_a_released_lease_is_over_at_once(engine: Engine, make: Callable[..., Ownership]) -> None:
    first = make()
    first.keep()
    assert holder(engine, first) is not None
    first.release()
    first.release()
    assert holder(engine, first) is None


def test_a_lease_is_renewed(engine: Engine, make: Callable[..., Ownership]) -> None:
    first = make(SHORT_S)
    before = expiry(engine)
    first.keep()
    wait_until(lambda: expiry(engine) > before + 3 * SHORT_S)
    check(engine, first)


def test_a_renewal_that_fails_is_tried_again(
    engine: Engine, make: Callable[..., Ownership], caplog: pytest.LogCaptureFixture
) -> None:
    first = make(SHORT_S)
    with engine.begin() as connection, caplog.at_level(logging.WARNING):
        connection.execute(text("ALTER TABLE owners RENAME TO gone"))
        connection.commit()
        first.keep()
        wait_until(lambda: "could not be renewed" in caplog.text)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE gone RENAME TO owners"))
    before = expiry(engine)
    wait_until(lambda: expiry(engine) > before)


def test_a_stale_owner_is_fenced_for_good(engine: Engine, make: Callable[..., Ownership]) -> None:
    first = make()
    reasons: list[str] = []
    first.watch(reasons.append)
    check(engine, first)
    second = make()
    for _ in range(2):
        with pytest.raises(StoreFenced, match=r"another server owns this data since 20.* UTC: process "):
            check(engine, first)
    check(engine, second)
    assert len(reasons) == 1
    first.watch(reasons.append)
    assert len(reasons) == 2 and reasons[0] == reasons[1]
    first.release()
    assert holder(engine, second) is not None, "the lease is the second one's"


def test_a_renewal_finds_out_without_a_write(engine: Engine, make: Callable[..., Ownership]) -> None:
    first, fenced = make(SHORT_S), threading.Event()
    first.watch(lambda reason: fenced.set())
    make()
    first.keep()
    assert fenced.wait(20)


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_takeover_waits_for_a_transaction_and_a_renewal_does_not(
    engine: Engine, make: Callable[..., Ownership]
) -> None:
    """On SQLite there is one transaction that writes at a time."""
    first, order = make(SHORT_S), list[str]()
    first.keep()

    def take() -> None:
        make()
        order.append("taken")

    with engine.begin() as connection:
        first.check(connection)
        taker = threading.Thread(target=take)
        taker.start()
        before = expiry(engine)
        wait_until(lambda: expiry(engine) > before + 3 * SHORT_S)
        order.append("committed")
    taker.join()
    assert order == ["committed", "taken"]
    with pytest.raises(StoreFenced):
        check(engine, first)


def test_a_stale_store_writes_nothing(path: Path) -> None:
    """Somebody deleted the lock file, so a second server could start."""
    first = open_store(f"sqlite:///{path}")
    sid = create(first).sid
    append(first, sid, 1, 1)
    path.with_name(path.name + ".lock").unlink()
    second = open_store(f"sqlite:///{path}")
    with pytest.raises(StoreFenced, match="another server owns this data since"):
        append(first, sid, 1, 2)
    assert append(second, sid, 1, 3) == Appended(1, 2)
    with pytest.raises(StoreFenced):
        append(first, sid, 1, 2)
    assert read(first, sid) == token(1) + token(3), "what is there"
    assert read(second, sid) == token(1) + token(3)
    first.close()
    assert append(second, sid, 1, 5) == Appended(2, 3)
    second.close()
