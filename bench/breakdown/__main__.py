"""`make bench-breakdown`: prints the tables of docs/performance.md, then one JSON line."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from bench import over_http, scene
from bench.breakdown import growth, parts, writes
from bench.breakdown.parts import Profile
from bench.figures import machine, say

NUM_SESSIONS = 16


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make bench-breakdown", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter: a look, no figure")
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        stage = scene.make_scene(Path(directory))
        tokens = scene.make_tokens(scene.LENGTH)
        with over_http.serving(stage) as port:
            say(f"{NUM_SESSIONS} sessions are filled")
            over_http.fill(port, NUM_SESSIONS, tokens, stage, tokens[:4])
            say("many attends, appends, steps")
            profiles: list[Profile] = []
            queries = torch.randn(over_http.NUM_QUERIES, scene.DIM)
            loads = {}
            for what, calls in (
                ("One attend", over_http.attends(NUM_SESSIONS, queries)[0]),
                ("One append", over_http.appends(queries)),
                ("One step", over_http.steps(NUM_SESSIONS, queries)),
            ):
                profile, loads[what] = parts.under_load(stage, port, what, calls, options.quick)
                profiles.append(profile)
            say("layers of a write, growth")
            layers = writes.layers(stage, options.quick)
            growths = [growth.over_connections(stage, port, NUM_SESSIONS, options.quick)]
        say("one attend, one append, one search")
        ones = (parts.one_attend, parts.one_append, parts.one_search)
        profiles[:0] = [one(stage, options.quick) for one in ones]
        growths = [*scene.run(growth.in_process(stage, options.quick)), *growths]
        say("searches")
        growths += scene.run(growth.of_searches(stage, options.quick))
    for each in profiles:
        print(f"{as_markdown(each)}\n")
    print(f"{layers_as_markdown(layers)}\n")
    for one in growths:
        print(f"{growth.as_markdown(one)}\n")
    conditions = {**machine(), "quick": options.quick, "seconds": round(time.perf_counter() - began)}
    found = {"profiles": profiles, "layers": layers, "loads": loads, "growths": growths}
    print(json.dumps({**conditions, **found}))


def as_markdown(profile: Profile) -> str:
    """A table with its sum."""
    lines = [f"| {profile.title} | {profile.unit} | |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {figure:,.0f} | {figure / profile.total:.0%} |" for name, figure in profile.parts]
    return "\n".join([*lines, f"| **together** | **{profile.total:,.0f}** | |"])


def layers_as_markdown(layers: list[tuple[str, float]]) -> str:
    """A table of rates, each beside the first."""
    lines = [f"| Durable appends in groups of {writes.GROUP} | per second | |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {rate:,.0f} | {rate / layers[0][1]:.2f} |" for name, rate in layers]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
