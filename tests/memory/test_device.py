"""Which device is chosen."""

import pytest
import torch

from htm_service.errors import InvalidArgument
from htm_service.memory.device import choose_device


def test_bad_devices_are_refused() -> None:
    assert choose_device("cpu")[0].type == "cpu"
    assert choose_device("auto")[1].startswith("auto: ")
    with pytest.raises(InvalidArgument, match="device is 'tpu'"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidArgument, match="finds no CUDA device"):
            choose_device("cuda")
