// Sixteen-byte vectors of float, half or bfloat16: access, and exact conversion to and from float32.
#pragma once
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <type_traits>
#include "ptx.cuh"

using bfloat16 = __nv_bfloat16;
using float16 = __half;
using float32 = float;

/// Elements of T in one sixteen-byte vector.
template <typename T>
constexpr int kPerVector = 16 / int(sizeof(T));

/// The elements of one vector as float32; exact for every T.
__device__ __forceinline__ void unpack(const uint4& v, float (&x)[4], float) {
    x[0] = __uint_as_float(v.x);
    x[1] = __uint_as_float(v.y);
    x[2] = __uint_as_float(v.z);
    x[3] = __uint_as_float(v.w);
}
__device__ __forceinline__ void unpack(const uint4& v, float (&x)[8], bfloat16) {
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = __uint_as_float(w[i] << 16);
        x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ void unpack(const uint4& v, float (&x)[8], float16) {
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&w[i]));
        x[2 * i] = f.x;
        x[2 * i + 1] = f.y;
    }
}
template <typename T>
__device__ __forceinline__ void unpack(const uint4& v, float (&x)[kPerVector<T>]) {
    unpack(v, x, T());
}

/// One vector of T from float32, each element rounded once to nearest even.
__device__ __forceinline__ uint4 pack(const float (&x)[4], float) {
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                      __float_as_uint(x[3]));
}
__device__ __forceinline__ uint4 pack(const float (&x)[8], bfloat16) {
    uint32_t w[4];
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        const __nv_bfloat162 h = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
        w[i] = *reinterpret_cast<const uint32_t*>(&h);
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
}
__device__ __forceinline__ uint4 pack(const float (&x)[8], float16) {
    uint32_t w[4];
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        const __half2 h = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
        w[i] = *reinterpret_cast<const uint32_t*>(&h);
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
}
template <typename T>
__device__ __forceinline__ uint4 pack(const float (&x)[kPerVector<T>]) {
    return pack(x, T());
}

/// Two values rounded to T, `low` in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    if constexpr (std::is_same_v<T, float16>) {
        const __half2 v = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&v);
    } else {
        const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&v);
    }
}

/// The vector at `data + first`, elements from n on read as +0. kFull promises alignment and first +
/// kPerVector <= n.
template <bool kFull, typename T>
__device__ __forceinline__ uint4 load_vector(const T* data, int64_t first, int64_t n) {
    if constexpr (kFull) {
        return load_streaming(reinterpret_cast<const uint4*>(data + first));
    } else {
        const int left = int(::max(::min(n - first, int64_t(kPerVector<T>)), int64_t(0)));
        uint32_t w[4];
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (sizeof(T) == 4) {
                w[i] = i < left ? reinterpret_cast<const uint32_t*>(data)[first + i] : 0;
            } else {  // packed by PRMT at once: the compiler would keep both halves in registers of their
                      // own, and spill
                const uint16_t* const bits = reinterpret_cast<const uint16_t*>(data) + first;
                w[i] = permute_bytes(2 * i < left ? bits[2 * i] : 0, 2 * i + 1 < left ? bits[2 * i + 1] : 0,
                                     0x5410);
            }
        }
        return make_uint4(w[0], w[1], w[2], w[3]);
    }
}

/// Writes the elements of `v` that lie below n; kFull as above.
template <bool kFull, typename T>
__device__ __forceinline__ void store_vector(T* data, int64_t first, int64_t n, const uint4& v) {
    if constexpr (kFull) {
        store_streaming(reinterpret_cast<uint4*>(data + first), v);
    } else {
        alignas(16) T x[kPerVector<T>];
        *reinterpret_cast<uint4*>(x) = v;
        #pragma unroll
        for (int i = 0; i < kPerVector<T>; ++i)
            if (first + i < n) data[first + i] = x[i];
    }
}
