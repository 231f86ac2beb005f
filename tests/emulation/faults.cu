// A small kernel in the manner of those for sm_90a, and the faults that the emulation must find in it.
// output[row] = sum of input[row, :] + bias[row]: a cluster of two divides the columns, wgmma adds them up.
#include "ptx.cuh"
#include "ptx_sm90.cuh"

struct RowSumsParams {
    TensorMap input;    // [k / 64, 16, 64] bfloat16, box {64, 16, 1}, 128 B swizzle
    TensorMap output;   // [16] float, box {16}
    const float* bias;  // [16]
    int32_t k;          // a multiple of 128
    int32_t fault;      // an index of FAULTS in test_emulation_faults.py; 0: none
};

enum Fault {
    kNone,
    kNeverArrives,
    kArrivesTwice,
    kReadsUnfilledStage,
    kReleasesBeforeReading,
    kReleasesBeforeProduct,
    kUsesSumsOfPendingProduct,
    kReadsInputEarly,
    kWritesOutputEarly,
    kWritesBehindShared,
    kOverwritesBarrier,
    kLeavesNeighbour,
    kMeetsNeighbourUnstarted,
    kOverwritesStaging,
    kLeavesStore,
    kLeavesOutputUnwritten,
};

constexpr int kStages = 2, kStageBytes = 16 * 128, kFull = kStages * kStageBytes,
              kEmpty = kFull + 8 * kStages;
constexpr int kSums = kFull + 128, kStaging = kSums + 128, kSharedBytes = kStaging + 128;

/// Columns of this CTA, in blocks of 64, by warp 4.
__device__ void copy(const RowSumsParams& p, uint32_t base, int first, int end) {
    if (p.fault != kReadsInputEarly) wait_for_earlier_kernels();
    uint32_t parity = 1;
    for (int block = first, slot = 0; block < end; ++block) {
        barrier_wait(base + kEmpty + 8 * slot, parity);
        barrier_expect(base + kFull + 8 * slot, kStageBytes);
        tma_load(base + slot * kStageBytes, &p.input, 0, 0, block, base + kFull + 8 * slot);
        if (++slot == kStages) slot = 0, parity ^= 1;
    }
}

/// Warps 0 to 3; every row of the product is the same.
__device__ void add_columns(const RowSumsParams& p, uint32_t base, int first, int end) {
    const uint32_t ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
    const int lane = threadIdx.x % 32;
    float acc[8] = {};
    uint32_t parity = 0;
    for (int block = first, slot = 0; block < end; ++block) {
        if (p.fault != kReadsUnfilledStage) barrier_wait(base + kFull + 8 * slot, parity);
        const auto release = [&] {
            __syncwarp();
            if (lane == 0 && !(p.fault == kNeverArrives && block == first))
                barrier_arrive(base + kEmpty + 8 * slot);
            if (lane == 0 && p.fault == kArrivesTwice) barrier_arrive(base + kEmpty + 8 * slot);
        };
        if (p.fault == kReleasesBeforeReading) release();
        const uint64_t rows = operand_descriptor(base + slot * kStageBytes);
        wgmma_fence();
        for (int step = 0; step < 4; ++step) wgmma_k16<bfloat16, 16>(acc, ones, rows + 2 * step);
        wgmma_commit();
        if (p.fault == kReleasesBeforeProduct) release();
        if (p.fault != kUsesSumsOfPendingProduct || block + 1 < end) wgmma_wait<0>();
        if (p.fault != kReleasesBeforeReading && p.fault != kReleasesBeforeProduct) release();
        if (++slot == kStages) slot = 0, parity ^= 1;
    }
    if (threadIdx.x < 4)
        for (int i = 0; i < 8; ++i)
            if (i % 4 < 2)
                store_shared_4(base + kSums + 4 * (i / 4 * 8 + 2 * lane + i % 2), __float_as_uint(acc[i]));
    wgmma_wait<0>();
}

/// By four threads of the first CTA, four rows each.
__device__ void store(const RowSumsParams& p, uint32_t base) {
    wait_for_earlier_kernels();
    const uint4 own = load_shared_16(base + kSums + 16 * threadIdx.x);
    const uint4 other = load_remote_16(base + kSums + 16 * threadIdx.x, 1);
    const uint32_t a[4] = {own.x, own.y, own.z, own.w}, b[4] = {other.x, other.y, other.z, other.w};
    for (int i = 0; i < 4; ++i)
        store_shared_4(
            base + kStaging + 4 * (4 * threadIdx.x + i),
            __float_as_uint(__uint_as_float(a[i]) + __uint_as_float(b[i]) + p.bias[4 * threadIdx.x + i]));
    fence_async_proxy();
    named_barrier(1, 4);
    if (threadIdx.x != 0 || p.fault == kLeavesOutputUnwritten) return;
    tma_store(&p.output, base + kStaging, 0, 0);
    if (p.fault == kOverwritesStaging) store_shared_4(base + kStaging, 0);
    if (p.fault != kLeavesStore) tma_store_wait();
}

extern "C" __global__ void __launch_bounds__(160, 1) row_sums(const __grid_constant__ RowSumsParams p) {
    const uint32_t base = shared_start();
    if (p.fault == kWritesOutputEarly && threadIdx.x == 0) reinterpret_cast<float*>(p.output.data)[0] = 0.0f;
    if (p.fault == kWritesBehindShared && threadIdx.x == 0) dynamic_shared()[kSharedBytes / 4] = 0.0f;
    if (p.fault == kMeetsNeighbourUnstarted) load_remote_16(base + kSums, 1 - cluster_rank());
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(base + kFull + 8 * i, 1);
            barrier_init(base + kEmpty + 8 * i, 4);
        }
        fence_barrier_init();
        if (p.fault == kOverwritesBarrier) store_shared_4(base + kFull, 0);
    }
    cluster_sync();
    dependency_launch();
    const int part = p.k / 128, first = cluster_rank() * part;
    if (threadIdx.x < 128) {
        add_columns(p, base, first, first + part);
    } else if (threadIdx.x == 128) {
        copy(p, base, first, first + part);
    }
    cluster_sync();
    if (cluster_rank() == 0 && threadIdx.x < 4) store(p, base);
    if (p.fault == kLeavesNeighbour) return;
    cluster_sync();
}
