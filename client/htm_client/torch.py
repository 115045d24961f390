"""A learner's memory: HTM attention with weights of one's own over memories that a server keeps; needs PyTorch.

The server is told what a query looks for among the summary keys, and answers which chunks that takes, and their tokens.
All else is computed here, by the module itself, so every gradient is the module's own. Does not know how weights are
trained, nor how memories came to be where they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from htm_client.batches import MAX_SESSIONS
from htm_client.client import HTMClient
from htm_client.errors import InvalidArgument
from htm_client.results import BatchSelected, Ints

MAX_CONNECTIONS = 8
"""That one forward uses at once."""

MAX_CHUNKS, MAX_BYTES = 4_096, 16 << 20
"""Of one answer: as many chunks as the server allows, and fewer bytes: several at once are there before a large one."""

_NEEDED = ("to_summary_queries", "to_summary_keys", "scale", "topk_mems", "mem_chunk_size")


class _Ask(NamedTuple):
    """One request: its sessions, their places among all, and what they may see."""

    places: list[int]
    sessions: list[str]
    options: dict[str, Any]


class RemoteHTMAttention(nn.Module):
    """An `HTMAttention` or `HTMBlock`, of htm_service or of htm-pytorch, over the sessions of a server.

    `attention` is trained as ever: its parameters are this module's. Memories get no gradient, as in the paper. Raises
    TypeError for another kind of module.
    """

    def __init__(self, client: HTMClient, attention: nn.Module) -> None:
        super().__init__()
        self.client = client
        self.attention = attention
        missing = [name for name in _NEEDED if not hasattr(self._htm, name)]
        if missing:
            raise TypeError(f"{type(attention).__name__} is no HTMAttention or HTMBlock: it has no {missing[0]}")

    @property
    def _htm(self) -> Any:
        """The attention itself, without a block's norm and residual."""
        return self.attention.attn if self._is_block else self.attention

    @property
    def _is_block(self) -> bool:
        return hasattr(self.attention, "norm")

    def forward(
        self,
        queries: Tensor,
        sessions: Sequence[str],
        *,
        start: int | Sequence[int] | None = None,
        stop: int | Sequence[int] | None = None,
        episodes: Sequence[int] | None = None,
        mask: Sequence[Any] | None = None,
        chunk_mask: Sequence[Any] | None = None,
    ) -> Tensor:
        """Attend `queries` [S, Q, D] to S `sessions`, one row of queries to each; returns [S, Q, D].

        What is visible, as in an attend: `start` and `stop` for all or one for each session, `episodes` for all, and
        for each session (n tokens, M chunks) its `mask` [n] and `chunk_mask` [M] or [Q, M], or None. A query that sees
        nothing gets zero, in a block itself, normed. Raises InvalidArgument for shapes that do not fit, and what
        `HTMClient.select` raises, for the first session that fails.
        """
        if queries.ndim != 3 or len(queries) != len(sessions):
            wanted = f"for {len(sessions)} sessions it must be [{len(sessions)}, Q, D]"
            raise InvalidArgument(f"queries has shape {list(queries.shape)}; {wanted}")
        asked: Tensor = self.attention.norm(queries) if self._is_block else queries  # type: ignore[operator]
        options = _options(len(sessions), start=start, stop=stop, mask=mask, chunk_mask=chunk_mask)
        asks = _asks(sessions, options, self._max_together(asked))
        if episodes is not None:
            asks = [ask._replace(options={**ask.options, "episodes": episodes}) for ask in asks]
        memories, visible = self._gather(asks, self._select(asked, asks), asked)
        output = self._attend(asked, memories, visible)
        return output + asked if self._is_block else output

    def _max_together(self, queries: Tensor) -> int:
        """Sessions whose chunks fit into one answer, should each query take others."""
        num_chunks: int = queries.shape[1] * self._htm.topk_mems
        num_bytes: int = num_chunks * self._htm.mem_chunk_size * queries.shape[2] * 4
        return max(1, min(MAX_SESSIONS, MAX_CHUNKS // max(1, num_chunks), MAX_BYTES // max(1, num_bytes)))

    def _select(self, queries: Tensor, asks: Sequence[_Ask]) -> list[BatchSelected]:
        """What the queries of each request take: the one place that asks the server."""
        htm = self._htm
        with (
            torch.no_grad()
        ):  # the summary keys' projection, folded into the query; its bias is the same for all chunks
            in_key_space = htm.to_summary_queries(queries) @ htm.to_summary_keys.weight * htm.scale
        rows = in_key_space.float().numpy(force=True)

        def select(ask: _Ask) -> BatchSelected:
            return self.client.batch_select(
                ask.sessions,
                rows[ask.places],
                errors="return",
                top_k=htm.topk_mems,
                returns=["chunks", "tokens"],
                **ask.options,
            )

        if len(asks) <= 1:
            found = list(map(select, asks))
        else:
            with ThreadPoolExecutor(min(len(asks), MAX_CONNECTIONS)) as pool:
                found = list(pool.map(select, asks))
        for one in found:
            if one.errors:
                raise one.errors[0].error
        return found

    def _gather(self, asks: Sequence[_Ask], found: Sequence[BatchSelected], queries: Tensor) -> tuple[Tensor, Tensor]:
        """For each query its own chunks, [S, Q, K, C, D] in the queries' dtype, and what is visible, [S, Q, K, C]."""
        num_sessions, num_queries, dim = queries.shape
        size, top_k = self._htm.mem_chunk_size, self._htm.topk_mems
        memories = np.zeros((num_sessions, num_queries, top_k, size, dim), np.float32)
        visible = np.zeros(memories.shape[:-1], np.bool_)
        for ask, one in zip(asks, found, strict=True):
            index, unique, tokens, shown = one.chunk_index, one.unique_index, one.unique_tokens, one.unique_visible
            assert index is not None and unique is not None and tokens is not None and shown is not None
            assert one.chunk_size is not None
            for session, chunk_size in zip(ask.sessions, one.chunk_size.tolist(), strict=True):
                if chunk_size != size:
                    found_size = f"the chunks of session {session!r} have {chunk_size} tokens, the attention's {size}"
                    raise InvalidArgument(f"{found_size}: they must be the same")
            item, of_query, rank = np.nonzero(index >= 0)
            place = _places(unique, item, index[item, of_query, rank])
            of_session = np.array(ask.places)[item]
            memories[of_session, of_query, rank] = tokens[item, place]
            visible[of_session, of_query, rank] = shown[item, place]
        device = queries.device
        return torch.from_numpy(memories).to(device, queries.dtype), torch.from_numpy(visible).to(device)

    def _attend(self, queries: Tensor, memories: Tensor, visible: Tensor) -> Tensor:
        """The attention over the chunks taken, each query over its own, so that it takes them all; [S, Q, D]."""
        rows = memories.flatten(0, 1).flatten(1, 2)  # [S Q, K C, D]
        mask = None if bool(visible.all()) else visible.flatten(0, 1).flatten(1, 2)  # [S Q, K C]
        output: Tensor = self._htm(queries.flatten(0, 1)[:, None], rows, mask=mask)  # [S Q, 1, D]
        sees_nothing = ~visible.flatten(2).any(dim=-1)  # [S, Q]; for these htm-pytorch has a mean of what is hidden
        return output.view(queries.shape).masked_fill(sees_nothing[..., None], 0.0)


def _places(unique: Ints, item: Ints, index: Ints) -> Ints:
    """Where the chunks `index` [N] of the items [N] are in those items' rows of `unique` [S, U], which end with -1."""
    width = int(unique.max(initial=0)) + 1  # so that an item's chunks are numbers of their own, and all ascend
    numbers = np.where(unique < 0, width, unique) + np.arange(len(unique))[:, None] * (width + 1)
    found: Ints = np.searchsorted(numbers.ravel(), index + item * (width + 1)) - item * unique.shape[1]
    return found


def _asks(sessions: Sequence[str], options: Sequence[Mapping[str, Any]], max_together: int) -> list[_Ask]:
    """The requests that ask all sessions: those whose masks have one shape together, at most so many."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for at, one in enumerate(options):
        alike[tuple((name, np.shape(one[name])) for name in ("mask", "chunk_mask") if name in one)].append(at)
    parts = [places[at : at + max_together] for places in alike.values() for at in range(0, len(places), max_together)]
    return [
        _Ask(places, [sessions[at] for at in places], _together([options[at] for at in places])) for places in parts
    ]


def _together(options: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of several selects as those of one request, with the sessions in front."""
    fields: dict[str, Any] = {}
    for name in {name for one in options for name in one}:
        values = [one.get(name) for one in options]
        if name == "stop":
            fields[name] = [None if stop is None else [stop] for stop in values]
        elif name in ("mask", "chunk_mask"):
            fields[name] = np.array(values, np.bool_)
        else:
            fields[name] = values
    return fields


def _options(num_sessions: int, **fields: Any) -> list[dict[str, Any]]:
    """The fields of each session's select. Raises InvalidArgument for one that is of another number of sessions."""
    options: list[dict[str, Any]] = [{} for _ in range(num_sessions)]
    for name, value in fields.items():
        if value is None:
            continue
        values = [value] * num_sessions if isinstance(value, int) else value
        if len(values) != num_sessions:
            raise InvalidArgument(f"{name} is for {len(values)} sessions, there are {num_sessions}")
        for one, of_session in zip(options, values, strict=True):
            if of_session is not None:
                one[name] = of_session
    return options
