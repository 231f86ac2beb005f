// Arguments of the kernels of gemm_4bit_transposed.
#pragma once
#include "gemm_4bit.cuh"
#include "pack.cuh"

/// Arguments of all kernels.
struct Gemm4bitTransposedParams {
    const void* input;           // [m, n]                    T
    const uint8_t* packed;       // [ceil_div(n * k, 2)]      element i = row * k + column; even: high nibble
    const void* absmax;          // [ceil_div(n * k, block)]  float, or uint8_t codes when nested
    const float* absmax_scale;   // [ceil_div(blocks, 256)]   of the codes; null: absmax is not nested
    const float* absmax_offset;  // [1]                       nested only
    const float* absmax_codebook;  // [256]                     nested only; null: the signed dynamic map
    float* partial;                // [splits, m, k]            scratch, all written before it is read
    void* output;                  // [m, k]                    T
    int64_t m;                     //
    int64_t n;                     //
    int64_t k;                     //
    int64_t rows_per_split;        // a multiple of 16
    int32_t block_shift;           // log2 of the block size, 5..12
    int32_t codebook;              // 0 NF4, 1 FP4, 2 AF4
    int32_t num_splits;            //
};
static_assert(sizeof(Gemm4bitTransposedParams) == 112, "keep in step with the Rust mirror");
