"""Which kernel a device gets: the compiled one on a CPU, the blocked one where numba is not there."""

from __future__ import annotations

import importlib.util

import torch

from htm_service.kernels.base import Kernel
from htm_service.kernels.blocked import BlockedKernel
from htm_service.kernels.reference import ReferenceKernel

KERNELS = ("reference", "blocked", "compiled")


def resolve_kernel(device: torch.device, override: str | None = None) -> Kernel:
    """The kernel for `device`; `override` names one of KERNELS, for tests and benchmarks. Raises KeyError."""
    name = override or _default(device)
    if name == "compiled":
        # Imported here: numba takes half a second, and is not there on every platform.
        from htm_service.kernels.compiled import CompiledKernel

        return CompiledKernel()
    kernels: dict[str, type[Kernel]] = {"reference": ReferenceKernel, "blocked": BlockedKernel}
    return kernels[name]()


def _default(device: torch.device) -> str:
    if device.type != "cpu":
        return "reference"
    return "compiled" if importlib.util.find_spec("numba") is not None else "blocked"
