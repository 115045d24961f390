"""Which kernel a device gets."""

from __future__ import annotations

import torch

from htm_service.kernels.base import Kernel
from htm_service.kernels.blocked import BlockedKernel
from htm_service.kernels.reference import ReferenceKernel


def resolve_kernel(device: torch.device, override: str | None = None) -> Kernel:
    """The kernel for `device`; `override` names one, for tests and benchmarks. Raises KeyError."""
    if override is not None:
        kernels: dict[str, type[Kernel]] = {"reference": ReferenceKernel, "blocked": BlockedKernel}
        return kernels[override]()
    return BlockedKernel() if device.type == "cpu" else ReferenceKernel()
