"""What the emulation of kernels finds: each fault of a small kernel, and none without a fault."""

from __future__ import annotations

from ctypes import c_int32, c_void_p

import numpy as np
import pytest
import reference
from emulation.arrays import Output, aligned
from emulation.emulator import HERE, EmulationError, Emulator, Launch, build, needs_compiler
from emulation.gemm_kernels import TensorMap, tensor_map
from emulation.gemm_kernels import aligned as aligned_struct
from emulation.kernels import address

K = 128 * 7
SHARED_BYTES = 4480
RowSums = aligned_struct(
    "RowSums",
    ("input", TensorMap),
    ("output", TensorMap),
    ("bias", c_void_p),
    ("k", c_int32),
    ("fault", c_int32),
)
# In the order of the kernel's numbers: what the emulation says; WRONG where the sums are wrong.
WRONG = "wrong sums"
BROKEN_RING = f"more arrivals than a barrier expects|every thread waits|{WRONG}"
FAULTS = {
    "never_arrives": "every thread waits",
    "arrives_twice": BROKEN_RING,
    "reads_unfilled_stage": BROKEN_RING,
    "releases_before_reading": WRONG,
    "releases_before_product": WRONG,
    "uses_sums_of_pending_product": WRONG,
    "reads_input_early": WRONG,
    "writes_output_early": "output was written while earlier work was not done",
    "writes_behind_shared": "bytes behind the start of shared memory, 4480 were asked for",
    "overwrites_barrier": "a barrier was overwritten",
    "leaves_neighbour": "a shared address of a CTA that has ended",
    "meets_neighbour_unstarted": "a shared address of a CTA that may not have started",
    "overwrites_staging": WRONG,
    "leaves_store": "has ended before its bulk copies out of shared memory",
    "leaves_output_unwritten": WRONG,
}

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The kernel, compiled once."""
    folder = tmp_path_factory.mktemp("emulation_faults")
    build(folder, False, ("faults",), HERE)
    return Emulator(folder, ("faults",))


def run(emulator: Emulator, fault: int) -> None:
    """Random integers, whose sums are exact in every order."""
    x = np.random.default_rng(fault).integers(-8, 9, (16, K)).astype(np.float32)
    stored, bias = aligned(reference.round_to(x.ravel(), "bfloat16")), aligned(x[:, 0])
    output = Output(16, np.float32)
    params = RowSums(
        tensor_map(stored, (64, 16, K // 64), (2, 2 * K, 128), (64, 16, 1), 2, 128),
        tensor_map(output.array, (16, 1), (4, 64), (16, 1), 4, 16),
        address(bias), K, fault,
    )  # fmt: skip
    earlier = {"inputs": [stored, bias], "outputs": [output.array]}
    emulator.launch(Launch("faults", "row_sums", 2, 160, 2, SHARED_BYTES, **earlier), params)
    if not np.array_equal(output.array, x.sum(axis=1) + x[:, 0]):
        raise EmulationError(WRONG)
    assert output.is_intact()


def test_a_right_kernel_passes(emulator):
    for _ in range(20):
        run(emulator, 0)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(emulator, fault):
    number = 1 + list(FAULTS).index(fault)
    with pytest.raises(EmulationError, match=FAULTS[fault]):
        for _ in range(10):  # some depend on the order of the threads
            run(emulator, number)
    run(emulator, 0)  # nothing is left behind
