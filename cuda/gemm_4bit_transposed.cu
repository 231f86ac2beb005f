// output[m, k] = input[m, n] * dequantize(weight)[n, k]: the gradient of a 4-bit linear layer's input, for few tokens.
// Codes in place, two to a byte, absmax per block: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
//
// Launch: first a kernel that multiplies, then gemm_4bit_transposed_sum_{dtype}; m, n, k > 0. Each CTA multiplies one
// slab of 256 columns by one part of the rows; `partial` [splits, m, k] takes the parts' sums, which the second kernel
// adds in their order. Weights are rounded to T as dequantize_4bit rounds them.
//
//   entry point                                 threads  grid                             dynamic shared
//   gemm_4bit_transposed_mma_{nested_}{dtype}_8     256  ceil_div(k, 256) * splits                32768
//   gemm_4bit_transposed_mma_{nested_}{dtype}_16    256  ceil_div(k, 256) * splits                65536
//       capability >= 8.0, float16 or bfloat16, k % 32 == 0, packed on 16 bytes; any m by passes over the weight
//   gemm_4bit_transposed_simt_{nested_}{dtype}      256  ceil_div(k, 256) * splits                    0
//   gemm_4bit_transposed_sum_{dtype}                256  min(ceil_div(m * k, 256), 2^31 - 1)          0
#include "gemm_4bit_transposed.cuh"

namespace transposed {

constexpr int kSlab = 256;  // columns of a CTA
constexpr int kStep = 16;   // rows that a warp multiplies at once
constexpr int kMmaThreads = 256;

/// The slab and the rows of this CTA. Neighbouring CTAs share rows, whose memory is neighbouring too.
struct Share {
    int64_t first_column, first_row, end_row;
    int split;

    __device__ __forceinline__ explicit Share(const Gemm4bitTransposedParams& p) {
        const int num_slabs = int((p.k + kSlab - 1) / kSlab), cta = blockIdx.x;
        split = cta / num_slabs;
        first_column = int64_t(cta % num_slabs) * kSlab;
        first_row = split * p.rows_per_split;
        end_row = min(first_row + p.rows_per_split, p.n);
    }
};

/// Line b of the table holds the two values of byte b, high nibble first, sixteen times: half a warp looks up sixteen
/// different bytes without a conflict.
__device__ __forceinline__ void fill_pair_table(int codebook, float2* table) {
    for (int i = threadIdx.x; i < 256 * 16; i += blockDim.x) {
        const uint32_t byte = i / 16;
        table[i] = with_codebook(codebook, [&]<typename Codebook>(Codebook) {
            return make_float2(select_value<Codebook>(byte >> 4), select_value<Codebook>(byte & 15));
        });
    }
}

/// What one lane brings for a step of 16 rows: 16 bytes of codes and a block scale of four rows, and the inputs of one
/// token of each tile.
template <bool kNested, int kTokenTiles>
struct Step {
    uint4 codes[4];
    typename BlockScales<kNested>::Raw scale[4];
    uint2 input[kTokenTiles];
};

}  // namespace transposed

/// Lane (g, t) of a warp decodes columns 32 g .. of rows 4 t .. of each step. Product j takes from it byte j of the four
/// rows: columns 32 g + 2 j and the next, rows g and g + 8 of the [16, 16] operand, and its rows of the weight are the
/// operand's columns. So a decoded pair goes into two registers, each with the same column of two rows.
template <typename T, bool kNested, int kTokenTiles, int kAhead>
__device__ __forceinline__ void gemm_4bit_transposed_mma(const Gemm4bitTransposedParams& p) {
    using namespace transposed;
    constexpr int kWarps = kMmaThreads / 32, kTokens = 8 * kTokenTiles, kBytes = 16;
    constexpr int kSums = kBytes * kTokenTiles * 4;  // of a lane
    __shared__ float map[256];
    float2* const table = reinterpret_cast<float2*>(dynamic_shared());
    float* const areas = dynamic_shared();  // takes the table's place at the end
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const Share share(p);
    const int64_t column = share.first_column + 32 * g;
    const bool has_columns = column < p.k;  // k % 32 == 0: all or none

    const BlockScales<kNested> scales(p, 0, map);
    fill_pair_table(p.codebook, table);
    __syncthreads();
    const float2* const lane_table = table + lane % 16;

    for (int64_t first_token = 0; first_token < p.m; first_token += kTokens) {
        const auto load = [&](int64_t row, Step<kNested, kTokenTiles>& step) {
            #pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t r = row + 4 * t + i;
                const bool exists = has_columns && r < share.end_row;
                step.codes[i] = make_uint4(0, 0, 0, 0);
                step.scale[i] = 0;
                if (exists) {
                    step.codes[i] =
                        load_streaming(reinterpret_cast<const uint4*>(p.packed + (r * p.k + column) / 2));
                    step.scale[i] = scales.load(r * p.k + column);
                }
            }
            #pragma unroll
            for (int i = 0; i < kTokenTiles; ++i) {
                const int64_t token = first_token + 8 * i + g;
                uint32_t bits[4] = {};
                if (token < p.m) {
                    const uint16_t* const from =
                        static_cast<const uint16_t*>(p.input) + token * p.n + row + 4 * t;
                    #pragma unroll
                    for (int j = 0; j < 4; ++j)
                        if (row + 4 * t + j < share.end_row) bits[j] = __ldg(from + j);
                }
                step.input[i] = make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
            }
        };

        float sum[kBytes][kTokenTiles][4] = {};
        int64_t row = share.first_row + warp * kStep;
        Step<kNested, kTokenTiles> ring[kAhead];
        #pragma unroll
        for (int a = 0; a < kAhead; ++a) load(row + a * kWarps * kStep, ring[a]);
        const auto multiply = [&](Step<kNested, kTokenTiles>& step) {
            float scale[4];
            #pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t r = row + 4 * t + i;
                scale[i] =
                    has_columns && r < share.end_row ? scales.decode(step.scale[i], r * p.k + column) : 0.0f;
            }
            const Step<kNested, kTokenTiles> here = step;
            load(row + kAhead * kWarps * kStep, step);
            #pragma unroll
            for (int j = 0; j < kBytes; ++j) {
                float2 v[4];
                #pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t words[4] = {here.codes[i].x, here.codes[i].y, here.codes[i].z,
                                               here.codes[i].w};
                    const float2 pair = lane_table[(words[j / 4] >> 8 * (j % 4) & 255) * 16];
                    v[i] = make_float2(__fmul_rn(pair.x, scale[i]), __fmul_rn(pair.y, scale[i]));
                }
                const uint32_t weights[4] = {pack_pair<T>(v[0].x, v[1].x), pack_pair<T>(v[0].y, v[1].y),
                                             pack_pair<T>(v[2].x, v[3].x), pack_pair<T>(v[2].y, v[3].y)};
                #pragma unroll
                for (int i = 0; i < kTokenTiles; ++i)
                    mma_m16n8k16<std::is_same_v<T, bfloat16>>(sum[j][i], weights, here.input[i].x,
                                                              here.input[i].y);
            }
            row += kWarps * kStep;
        };
        #pragma unroll 1
        while (row < share.end_row)
            #pragma unroll
            for (int a = 0; a < kAhead; ++a)
                if (a == 0 || row < share.end_row) multiply(ring[a]);

        // The warps' sums are added in pairs that halve their number: the order is fixed.
        const auto area = [&](int w) { return areas + w * (kSums * 32) + lane; };
        #pragma unroll 1
        for (int half = kWarps / 2; half > 0; half /= 2) {
            __syncthreads();
            if (warp >= half && warp < 2 * half)
                #pragma unroll
                for (int i = 0; i < kSums; ++i)
                    area(warp - half)[i * 32] = sum[i / (4 * kTokenTiles)][i / 4 % kTokenTiles][i % 4];
            __syncthreads();
            if (warp < half)
                #pragma unroll
                for (int i = 0; i < kSums; ++i)
                    sum[i / (4 * kTokenTiles)][i / 4 % kTokenTiles][i % 4] += area(warp)[i * 32];
        }
        if (warp == 0 && has_columns)
            #pragma unroll
            for (int i = 0; i < kTokenTiles * 2; ++i) {
                const int64_t token = first_token + i / 2 * 8 + 2 * t + i % 2;
                if (token >= p.m) break;
                float* const to = p.partial + (int64_t(share.split) * p.m + token) * p.k + column;
                #pragma unroll
                for (int j = 0; j < kBytes; ++j)
                    reinterpret_cast<float2*>(to)[j] =
                        make_float2(sum[j][i / 2][i % 2], sum[j][i / 2][2 + i % 2]);
            }
        if (first_token + kTokens < p.m) {
            __syncthreads();
            fill_pair_table(p.codebook, table);
            __syncthreads();
        }
    }
}

/// Every input type, shape and alignment: a thread computes one column for four tokens at a time.
template <typename T, bool kNested>
__device__ __forceinline__ void gemm_4bit_transposed_simt(const Gemm4bitTransposedParams& p) {
    using namespace transposed;
    constexpr int kTokens = 4;
    __shared__ float values[16], map[256];
    const Share share(p);
    const int64_t column = share.first_column + threadIdx.x;
    const BlockScales<kNested> scales(p, 0, map);
    if (threadIdx.x < 16)
        values[threadIdx.x] = with_codebook(
            p.codebook, [&]<typename Codebook>(Codebook) { return select_value<Codebook>(threadIdx.x); });
    __syncthreads();
    if (column >= p.k) return;
    for (int64_t first_token = 0; first_token < p.m; first_token += kTokens) {
        float sum[kTokens] = {};
        #pragma unroll 2
        for (int64_t row = share.first_row; row < share.end_row; ++row) {
            const int64_t element = row * p.k + column;
            const uint32_t code = __ldg(p.packed + element / 2) >> nibble_shift(int(element % 2)) & 15;
            const float weight = __fmul_rn(values[code], scales.decode(scales.load(element), element));
            #pragma unroll
            for (int i = 0; i < kTokens; ++i)
                if (first_token + i < p.m)
                    sum[i] = fmaf(float(static_cast<const T*>(p.input)[(first_token + i) * p.n + row]),
                                  float(T(weight)), sum[i]);
        }
        #pragma unroll
        for (int i = 0; i < kTokens; ++i)
            if (first_token + i < p.m)
                p.partial[(int64_t(share.split) * p.m + first_token + i) * p.k + column] = sum[i];
    }
}

/// Adds the parts in their order and rounds once.
template <typename T>
__device__ __forceinline__ void gemm_4bit_transposed_sum(const Gemm4bitTransposedParams& p) {
    const int64_t num = p.m * p.k;
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < num;
         i += int64_t(gridDim.x) * blockDim.x) {
        float sum = 0.0f;
        for (int split = 0; split < p.num_splits; ++split) sum += p.partial[split * num + i];
        static_cast<T*>(p.output)[i] = T(sum);
    }
}

#define GEMM_4BIT_TRANSPOSED_MMA(name, T, kNested, kTokenTiles, kAhead)                   \
    extern "C" __global__ void __launch_bounds__(transposed::kMmaThreads, 1)              \
        gemm_4bit_transposed_##name(const __grid_constant__ Gemm4bitTransposedParams p) { \
        gemm_4bit_transposed_mma<T, kNested, kTokenTiles, kAhead>(p);                     \
    }
#define GEMM_4BIT_TRANSPOSED_MMA_OF(T, name, kNested)          \
    GEMM_4BIT_TRANSPOSED_MMA(mma_##name##_8, T, kNested, 1, 2) \
    GEMM_4BIT_TRANSPOSED_MMA(mma_##name##_16, T, kNested, 2, 1)
GEMM_4BIT_TRANSPOSED_MMA_OF(float16, float16, false)
GEMM_4BIT_TRANSPOSED_MMA_OF(float16, nested_float16, true)
GEMM_4BIT_TRANSPOSED_MMA_OF(bfloat16, bfloat16, false)
GEMM_4BIT_TRANSPOSED_MMA_OF(bfloat16, nested_bfloat16, true)

#define GEMM_4BIT_TRANSPOSED_SIMT(T, name)                                                            \
    extern "C" __global__ void __launch_bounds__(256)                                                 \
        gemm_4bit_transposed_simt_##name(const __grid_constant__ Gemm4bitTransposedParams p) {        \
        gemm_4bit_transposed_simt<T, false>(p);                                                       \
    }                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256)                                                 \
        gemm_4bit_transposed_simt_nested_##name(const __grid_constant__ Gemm4bitTransposedParams p) { \
        gemm_4bit_transposed_simt<T, true>(p);                                                        \
    }                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256)                                                 \
        gemm_4bit_transposed_sum_##name(const __grid_constant__ Gemm4bitTransposedParams p) {         \
        gemm_4bit_transposed_sum<T>(p);                                                               \
    }
GEMM_4BIT_TRANSPOSED_SIMT(float, float32)
GEMM_4BIT_TRANSPOSED_SIMT(float16, float16)
GEMM_4BIT_TRANSPOSED_SIMT(bfloat16, bfloat16)
