"""`make demo`: its options, and one sentence where it cannot run. Does not know how it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    data: Annotated[
        Path | None, typer.Option(help="Directory of the demo's data; a temporary one if left out.")
    ] = None,
    embedder: Annotated[
        str | None, typer.Option(help="A sentence-transformers model; TF-IDF and SVD if left out.")
    ] = None,
    keep: Annotated[bool, typer.Option(help="Leave the server up and print the address of its page.")] = False,
    port: Annotated[int, typer.Option(help="Port of the demo's server; 0 takes a free one.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Most passages to read; all if left out.")] = None,
) -> None:
    """Show it at work: agents remember Python's own documentation and are asked about it."""
    try:
        from examples.demo.run import run_demo

        code = run_demo(data=data, embedder=embedder, keep=keep, port=port, limit=limit)
    except ModuleNotFoundError as error:
        raise SystemExit(f"the demo needs {error.name}; `make demo` installs it") from None
    except OSError as error:
        raise SystemExit(str(error)) from None
    raise typer.Exit(code or 0)


if __name__ == "__main__":
    typer.run(demo)
