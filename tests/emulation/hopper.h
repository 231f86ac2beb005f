// What the emulated instructions of sm_90a ask of the scheduler: clusters, shared memory by address, mbarriers.
#pragma once
#include <cstdint>

namespace emulation {

/// Ends the test run with the sentence.
[[noreturn]] void fail(const char* sentence);
uint32_t cta_rank();
int cluster_size();
/// Host address of a shared address: dynamic shared memory begins at 1024, the top byte is the rank of the CTA.
uint8_t* shared_at(uint32_t address, int bytes);
void barrier_init(uint32_t barrier, int arrivals);
void barrier_arrive(uint32_t barrier, int expected_bytes);
void barrier_complete(uint32_t barrier, int bytes);
void barrier_wait(uint32_t barrier, uint32_t parity);
void named_barrier(int id, int num_threads);
void named_barrier_arrive(int id, int num_threads);
void cluster_arrive();
void cluster_wait();
/// Lets other threads run for a while.
void delay();

}  // namespace emulation

inline void __trap() { emulation::fail("trap"); }
