"""How much of each fault: a little with every `make test`, as much as docs/faults.md says with `make faults`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Numbers of one run."""

    kill_rounds: int
    """R1: kills of a server under load."""
    kill_rounds_on_postgresql: int
    """R1: the same, on PostgreSQL."""
    database_crashes: int
    """R1: kills of a PostgreSQL under load."""
    power_cuts: int
    """R1: states of the disk that are rebuilt and opened."""
    vanishing_rounds: int
    """R2: times that half of the clients go away, at each stage."""
    poison_rounds: int
    """R3: batches for each kind of poison."""
    thread_faults: int
    """R4: of the ways in which a thread may fail, so many."""
    large_appends: int
    """R5: appends of 40 MB."""
    session_mib: int
    """R5: of a session that is exported and imported."""
    budget_mib: int
    """R6, R7: memory budget; the data is so many times more than it."""
    sessions: int
    """R8: sessions created, filled and ended."""
    neighbour_seconds: float
    """R9: length of each measurement."""
    lost_answers: int
    """R10: appends whose answer is lost."""
    races: int
    """R10: pairs of writers."""
    drains: int
    """R11: stops under load."""
    locks: int
    """R12: times that the database of a running server is locked."""
    requests: int
    """R13: requests made of the schema."""
    requests_with_keys: int
    """R13: of the same, by each of two callers who may not do all of it."""
    bodies: int
    """R13: bodies of the binary format."""
    bodies_with_keys: int
    """R13: of the same, by each of these callers."""
    branch_examples: int
    """R18: orders of forks, truncations and all else, on each of SQLite and memory."""
    branch_examples_on_postgresql: int
    """R18: the same, on PostgreSQL."""


FAST = Scale(
    kill_rounds=5,
    kill_rounds_on_postgresql=2,
    database_crashes=1,
    power_cuts=25,
    vanishing_rounds=2,
    poison_rounds=2,
    thread_faults=2,
    large_appends=3,
    session_mib=64,
    budget_mib=2,
    sessions=200,
    neighbour_seconds=1.0,
    lost_answers=20,
    races=20,
    drains=1,
    locks=0,
    requests=200,
    requests_with_keys=60,
    bodies=300,
    bodies_with_keys=60,
    branch_examples=8,
    branch_examples_on_postgresql=4,
)

FULL = Scale(
    kill_rounds=200,
    kill_rounds_on_postgresql=50,
    database_crashes=20,
    power_cuts=500,
    vanishing_rounds=50,
    poison_rounds=50,
    thread_faults=5,
    large_appends=20,
    session_mib=1_024,
    budget_mib=32,
    sessions=10_000,
    neighbour_seconds=10.0,
    lost_answers=500,
    races=500,
    drains=10,
    locks=3,
    requests=4_000,
    requests_with_keys=1_000,
    bodies=6_000,
    bodies_with_keys=1_500,
    branch_examples=1_000,
    branch_examples_on_postgresql=1_000,
)
