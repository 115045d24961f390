"""The engine's configuration as one frozen record. Does not know where the values come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from htm_service.records import DType

MAX_DIM = 65_536
MAX_CHUNK_SIZE = 1_024
MAX_TOP_K = 256
MAX_QUERIES = 4_096
"""Queries of one attend."""
MAX_SESSIONS = 4_096
"""Of one lock-step batch."""
MAX_RECALLED = 1_024
"""Tokens per query that one attend lists."""
MAX_FOUND = 1_000
"""Tokens that a search answers for each query."""
MAX_OVERSAMPLE = 100
MAX_SEARCHED = 4_096
"""Sessions of one search."""
MAX_RANKED = 10_000
"""Chunks that one explanation lists."""
MAX_SELECTED_CHUNKS = 4_096
"""That one select answers with their keys or tokens."""
MAX_SELECTED_BYTES = 256 << 20
"""Of one select's answer."""
MAX_NOTE_CHARS = 1_000
MAX_BINS = 4_096
"""Runs of chunks in one heat strip."""
MAX_LABELS = 64
MAX_LABEL_CHARS = 256
MAX_MODELS = 100
"""Of one namespace: all of them stay loaded."""
DEFAULT_CHUNK_SIZE = 32
NAME_PATTERN = "[A-Za-z0-9._~-]{1,128}"
"""Of session ids and of models' names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How one engine runs."""

    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    dtype: DType = "float32"
    """Of sessions that do not name one."""
    memory_budget_bytes: int = 4 << 30
    """Of the arenas and the summary keys together, on the device."""
    max_waiting: int = 4_096
    """Requests that may wait for the device, and as many for the store; one more is refused."""
    max_batch_products: int = 512 << 20
    """Multiply-adds of one batch: about 20 ms on a core. A request with more is done in several parts."""
    max_answer_bytes: int = 64 << 20
    """Of tensors, payloads and recalled tokens in one answer."""
    default_timeout_s: float = 30.0
    oversample: int = 4
    """Tokens that a search scores for each that is wanted, by their sketches, before those that may be better."""
    payload_cache_bytes: int = 256 << 20
    """Of payloads in host memory, those that came last."""
    recalls_per_session: int = 64
    max_recall_bytes: int = 256 << 20
    """Of all sessions' recalls in host memory: beyond it those of sessions used longest ago are forgotten."""
    create_on_append: bool = False
    models_dir: Path | None = None
    kernel_cache: Path | None = None
    """Where the compiled kernel is kept, so that no start waits for it; None: a start waits until it is ready."""
    retrieval_summary_scale: float = 20.0
    retrieval_attention_scale: float = 20.0
    stuck_s: float = 120.0
    """A thread that is at one batch, or one piece of a load, for longer counts as stuck."""
    expiry_interval_s: float = 15.0
    """How often sessions past their `ttl_s` are looked for."""
    max_write_group_bytes: int = 16 << 20
    """Bytes of tokens that share one transaction; one append with more is a group of its own."""
