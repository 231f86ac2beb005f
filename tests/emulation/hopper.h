// What the emulated instructions of sm_90a ask of the scheduler: clusters, shared memory by address, mbarriers, copies
// and products under way; and what a launch is.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <vector>

namespace emulation {

struct Range {
    uint8_t* data;
    size_t size;
};

/// Mirrored by emulator.py.
struct Launch {
    void* kernel;
    void (*poison)();  // overwrites the static shared memory of the kernel's module
    const void* params;
    uint32_t params_bytes, params_alignment;
    uint32_t grid_x, grid_y, threads, cluster, shared_bytes;
    // Of a dependent launch: memory that earlier work still writes, and what it may still read.
    int32_t num_inputs, num_outputs;
    Range inputs[8], outputs[4];
};

/// Ends the launch with the sentence.
[[noreturn]] void fail(const char* sentence);
uint32_t cta_rank();
int cluster_size();
/// Host address of a shared address: dynamic shared memory begins at 1024, the top byte is the rank of the CTA.
uint8_t* shared_at(uint32_t address, int bytes);
void barrier_init(uint32_t barrier, int arrivals);
void barrier_arrive(uint32_t barrier, int expected_bytes);
void barrier_complete(uint32_t barrier, int bytes);
bool barrier_is_done(uint32_t barrier, uint32_t parity);
void barrier_wait(uint32_t barrier, uint32_t parity);
void named_barrier_arrive(int id, int num_threads, bool waits);
void cluster_arrive();
void cluster_wait();
/// Runs a copy at some time from now on.
void copy_later(std::function<void()> run, bool is_store);
/// Until this thread's copies out of shared memory are done.
void await_stores();
void await_earlier_work();
/// Lets other threads run for a while.
void delay();

/// Products that this thread has issued: those of the group that is open, then the groups that may be under way.
struct Wgmmas {
    std::vector<std::function<void()>> open;
    std::deque<std::vector<std::function<void()>>> committed;
    unsigned num_groups = 0;
};
Wgmmas& wgmmas();

}  // namespace emulation

inline void __trap() { emulation::fail("trap"); }
