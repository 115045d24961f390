"""S14, S15, S20: what searches find, what payloads cost an attend, what sketches take; on the data of the peers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from htm_client import HTMClient
from htm_client.calls import Codec, attend_parts

from bench import over_http
from bench.figures import Figure, say
from bench.peers import htm
from bench.peers.memories import NUM_RECALLED, make_memories
from bench.processes import Call
from bench.scene import DIM, Scene

IDS = ("S14", "S15", "S20")


def measure(stage: Scene, quick: bool) -> list[Figure]:
    """All three, on a server of their own."""
    say("S14, S15, S20: memories are made")
    memories = make_memories(4_000 if quick else 20_000, DIM)
    shuffled = memories.shuffled()
    with over_http.serving(stage, data="searches") as port, HTMClient(f"http://127.0.0.1:{port}") as client:
        htm.fill(client, "ordered", memories)
        htm.fill(client, "shuffled", shuffled)
        _sketched(client, "ordered")
        _sketched(client, "shuffled")
        shares = {
            "in_order": memories.recall_of(htm.found(client, "ordered", memories)),
            "shuffled": shuffled.recall_of(htm.found(client, "shuffled", shuffled)),
        }
        num_bytes = client.info()["totals"]["device_sketch_bytes"] / (2 * len(memories.texts))
        payloads, tokens = (_attends(memories.queries, returns) for returns in ("payloads", "tokens"))
        with_payloads, without = over_http.in_turns(stage, port, payloads, tokens, 1.0 if quick else 3.0)
    measured = {"payloads_per_s": with_payloads["per_s"], "tokens_per_s": without["per_s"]}
    ratio = with_payloads["per_s"] / without["per_s"]
    return [
        Figure(
            "S14", "share of the best 8 that a search finds, in any order", min(shares.values()), 0.995, measured=shares
        ),
        Figure("S15", "attends with payloads, beside the same with tokens", ratio, 0.8, measured=measured),
        Figure("S20", "bytes of sketches per token, of D / 8 + 4", num_bytes / (DIM / 8 + 4), 1.1, at_most=True),
    ]


def _sketched(client: HTMClient, session: str) -> None:
    """Search until all sketches are made."""
    known = -1
    while (now := client.info()["totals"]["device_sketch_bytes"]) != known:
        known = now
        client.search(session, [0.0] * DIM)
        time.sleep(0.5)


def _attends(queries: Any, returns: str) -> list[Call]:
    options: Mapping[str, Any] = {"max_recalled": NUM_RECALLED, "rank_by": "score"}
    sent = [
        Codec(binary=True).attend("ordered", *attend_parts(query, returns=[returns], **options)) for query in queries
    ]
    return [(call.path, call.headers["Content-Type"], call.content or b"") for call in sent]
