// Largest magnitude of vectors, lanes and warps, on integers: exact, order-free, and a NaN wins over
// everything.
#pragma once
#include "dtype.cuh"

/// A magnitude of T as an unsigned integer orders as the value does, +Inf below every NaN. Sixteen-bit types
/// keep two running maxima in one register.
template <typename T>
struct Magnitude;
template <>
struct Magnitude<bfloat16> {
    static __device__ __forceinline__ uint32_t of(const uint4& v) {
        const uint32_t a = __vmaxu2(v.x & 0x7fff7fffu, v.y & 0x7fff7fffu);
        return __vmaxu2(a, __vmaxu2(v.z & 0x7fff7fffu, v.w & 0x7fff7fffu));
    }
    static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
    static __device__ __forceinline__ uint32_t to_float_bits(uint32_t m) {
        return ::max(m << 16, m & 0xffff0000u);
    }
};
template <>
struct Magnitude<float16> {
    /// HMNMX2 takes the magnitude of a float16 operand for nothing; of a bfloat16 it does not.
    static __device__ __forceinline__ uint32_t of(const uint4& v) {
        const __half2 m = __hmax2_nan(__hmax2_nan(magnitudes(v.x), magnitudes(v.y)),
                                      __hmax2_nan(magnitudes(v.z), magnitudes(v.w)));
        return *reinterpret_cast<const uint32_t*>(&m);
    }
    static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
    static __device__ __forceinline__ uint32_t to_float_bits(uint32_t m) {
        return __float_as_uint(__half2float(__ushort_as_half(uint16_t(::max(m & 0xffffu, m >> 16)))));
    }

 private:
    static __device__ __forceinline__ __half2 magnitudes(const uint32_t& w) {
        return __habs2(*reinterpret_cast<const __half2*>(&w));
    }
};
template <>
struct Magnitude<float> {
    static __device__ __forceinline__ uint32_t of(const uint4& v) {
        return ::max(::max(v.x & 0x7fffffffu, v.y & 0x7fffffffu),
                     ::max(v.z & 0x7fffffffu, v.w & 0x7fffffffu));
    }
    static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) { return ::max(a, b); }
    static __device__ __forceinline__ uint32_t to_float_bits(uint32_t m) { return m; }
};

/// x, which is the same in all lanes, as the compiler then knows: no shuffle behind a branch on it needs a
/// vote.
template <typename T>
__device__ __forceinline__ T uniform(T x) {
    return T(__shfl_sync(0xffffffffu, int(x), 0));
}

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
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xffffffffu, bits);
#else
    #pragma unroll
    for (int d = 1; d < 32; d *= 2) bits = ::max(bits, __shfl_xor_sync(0xffffffffu, bits, d));
    return bits;
#endif
}

/// The same for the sum.
__device__ __forceinline__ uint32_t sum_over_warp(uint32_t value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(0xffffffffu, value);
#else
    #pragma unroll
    for (int d = 1; d < 32; d *= 2) value += __shfl_xor_sync(0xffffffffu, value, d);
    return value;
#endif
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

/// Sums of two values over a CTA, in place. `shared` [2 * kThreads / 32] is unused before.
template <int kThreads>
__device__ __forceinline__ void sum_over_cta(uint32_t (&value)[2], uint32_t* shared) {
    constexpr int kWarps = kThreads / 32;
    static_assert(kWarps <= 32, "one lane for each warp");
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t sum = sum_over_warp(value[i]);
        if (lane == 0) shared[i * kWarps + warp] = sum;
    }
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 2; ++i) value[i] = sum_over_warp(lane < kWarps ? shared[i * kWarps + lane] : 0);
}
