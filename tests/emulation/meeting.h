// Where threads wait for each other: barriers and collectives, and mbarriers.
#pragma once
#include <cstdint>

namespace emulation {

/// Where threads meet: a generation ends when `size` have come. What they bring is kept until the end of the next one.
struct Meeting {
    int size = 0, arrived = 0;
    unsigned generation = 0;
    uint64_t lane[2][32];
    int count[2] = {0, 0};
    void check() {
        if (arrived < size || arrived == 0) return;
        arrived = 0;
        count[(generation + 1) & 1] = 0;
        ++generation;
    }
};

/// An mbarrier: a phase ends when all arrivals and all bytes expected have come.
struct Barrier {
    int arrivals, pending;
    int64_t bytes;
    unsigned phase;
    void check() {
        if (pending == 0 && bytes == 0) {
            ++phase;
            pending = arrivals;
        }
    }
};

}  // namespace emulation
