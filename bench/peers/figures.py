"""What was found of each system, as a table of Markdown and as JSON. Does not know how it was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.figures import Figure

CLIENTS = (1, 32)
SYSTEM = "htm-service"
RIVAL = "HNSW"
"""In the name of the row that ours is compared with."""
ROUNDS = 2
"""How often everything is measured. The better run counts, for all systems alike: machines are noisy."""


@dataclass(frozen=True, slots=True)
class Row:
    """One system, or one setting of it. `searches` and `appends` are what the load says, by number of clients."""

    system: str
    recall: float
    searches: Mapping[int, Mapping[str, float]]
    appends: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    fill_s: float | None = None
    """From the first token sent to the first answer: with whatever index it has."""
    flushes_per_append: float | None = None
    """Of the disk, with one client: below 1, an append was answered before it was safe."""


def better(runs: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """The run with the higher rate."""
    return max(runs, key=lambda run: run["per_s"])


def measure_searches(search: Callable[[int], Mapping[str, float]]) -> dict[int, Mapping[str, float]]:
    """The better run of each number of clients; `search` runs the load with so many."""
    return {clients: better([search(clients) for _ in range(ROUNDS)]) for clients in CLIENTS}


def measure_appends(
    append: Callable[[int], Mapping[str, float]],
) -> tuple[dict[int, Mapping[str, float]], float | None]:
    """The same of appends, and the flushes of the disk per append of one client in its first run."""
    before = num_flushes()
    first = append(1)
    flushes = per_append(before, num_flushes(), first)
    runs: dict[int, list[Mapping[str, float]]] = {1: [first], 32: []}
    for clients, some in runs.items():
        some += [append(clients) for _ in range(ROUNDS - len(some))]
    return {clients: better(some) for clients, some in runs.items()}, flushes


def table(rows: Sequence[Row]) -> str:
    """All rows, with their rates per second and the median latencies of one client."""
    head = ["", "fill, s"]
    head += [f"appends/s, {_clients(number)}" for number in CLIENTS] + ["flushes per append"]
    head += [f"searches/s, {_clients(number)}" for number in CLIENTS] + ["p50, ms", "recall"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row.system, _short(row.fill_s)]
        cells += [_short(row.appends.get(number, {}).get("per_s")) for number in CLIENTS]
        cells += [_short(row.flushes_per_append)]
        cells += [_short(row.searches.get(number, {}).get("per_s")) for number in CLIENTS]
        cells += [_short(row.searches.get(1, {}).get("p50_ms")), f"{row.recall:.3f}"]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdicts(rows: Sequence[Row]) -> list[Figure]:
    """S13, S14 and S16, as far as what they compare was measured: the first of our rows beside the rival's."""
    ours = next((row for row in rows if row.system.startswith(SYSTEM)), None)
    rival = next((row for row in rows if row.system.endswith(RIVAL)), None)
    figures = []
    if ours is not None:
        shuffled = next(row for row in rows if row.system == f"{ours.system}, shuffled")
        worst = min(ours.recall, shuffled.recall)
        figures.append(Figure("S14", "share of the best 8 that a search finds, in any order", worst, 0.995))
    if ours is not None and rival is not None:
        for id, what, of, bars in (
            ("S13", "searches", "searches", (0.6, 1.0)),
            ("S16", "durable appends", "appends", (0.8, 1.6)),
        ):
            for clients, bar in zip(CLIENTS, bars, strict=True):
                mine, theirs = (getattr(row, of)[clients]["per_s"] for row in (ours, rival))
                measured = {"ours_per_s": mine, "hnsw_per_s": theirs}
                what_ = f"{what}, {_clients(clients)}, beside pgvector with {RIVAL}"
                figures.append(Figure(id, what_, mine / theirs, bar, measured=measured))
    return sorted(figures, key=lambda figure: figure.id)


def num_flushes(stats: Path = Path("/proc/diskstats")) -> int | None:
    """How often all disks have made safe what they were given, since they were started; None where nobody counts."""
    if not stats.exists():
        return None
    rows = [line.split() for line in stats.read_text().splitlines()]
    counts = [int(row[18]) for row in rows if len(row) > 18 and not row[2].startswith(("dm-", "md", "loop"))]
    return sum(counts) if counts else None


def per_append(before: int | None, after: int | None, appends: Mapping[str, Any]) -> float | None:
    """Flushes of the disk per append, in the run that the load says this of."""
    return None if before is None or after is None else (after - before) / appends["all_requests"]


def _clients(number: int) -> str:
    return f"{number} client{'s' if number > 1 else ''}"


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
