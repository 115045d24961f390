"""The seam of the kernels: one signature, several implementations, one resolver."""

from htm_service.kernels.base import Attended, Batch, Kernel, Projections, Search, View
from htm_service.kernels.resolve import resolve_kernel

__all__ = ["Attended", "Batch", "Kernel", "Projections", "Search", "View", "resolve_kernel"]
