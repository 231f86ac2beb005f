// Largest magnitude of vectors, lanes and warps, on integers: exact, order-free, and a NaN wins over
// everything.
#pragma once
#include "dtype.cuh"

/// A magnitude of T as an unsigned integer orders as the value does, +Inf below every NaN. Sixteen-bit types
/// keep two running maxima in one register (VIMNMX.U16x2).
template <typename T>
struct Magnitude {
    static __device__ __forceinline__ uint32_t of(const uint4& v) {
        const uint32_t a = __vmaxu2(v.x & 0x7fff7fffu, v.y & 0x7fff7fffu);
        return __vmaxu2(a, __vmaxu2(v.z & 0x7fff7fffu, v.w & 0x7fff7fffu));
    }
    static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
    static __device__ __forceinline__ uint32_t to_float_bits(uint32_t m);
};
template <>
__device__ __forceinline__ uint32_t Magnitude<bfloat16>::to_float_bits(uint32_t m) {
    return ::max(m << 16, m & 0xffff0000u);
}
template <>
__device__ __forceinline__ uint32_t Magnitude<float16>::to_float_bits(uint32_t m) {
    return __float_as_uint(__half2float(__ushort_as_half(uint16_t(::max(m & 0xffffu, m >> 16)))));
}
template <>
struct Magnitude<float> {
    static __device__ __forceinline__ uint32_t of(const uint4& v) {
        return ::max(::max(v.x & 0x7fffffffu, v.y & 0x7fffffffu),
                     ::max(v.z & 0x7fffffffu, v.w & 0x7fffffffu));
    }
    static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) { return ::max(a, b); }
    static __device__ __forceinline__ uint32_t to_float_bits(uint32_t m) { return m; }
};

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kNanBits = 0x7fc00000u;

/// What a group of elements is scaled by: the stored absmax, and its reciprocal or 0.
struct Scale {
    float absmax;
    float inverse;  // RN(numerator / absmax); 0 for a group that is zero or holds a NaN or an Inf
};

/// Scales of blocks (numerator 1, smallest normal number) and of int8 rows (numerator 127, smallest 2^-119):
/// a smaller maximum counts as 0; NaN becomes the quiet NaN; NaN and Inf are stored as they are and scale by
/// 0.
template <int kNumerator>
__device__ __forceinline__ Scale scale_of(uint32_t absmax_bits) {
    static_assert(kNumerator == 1 || kNumerator == 127, "one rule for blocks, one for int8 rows");
    constexpr uint32_t kSmallest = kNumerator == 1 ? 0x00800000u : 0x04000000u;
    const bool usable = absmax_bits >= kSmallest && absmax_bits < kInfinityBits;
    // 1 in place of an unusable maximum keeps the division on its fast path
    const float absmax = __uint_as_float(usable ? absmax_bits : 0x3f800000u);
    const float inverse = kNumerator == 1 ? __frcp_rn(absmax) : __fdiv_rn(float(kNumerator), absmax);
    const uint32_t stored = absmax_bits < kSmallest       ? 0u
                            : absmax_bits > kInfinityBits ? kNanBits
                                                          : absmax_bits;
    return {__uint_as_float(stored), usable ? inverse : 0.0f};
}

/// Largest of the magnitudes of a warp; every lane gets it.
__device__ __forceinline__ uint32_t max_over_warp(uint32_t bits) {
    #pragma unroll
    for (int d = 1; d < 32; d *= 2) bits = ::max(bits, __shfl_xor_sync(0xffffffffu, bits, d));
    return bits;
}

/// Largest of the magnitudes of a CTA; every thread gets it. `shared` [kThreads / 32] is unused before.
template <int kThreads>
__device__ __forceinline__ uint32_t max_over_cta(uint32_t bits, uint32_t* shared) {
    constexpr int kWarps = kThreads / 32;
    static_assert(kWarps <= 32 && 32 % kWarps == 0, "one lane of the last step for each warp");
    bits = max_over_warp(bits);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = bits;
    __syncthreads();
    return max_over_warp(shared[threadIdx.x % kWarps]);
}
