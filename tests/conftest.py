"""Fixtures of the whole suite: the device, fixed seeds."""

from __future__ import annotations

import pytest
import torch
from emulation.arrays import SANITIZE
from emulation.emulator import Emulator, build

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device of this machine that qbits serves."""
    return str(request.param)


@pytest.fixture(scope="module")
def emulator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The kernels of the test file's `MODULES`, compiled once for the CPU."""
    folder = tmp_path_factory.mktemp("emulation")
    build(folder, SANITIZE, request.module.MODULES)
    return Emulator(folder, request.module.MODULES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deselects, with a reason, what this machine has no GPUs for."""
    num_devices = torch.cuda.device_count()
    for item in items:
        if item.get_closest_marker("multigpu") and num_devices < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs two CUDA devices, got {num_devices}"))
        elif item.get_closest_marker("gpu") and num_devices < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
