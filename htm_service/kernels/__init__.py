"""The seam of the kernels: one signature, several implementations, one resolver."""

from htm_service.kernels.base import ChunkAttention, ChunkBatch, Kernel
from htm_service.kernels.resolve import resolve_kernel

__all__ = ["ChunkAttention", "ChunkBatch", "Kernel", "resolve_kernel"]
