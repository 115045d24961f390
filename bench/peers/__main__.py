"""`make bench-peers`: appends, searches and recall of htm-service, Chroma, PostgreSQL with pgvector, in one run."""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from bench.figures import machine, say
from bench.machine import raw_log_rate
from bench.peers import chroma, htm, postgres
from bench.peers.figures import Row, table, verdicts
from bench.peers.memories import make_memories

SYSTEMS = ("htm", "chroma", "postgres")
DIM = 512
NUM = 20_000


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make bench-peers", description=__doc__)
    parser.add_argument("--only", default=",".join(SYSTEMS), help="systems, separated by commas: htm,chroma")
    parser.add_argument("--num", type=int, default=NUM, help=f"how many memories, {NUM:,} unless told")
    parser.add_argument("--minilm", action="store_true", help="embeddings of MiniLM, of the extra `minilm`")
    parser.add_argument("--quick", action="store_true", help="4,000 tokens and single seconds: a look, no figure")
    parser.add_argument("--environment", type=Path, default=Path(".venv-peers"), help="where the peers are installed")
    options = parser.parse_args()
    wanted = options.only.lower().split(",")
    if unknown := set(wanted) - set(SYSTEMS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SYSTEMS)}")
    environment = options.environment.absolute()
    seconds = 1.0 if options.quick else 2.0
    began = time.perf_counter()
    say("memories are made")
    try:
        memories = make_memories(min(options.num, 4_000) if options.quick else options.num, DIM, minilm=options.minilm)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    rows: list[Row] = []
    not_measured: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        log_per_s = raw_log_rate(directory, [1] * 200, memories.vectors[0].nbytes)
        if "htm" in wanted:
            rows += htm.measure(memories, directory, seconds)
        for system, peer in (("chroma", chroma), ("postgres", postgres)):
            if system not in wanted:
                continue
            if reason := peer.why_not(environment):
                not_measured[system] = reason
                say(f"{system} is not measured: {reason}")
            else:
                rows += peer.measure(environment, memories, directory, seconds)
    num, dim = memories.vectors.shape
    print(f"{num:,} x {dim}, {len(memories.queries)} queries; a raw log with a sync for each record:")
    print(f"{log_per_s:,.0f} records/s\n")
    print(table(rows))
    figures = verdicts(rows)
    for figure in figures:
        print(figure.line())
    for system, reason in not_measured.items():
        print(f"{system} is not measured: {reason}")
    conditions = {
        "date": datetime.date.today().isoformat(),
        "quick": options.quick,
        "seconds": round(time.perf_counter() - began),
        "num_tokens": num,
        "dim": dim,
        "minilm": options.minilm,
        "log_per_s": log_per_s,
        "not_measured": not_measured,
    }
    print(
        json.dumps({**machine(), **conditions, "figures": list(map(asdict, figures)), "rows": list(map(asdict, rows))})
    )


if __name__ == "__main__":
    main()
