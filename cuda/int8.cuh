// int8 codes of elements that share a scale: what the kernels of rows, columns and tensors share.
// Dettmers et al., LLM.int8(), arXiv:2208.07339, section 2.
//
// code = rint(RN(x * RN(127 / absmax))), NUMERICS 4.1.
#pragma once
#include "dtype.cuh"
#include "pack.cuh"
#include "reduce.cuh"

/// A word whose low byte is the code of x. Adding 1.5 * 2^23 rounds half to even and leaves the code there.
__device__ __forceinline__ uint32_t rounded_to_low_byte(float x, float inverse) {
    return __float_as_uint(__fadd_rn(__fmul_rn(x, inverse), 12582912.0f));
}

/// Codes of four elements in order. An inverse of 0 gives 0, whatever the elements are.
__device__ __forceinline__ uint32_t quantize_int8(float a, float b, float c, float d, float inverse) {
    const uint32_t word = gather_bytes<0>(rounded_to_low_byte(a, inverse), rounded_to_low_byte(b, inverse),
                                          rounded_to_low_byte(c, inverse), rounded_to_low_byte(d, inverse));
    return inverse == 0.0f ? 0u : word;
}

/// Codes of one vector that shares a scale.
template <typename T>
__device__ __forceinline__ void quantize_vector(const uint4& raw, float inverse,
                                                uint32_t (&word)[kPerVector<T> / 4]) {
    float x[kPerVector<T>];
    unpack<T>(raw, x);
    #pragma unroll
    for (int q = 0; q < kPerVector<T> / 4; ++q)
        word[q] = quantize_int8(x[4 * q], x[4 * q + 1], x[4 * q + 2], x[4 * q + 3], inverse);
}

/// Whether vectors of `input` and the codes of as many elements are all aligned, rows of `columns` elements
/// included.
template <typename T>
__device__ __forceinline__ bool vectors_are_aligned(const void* input, const void* codes, int64_t columns) {
    return (reinterpret_cast<uintptr_t>(input) | reinterpret_cast<uintptr_t>(codes) * sizeof(T)) % 16 == 0 &&
           columns % kPerVector<T> == 0;
}

/// Largest of the magnitudes that kernels before this one have left; every thread gets it.
template <int kThreads>
__device__ __forceinline__ uint32_t max_of_partials(const uint32_t* partials, int num, uint32_t* shared) {
    uint32_t bits = 0;
    for (int i = threadIdx.x; i < num; i += kThreads) bits = ::max(bits, partials[i]);
    return max_over_cta<kThreads>(bits, shared);
}
