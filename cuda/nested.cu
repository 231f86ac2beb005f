// The second level of nested statistics: absmax values as 8-bit codes around their mean.
// Dettmers et al., QLoRA, arXiv:2305.14314, section 3 (double quantization).
//
// Launch: quantize_absmax_sums, quantize_absmax_offset, quantize_absmax, with the same parameters; 4-byte aligned.
//
//   entry point             threads  elements/CTA  static shared  grid
//   quantize_absmax_sums        256          8192        32.9 KB  min(ceil_div(n, 8192), 2^31 - 1)
//   quantize_absmax_offset     1024             n        16.6 KB  1
//   quantize_absmax             256          4096         5.1 KB  min(ceil_div(n, 4096), 2^31 - 1)
#include "blockwise_8bit.cuh"

constexpr int kRun = 256;  // entries of one block, and of one run of the mean

/// Arguments of the three kernels.
struct QuantizeAbsmaxParams {
    const float* absmax;  // [n]
    uint8_t* codes;       // [n]
    float* scale;         // [ceil_div(n, 256)]
    float* offset;        // [1]                 the mean
    double*
        run_sums;  // [ceil_div(n, 256)]  scratch of 8 * ceil_div(n, 256) bytes, all written before it is read
    int64_t n;     //
};
static_assert(sizeof(QuantizeAbsmaxParams) == 48, "keep in step with the Rust mirror");

/// Sum of every run, its entries added in order: one lane adds one run, from shared memory.
extern "C" __global__ __launch_bounds__(256) void quantize_absmax_sums(
    const __grid_constant__ QuantizeAbsmaxParams p) {
    constexpr int kRuns = 32, kStride = kRun + 1;  // the odd stride keeps 32 runs apart in the banks
    __shared__ float entry[kRuns * kStride];
    for (int64_t base = int64_t(blockIdx.x) * kRuns * kRun; base < p.n;
         base += int64_t(gridDim.x) * kRuns * kRun) {
        #pragma unroll
        for (int r = 0; r < kRuns; ++r) {
            const int64_t i = base + r * kRun + threadIdx.x;
            entry[r * kStride + threadIdx.x] = i < p.n ? __ldg(p.absmax + i) : 0.0f;
        }
        __syncthreads();
        const int64_t first = base + int(threadIdx.x) * kRun;
        if (threadIdx.x < kRuns && first < p.n) {
            double sum = 0.0;
            #pragma unroll 16
            for (int i = 0; i < kRun; ++i) sum = __dadd_rn(sum, double(entry[threadIdx.x * kStride + i]));
            p.run_sums[first / kRun] = sum;
        }
        __syncthreads();
    }
}

/// Where the bits of some doubles lie, all relative to 2^-1075.
struct BitRange {
    int highest = 0;       // largest exponent field
    int lowest = 1 << 12;  // exponent field of the lowest bit that is set

    __device__ __forceinline__ void include(double x) {
        const uint64_t bits = uint64_t(__double_as_longlong(x));
        const int exponent = int(bits >> 52) & 0x7ff;
        highest = ::max(highest, exponent);
        if (x != 0.0) lowest = ::min(lowest, exponent + __ffsll(int64_t(bits | 1ull << 52)) - 1);
    }
    /// Whether every sum of up to `num` of the doubles, in any order, is exact: a multiple of the lowest bit
    /// that fits into 53 bits. (Subnormal doubles do not occur: the entries are floats.)
    __device__ __forceinline__ bool sums_are_exact(int64_t num) const {
        return highest < 0x7ff && highest + (64 - __clzll(num)) <= lowest;
    }
};

constexpr int kOffsetThreads = 1024;

/// The run sums added in order. Thread 0 adds from shared memory while the others bring the next entries.
__device__ __forceinline__ double sum_in_order(const double* x, int64_t num,
                                               double (&stage)[2][kOffsetThreads]) {
    double sum = 0.0;
    const int i = threadIdx.x;
    if (i < num) stage[0][i] = x[i];
    int turn = 0;
    for (int64_t base = 0; base < num; base += kOffsetThreads, turn ^= 1) {
        __syncthreads();
        if (base + kOffsetThreads + i < num) stage[turn ^ 1][i] = x[base + kOffsetThreads + i];
        if (i == 0) {
            const int here = int(::min(num - base, int64_t(kOffsetThreads)));
            #pragma unroll 8
            for (int j = 0; j < here; ++j) sum = __dadd_rn(sum, stage[turn][j]);
        }
    }
    return sum;
}

/// offset = float(sum of the run sums in order / n). Most tensors' sums are exact in any order, so that all
/// threads can add; the others take about 5 ns a run.
extern "C" __global__ __launch_bounds__(kOffsetThreads) void quantize_absmax_offset(
    const __grid_constant__ QuantizeAbsmaxParams p) {
    __shared__ double stage[2][kOffsetThreads];
    __shared__ int highest[32], lowest[32];
    const int64_t num = (p.n + kRun - 1) / kRun;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    BitRange range;
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < num; i += kOffsetThreads) {
        const double x = p.run_sums[i];
        range.include(x);
        sum += x;
    }
    const auto reduce = [&]() {
        #pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, d);
            range.highest = ::max(range.highest, __shfl_xor_sync(0xffffffffu, range.highest, d));
            range.lowest = ::min(range.lowest, __shfl_xor_sync(0xffffffffu, range.lowest, d));
        }
    };
    reduce();
    if (lane == 0) {
        stage[0][warp] = sum;
        highest[warp] = range.highest;
        lowest[warp] = range.lowest;
    }
    __syncthreads();
    sum = stage[0][lane];
    range.highest = highest[lane];
    range.lowest = lowest[lane];
    reduce();
    __syncthreads();
    if (!range.sums_are_exact(num)) sum = sum_in_order(p.run_sums, num, stage);
    if (threadIdx.x == 0) {
        const float offset = __double2float_rn(__ddiv_rn(sum, double(::max(p.n, int64_t(1)))));
        *p.offset = offset == offset ? offset : __uint_as_float(kNanBits);
    }
}

/// codes, scale = the blocks of 256 of RN(absmax - offset) in the signed dynamic map.
extern "C" __global__ __launch_bounds__(kEncoderThreads) void quantize_absmax(
    const __grid_constant__ QuantizeAbsmaxParams p) {
    using Tile = WarpTile<float>;
    constexpr int64_t kCtaElements = int64_t(Tile::kElements) * (kEncoderThreads / 32);
    constexpr int kBlockShift = 8;
    __shared__ DynamicTable table;
    const int lane = threadIdx.x % 32, warp = warp_in_cta();
    for (int e = threadIdx.x; e < DynamicTable::kPadded; e += kEncoderThreads)
        table.entry[e] = __ldg(kDynamicTable.entry + e);
    __syncthreads();
    const float offset = __ldg(p.offset);
    const BlockLane<float> self(kBlockShift, lane, warp);
    for (int64_t first = blockIdx.x * kCtaElements + warp * Tile::kElements; first < p.n;
         first += gridDim.x * kCtaElements) {
        Tile tile;
        tile.load<false>(p.absmax, first, p.n, lane);
        #pragma unroll
        for (int r = 0; r < Tile::kRows; ++r) {
            float x[4];
            unpack<float>(tile.row[r], x);
            #pragma unroll
            for (int i = 0; i < 4; ++i)
                if (first + r * Tile::kRowElements + lane * 4 + i < p.n) x[i] = __fsub_rn(x[i], offset);
            tile.row[r] = pack<float>(x);
        }
        const float inverse = block_scales<false, kEncoderThreads>(tile, self, nullptr, p.scale, first, p.n);
        encode_tile<false>(tile, DynamicEncoder{table.entry}, inverse, self, p.codes + first, p.n - first,
                           [](int) {});
    }
}
