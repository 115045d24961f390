"""Which kernel a device gets: the compiled one on a CPU, Triton's on a GPU, the reference where that cannot run."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import sysconfig
from pathlib import Path

import torch

from htm_service.kernels.base import Kernel
from htm_service.kernels.compilation import Compilation, use_cache
from htm_service.kernels.reference import ReferenceKernel
from htm_service.kernels.search.base import SearchKernel
from htm_service.kernels.search.reference import ReferenceSearch

KERNELS = ("reference", "compiled", "triton")
OLDEST_TRITON = "3.5"
"""Older ones do not compile products as small as a single head's."""
OLDEST_CAPABILITY = (8, 0)
"""NVIDIA GPUs before this are not Triton's."""


def resolve_kernel(device: torch.device, override: str | None = None) -> Kernel:
    """The kernel for `device`; `override` names one of KERNELS, for tests and benchmarks. Raises KeyError."""
    name = override or _default(device)
    if name not in KERNELS:
        raise KeyError(name)
    # Imported here: numba and triton take long, and are not there on every platform.
    if name == "compiled":
        from htm_service.kernels.compiled import CompiledKernel

        return CompiledKernel()
    if name == "triton":
        from htm_service.kernels.triton_gpu import TritonKernel

        return TritonKernel(device)
    return ReferenceKernel()


def resolve_for_start(device: torch.device, cache: Path | None) -> tuple[Kernel, Compilation | None]:
    """The kernel that serves at once, and, where that is not the best for `device`, how the best one comes."""
    name = _default(device)
    if name != "compiled" or cache is None:
        return resolve_kernel(device, name), None
    compilation = Compilation(cache)
    if not compilation.is_done:
        compilation.prepare()
        return ReferenceKernel(), compilation
    use_cache(compilation.folder)
    return resolve_kernel(device, name), None


def search_kernel(kernel: Kernel) -> SearchKernel:
    """What searches where `kernel` attends: on a GPU torch, which reads all resident pages as fast as they can be."""
    if kernel.name != "compiled":
        return ReferenceSearch()
    from htm_service.kernels.compiled import CompiledKernel
    from htm_service.kernels.search.compiled import CompiledSearch

    assert isinstance(kernel, CompiledKernel)
    return CompiledSearch(kernel)


def _default(device: torch.device) -> str:
    if device.type == "cpu":
        return "compiled" if importlib.util.find_spec("numba") is not None else "reference"
    if reason := why_not_triton(device):
        logging.getLogger(__name__).warning("%s gets the reference kernel, which is slow: %s", device, reason)
        return "reference"
    return "triton"


def why_not_triton(device: torch.device) -> str | None:
    """What keeps Triton's kernel from running on a GPU, in words; None when nothing does."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < tuple(map(int, OLDEST_TRITON.split("."))):
        return f"triton is {triton.__version__}, and {OLDEST_TRITON} is the oldest that serves"
    if torch.version.cuda is not None and (capability := torch.cuda.get_device_capability(device)) < OLDEST_CAPABILITY:
        return f"the GPU's compute capability is {capability}, and {OLDEST_CAPABILITY} the least that serves"
    has_compiler = shutil.which("gcc") or shutil.which("clang")
    if not has_compiler or not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "triton needs gcc or clang and Python's headers, to compile what launches its kernels"
    return None
