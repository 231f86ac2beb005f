// Buffers, random data, graph timing and the yardstick's rate for the stand-alone kernel benchmarks.
#pragma once
#include <cuda_runtime.h>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>
#include "dtype.cuh"
#include "ratio_copy.cuh"

#define CHECK(call)                                                                               \
    do {                                                                                          \
        const cudaError_t status = (call);                                                        \
        if (status != cudaSuccess) {                                                              \
            std::printf("%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(status)); \
            std::exit(1);                                                                         \
        }                                                                                         \
    } while (0)

inline int failures = 0;

inline int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

/// Device memory between canaries, poisoned with 0xff.
template <typename T>
class Buffer {
 public:
    explicit Buffer(size_t n, size_t offset = 0) : count_(n), offset_(offset) {
        CHECK(cudaMalloc(&base_, total()));
        CHECK(cudaMemset(base_, 0xff, total()));
    }
    explicit Buffer(const std::vector<T>& v, size_t offset = 0) : Buffer(v.size(), offset) {
        CHECK(cudaMemcpy(data(), v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { cudaFree(base_); }
    T* data() const { return reinterpret_cast<T*>(base_ + kCanary) + offset_; }
    std::vector<T> download() const {
        std::vector<T> v(count_);
        CHECK(cudaMemcpy(v.data(), data(), count_ * sizeof(T), cudaMemcpyDeviceToHost));
        return v;
    }
    bool intact() const {
        std::vector<uint8_t> v(total());
        CHECK(cudaMemcpy(v.data(), base_, total(), cudaMemcpyDeviceToHost));
        const size_t first = kCanary + offset_ * sizeof(T);
        return std::all_of(v.begin(), v.begin() + first, [](uint8_t b) { return b == 0xff; }) &&
               std::all_of(v.begin() + first + count_ * sizeof(T), v.end(),
                           [](uint8_t b) { return b == 0xff; });
    }

 private:
    static constexpr size_t kCanary = 256;
    size_t total() const { return (count_ + offset_) * sizeof(T) + 2 * kCanary; }
    uint8_t* base_ = nullptr;
    size_t count_, offset_;
};

__device__ __forceinline__ uint32_t hash32(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

/// Standard normal numbers, by Box-Muller over a counter.
template <typename T>
__global__ void fill_normal(T* data, int64_t n, uint32_t seed) {
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n;
         i += int64_t(gridDim.x) * blockDim.x) {
        const uint32_t a = hash32(uint32_t(i) * 2u + seed * 0x9e3779b9u),
                       b = hash32(uint32_t(i) * 2u + 1u + seed * 0x85ebca6bu);
        const float u = fminf((a + 1.0f) * 2.3283064e-10f, 1.0f), v = b * 2.3283064e-10f;
        data[i] = T(sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * v));
    }
}
template <typename T>
void random_normal(T* data, int64_t n, uint32_t seed) {
    fill_normal<<<132 * 8, 256>>>(data, n, seed);
    CHECK(cudaGetLastError());
}

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

/// Calls f(begin, end) on all cores over [0, n).
inline void parallel(int64_t n, const std::function<void(int64_t, int64_t)>& f) {
    const int num = std::max(1, int(std::thread::hardware_concurrency()));
    std::vector<std::thread> threads;
    for (int t = 0; t < num; ++t) threads.emplace_back([=, &f] { f(n * t / num, n * (t + 1) / num); });
    for (auto& t : threads) t.join();
}

/// Median microseconds of one call in a graph of calls over `num` rotating sets of operands.
inline float time_us(int num, const std::function<void(int, cudaStream_t)>& launch) {
    constexpr int kRepeats = 7;
    constexpr float kRepeatMs = 6.0f;
    static cudaStream_t stream = nullptr;
    if (!stream) CHECK(cudaStreamCreate(&stream));
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < num; ++i) launch(i, stream);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    const auto run = [&](int replays) {
        float ms = 0;
        CHECK(cudaEventRecord(begin, stream));
        for (int k = 0; k < replays; ++k) CHECK(cudaGraphLaunch(exec, stream));
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        return ms;
    };
    run(1);
    const int replays = std::max(1, int(kRepeatMs / std::max(run(1), 1e-3f)));
    std::vector<float> us;
    for (int r = 0; r < kRepeats; ++r) us.push_back(run(replays) * 1e3f / float(replays * num));
    std::sort(us.begin(), us.end());
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    return us[kRepeats / 2];
}

/// The yardstick as a kernel.
template <int kRead, int kWrite, int kUnroll>
__global__ __launch_bounds__(kCopyThreads) void ratio_copy_kernel(const uint4* input, uint4* output,
                                                                  int64_t num_steps) {
    ratio_copy<kRead, kWrite, kUnroll>(input, output, num_steps);
}

/// Two pools of memory that operands rotate through, so that every launch finds them cold.
struct Pools {
    static constexpr size_t kBytes = 4ull * 8192 * 8192 * 4;
    uint8_t *a, *b;
    uint8_t* copy;  // only copies write here
    Pools() {
        CHECK(cudaMalloc(&a, kBytes));
        CHECK(cudaMalloc(&b, kBytes));
        CHECK(cudaMalloc(&copy, kBytes));
        random_normal(reinterpret_cast<float*>(a), kBytes / 4, 1);
        random_normal(reinterpret_cast<float*>(b), kBytes / 4, 2);
    }
};

/// The copy of one ratio and size, in the grid and unrolling that are best for it.
class Copy {
 public:
    template <int kRead, int kWrite>
    static Copy of(const Pools& pools, double bytes) {
        Copy best;
        const auto add = [&]<int kUnroll>() {
            constexpr int64_t kStep = 16 * kCopyThreads * kUnroll;
            const int64_t steps = int64_t(bytes / double(kStep * (kRead + kWrite)));
            const int64_t in = steps * kRead * kStep, out = steps * kWrite * kStep;
            const int sets = int(std::clamp<int64_t>(int64_t(Pools::kBytes) / std::max(in, out), 1, 8));
            for (int64_t grid : {int64_t(132 * 4), steps}) {
                Copy copy;
                copy.measure_ = [=] {
                    const float us = time_us(sets, [=](int i, cudaStream_t stream) {
                        ratio_copy_kernel<kRead, kWrite, kUnroll>
                            <<<unsigned(std::min(grid, steps)), kCopyThreads, 0, stream>>>(
                                reinterpret_cast<const uint4*>(pools.a + i * in),
                                reinterpret_cast<uint4*>(pools.copy + i * out), steps);
                    });
                    return float(double(in + out) / us);
                };
                copy.first_ = copy.measure_();
                if (copy.first_ > best.first_) best = copy;
            }
        };
        add.template operator()<1>();
        add.template operator()<2>();
        if constexpr (kRead + kWrite <= 3) add.template operator()<4>();
        std::printf("copy %d:%d of %.0f MB  %.3f TB/s\n", kRead, kWrite, bytes * 1e-6, best.first_ * 1e-6);
        return best;
    }

    /// Bytes per microsecond, measured anew.
    float rate() const { return measure_(); }

 private:
    std::function<float()> measure_;
    float first_ = 0;
};

/// One line: the time, its rate, and the share of the copy's rate. The copy runs behind each kernel, since a
/// GPU that has just begun, or has only copied, copies up to 7 % faster than among kernels that compute.
inline void report(const std::string& what, float us, double bytes, const Copy& copy) {
    std::printf("%-58s %8.2f us  %6.3f TB/s  %5.1f %% of copy\n", what.c_str(), us, bytes / us * 1e-6,
                bytes / us / copy.rate() * 100);
}
