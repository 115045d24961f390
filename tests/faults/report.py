"""What the fault tests count, as a table and one line of JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Tally:
    """Counted by one test; `figures` are measurements of its own."""

    test: str
    rounds: int = 0
    faults: int = 0
    requests: int = 0
    losses: int = 0
    """What was acknowledged and is not there, callers without an answer, answers that are wrong."""
    figures: dict[str, float] = field(default_factory=dict)
    outcome: str = "not run"
    seconds: float = 0.0

    @property
    def id(self) -> str:
        """R1 to R16, which the test's name begins with."""
        found = re.match(r"test_(r\d+)_", self.test)
        assert found is not None, f"{self.test} does not begin with the number of a fault"
        return found[1].upper()


def table(tallies: Sequence[Tally]) -> str:
    """A line for each test."""
    rows: list[tuple[str, ...]] = [
        ("id", "test", "rounds", "faults", "requests", "losses", "seconds", "outcome, figures")
    ]
    for tally in tallies:
        counts = (tally.rounds, tally.faults, tally.requests, tally.losses)
        figures = ", ".join(f"{name} {value:g}" for name, value in tally.figures.items())
        name = tally.test.removeprefix(f"test_{tally.id.lower()}_").replace("_", " ")
        rows.append((tally.id, name, *map(str, counts), f"{tally.seconds:.1f}", f"{tally.outcome} {figures}".strip()))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 2 <= place <= 6 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def json_line(tallies: Sequence[Tally]) -> str:
    """All of it as JSON."""
    return json.dumps(
        [
            {
                "id": tally.id,
                "test": tally.test,
                "rounds": tally.rounds,
                "faults": tally.faults,
                "requests": tally.requests,
                "losses": tally.losses,
                "seconds": round(tally.seconds, 1),
                "outcome": tally.outcome,
                **tally.figures,
            }
            for tally in tallies
        ]
    )
