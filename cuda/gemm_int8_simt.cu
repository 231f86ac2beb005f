// gemm_int8 and gemm_int8_outliers for any m, n, k and alignment on every GPU, and the list of a mask's columns.
// Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, arXiv:2208.07339, section 2.
//
// Launch: 256 threads, one CTA for each 64 x 64 tile of the output, tiles of the same rows side by side; m, n > 0.
//   gemm_int8_simt_{float32,float16,bfloat16,int32}         k <= 131071
//   gemm_int8_simt_long_{float32,float16,bfloat16}          any k: sums of 64 bits
//   gemm_int8_outliers_simt_{long_,}{float32,..}            as these, with the columns that gemm_int8_list_columns leaves
//   gemm_int8_list_columns                                  one CTA of 1024 threads
#include "gemm_int8.cuh"

/// Arguments of gemm_int8_list_columns; mirrored by `ops::gemm_int8::ListColumnsParams`.
struct ListColumnsParams {
    const uint8_t* mask;   // [k]  not 0 for the columns to list
    int32_t* columns;      // [k]  ascending; what lies behind the last is not written
    int32_t* num_columns;  // [1]
    int64_t k;
};
static_assert(sizeof(ListColumnsParams) == 32, "keep in step with the Rust mirror");

namespace gemm_int8 {

constexpr int kListThreads = 1024;
constexpr int kListColumns = 8;  // of a thread at once

/// Sum of v over the lanes up to this one.
__device__ __forceinline__ int sum_up_to_lane(int v, int lane) {
    #pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const int below = __shfl_up_sync(0xffffffffu, v, d);
        if (lane >= d) v += below;
    }
    return v;
}

constexpr int kThreads = 256;
constexpr int kTile = 64;           // rows of input and of weight
constexpr int kStep = 64;           // columns in shared memory at once
constexpr int kWords = kStep / 4;   // of a row
constexpr int kPitch = kWords + 1;  // 16 rows at the same word lie in 16 banks
constexpr int kSide = kTile / 16;   // rows of either side that a thread multiplies
constexpr int kLongRun = 1024;      // steps whose sums fit 32 bits: 2^16 products of at most 2^14

/// Copies kTile rows from `first_row` on, kStep columns from `column` on, to shared memory; zeros outside the matrix.
__device__ __forceinline__ void load_tile(uint32_t (&tile)[kTile * kPitch], const int8_t* matrix,
                                          int64_t first_row, int64_t num_rows, int64_t column, int64_t k,
                                          bool is_aligned) {
    const int row = threadIdx.x / 4, part = threadIdx.x % 4 * 16;
    const int8_t* const from = matrix + (first_row + row) * k + column + part;
    const int64_t left = first_row + row < num_rows ? k - column - part : 0;
    uint32_t w[4] = {};
    if (is_aligned && left >= 16) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
        w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    } else {
        #pragma unroll
        for (int i = 0; i < 16; ++i)
            if (i < left) w[i / 4] |= uint32_t(uint8_t(from[i])) << i % 4 * 8;
    }
    #pragma unroll
    for (int i = 0; i < 4; ++i) tile[row * kPitch + part / 4 + i] = w[i];
}

/// The part of a float32 sum that the outliers contribute, in the order of the columns.
template <typename T>
__device__ __forceinline__ void add_outliers(float (&sum)[kSide][kSide], const GemmInt8Params& p,
                                             const int64_t (&row)[kSide], const int64_t (&column)[kSide],
                                             const float (&scale)[kSide]) {
    const T* const input = static_cast<const T*>(p.outlier_input);
    const int num = *p.num_outliers;
    #pragma unroll 1
    for (int i = 0; i < num; ++i) {
        const int64_t k = p.outliers[i];
        float x[kSide], w[kSide];
        #pragma unroll
        for (int j = 0; j < kSide; ++j) {
            x[j] = row[j] < p.m ? float(input[row[j] * p.k + k]) : 0.0f;
            w[j] = column[j] < p.n ? decoded<T>(p.weight[column[j] * p.k + k], scale[j]) : 0.0f;
        }
        #pragma unroll
        for (int a = 0; a < kSide; ++a)
            #pragma unroll
            for (int b = 0; b < kSide; ++b) sum[a][b] = __fmaf_rn(x[a], w[b], sum[a][b]);
    }
}

/// Thread (a, b) of 16 x 16 computes rows a + 16 i and columns b + 16 j of the tile.
template <typename T, bool kLong, bool kOutliers>
__device__ __forceinline__ void simt(const GemmInt8Params& p) {
    using Total = std::conditional_t<kLong, int64_t, int32_t>;
    __shared__ uint32_t input[kTile * kPitch], weight[kTile * kPitch];
    wait_for_earlier_kernels();
    const int64_t tiles_n = (p.n + kTile - 1) / kTile;
    const int64_t first_row = blockIdx.x / tiles_n * kTile, first_column = blockIdx.x % tiles_n * kTile;
    const int a = threadIdx.x / 16, b = threadIdx.x % 16;
    const bool is_aligned =
        (reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.weight) | uint64_t(p.k)) % 16 ==
        0;

    Total total[kSide][kSide] = {};
    int32_t sum[kSide][kSide] = {};
    int num_steps = 0;
    #pragma unroll 1
    for (int64_t column = 0; column < p.k; column += kStep) {
        __syncthreads();
        load_tile(input, p.input, first_row, p.m, column, p.k, is_aligned);
        load_tile(weight, p.weight, first_column, p.n, column, p.k, is_aligned);
        __syncthreads();
        #pragma unroll 4
        for (int w = 0; w < kWords; ++w) {
            uint32_t x[kSide], y[kSide];
            #pragma unroll
            for (int i = 0; i < kSide; ++i) {
                x[i] = input[(a + 16 * i) * kPitch + w];
                y[i] = weight[(b + 16 * i) * kPitch + w];
            }
            #pragma unroll
            for (int i = 0; i < kSide; ++i)
                #pragma unroll
                for (int j = 0; j < kSide; ++j) sum[i][j] = __dp4a(int(x[i]), int(y[j]), sum[i][j]);
        }
        if (kLong && ++num_steps % kLongRun == 0)
            for (int i = 0; i < kSide; ++i)
                for (int j = 0; j < kSide; ++j) total[i][j] += sum[i][j], sum[i][j] = 0;
    }

    int64_t row[kSide], output_column[kSide];
    float scale[kSide];
    #pragma unroll
    for (int i = 0; i < kSide; ++i) {
        row[i] = first_row + a + 16 * i;
        output_column[i] = first_column + b + 16 * i;
        scale[i] = output_column[i] < p.n ? weight_scale(p, output_column[i]) : 0.0f;
    }
    float outliers[kSide][kSide] = {};
    if constexpr (kOutliers) add_outliers<T>(outliers, p, row, output_column, scale);
    T* const output = static_cast<T*>(p.output);
    #pragma unroll
    for (int i = 0; i < kSide; ++i) {
        if (row[i] >= p.m) continue;
        [[maybe_unused]] const float factor = row_factor(p.input_scales, row[i]);
        #pragma unroll
        for (int j = 0; j < kSide; ++j) {
            if (output_column[j] >= p.n) continue;
            const Total all = total[i][j] + sum[i][j];
            T* const to = output + row[i] * p.n + output_column[j];
            if constexpr (std::is_same_v<T, int32_t>) {
                *to = all;
            } else {
                float y = scaled(all, factor, scale[j], load_bias(p, output_column[j]));
                if constexpr (kOutliers) y = __fadd_rn(y, outliers[i][j]);
                *to = T(y);
            }
        }
    }
}

}  // namespace gemm_int8

/// Ascending by construction: thread after thread takes eight columns, and writes behind those before it.
extern "C" __global__ void __launch_bounds__(gemm_int8::kListThreads)
    gemm_int8_list_columns(const __grid_constant__ ListColumnsParams p) {
    using namespace gemm_int8;
    __shared__ int warp_sums[kListThreads / 32];
    wait_for_earlier_kernels();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int num_listed = 0;
    for (int64_t first = 0; first < p.k; first += kListThreads * kListColumns) {
        const int64_t own = first + int64_t(threadIdx.x) * kListColumns;
        uint32_t bits = 0;
        #pragma unroll
        for (int i = 0; i < kListColumns; ++i)
            if (own + i < p.k && p.mask[own + i] != 0) bits |= 1u << i;
        const int num = __popc(bits);
        const int up_to_lane = sum_up_to_lane(num, lane);
        if (lane == 31) warp_sums[warp] = up_to_lane;
        __syncthreads();
        const int of_warp = warp_sums[lane];
        const int up_to_warp = sum_up_to_lane(of_warp, lane);
        const int before = __shfl_sync(0xffffffffu, up_to_warp - of_warp, warp);
        int at = num_listed + before + up_to_lane - num;
        for (int i = 0; i < kListColumns; ++i)
            if (bits >> i & 1) p.columns[at++] = int32_t(own + i);
        num_listed += __shfl_sync(0xffffffffu, up_to_warp, 31);
        __syncthreads();
    }
    if (threadIdx.x == 0) *p.num_columns = num_listed;
}

#define GEMM_INT8_SIMT(name, T, kLong, kOutliers)                     \
    extern "C" __global__ void __launch_bounds__(gemm_int8::kThreads) \
        gemm_int8_##name(const __grid_constant__ GemmInt8Params p) {  \
        gemm_int8::simt<T, kLong, kOutliers>(p);                      \
    }
#define GEMM_INT8_SIMT_OF(T)                          \
    GEMM_INT8_SIMT(simt_##T, T, false, false)         \
    GEMM_INT8_SIMT(simt_long_##T, T, true, false)     \
    GEMM_INT8_SIMT(outliers_simt_##T, T, false, true) \
    GEMM_INT8_SIMT(outliers_simt_long_##T, T, true, true)
GEMM_INT8_SIMT_OF(float32)
GEMM_INT8_SIMT_OF(float16)
GEMM_INT8_SIMT_OF(bfloat16)
GEMM_INT8_SIMT(simt_int32, int32_t, false, false)
