"""The first stage: the card, the versions, and what is missing. Does not know the server."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess

import torch

NEEDED = (
    "torch", "triton", "numpy", "numba", "einops", "safetensors", "fastapi", "starlette", "uvicorn", "pydantic",
    "pydantic-settings", "orjson", "SQLAlchemy", "alembic", "typer", "platformdirs", "httptools", "httpx",
    "htm-pytorch", "pytest", "pytest-asyncio", "pytest-timeout", "hypothesis",
)  # fmt: skip
"""What the stages import; the stages that lack something fail and say so, the others go on."""


def versions() -> dict[str, str | None]:
    """The installed version of each of them, None where there is none."""
    found: dict[str, str | None] = {}
    for name in NEEDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def card() -> dict[str, object]:
    """What torch and the driver say of the GPU."""
    properties = torch.cuda.get_device_properties(0)
    found: dict[str, object] = {
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found


def main() -> None:
    """Print it, and fail where a product on the card is wrong."""
    found = versions()
    missing = sorted(name for name, version in found.items() if version is None)
    print("missing:", ", ".join(missing) or "nothing")
    one = torch.arange(6.0, device="cuda").view(2, 3)
    assert (one @ one.T).tolist() == [[5.0, 14.0], [14.0, 50.0]]
    print(json.dumps({**card(), "python": platform.python_version(), "versions": found, "missing": missing}))


if __name__ == "__main__":
    main()
