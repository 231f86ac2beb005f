// What every kernel that multiplies 8-bit codes needs: arguments, scales, the rounding of outputs, unquantized columns.
// Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, arXiv:2208.07339, section 2.
#pragma once
#include <type_traits>
#include "bias.cuh"
#include "gemm_int8_scales.cuh"

/// Arguments of the kernels for all GPUs; mirrored by `ops::gemm_int8::GemmInt8Params`.
struct GemmInt8Params {
    const int8_t* input;          // [m, k]
    const int8_t* weight;         // [n, k]
    const float* input_scales;    // [m]     null: the factor of every row is 1
    const float* weight_scales;   // [n], or [1] where the stride is 0; null: 1
    const void* bias;             // [n]     of bias_dtype; null: 0
    void* output;                 // [m, n]  T
    const void* outlier_input;    // [m, k]  T; this and what follows: kernels with outliers alone
    const int32_t* outliers;      // [num_outliers]  columns, ascending
    const int32_t* num_outliers;  // [1]
    int64_t m, n, k;
    int32_t weight_scale_stride;  // 1, or 0 for one scale of all rows
    int32_t bias_dtype;           // 0 float32, 1 float16, 2 bfloat16
};
static_assert(sizeof(GemmInt8Params) == 104, "keep in step with the Rust mirror");

namespace gemm_int8 {

constexpr float kInverse127 = 0x1.020408p-7f;  // RN(1 / 127)

/// Of row n of the weight.
template <typename Params>
__device__ __forceinline__ float weight_scale(const Params& p, int64_t n) {
    return p.weight_scales ? p.weight_scales[n * p.weight_scale_stride] : 1.0f;
}

/// What a code of the weight stands for, as an operand of type T.
template <typename T>
__device__ __forceinline__ float decoded(int8_t code, float scale) {
    return float(T(__fmul_rn(__fmul_rn(float(code), scale), kInverse127)));
}

}  // namespace gemm_int8
