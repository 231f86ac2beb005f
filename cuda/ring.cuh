// A ring of stages in shared memory, which some warps fill and others empty.
#pragma once
#include <cstdint>

/// Position in a ring of stages; `parity` is that of the fill, a free slot has the other one.
template <int kStages>
struct Ring {
    int slot = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance(int count = 1) {
        slot += count;
        if (slot >= kStages) {
            slot -= kStages;
            parity ^= 1;
        }
    }
};
