// Arguments of the kernels of gemm_4bit_skinny.
#pragma once
#include "gemm_4bit.cuh"

/// Arguments of gemm_4bit_skinny; mirrored by `ops::gemm_4bit::Gemm4bitSkinnyParams`.
struct Gemm4bitSkinnyParams {
    const void* input;  // [m, k]                     T
    const uint8_t*
        packed;  // [ceil_div(n * k, 2)]       element i = row * k + column; an even one in the high nibble
    const void* absmax;            // [ceil_div(n * k, block)]   float, or uint8_t codes when nested
    const float* absmax_scale;     // [ceil_div(blocks, 256)]    of the codes; null: absmax is not nested
    const float* absmax_offset;    // [1]                        nested only
    const float* absmax_codebook;  // [256]                      nested only; null: the signed dynamic map
    const void* bias;              // [n]                        bias_dtype, or null
    void* output;                  // [m, n]                     T
    int64_t m;
    int64_t n;
    int64_t k;
    int32_t block_shift;      // log2 of the block size, 5..12
    int32_t codebook;         // 0 NF4, 1 FP4, 2 AF4
    int32_t bias_dtype;       // 0 float32, 1 float16, 2 bfloat16
    int32_t tiles_per_cta;    // mma kernel: tiles of 16 rows of a CTA, 0..3 ..
    int32_t num_larger_ctas;  // .. and how many CTAs, the first ones, have one tile more
};
static_assert(sizeof(Gemm4bitSkinnyParams) == 112, "keep in step with the Rust mirror");
