"""What the demo prints: progress, a few answers in full, then the figures of the run. Measures nothing itself.

Does not know the server or the client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.demo.agents import PASSAGES_PER_APPEND, TOP_K, Answers
from examples.demo.quality import MAX_HITS_BELOW_EXACT, MIN_FOUND, Quality
from examples.demo.questions import Question

if TYPE_CHECKING:
    from examples.demo.streaming import Loaded

NUM_EXAMPLES = 4
MIN_FOUND_BY_SEARCH = 0.98
NUM_PASSAGES = 3
WIDTH = 120
"""Where there is no terminal to ask for its width."""


@dataclass(frozen=True, slots=True)
class Load:
    """The attends of all agents together."""

    num_agents: int
    per_second: float
    p50_ms: float
    p99_ms: float
    mean_batch_size: float

    @classmethod
    def of(cls, answers: Sequence[Answers], seconds: float) -> Self:
        """Of what each agent got, all of it within `seconds`."""
        latencies_ms = [latency for answer in answers for latency in answer.latencies_ms]
        p50_ms, p99_ms = np.percentile(latencies_ms, [50, 99])
        sizes = [size for answer in answers for size in answer.batch_sizes]
        return cls(len(answers), len(latencies_ms) / seconds, float(p50_ms), float(p99_ms), float(np.mean(sizes)))


@dataclass(frozen=True, slots=True)
class Searched:
    """The searches of all agents together."""

    per_second: float
    quality: Quality

    @property
    def is_good(self) -> bool:
        """Whether they found what they promise."""
        return self.quality.found >= MIN_FOUND_BY_SEARCH


def make_console() -> Console:
    """As wide as the terminal, or WIDTH where there is none."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console


@contextmanager
def progress(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere; gives the function that moves it on."""
    columns = (TextColumn("   {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda number: bar.update(task, advance=number)


def show_loaded(console: Console, loaded: Loaded) -> None:
    """The kill and what was there after it."""
    crash = loaded.crash
    console.print(
        f"   killed with SIGKILL at {crash.num_tokens:,} acknowledged passages, "
        f"ready again on the same data after {crash.down_seconds:.1f} s"
    )
    if not crash.losses:
        console.print("   right after the restart: every acknowledged passage is there, equal to the bit")
    if not loaded.final_losses:
        console.print(f"   at the end: all {loaded.num_tokens:,} passages read back, equal to the bit, none twice")
    for loss in loaded.losses:
        console.print(f"   [red]lost[/]: {escape(loss)}")


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
    console: Console,
    info: Mapping[str, Any],
    loaded: Loaded,
    quality: Quality,
    shares: Quality,
    load: Load,
    searched: Searched,
) -> None:
    """The figures of this run on this machine."""
    table = Table(title="\nThis run, on this machine", title_justify="left", show_header=False)
    totals = info["totals"]
    table.add_row("server", f"{info['device']} ({info['device_reason']}), kernel {info['kernel']}")
    table.add_row("sessions, tokens", f"{totals['sessions']:,}, {totals['tokens']:,}")
    table.add_row("bytes of tokens; on disk", f"{totals['stored_bytes']:,}; {totals['disk_bytes']:,}")
    table.add_row(
        f"appends of {PASSAGES_PER_APPEND} passages",
        f"{loaded.num_appends:,}, {loaded.num_appends / loaded.seconds:,.0f}/s, each on disk when acknowledged"
        if loaded.num_appends
        else "none, the data was there already",
    )
    table.add_row(
        "attends",
        f"{load.per_second:,.0f}/s, {load.num_agents} agents beside the server, each one question after another",
    )
    table.add_row("latency seen by the agents", f"p50 {load.p50_ms:.1f} ms, p99 {load.p99_ms:.1f} ms")
    table.add_row("mean batch size", f"{load.mean_batch_size:.1f} queries")
    table.add_row(
        "exact search's top 10 recalled",
        f"{quality.found:.3f} in the library (top_k {TOP_K}; at least {MIN_FOUND}), {shares.found:.3f} in the shares",
    )
    table.add_row(
        "hit rate at 5",
        f"{quality.hit_rate:.3f} in the library, exact search {quality.exact_hit_rate:.3f} "
        f"(at most {MAX_HITS_BELOW_EXACT:.2f} below); "
        f"in the shares {shares.hit_rate:.3f}, exact search {shares.exact_hit_rate:.3f}",
    )
    table.add_row("searches", f"{searched.per_second:,.0f}/s, the same agents and questions")
    table.add_row(
        "exact search's top 10 found by search",
        f"{searched.quality.found:.3f} in the library (at least {MIN_FOUND_BY_SEARCH}), "
        f"hit rate at 5 {searched.quality.hit_rate:.3f}",
    )
    console.print(table)
    is_good = quality.is_good and searched.is_good and not loaded.losses
    console.print("   [green]as promised[/]" if is_good else "   [red]not as promised[/]")
