// Runs a kernel CTA by CTA. The order of the threads is shuffled anew in every round, so that a missing barrier shows as a
// wrong result.
#include <ucontext.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <vector>
#include "emulation.h"

namespace {

constexpr size_t kStackBytes = 1 << 17;

/// Where threads meet: a generation ends when `size` have come. What they bring is kept until the end of the next one.
struct Meeting {
    int size = 0, arrived = 0;
    unsigned generation = 0;
    uint64_t lane[2][32];
    int count[2] = {0, 0};
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    const Meeting* waits_at = nullptr;
    unsigned generation = 0;  // that it waits for the end of
    bool done = false;
};

struct Cta {
    std::vector<Thread> threads;
    std::vector<Meeting> warps;
    Meeting all;
    ucontext_t scheduler;
    unsigned current = 0, block = 0, grid = 0;
    std::function<void()> kernel;
    std::mt19937 random{12345};
};
Cta cta;

/// The parity of the generation that has ended.
unsigned meet(Meeting& meeting) {
    const unsigned generation = meeting.generation;
    if (++meeting.arrived == meeting.size) {
        meeting.arrived = 0;
        meeting.count[(generation + 1) & 1] = 0;
        ++meeting.generation;
    } else {
        Thread& self = cta.threads[cta.current];
        self.waits_at = &meeting;
        self.generation = generation;
        swapcontext(&self.context, &cta.scheduler);
    }
    return generation & 1;
}

void run_thread() {
    cta.kernel();
    cta.threads[cta.current].done = true;
    swapcontext(&cta.threads[cta.current].context, &cta.scheduler);
}

void start(Thread& thread) {
    thread.waits_at = nullptr;
    thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
}

void run_cta() {
    const unsigned num = unsigned(cta.threads.size());
    for (Meeting& warp : cta.warps) warp = {.size = 32};
    cta.all = {.size = int(num)};
    std::vector<unsigned> order(num);
    for (unsigned t = 0; t < num; ++t) {
        order[t] = t;
        start(cta.threads[t]);
    }
    while (!order.empty()) {
        std::shuffle(order.begin(), order.end(), cta.random);
        bool progress = false;
        for (unsigned t : order) {
            Thread& thread = cta.threads[t];
            if (thread.waits_at && thread.waits_at->generation == thread.generation) continue;
            thread.waits_at = nullptr;
            progress = true;
            cta.current = t;
            swapcontext(&cta.scheduler, &thread.context);
        }
        std::erase_if(order, [](unsigned t) { return cta.threads[t].done; });
        if (!progress) {
            std::fprintf(stderr, "block %u: %zu threads wait for others that have left\n", cta.block, order.size());
            std::abort();
        }
    }
}

template <int kWords>
struct Params {
    uint64_t word[kWords];
};
/// A call with a struct of kWords words by value: above 16 bytes the System V ABI passes every struct alike, in memory.
template <int kWords>
std::function<void()> bind(void* kernel, const void* params) {
    static_assert(kWords > 2, "smaller structs travel in registers");
    Params<kWords> copy;
    std::memcpy(&copy, params, sizeof copy);
    return [=] { reinterpret_cast<void (*)(Params<kWords>)>(kernel)(copy); };
}

}  // namespace

namespace emulation {

Index thread_index() {
    return {cta.current};
}
Index block_index() {
    return {cta.block};
}
Index grid_size() {
    return {cta.grid};
}
Index cta_size() {
    return {unsigned(cta.threads.size())};
}
const uint64_t* exchange(uint64_t value) {
    Meeting& warp = cta.warps[cta.current / 32];
    warp.lane[warp.generation & 1][cta.current % 32] = value;
    return warp.lane[meet(warp)];
}
int count_over_cta(bool value) {
    cta.all.count[cta.all.generation & 1] += value;
    return cta.all.count[meet(cta.all)];
}

}  // namespace emulation

/// Launches `kernel` of a module whose shared memory `poison` overwrites. False for a size of params that no kernel has.
extern "C" bool launch(void* kernel, void (*poison)(), const void* params, int params_bytes, unsigned grid, int threads) {
    switch (params_bytes) {
        case 24: cta.kernel = bind<3>(kernel, params); break;
        case 32: cta.kernel = bind<4>(kernel, params); break;
        case 40: cta.kernel = bind<5>(kernel, params); break;
        case 48: cta.kernel = bind<6>(kernel, params); break;
        case 56: cta.kernel = bind<7>(kernel, params); break;
        case 64: cta.kernel = bind<8>(kernel, params); break;
        case 112: cta.kernel = bind<14>(kernel, params); break;
        default: return false;
    }
    cta.threads.resize(size_t(threads));
    cta.warps.resize(size_t(threads / 32));
    cta.grid = grid;
    for (cta.block = 0; cta.block < grid; ++cta.block) {
        poison();
        run_cta();
    }
    return true;
}
