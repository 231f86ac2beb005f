// Runs a kernel CTA by CTA, or cluster by cluster. The order of the threads is shuffled anew in every round, copies and
// the end of earlier work come at random times, so that a missing wait shows as a wrong result.
#include <ucontext.h>
#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>
#include "bind.h"
#include "emulation.h"
#include "failure.h"
#include "hopper.h"
#include "meeting.h"

namespace {

using emulation::Barrier;
using emulation::Failure;
using emulation::Meeting;
using emulation::text;

constexpr size_t kStackBytes = 1 << 17;
constexpr uint32_t kSharedStart = 1024;  // as on sm_90
constexpr uint32_t kCanaryBytes = 128;   // behind the shared memory that a launch asks for
constexpr unsigned kRoundsOfEarlierWork = 48, kRoundsOfStart = 8, kRoundsOfCopy = 6;
constexpr unsigned kLaziness[] = {0, 0, 0, 0, 0, 0, 0, 4, 12};
constexpr uint64_t kBarrierMark = 0xb5e1b5e1b5e1b5e1;

struct alignas(128) Line {
    uint8_t bytes[128];
};

struct Cta {
    std::vector<Meeting> warps;
    std::vector<unsigned> laziness;  // of 16 rounds, how many the threads of a warp sleep through
    Meeting all, named[16];
    std::vector<Line> shared;  // addressed by shared_at
    std::map<uint32_t, Barrier> barriers;
    unsigned rank = 0, x = 0, y = 0;
    unsigned start = 0, num_running = 0;  // the round in which its threads start, and how many have not ended
};

enum class Wait { kNone, kMeeting, kBarrier, kEarlierWork, kStores };

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    Wait wait = Wait::kNone;
    const Meeting* meeting = nullptr;
    const Barrier* barrier = nullptr;
    uint32_t barrier_address = 0;
    unsigned generation = 0;          // of the meeting, or phase of the barrier, that it waits for the end of
    unsigned cluster_generation = 0;  // of its arrival at the cluster's barrier
    bool has_arrived_at_cluster = false;
    int num_stores = 0;           // bulk copies out of shared memory under way,
    bool has_awaited_all = true;  // or at least not waited for
    emulation::Wgmmas wgmmas;
    bool done = false;
    Cta* cta = nullptr;
    unsigned index = 0;
};

/// A bulk copy in flight.
struct Copy {
    unsigned due;
    Thread* store;  // whose it is, if out of shared memory
    std::function<void()> run;
};

/// CTAs that run at the same time: one, or a cluster.
struct Cluster {
    std::vector<Cta> ctas;
    std::vector<Thread> threads;
    Meeting all;
    ucontext_t scheduler;
    Thread* current = nullptr;
    const emulation::Launch* launch = nullptr;
    std::function<void()> kernel;
    std::vector<Copy> copies;
    std::vector<std::vector<uint8_t>> inputs,
        outputs;  // of the launch: to come, and as they were at the start
    bool has_earlier_work = false;
    unsigned round = 0;
    std::string failure;
    std::mt19937 random{12345};
};
Cluster cluster;

void yield() { swapcontext(&cluster.current->context, &cluster.scheduler); }
void wait(Wait what) {
    cluster.current->wait = what;
    yield();
}

/// The generation that the thread arrived in.
unsigned arrive(Meeting& meeting) {
    const unsigned generation = meeting.generation;
    ++meeting.arrived;
    meeting.check();
    return generation;
}
void wait_at(Meeting& meeting, unsigned generation) {
    if (meeting.generation != generation) return;
    cluster.current->meeting = &meeting;
    cluster.current->generation = generation;
    wait(Wait::kMeeting);
}
/// The parity of the generation that has ended.
unsigned meet(Meeting& meeting) {
    const unsigned generation = arrive(meeting);
    wait_at(meeting, generation);
    return generation & 1;
}

/// The barrier of the cluster counts the threads that have not ended.
void leave_cluster(const Thread& thread) {
    if (thread.has_arrived_at_cluster && thread.cluster_generation == cluster.all.generation)
        --cluster.all.arrived;
    --cluster.all.size;
    cluster.all.check();
}

void run_thread() {
    Thread& thread = *cluster.current;
    try {
        cluster.kernel();
        if (!thread.wgmmas.open.empty() || !thread.wgmmas.committed.empty())
            emulation::fail("has ended before its wgmma");
        if (!thread.has_awaited_all) emulation::fail("has ended before its bulk copies out of shared memory");
        leave_cluster(thread);
        --thread.cta->num_running;
    } catch (const Failure& failure) {
        cluster.failure = failure.sentence;
    }
    thread.done = true;
    yield();
}

void start(Thread& thread) {
    thread.wait = Wait::kNone;
    thread.done = thread.has_arrived_at_cluster = false;
    thread.num_stores = 0;
    thread.has_awaited_all = true;
    thread.wgmmas = {};
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
}

bool is_waiting(const Thread& thread) {
    switch (thread.wait) {
        case Wait::kMeeting:
            return thread.meeting->generation == thread.generation;
        case Wait::kBarrier:
            return thread.barrier->phase == thread.generation;
        case Wait::kEarlierWork:
            return cluster.has_earlier_work;
        case Wait::kStores:
            return thread.num_stores > 0;
        default:
            return cluster.round < thread.cta->start;
    }
}

std::string name_of(const Thread& thread) {
    switch (thread.wait) {
        case Wait::kMeeting:
            for (int i = 0; i < 16; ++i)
                if (thread.meeting == &thread.cta->named[i]) return text("named barrier %d", i);
            if (thread.meeting == &cluster.all) return "the barrier of the cluster";
            return thread.meeting == &thread.cta->all ? "the barrier of the CTA" : "the warp";
        case Wait::kBarrier:
            return text("phase %u of the barrier at %u: %d arrivals and %lld bytes lack", thread.generation,
                        thread.barrier_address & 0xffffff, thread.barrier->pending,
                        static_cast<long long>(thread.barrier->bytes));
        default:
            return "copies";
    }
}

/// A line for each warp and what its threads wait for.
std::string describe(const std::vector<unsigned>& waiting) {
    std::map<std::pair<unsigned, std::string>, int> groups;
    for (unsigned t : waiting) ++groups[{t / 32, name_of(cluster.threads[t])}];
    const unsigned warps = cluster.launch->threads / 32;
    std::string lines = "every thread waits:";
    for (const auto& [key, num] : groups)
        lines += text("\n  block %u, warp %u: %d threads at ", cluster.ctas[key.first / warps].x,
                      key.first % warps, num) +
                 key.second;
    return lines;
}

/// Hides what earlier work writes.
void begin_earlier_work() {
    const emulation::Launch& launch = *cluster.launch;
    cluster.has_earlier_work = launch.num_inputs > 0;
    if (!cluster.has_earlier_work) return;
    for (int i = 0; i < launch.num_inputs; ++i)
        std::memset(launch.inputs[i].data, 0xff, launch.inputs[i].size);
    for (int i = 0; i < launch.num_outputs; ++i)
        std::memcpy(cluster.outputs[size_t(i)].data(), launch.outputs[i].data, launch.outputs[i].size);
}
void end_earlier_work() {
    if (!cluster.has_earlier_work) return;
    const emulation::Launch& launch = *cluster.launch;
    cluster.has_earlier_work = false;
    for (int i = 0; i < launch.num_inputs; ++i)
        std::memcpy(launch.inputs[i].data, cluster.inputs[size_t(i)].data(), launch.inputs[i].size);
    for (int i = 0; i < launch.num_outputs; ++i)
        if (std::memcmp(cluster.outputs[size_t(i)].data(), launch.outputs[i].data, launch.outputs[i].size))
            throw Failure{
                text("block %u: output was written while earlier work was not done", cluster.ctas[0].x)};
}

bool run_copies() {
    bool any = false;
    std::shuffle(cluster.copies.begin(), cluster.copies.end(), cluster.random);
    std::vector<Copy> left, due;
    for (Copy& copy : cluster.copies) (copy.due <= cluster.round ? due : left).push_back(std::move(copy));
    cluster.copies = std::move(left);
    for (Copy& copy : due) {
        copy.run();
        if (copy.store) --copy.store->num_stores;
        any = true;
    }
    return any;
}

void begin_cluster(std::vector<unsigned>& order) {
    const unsigned num = unsigned(cluster.threads.size());
    cluster.all = {.size = int(num)};
    cluster.round = 0;
    cluster.copies.clear();
    for (Cta& cta : cluster.ctas) {
        for (Meeting& warp : cta.warps) warp = {.size = 32};
        for (Meeting& barrier : cta.named) barrier = {};
        cta.all = {.size = int(cluster.launch->threads)};
        for (unsigned& laziness : cta.laziness) laziness = kLaziness[cluster.random() % std::size(kLaziness)];
        cta.num_running = cluster.launch->threads;
        cta.start = cluster.ctas.size() > 1 ? unsigned(cluster.random() % kRoundsOfStart) : 0;
        cta.barriers.clear();
        std::memset(static_cast<void*>(cta.shared.data()), 0xff, cta.shared.size() * sizeof(Line));
    }
    order.resize(num);
    for (unsigned t = 0; t < num; ++t) {
        order[t] = t;
        start(cluster.threads[t]);
    }
    begin_earlier_work();
}

void check_canaries() {
    for (const Cta& cta : cluster.ctas) {
        const auto* const bytes = reinterpret_cast<const uint8_t*>(cta.shared.data());
        for (size_t i = cluster.launch->shared_bytes; i < cta.shared.size() * sizeof(Line); ++i)
            if (bytes[i] != 0xff)
                throw Failure{
                    text("block %u: written %zu bytes behind the start of shared memory, %u were asked for",
                         cta.x, i, cluster.launch->shared_bytes)};
    }
}

void run_cluster() {
    std::vector<unsigned> order;
    begin_cluster(order);
    const unsigned end = unsigned(cluster.random() % kRoundsOfEarlierWork);
    for (; !order.empty(); ++cluster.round) {
        if (cluster.round == end) end_earlier_work();
        bool progress =
            run_copies() || cluster.round <= std::max(end, kRoundsOfStart) || !cluster.copies.empty();
        std::shuffle(order.begin(), order.end(), cluster.random);
        for (unsigned t : order) {
            Thread& thread = cluster.threads[t];
            if (is_waiting(thread)) continue;
            progress = true;
            if (cluster.random() % 16 < thread.cta->laziness[thread.index / 32]) continue;
            thread.wait = Wait::kNone;
            cluster.current = &thread;
            swapcontext(&cluster.scheduler, &thread.context);
            cluster.current = nullptr;
            if (!cluster.failure.empty()) return;
        }
        std::erase_if(order, [](unsigned t) { return cluster.threads[t].done; });
        if (!progress) throw Failure{describe(order)};
    }
    if (!cluster.copies.empty())
        throw Failure{text("block %u: has ended before copies into its shared memory", cluster.ctas[0].x)};
    end_earlier_work();
    check_canaries();
}

Barrier& barrier_at(uint32_t address) {
    const uint8_t* const mark = emulation::shared_at(address, 8);
    auto& barriers = cluster.ctas[address >> 24].barriers;
    const auto found = barriers.find(address & 0xffffff);
    if (found == barriers.end()) emulation::fail("no barrier was initialised there");
    if (std::memcmp(mark, &kBarrierMark, 8)) emulation::fail("a barrier was overwritten");
    return found->second;
}

}  // namespace

namespace emulation {

Index thread_index() { return {cluster.current->index, 0}; }
Index block_index() { return {cluster.current->cta->x, cluster.current->cta->y}; }
Index grid_size() { return {cluster.launch->grid_x, cluster.launch->grid_y}; }
Index cta_size() { return {cluster.launch->threads, 1}; }
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
    if (!cluster.current) throw Failure{text("a copy: %s", sentence)};
    throw Failure{text("block %u, thread %u: %s", cluster.current->cta->x, cluster.current->index, sentence)};
}
uint32_t cta_rank() { return cluster.current->cta->rank; }
int cluster_size() { return int(cluster.ctas.size()); }
uint8_t* shared_at(uint32_t address, int bytes) {
    const uint32_t rank = address >> 24, at = address & 0xffffff;
    if (rank >= cluster.ctas.size() || at < kSharedStart ||
        at + uint32_t(bytes) > kSharedStart + cluster.launch->shared_bytes)
        fail("a shared address out of range");
    Cta& cta = cluster.ctas[rank];
    if (cluster.round < cta.start) fail("a shared address of a CTA that may not have started");
    if (cta.num_running == 0) fail("a shared address of a CTA that has ended");
    return reinterpret_cast<uint8_t*>(cta.shared.data()) + at - kSharedStart;
}
void barrier_init(uint32_t barrier, int arrivals) {
    std::memcpy(shared_at(barrier, 8), &kBarrierMark, 8);
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
bool barrier_is_done(uint32_t barrier, uint32_t parity) { return (barrier_at(barrier).phase & 1) != parity; }
void barrier_wait(uint32_t barrier, uint32_t parity) {
    const Barrier& b = barrier_at(barrier);
    if ((b.phase & 1) != parity) return;
    cluster.current->barrier = &b;
    cluster.current->barrier_address = barrier;
    cluster.current->generation = b.phase;
    wait(Wait::kBarrier);
}
void named_barrier_arrive(int id, int num_threads, bool waits) {
    Meeting& barrier = cluster.current->cta->named[id];
    if (barrier.arrived && barrier.size != num_threads) fail("threads count differently at a named barrier");
    barrier.size = num_threads;
    const unsigned generation = arrive(barrier);
    if (waits) wait_at(barrier, generation);
}
void cluster_arrive() {
    cluster.current->has_arrived_at_cluster = true;
    cluster.current->cluster_generation = arrive(cluster.all);
}
void cluster_wait() { wait_at(cluster.all, cluster.current->cluster_generation); }

void copy_later(std::function<void()> run, bool is_store) {
    cluster.current->num_stores += is_store;
    cluster.current->has_awaited_all &= !is_store;
    cluster.copies.push_back({cluster.round + 1 + unsigned(cluster.random() % kRoundsOfCopy),
                              is_store ? cluster.current : nullptr, std::move(run)});
}
void await_stores() {
    if (cluster.current->num_stores) wait(Wait::kStores);
    cluster.current->has_awaited_all = true;
}
void await_earlier_work() {
    if (cluster.has_earlier_work) wait(Wait::kEarlierWork);
}
void delay() {
    for (unsigned i = cluster.random() % 3; i > 0; --i) yield();
}
Wgmmas& wgmmas() { return cluster.current->wgmmas; }

}  // namespace emulation

/// Runs a launch to its end. What went wrong, or null.
extern "C" const char* run(const emulation::Launch* launch) {
    const size_t words = launch->params_bytes / 8;
    const auto bind = launch->params_alignment == 64
                          ? emulation::bind_of<64>(words, std::make_index_sequence<12>())
                          : emulation::bind_of<8>(words, std::make_index_sequence<24>());
    if (!bind) return "no kernel takes parameters of this size";
    cluster.launch = launch;
    cluster.kernel = bind(launch->kernel, launch->params);
    cluster.failure.clear();
    cluster.ctas.resize(launch->cluster);
    cluster.threads.resize(size_t(launch->cluster) * launch->threads);
    for (size_t i = 0; i < cluster.threads.size(); ++i) {
        cluster.threads[i].cta = &cluster.ctas[i / launch->threads];
        cluster.threads[i].index = unsigned(i % launch->threads);
    }
    for (Cta& cta : cluster.ctas) {
        cta.warps.resize(launch->threads / 32);
        cta.laziness.resize(launch->threads / 32);
        cta.shared.resize((launch->shared_bytes + kCanaryBytes) / sizeof(Line) + 1);
    }
    const auto copies = [](const emulation::Range* ranges, int num) {
        std::vector<std::vector<uint8_t>> bytes;
        for (int i = 0; i < num; ++i) bytes.emplace_back(ranges[i].data, ranges[i].data + ranges[i].size);
        return bytes;
    };
    cluster.inputs = copies(launch->inputs, launch->num_inputs);
    cluster.outputs = copies(launch->outputs, launch->num_outputs);
    try {
        for (unsigned y = 0; y < launch->grid_y; ++y)
            for (unsigned x = 0; x < launch->grid_x && cluster.failure.empty(); x += launch->cluster) {
                for (unsigned rank = 0; rank < launch->cluster; ++rank) {
                    Cta& cta = cluster.ctas[rank];
                    cta.rank = rank, cta.x = x + rank, cta.y = y;
                }
                launch->poison();
                run_cluster();
            }
    } catch (const Failure& failure) {
        cluster.failure = failure.sentence;
    }
    for (size_t i = 0; i < cluster.inputs.size(); ++i)
        std::memcpy(launch->inputs[i].data, cluster.inputs[i].data(), launch->inputs[i].size);
    return cluster.failure.empty() ? nullptr : cluster.failure.c_str();
}
