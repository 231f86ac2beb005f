// Runs a kernel CTA by CTA, or cluster by cluster. The order of the threads is shuffled anew in every round, so that a missing barrier shows as a
// wrong result.
#include <ucontext.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>
#include "emulation.h"
#include "hopper.h"

namespace {

constexpr size_t kStackBytes = 1 << 17;
constexpr uint32_t kSharedStart = 1024, kSharedBytes = 232448;  // as on sm_90

/// Where threads meet: a generation ends when `size` have come. What they bring is kept until the end of the next one.
struct Meeting {
    int size = 0, arrived = 0;
    unsigned generation = 0;
    uint64_t lane[2][32];
    int count[2] = {0, 0};
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

struct Cta {
    std::vector<Meeting> warps;
    Meeting all, named[16];
    std::vector<uint8_t> shared;  // addressed by shared_at
    std::map<uint32_t, Barrier> barriers;
    unsigned rank = 0, x = 0, y = 0;
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    const Meeting* waits_at = nullptr;
    const Barrier* waits_for = nullptr;
    unsigned generation = 0;          // of the meeting, or phase of the barrier, that it waits for the end of
    unsigned cluster_generation = 0;  // of its arrival at the cluster's barrier
    bool done = false;
    Cta* cta = nullptr;
    unsigned index = 0;
};

/// CTAs that run at the same time: one, or a cluster.
struct Cluster {
    std::vector<Cta> ctas;
    std::vector<Thread> threads;
    Meeting all;
    ucontext_t scheduler;
    Thread* current = nullptr;
    unsigned grid = 0, threads_per_cta = 0;
    std::function<void()> kernel;
    std::mt19937 random{12345};
};
Cluster cluster;

void yield() { swapcontext(&cluster.current->context, &cluster.scheduler); }

/// The generation that the thread arrived in.
unsigned arrive(Meeting& meeting) {
    const unsigned generation = meeting.generation;
    if (++meeting.arrived == meeting.size) {
        meeting.arrived = 0;
        meeting.count[(generation + 1) & 1] = 0;
        ++meeting.generation;
    }
    return generation;
}
/// The parity of the generation that has ended.
unsigned meet(Meeting& meeting) {
    const unsigned generation = arrive(meeting);
    if (meeting.generation == generation) {
        cluster.current->waits_at = &meeting;
        cluster.current->generation = generation;
        yield();
    }
    return generation & 1;
}

void run_thread() {
    cluster.kernel();
    cluster.current->done = true;
    yield();
}

void start(Thread& thread) {
    thread.waits_at = nullptr;
    thread.waits_for = nullptr;
    thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
}

bool is_waiting(const Thread& thread) {
    if (thread.waits_at) return thread.waits_at->generation == thread.generation;
    return thread.waits_for && thread.waits_for->phase == thread.generation;
}

void run_cluster() {
    const unsigned num = unsigned(cluster.threads.size());
    cluster.all = {.size = int(num)};
    for (Cta& cta : cluster.ctas) {
        for (Meeting& warp : cta.warps) warp = {.size = 32};
        for (Meeting& barrier : cta.named) barrier = {};
        cta.all = {.size = int(cluster.threads_per_cta)};
        cta.barriers.clear();
        std::fill(cta.shared.begin(), cta.shared.end(), uint8_t(0xff));
    }
    std::vector<unsigned> order(num);
    for (unsigned t = 0; t < num; ++t) {
        order[t] = t;
        start(cluster.threads[t]);
    }
    while (!order.empty()) {
        std::shuffle(order.begin(), order.end(), cluster.random);
        bool progress = false;
        for (unsigned t : order) {
            Thread& thread = cluster.threads[t];
            if (is_waiting(thread)) continue;
            thread.waits_at = nullptr;
            thread.waits_for = nullptr;
            progress = true;
            cluster.current = &thread;
            swapcontext(&cluster.scheduler, &thread.context);
        }
        std::erase_if(order, [](unsigned t) { return cluster.threads[t].done; });
        if (!progress) {
            std::fprintf(stderr, "block %u: %zu threads wait for others that have left or wait too\n",
                         cluster.ctas[0].x, order.size());
            std::abort();
        }
    }
}

Barrier& barrier_at(uint32_t address) {
    auto& barriers = cluster.ctas.at(address >> 24).barriers;
    const auto found = barriers.find(address & 0xffffff);
    if (found == barriers.end()) emulation::fail("no barrier was initialised there");
    return found->second;
}

template <int kWords, size_t kAlignment>
struct alignas(kAlignment) Params {
    uint64_t word[kWords];
};
/// A call with a struct of kWords words by value: above 16 bytes the System V ABI passes every struct alike, in memory.
template <int kWords, size_t kAlignment = 8>
std::function<void()> bind(void* kernel, const void* params) {
    static_assert(kWords > 2, "smaller structs travel in registers");
    using Copy = Params<kWords, kAlignment>;
    Copy copy;
    std::memcpy(&copy, params, sizeof copy);
    return [=] { reinterpret_cast<void (*)(Copy)>(kernel)(copy); };
}

}  // namespace

namespace emulation {

Index thread_index() { return {cluster.current->index, 0}; }
Index block_index() { return {cluster.current->cta->x, cluster.current->cta->y}; }
Index grid_size() { return {cluster.grid, 1}; }
Index cta_size() { return {cluster.threads_per_cta, 1}; }
const uint64_t* exchange(uint64_t value) {
    Meeting& warp = cluster.current->cta->warps[cluster.current->index / 32];
    warp.lane[warp.generation & 1][cluster.current->index % 32] = value;
    return warp.lane[meet(warp)];
}
int count_over_cta(bool value) {
    Meeting& all = cluster.current->cta->all;
    all.count[all.generation & 1] += value;
    return all.count[meet(all)];
}

void fail(const char* sentence) {
    std::fprintf(stderr, "block %u, thread %u: %s\n", cluster.current->cta->x, cluster.current->index,
                 sentence);
    std::abort();
}
uint32_t cta_rank() { return cluster.current->cta->rank; }
int cluster_size() { return int(cluster.ctas.size()); }
uint8_t* shared_at(uint32_t address, int bytes) {
    const uint32_t rank = address >> 24, at = address & 0xffffff;
    if (rank >= cluster.ctas.size() || at < kSharedStart ||
        at + uint32_t(bytes) > kSharedStart + kSharedBytes)
        fail("a shared address out of range");
    return cluster.ctas[rank].shared.data() + at - kSharedStart;
}
void barrier_init(uint32_t barrier, int arrivals) {
    cluster.ctas[barrier >> 24].barriers[barrier & 0xffffff] = {arrivals, arrivals, 0, 0};
}
void barrier_arrive(uint32_t barrier, int expected_bytes) {
    Barrier& b = barrier_at(barrier);
    b.bytes += expected_bytes;
    if (--b.pending < 0) fail("more arrivals than a barrier expects");
    b.check();
}
void barrier_complete(uint32_t barrier, int bytes) {
    Barrier& b = barrier_at(barrier);
    b.bytes -= bytes;
    b.check();
}
void barrier_wait(uint32_t barrier, uint32_t parity) {
    const Barrier& b = barrier_at(barrier);
    if ((b.phase & 1) != parity) return;
    cluster.current->waits_for = &b;
    cluster.current->generation = b.phase;
    yield();
}
void named_barrier(int id, int num_threads) {
    Meeting& barrier = cluster.current->cta->named[id];
    barrier.size = num_threads;
    meet(barrier);
}
void named_barrier_arrive(int id, int num_threads) {
    Meeting& barrier = cluster.current->cta->named[id];
    barrier.size = num_threads;
    arrive(barrier);
}
void cluster_arrive() { cluster.current->cluster_generation = arrive(cluster.all); }
void cluster_wait() {
    if (cluster.all.generation != cluster.current->cluster_generation) return;
    cluster.current->waits_at = &cluster.all;
    cluster.current->generation = cluster.current->cluster_generation;
    yield();
}
void delay() {
    for (unsigned i = cluster.random() % 3; i > 0; --i) yield();
}

}  // namespace emulation

/// Launches `kernel` of a module whose static shared memory `poison` overwrites. False for a size of params that no
/// kernel has.
extern "C" bool launch(void* kernel, void (*poison)(), const void* params, int params_bytes, unsigned grid_x,
                       unsigned grid_y, int threads, int cluster_size) {
    switch (params_bytes) {
        case 24:
            cluster.kernel = bind<3>(kernel, params);
            break;
        case 32:
            cluster.kernel = bind<4>(kernel, params);
            break;
        case 40:
            cluster.kernel = bind<5>(kernel, params);
            break;
        case 48:
            cluster.kernel = bind<6>(kernel, params);
            break;
        case 56:
            cluster.kernel = bind<7>(kernel, params);
            break;
        case 64:
            cluster.kernel = bind<8>(kernel, params);
            break;
        case 112:
            cluster.kernel = bind<14>(kernel, params);
            break;
        case 384:
            cluster.kernel = bind<48, 64>(kernel, params);
            break;  // tensor maps
        default:
            return false;
    }
    cluster.grid = grid_x;
    cluster.threads_per_cta = unsigned(threads);
    cluster.ctas.resize(size_t(cluster_size));
    cluster.threads.resize(size_t(cluster_size * threads));
    for (size_t i = 0; i < cluster.threads.size(); ++i) {
        cluster.threads[i].cta = &cluster.ctas[i / size_t(threads)];
        cluster.threads[i].index = unsigned(i % size_t(threads));
    }
    for (Cta& cta : cluster.ctas) {
        cta.warps.resize(size_t(threads / 32));
        if (params_bytes == 384) cta.shared.resize(kSharedBytes);
    }
    for (unsigned y = 0; y < grid_y; ++y)
        for (unsigned x = 0; x < grid_x; x += unsigned(cluster_size)) {
            for (unsigned rank = 0; rank < unsigned(cluster_size); ++rank) {
                Cta& cta = cluster.ctas[rank];
                cta.rank = rank, cta.x = x + rank, cta.y = y;
            }
            poison();
            run_cluster();
        }
    return true;
}
