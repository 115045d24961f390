"""What the demo prints: a few answers in full, then the figures of the run. Measures nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from api.demo.agents import TOP_K, Answers
from api.demo.quality import MAX_HITS_BELOW_EXACT, MIN_FOUND, Quality
from api.demo.questions import Question

if TYPE_CHECKING:
    from api.demo.run import Loaded

NUM_EXAMPLES = 4
NUM_PASSAGES = 3


def show_examples(console: Console, questions: Sequence[Question], answers: Answers) -> None:
    """Some questions with the passages that were recalled for them."""
    step = max(1, len(questions) // NUM_EXAMPLES)
    for place in range(0, len(questions), step)[:NUM_EXAMPLES]:
        console.print(f"\n   [bold cyan]{questions[place].text}[/]")
        for token in answers.recalled[place][:NUM_PASSAGES]:
            payload: Mapping[str, Any] = token.payload or {}
            where = f"{payload.get('module')}:{payload.get('line')}"
            text = str(payload.get("text", ""))
            shown = text if len(text) <= 90 else f"{text[:90]}..."
            console.print(
                f"   score {token.score:6.2f}  weight {token.weight:.4f}  [green]{where:<28}[/] {escape(shown)}",
                soft_wrap=True,
                highlight=False,
            )


def show_summary(
    console: Console, info: Mapping[str, Any], loaded: Loaded, quality: Quality, shares: Quality, load: Answers
) -> None:
    """The figures of this run on this machine."""
    table = Table(title="\nThis run, on this machine", title_justify="left", show_header=False)
    totals = info["totals"]
    table.add_row("server", f"{info['device']} ({info['device_reason']}), kernel {info['kernel']}")
    table.add_row("sessions, tokens", f"{totals['sessions']:,}, {totals['tokens']:,}")
    table.add_row("bytes of tokens; on disk", f"{totals['stored_bytes']:,}; {totals['disk_bytes']:,}")
    table.add_row(
        "streamed", f"{loaded.num_appends / loaded.seconds:,.0f} appends/s with a kill and a restart in between"
    )
    table.add_row("attends", f"{len(load.latencies_ms) / load.seconds:,.0f}/s, all asked at the same time")
    p50, p99 = np.percentile(load.latencies_ms, [50, 99])
    table.add_row("latency in that crowd", f"p50 {p50:.0f} ms, p99 {p99:.0f} ms")
    table.add_row("mean batch size", f"{np.mean(load.batch_sizes):.1f} queries")
    table.add_row(
        f"exact search's top 10 found (top_k {TOP_K})",
        f"{quality.found:.3f} in the library, bar {MIN_FOUND}; {shares.found:.3f} in the shares",
    )
    table.add_row(
        "hit rate at 5",
        f"{quality.hit_rate:.3f}, exact search {quality.exact_hit_rate:.3f}, bar {MAX_HITS_BELOW_EXACT:.0%} below it; "
        f"in the shares {shares.hit_rate:.3f} and {shares.exact_hit_rate:.3f}",
    )
    console.print(table)
    console.print("   [green]as promised[/]" if quality.is_good else "   [red]below the bar[/]")
