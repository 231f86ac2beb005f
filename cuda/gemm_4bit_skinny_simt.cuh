// Skinny 4-bit GEMM in float32 arithmetic: every input type, shape and alignment, every architecture.
// Codes in place, two to a byte, absmax per block: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
#pragma once
#include "gemm_4bit_skinny.cuh"
#include "pack.cuh"

namespace skinny_simt {

constexpr int kThreads = 256;
constexpr int kRows = 8;     // of a CTA; every warp computes all of them over its part of K
constexpr int kColumns = 8;  // of a lane in one step: one word of codes
constexpr int kStep = kThreads * kColumns;

/// Sums of kNum values over the lanes of a warp: lane l gets the sum of v[l % kNum]. Halving the number of
/// values at each step costs kNum - 1 + log2(32 / kNum) shuffles instead of 5 kNum.
template <int kNum>
__device__ __forceinline__ float sum_over_lanes(float (&v)[kNum], int lane) {
    static_assert(kNum <= 32 && (kNum & (kNum - 1)) == 0, "one lane for each sum");
    #pragma unroll
    for (int d = 1; d < 32; d *= 2)
        if (d < kNum) {
            const bool odd = lane & d;
            #pragma unroll
            for (int i = 0; i < kNum; i += 2 * d) {
                const float keep = odd ? v[i + d] : v[i], send = odd ? v[i] : v[i + d];
                v[i] = keep + __shfl_xor_sync(0xffffffffu, send, d);
            }
        } else {
            v[0] += __shfl_xor_sync(0xffffffffu, v[0], d);
        }
    return v[0];
}

/// The codes of elements first .. first + 7 as an aligned word would hold them, whatever the alignment and
/// parity; bytes behind element `last` are not read.
__device__ __forceinline__ uint32_t load_codes(const uint8_t* packed, int64_t first, int64_t last) {
    uint64_t nibbles = 0;  // element order, lowest first
    #pragma unroll
    for (int i = 0; i < 5; ++i) {
        const int64_t byte = first / 2 + i;
        if (byte > last / 2) break;
        const uint32_t v = packed[byte];
        nibbles |= uint64_t(v >> 4 | (v & 15) << 4) << 8 * i;
    }
    const uint32_t eight = uint32_t(nibbles >> (first % 2 * 4));
    return (eight & 0x0f0f0f0fu) << 4 | (eight >> 4 & 0x0f0f0f0fu);
}

/// Eight inputs of a token from `column` on, zero from k on. kAligned promises whole, aligned vectors.
template <bool kAligned, typename T>
__device__ __forceinline__ void load_input(const T* token, int64_t column, int64_t k, float (&x)[kColumns]) {
    if constexpr (kAligned) {
        #pragma unroll
        for (int i = 0; i < kColumns / kPerVector<T>; ++i) {
            float v[kPerVector<T>];
            unpack<T>(__ldg(reinterpret_cast<const uint4*>(token + column) + i), v);
            #pragma unroll
            for (int j = 0; j < kPerVector<T>; ++j) x[i * kPerVector<T> + j] = v[j];
        }
    } else {
        #pragma unroll
        for (int i = 0; i < kColumns; ++i) x[i] = column + i < k ? float(token[column + i]) : 0.0f;
    }
}

}  // namespace skinny_simt

/// One CTA computes eight rows. kAligned: K is a multiple of 8, packed 4-byte and input 16-byte aligned, so
/// that eight columns are one word of codes in one block.
template <typename T, bool kNested, int kTokens, bool kAligned>
__device__ __forceinline__ void gemm_4bit_skinny_simt(const Gemm4bitSkinnyParams& p) {
    using namespace skinny_simt;
    __shared__ float values[16 * 32];  // [code][lane]: 32 lanes look up different codes without a conflict
    __shared__ float map[256];
    __shared__ float sums[kThreads / 32][kRows * kTokens];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t first_row = int64_t(blockIdx.x) * kRows;

    const BlockScales<kNested> scales(p, 0, map);
    with_codebook(p.codebook, [&]<typename Codebook>(Codebook) {
        for (int i = threadIdx.x; i < 16 * 32; i += kThreads) values[i] = select_value<Codebook>(i / 32);
    });
    __syncthreads();
    const uint8_t* const lane_values = reinterpret_cast<const uint8_t*>(values + lane);
    const auto value = [&](uint32_t word, int i) {  // of the code of element i
        const int shift = nibble_shift(i) - 7;      // 128 bytes to a code
        return *reinterpret_cast<const float*>(lane_values +
                                               ((shift < 0 ? word << -shift : word >> shift) & 0x780));
    };

    for (int64_t first_token = 0; first_token < p.m; first_token += kTokens) {
        float sum[kRows * kTokens] = {};  // [row][token]
        #pragma unroll 1
        for (int64_t column = threadIdx.x * kColumns; column < p.k; column += kStep) {
            float x[kTokens][kColumns] = {};
            #pragma unroll
            for (int i = 0; i < kTokens; ++i)
                if (first_token + i < p.m)
                    load_input<kAligned>(static_cast<const T*>(p.input) + (first_token + i) * p.k, column,
                                         p.k, x[i]);
            const int64_t last_column = min(column + kColumns, p.k) - 1;
            uint32_t codes[kRows];
            typename BlockScales<kNested>::Raw raw[kRows], raw_last[kRows];
            #pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int64_t row = min(first_row + r, p.n - 1) * p.k;  // rows behind the last repeat it
                if constexpr (kAligned) {
                    codes[r] =
                        load_streaming(reinterpret_cast<const uint32_t*>(p.packed + (row + column) / 2));
                } else {
                    codes[r] = load_codes(p.packed, row + column, row + last_column);
                    raw_last[r] = scales.load(row + last_column);
                }
                raw[r] = scales.load(row + column);
            }
            #pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int64_t element = min(first_row + r, p.n - 1) * p.k + column;
                const float scale = scales.decode(raw[r], element);
                int num_first = kColumns;  // columns in the first block
                float last_scale = scale;
                if constexpr (!kAligned) {
                    num_first = int(min(scales.left_in_block(element), int64_t(kColumns)));
                    last_scale = scales.decode(raw_last[r], element + last_column - column);
                }
                float product[kTokens] = {};
                #pragma unroll
                for (int i = 0; i < kColumns; ++i) {
                    const float v = value(codes[r], i);
                    float weight = v;
                    if constexpr (!kAligned)
                        weight = i > last_column - column ? 0.0f : v * (i < num_first ? scale : last_scale);
                    #pragma unroll
                    for (int j = 0; j < kTokens; ++j) product[j] = fmaf(weight, x[j][i], product[j]);
                }
                #pragma unroll
                for (int j = 0; j < kTokens; ++j)
                    sum[r * kTokens + j] = kAligned ? fmaf(scale, product[j], sum[r * kTokens + j])
                                                    : sum[r * kTokens + j] + product[j];
            }
        }
        const float warp_sum = sum_over_lanes(sum, lane);
        if (lane < kRows * kTokens) sums[warp][lane] = warp_sum;
        __syncthreads();
        const int i = threadIdx.x;
        const int64_t row = first_row + i / kTokens, token = first_token + i % kTokens;
        if (i < kRows * kTokens && row < p.n && token < p.m) {
            float total = load_bias(p, row);
            for (int w = 0; w < kThreads / 32; ++w) total += sums[w][i];
            static_cast<T*>(p.output)[token * p.n + row] = T(total);
        }
        __syncthreads();
    }
}
