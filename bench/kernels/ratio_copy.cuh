// The yardstick of memory-bound kernels: a copy that reads and writes in a given ratio and computes nothing.
#pragma once
#include <cstdint>
#include "ptx.cuh"

constexpr int kCopyThreads = 512;

/// kRead sixteen-byte vectors read for every kWrite written, kUnroll times in flight; computes only an or.
template <int kRead, int kWrite, int kUnroll>
__device__ __forceinline__ void ratio_copy(const uint4* input,  // [num_steps, kUnroll, kRead, kCopyThreads]
                                           uint4* output,       // [num_steps, kUnroll, kWrite, kCopyThreads]
                                           int64_t num_steps) {
    for (int64_t s = blockIdx.x; s < num_steps; s += gridDim.x) {
        uint4 v[kUnroll][kRead];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
#pragma unroll
            for (int i = 0; i < kRead; ++i)
                v[u][i] =
                    load_streaming(input + ((s * kUnroll + u) * kRead + i) * kCopyThreads + threadIdx.x);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
#pragma unroll
            for (int i = 0; i < kWrite; ++i) {
                uint4 w = v[u][i % kRead];
#pragma unroll
                for (int j = i + kWrite; j < kRead; j += kWrite)
                    w.x |= v[u][j].x, w.y |= v[u][j].y, w.z |= v[u][j].z, w.w |= v[u][j].w;
                store_streaming(output + ((s * kUnroll + u) * kWrite + i) * kCopyThreads + threadIdx.x, w);
            }
    }
}
