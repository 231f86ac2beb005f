// The words of CUDA that the kernels use, for a C++ compiler: every thread of a CTA is a coroutine.
//
// Warp collectives and barriers are the only points where a thread yields. Not modelled: memory ordering, registers, time.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#undef __align__
#undef __device__
#undef __forceinline__
#undef __global__
#undef __launch_bounds__
#undef __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

namespace emulation {

struct Index {
    unsigned x, y;
};
Index thread_index();
Index block_index();
Index grid_size();
Index cta_size();

/// What each lane of the warp has brought, once all have.
const uint64_t* exchange(uint64_t value);
/// How many threads of the CTA have brought true, once all have come.
int count_over_cta(bool value);

template <typename T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8, "a shuffle moves one register or two");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define gridDim (emulation::grid_size())
#define blockDim (emulation::cta_size())

// ------------------------------------------------------------------------------------------- collectives

inline void __syncthreads() {
    emulation::count_over_cta(false);
}
inline int __syncthreads_count(bool value) {
    return emulation::count_over_cta(value);
}
inline bool __any_sync(unsigned, bool value) {
    const uint64_t* const votes = emulation::exchange(value);
    return std::any_of(votes, votes + 32, [](uint64_t vote) { return vote != 0; });
}
inline bool __syncthreads_and(bool value) {
    return emulation::count_over_cta(!value) == 0;
}
inline void __syncwarp() {
    emulation::exchange(0);
}
template <typename T>
T __shfl_sync(unsigned, T value, int source, int width = 32) {
    const int lane = int(threadIdx.x % 32);
    const int from = (lane & ~(width - 1)) | (source & (width - 1));
    return emulation::from_bits<T>(emulation::exchange(emulation::to_bits(value))[from]);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
    const int lane = int(threadIdx.x % 32);
    const uint64_t* const all = emulation::exchange(emulation::to_bits(value));
    return emulation::from_bits<T>(all[lane < distance ? lane : lane - distance]);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::from_bits<T>(emulation::exchange(emulation::to_bits(value))[(threadIdx.x % 32) ^ mask]);
}

// -------------------------------------------------------------------------------------------- arithmetic

inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __fsub_rn(float a, float b) {
    return a - b;
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
inline float __frcp_rn(float a) {
    return 1.0f / a;
}
inline double __dadd_rn(double a, double b) {
    return a + b;
}
inline double __ddiv_rn(double a, double b) {
    return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
    return std::fma(a, b, c);
}
/// a * b + c rounded down, for an integer c whose neighbours are integers.
inline float __fmaf_rd(float a, float b, float c) {
    return float(double(c) + std::floor(double(a) * double(b)));
}
inline float __double2float_rn(double x) {
    return float(x);
}
inline uint32_t __float_as_uint(float x) {
    return emulation::from_bits<uint32_t>(emulation::to_bits(x));
}
inline int __float_as_int(float x) {
    return emulation::from_bits<int>(emulation::to_bits(x));
}
inline float __uint_as_float(uint32_t bits) {
    return emulation::from_bits<float>(bits);
}
inline long long __double_as_longlong(double x) {
    return emulation::from_bits<long long>(emulation::to_bits(x));
}
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) {
    return std::max(a & 0xffffu, b & 0xffffu) | std::max(a >> 16, b >> 16) << 16;
}
/// Bytes of b:a picked by four selectors; bit 3 of a selector replicates the sign of its byte.
inline uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selectors) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t picked = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned selector = selectors >> (4 * i) & 15;
        uint32_t byte = uint32_t(bytes >> (8 * (selector & 7)) & 255);
        if (selector & 8) byte = byte & 128 ? 255 : 0;
        picked |= byte << (8 * i);
    }
    return picked;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selectors) {
    return pick_bytes(a, b, selectors & 0x7777);
}
/// c plus the products of the bytes of a and b.
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
    return c;
}
/// The same with signs.
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c += int8_t(a >> i) * int8_t(b >> i);
    return c;
}
inline int __popc(uint32_t x) {
    return __builtin_popcount(x);
}
inline int __clz(uint32_t x) {
    return x ? __builtin_clz(x) : 32;
}
inline int __clzll(uint64_t x) {
    return x ? __builtin_clzll(x) : 64;
}
inline int __ffsll(int64_t x) {
    return __builtin_ffsll(x);
}
inline int min(int a, int b) {
    return a < b ? a : b;
}
inline int max(int a, int b) {
    return a > b ? a : b;
}
inline uint32_t min(uint32_t a, uint32_t b) {
    return a < b ? a : b;
}
inline uint32_t max(uint32_t a, uint32_t b) {
    return a > b ? a : b;
}
inline int64_t min(int64_t a, int64_t b) {
    return a < b ? a : b;
}
inline int64_t max(int64_t a, int64_t b) {
    return a > b ? a : b;
}

inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    const auto one = [](__half x, __half y, __half z) {
        return __float2half_rn(std::fma(__half2float(x), __half2float(y), __half2float(z)));
    };
    return {one(a.x, b.x, c.x), one(a.y, b.y, c.y)};
}

// ------------------------------------------------------------------------------------------------ memory

/// Threads take turns, so nothing comes between.
inline uint32_t atomicMax(uint32_t* p, uint32_t value) {
    const uint32_t before = *p;
    *p = std::max(before, value);
    return before;
}
inline int atomicAdd(int* p, int value) {
    const int before = *p;
    *p = before + value;
    return before;
}
template <typename T>
T __ldg(const T* p) {
    return *p;
}
template <typename T>
void __stcs(T* p, T value) {
    *p = value;
}
