"""Which device the engine runs on, and why, asked once, when an engine is made; and how small tensors get there."""

from __future__ import annotations

import torch

from htm_service.errors import InvalidArgument


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """The device for `auto`, `cpu` or `cuda[:N]`, with the reason in words. Raises InvalidArgument."""
    if wanted == "cpu":
        return torch.device("cpu"), "asked for"
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"auto: {torch.cuda.get_device_name()} is there"
        build = "has no CUDA" if torch.version.cuda is None else "finds no CUDA device"
        return torch.device("cpu"), f"auto: this build of torch ({torch.__version__}) {build}"
    if wanted.split(":")[0] != "cuda":
        raise InvalidArgument(f"device is {wanted!r}, it must be auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise InvalidArgument(f"device is {wanted!r}, and torch {torch.__version__} finds no CUDA device")
    return torch.device(wanted), "asked for"


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device. A GPU copies it when its turn comes, and nobody waits for that."""
    if device.type == "cuda":  # from memory that is not page-locked, `to` returns when the stream has come so far
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
