// The bias of a product, of any float dtype. The arguments are fields of the kernels' structs: bias, bias_dtype.
#pragma once
#include "dtype.cuh"

/// bias[row] as float32, 0 without a bias.
template <typename Params, typename Row>
__device__ __forceinline__ float load_bias(const Params& p, Row row) {
    if (p.bias == nullptr) return 0.0f;
    if (p.bias_dtype == 0) return static_cast<const float*>(p.bias)[row];
    if (p.bias_dtype == 1) return float(static_cast<const float16*>(p.bias)[row]);
    return float(static_cast<const bfloat16*>(p.bias)[row]);
}
