"""`make bench`: S1 to S12, S14, S15, S17 to S22, A1, and C1 and C2 of the client, each beside its bar."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from bench import branches, client, costs, in_process, lockstep, over_http, searches, starting, swaps
from bench.figures import Figure, print_figures, say
from bench.scene import DIM, make_scene, run

OVER_HTTP = ("S1", "S2", "S3", "S8", "S9")
CLIENT = ("C1", "C2")
COSTS = ("S21", "A1")
ALL = (*(f"S{number}" for number in (*range(1, 13), 14, 15, *range(17, 23))), "A1", *CLIENT)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--only", default=",".join(ALL), help="ids, separated by commas: S1,S4")
    parser.add_argument("--quick", action="store_true", help="smaller and shorter, under 2 minutes: a look, no figure")
    parser.add_argument("--sessions", type=int, default=64, help="sessions of S1 to S3")
    options = parser.parse_args()
    wanted = options.only.upper().split(",")
    if unknown := set(wanted) - set(ALL):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    sessions = min(options.sessions, 8) if options.quick else options.sessions
    began = time.perf_counter()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as directory:
        stage = make_scene(Path(directory))
        if set(OVER_HTTP).intersection(wanted):
            say("over HTTP")
            figures += over_http.measure(stage, options.quick, sessions, wanted)
        if set(searches.IDS).intersection(wanted):
            figures += [one for one in searches.measure(stage, options.quick) if one.id in wanted]
        if "S17" in wanted:
            figures.append(lockstep.measure(stage, options.quick))
        if "S19" in wanted:
            say("S19")
            figures.append(swaps.measure(stage, options.quick))
        for id, cost in zip(COSTS, (costs.guarded, costs.accounts), strict=True):
            if id in wanted:
                say(id)
                queries = torch.randn(over_http.NUM_QUERIES, DIM, generator=torch.Generator().manual_seed(2))
                figures.append(cost(stage, 2 if options.quick else 8, queries, 4.0 if options.quick else 40.0))
        if set(CLIENT).intersection(wanted):
            figures += client.measure(stage, options.quick, wanted)
        for id, case in (
            ("S4", in_process.attends_many),
            ("S5", in_process.attends_long),
            ("S6", in_process.attends_batch),
            ("S7", in_process.appends),
            ("S11", in_process.latency),
            ("S18", branches.forks),
        ):
            if id in wanted:
                say(id)
                figures.append(run(case(stage, options.quick)))
        if {"S10", "S12"}.intersection(wanted):
            say("S10, S12")
            found = run(in_process.restore(stage, options.quick))
            figures += [figure for figure in found if figure.id in wanted]
    if "S22" in wanted:
        figures += starting.measure(options.quick)
    figures.sort(key=lambda figure: ALL.index(figure.id))
    print_figures(figures, quick=options.quick, sessions=sessions, seconds=round(time.perf_counter() - began))


if __name__ == "__main__":
    main()
