"""Which kernel a device gets."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from htm_service.kernels import resolve


@pytest.mark.parametrize(
    ("is_there", "version", "capability", "compiler", "reason"),
    [
        (True, "3.7.1", (8, 0), "/usr/bin/cc", None),
        (False, "", (9, 0), "/usr/bin/cc", "not installed"),
        (True, "3.4.0", (9, 0), "/usr/bin/cc", "3.5 is the oldest"),
        (True, "3.10.0", (7, 5), "/usr/bin/cc", r"capability is \(7, 5\)"),
        (True, "3.7.1", (9, 0), None, "needs gcc or clang"),
    ],
)
def test_a_gpu_gets_triton_where_that_can_run(
    is_there: bool,
    version: str,
    capability: tuple[int, int],
    compiler: str | None,
    reason: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "triton" if is_there else None)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("shutil.which", lambda name: compiler)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    device = torch.device("cuda")
    if reason is None:
        assert resolve.why_not_triton(device) is None
    else:
        assert resolve.resolve_kernel(device).name == "reference"
        assert re.search(f"cuda gets the reference kernel.* {reason}", caplog.text)


def test_a_gpu_s_kernel_is_triton_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "why_not_triton", lambda device: None)
    if find_spec("triton") is not None:
        assert resolve.resolve_kernel(torch.device("cuda")).name == "triton"
    with pytest.raises(KeyError):
        resolve.resolve_kernel(torch.device("cuda"), "tpu")
