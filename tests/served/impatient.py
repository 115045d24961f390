"""The server, with little patience: what takes it half a minute takes this one a second."""

from __future__ import annotations

from collections.abc import Sequence

from api import cli, protocol, serving


def main(arguments: Sequence[str] | None = None) -> None:
    protocol.MAX_SILENCE_S = protocol.MAX_HEAD_S = 1.0
    serving.LOOK_AT_CONNECTIONS_EVERY = 2
    cli.main(arguments)


if __name__ == "__main__":
    main()
