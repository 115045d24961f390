"""A learner's memory: HTM attention with weights of one's own over memories that a server keeps; needs PyTorch.

The server is told what a query looks for among the summary keys, and answers which chunks that takes, and their tokens.
All else is computed here, by the module itself, so every gradient is the module's own. Does not know how weights are
trained, nor how memories came to be where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from htm_client.client import HTMClient
from htm_client.errors import InvalidArgument
from htm_client.results import Selected

MAX_CONNECTIONS = 8
"""That one forward uses at once."""

_NEEDED = ("to_summary_queries", "to_summary_keys", "scale", "topk_mems", "mem_chunk_size")


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
        `HTMClient.select` raises.
        """
        if queries.ndim != 3 or len(queries) != len(sessions):
            wanted = f"for {len(sessions)} sessions it must be [{len(sessions)}, Q, D]"
            raise InvalidArgument(f"queries has shape {list(queries.shape)}; {wanted}")
        asked: Tensor = self.attention.norm(queries) if self._is_block else queries  # type: ignore[operator]
        options = _options(len(sessions), start=start, stop=stop, mask=mask, chunk_mask=chunk_mask)
        if episodes is not None:
            options = [{**one, "episodes": episodes} for one in options]
        memories, visible = self._gather(self._select(asked, sessions, options), asked)
        output = self._attend(asked, memories, visible)
        return output + asked if self._is_block else output

    def _select(self, queries: Tensor, sessions: Sequence[str], options: Sequence[Mapping[str, Any]]) -> list[Selected]:
        """What each session's queries take: the one place that asks the server."""
        htm = self._htm
        with (
            torch.no_grad()
        ):  # the summary keys' projection, folded into the query; its bias is the same for all chunks
            in_key_space = htm.to_summary_queries(queries) @ htm.to_summary_keys.weight * htm.scale
        rows = in_key_space.float().numpy(force=True)

        def select(at: int) -> Selected:
            return self.client.select(sessions[at], rows[at], top_k=htm.topk_mems, **options[at])

        if len(sessions) == 1:
            return [select(0)]
        with ThreadPoolExecutor(min(len(sessions), MAX_CONNECTIONS)) as pool:
            return list(pool.map(select, range(len(sessions))))

    def _gather(self, found: Sequence[Selected], queries: Tensor) -> tuple[Tensor, Tensor]:
        """For each query its own chunks, [S, Q, K, C, D] in the queries' dtype, and what is visible, [S, Q, K, C]."""
        num_sessions, num_queries, dim = queries.shape
        size, top_k = self._htm.mem_chunk_size, self._htm.topk_mems
        memories = np.zeros((num_sessions, num_queries, top_k, size, dim), np.float32)
        visible = np.zeros(memories.shape[:-1], np.bool_)
        for at, one in enumerate(found):
            index, unique, tokens, shown = one.chunk_index, one.unique_index, one.unique_tokens, one.unique_visible
            assert index is not None and unique is not None and tokens is not None and shown is not None
            if tokens.shape[1] != size:
                raise InvalidArgument(
                    f"the session's chunks have {tokens.shape[1]} tokens, the attention's {size}: they must be the same"
                )
            of_query, rank = np.nonzero(index >= 0)
            place = np.searchsorted(unique, index[of_query, rank])
            memories[at, of_query, rank] = tokens[place]
            visible[at, of_query, rank] = shown[place]
        device = queries.device
        return torch.from_numpy(memories).to(device, queries.dtype), torch.from_numpy(visible).to(device)

    def _attend(self, queries: Tensor, memories: Tensor, visible: Tensor) -> Tensor:
        """The attention over the chunks taken, each query over its own, so that it takes them all; [S, Q, D]."""
        rows = memories.flatten(0, 1).flatten(1, 2)  # [S Q, K C, D]
        mask = None if bool(visible.all()) else visible.flatten(0, 1).flatten(1, 2)  # [S Q, K C]
        output: Tensor = self._htm(queries.flatten(0, 1)[:, None], rows, mask=mask)  # [S Q, 1, D]
        sees_nothing = ~visible.flatten(2).any(dim=-1)  # [S, Q]; for these htm-pytorch has a mean of what is hidden
        return output.view(queries.shape).masked_fill(sees_nothing[..., None], 0.0)


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
