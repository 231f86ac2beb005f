// From the exact sum of an int8 product to its output: scales and bias in float32, rounded once, in the order of
// docs/NUMERICS.md, section 4.3. Row scales are the largest magnitudes that codes of 127 stand for.
#pragma once
#include "dtype.cuh"

/// What an input's scale is multiplied by, once a row: 1 / 127^2, both operands' codes being 127ths. 1 without scales.
__device__ __forceinline__ float row_factor(const float* input_scales, int64_t row) {
    return input_scales == nullptr ? 1.0f
                                   : __fmul_rn(__ldg(input_scales + row), __uint_as_float(0x38820610u));
}

/// The output before its rounding: `factor` of the row, scale and bias of the column.
template <typename Sum>
__device__ __forceinline__ float scaled(Sum sum, float factor, float weight_scale, float bias) {
    return __fmaf_rn(__fmul_rn(float(sum), factor), weight_scale, bias);
}
