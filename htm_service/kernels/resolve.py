"""Which kernel a device gets: the compiled one on a CPU, the reference where numba is not there."""

from __future__ import annotations

import importlib.util

import torch

from htm_service.kernels.base import Kernel
from htm_service.kernels.reference import ReferenceKernel

KERNELS = ("reference", "compiled")


def resolve_kernel(device: torch.device, override: str | None = None) -> Kernel:
    """The kernel for `device`; `override` names one of KERNELS, for tests and benchmarks. Raises KeyError."""
    name = override or _default(device)
    if name not in KERNELS:
        raise KeyError(name)
    if name == "reference":
        return ReferenceKernel()
    # Imported here: numba takes half a second, and is not there on every platform.
    from htm_service.kernels.compiled import CompiledKernel

    return CompiledKernel()


def _default(device: torch.device) -> str:
    has_numba = importlib.util.find_spec("numba") is not None
    return "compiled" if device.type == "cpu" and has_numba else "reference"
