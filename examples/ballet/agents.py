"""The agents: one encoder of what is seen, one head that picks a dancer, and between them ways to remember.

Shapes: S episodes, T steps, O numbers of an observation, D width. A reader takes a query [S, D] of the dance that is
named, and gives what the head reads. Does not know environments, servers or training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.ballet.environment import DANCE_STEPS, LOOK, MOVE, NUM_DANCES, NUM_LOOKS, NUM_MOVES, OBSERVATION
from htm_service.attention.modules import HTMBlock

DIM = 64
CHUNK_SIZE = 16
TOP_K = 4


class Encoder(nn.Module):
    """A short causal convolution: a step's token tells of that step and of the 15 before it.

    It learns by telling the moves of these steps, and who dances now, from its token: it needs no reader's gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Conv1d(OBSERVATION, 2 * DIM, DANCE_STEPS)
        self.sum_up = nn.Linear(2 * DIM, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.tell = nn.Linear(DIM, DANCE_STEPS * NUM_MOVES + NUM_LOOKS)

    def forward(self, observations: Tensor) -> Tensor:
        """Tokens [S, T, D] of observations [S, T, O]."""
        before = functional.pad(observations.transpose(1, 2), (DANCE_STEPS - 1, 0))
        tokens: Tensor = self.norm(self.sum_up(self.see(before).transpose(1, 2).relu()))
        return tokens

    def loss(self, observations: Tensor) -> Tensor:
        """How badly tokens tell what they are of."""
        moves = functional.pad(observations[..., MOVE], (0, 0, DANCE_STEPS - 1, 0)).unfold(1, DANCE_STEPS, 1)
        seen = torch.cat((moves.flatten(2), observations[..., LOOK]), dim=-1)
        return functional.binary_cross_entropy_with_logits(self.tell(self(observations)), seen)


class Agent(nn.Module):
    """`reader` remembers: called with queries [S, D] and tokens [S, T, D], it gives [S, width]."""

    def __init__(self, encoder: Encoder, reader: nn.Module, width: int = DIM) -> None:
        super().__init__()
        self.encoder = encoder
        self.ask = nn.Linear(NUM_DANCES, DIM)
        self.reader = reader
        self.head = nn.Sequential(nn.Linear(width, 2 * DIM), nn.ReLU(), nn.Linear(2 * DIM, NUM_LOOKS))

    def pick(self, read: Tensor, dancers: Tensor) -> Tensor:
        """Logits [S, looks] of what was read [S, width]; only those who danced can be picked."""
        logits: Tensor = self.head(read)
        return logits.masked_fill(~dancers, torch.finfo(logits.dtype).min)

    @property
    def reader_size(self) -> int:
        """Parameters of the reader."""
        return sum(parameter.numel() for parameter in self.reader.parameters())


def make_htm() -> HTMBlock:
    """HTM attention, with one narrow head within a chunk, so that it is the summaries that have to find the dance."""
    return HTMBlock(DIM, heads=1, topk_mems=TOP_K, mem_chunk_size=CHUNK_SIZE, dim_head=8)


class Recurrent(nn.Module):
    """A GRU over all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(DIM, 40, batch_first=True)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Its last state beside the query."""
        return torch.cat((self.gru(tokens)[1][0], queries), dim=-1)


class Mean(nn.Module):
    """The mean of all steps, through a layer as large as the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.ReLU(), nn.Linear(2 * DIM, 40))

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Beside the query."""
        return torch.cat((self.layer(tokens.mean(dim=1)), queries), dim=-1)


class Full(nn.Module):
    """Attention to every step, without chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 1, batch_first=True)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """What the query finds, and the query."""
        found: Tensor = self.attention(queries[:, None], tokens, tokens, need_weights=False)[0]
        return found[:, 0] + queries


LOCAL = {"GRU": (Recurrent, DIM + 40), "mean": (Mean, DIM + 40), "full attention": (Full, DIM)}
"""Those that remember within the process, with the width of what they give."""
