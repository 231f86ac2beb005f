// What the harnesses of gemm_4bit share: random products with float64 results, cuBLAS as a peer.
#pragma once
#include <dlfcn.h>
#include <random>
#include "gemm_4bit_skinny.cuh"
#include "harness.cuh"
#include "launch.cuh"

// -------------------------------------------------------------------------------------------- reference

struct HostValues {
    float value[3][16];
};
template <typename Codebook>
void fill_values(float (&value)[16]) {
    for (int i = 0; i < 16; ++i) value[i] = from_bits(Codebook::kValueBits[i]);
}

/// exact: float64; peer: weights rounded to T, sums exact (16-bit T) or in float32, one rounding to T. One warp an
/// output.
template <typename T>
__global__ void reference(Gemm4bitSkinnyParams p, HostValues values, double* exact_to, double* peer_to) {
    const int64_t o = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) / 32;
    const int lane = threadIdx.x % 32;
    if (o >= p.m * p.n) return;
    const int64_t row = o % p.n, token = o / p.n;
    double exact = 0, rounded = 0;
    float rounded32 = 0;
    for (int64_t i = lane; i < p.k; i += 32) {
        const int64_t element = row * p.k + i, block = element >> p.block_shift;
        const uint32_t code = p.packed[element / 2] >> (element % 2 ? 0 : 4) & 15;
        float absmax;
        if (p.absmax_scale) {
            const float* const map = p.absmax_codebook ? p.absmax_codebook : kDynamicMap.value;
            absmax = __fadd_rn(
                __fmul_rn(map[static_cast<const uint8_t*>(p.absmax)[block]], p.absmax_scale[block / 256]),
                *p.absmax_offset);
        } else {
            absmax = static_cast<const float*>(p.absmax)[block];
        }
        const float weight = __fmul_rn(values.value[p.codebook][code], absmax);
        const float x = float(static_cast<const T*>(p.input)[token * p.k + i]);
        exact += double(weight) * x;
        rounded += double(float(T(weight))) * x;
        rounded32 = fmaf(weight, x, rounded32);
    }
    for (int d = 16; d > 0; d /= 2) {
        exact += __shfl_xor_sync(~0u, exact, d);
        rounded += __shfl_xor_sync(~0u, rounded, d);
        rounded32 += __shfl_xor_sync(~0u, rounded32, d);
    }
    const float bias = load_bias(p, row);
    if (lane) return;
    exact_to[o] = exact + bias;
    peer_to[o] = sizeof(T) == 4 ? double(rounded32 + bias) : double(float(T(float(rounded + bias))));
}

__global__ void fill_bytes(uint8_t* data, int64_t n, uint32_t seed) {
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n;
         i += int64_t(gridDim.x) * blockDim.x)
        data[i] = uint8_t(hash32(uint32_t(i) + seed) >> 11);
}

inline std::vector<float> uniform(size_t n, float low, float high) {
    static std::mt19937 random(7);
    std::vector<float> v(n);
    for (float& x : v) x = low + (high - low) * (float(random() >> 8) * 0x1p-24f);
    return v;
}

/// Largest error of few outputs: so much of the peer's largest, so many steps of the type.
struct FewLimit {
    double of_peer = 0, of_step = 1;
};

/// Random operands of one product and its results. A Case has m, n, k, block_shift, codebook, nested, own_map and
/// bias_dtype (-1: no bias); packed, input and output lie `offset` elements behind an aligned address.
template <typename T>
class Product {
 public:
    template <typename Case>
    explicit Product(const Case& c, size_t offset = 0)
        : num_(int64_t(c.n) * c.k),
          blocks_(ceil_div(num_, int64_t(1) << c.block_shift)),
          size_(size_t(c.m) * size_t(c.n)),
          bias32_host_(uniform(size_t(c.n), -1, 1)),
          packed_(size_t(ceil_div(num_, 2)), offset),
          codes_(size_t(blocks_)),
          absmax_(uniform(size_t(blocks_), 0.01f, 0.11f)),
          scale_(uniform(size_t(ceil_div(blocks_, 256)), 0.01f, 0.06f)),
          offset_(std::vector<float>{0.08f}),
          map_(uniform(256, -1, 1)),
          bias32_(bias32_host_),
          bias16_(std::vector<float16>(bias32_host_.begin(), bias32_host_.end())),
          biasb_(std::vector<bfloat16>(bias32_host_.begin(), bias32_host_.end())),
          input_(size_t(c.m) * size_t(c.k), offset),
          exact_(size_),
          peer_(size_),
          output(size_, offset) {
        static uint32_t seed = 0;
        seed += 101;
        fill_bytes<<<264, 256>>>(packed_.data(), ceil_div(num_, 2), seed);
        fill_bytes<<<264, 256>>>(codes_.data(), blocks_, seed + 1);
        random_normal(input_.data(), int64_t(c.m) * c.k, seed + 2);
        const void* const biases[4] = {nullptr, bias32_.data(), bias16_.data(), biasb_.data()};
        params = {input_.data(),
                  packed_.data(),
                  c.nested ? static_cast<const void*>(codes_.data()) : absmax_.data(),
                  c.nested ? scale_.data() : nullptr,
                  c.nested ? offset_.data() : nullptr,
                  c.own_map ? map_.data() : nullptr,
                  biases[c.bias_dtype + 1],
                  output.data(),
                  c.m,
                  c.n,
                  c.k,
                  c.block_shift,
                  c.codebook,
                  std::max(c.bias_dtype, 0)};
        HostValues values;
        fill_values<Nf4>(values.value[0]);
        fill_values<Fp4>(values.value[1]);
        fill_values<Af4>(values.value[2]);
        reference<T>
            <<<unsigned(ceil_div(int64_t(size_), 8)), 256>>>(params, values, exact_.data(), peer_.data());
        CHECK(cudaDeviceSynchronize());
    }

    /// Launches `runs` times, compares the bits of all runs and the first with float64, prints a line that begins with
    /// `what`. The mean error is at most 1.05 times the peer's and the largest 1.5 times, in float32 both twice; of fewer
    /// outputs than `many` these say little: then only gross errors count, and only failures are printed.
    template <typename Launch>
    bool check(const std::string& what, int runs, size_t many, Launch&& launch, FewLimit few = {}) {
        bool same = true;
        std::vector<T> first;
        for (int run = 0; run < runs; ++run) {
            launch(run);
            CHECK(cudaDeviceSynchronize());
            const std::vector<T> now = output.download();
            if (run == 0) first = now;
            same &= !std::memcmp(first.data(), now.data(), now.size() * sizeof(T));
        }
        const bool intact = output.intact();
        const std::vector<double> e = exact_.download(), q = peer_.download();
        double mean = 0, peer_mean = 0, worst = 0, peer_worst = 0, rms = 0;
        for (size_t i = 0; i < e.size(); ++i) {
            const double d = std::abs(double(float(first[i])) - e[i]), dp = std::abs(q[i] - e[i]);
            mean += d / double(e.size()), peer_mean += dp / double(e.size());
            worst = std::max(worst, d == d ? d : INFINITY), peer_worst = std::max(peer_worst, dp);
            rms += e[i] * e[i] / double(e.size());
        }
        const double step = sizeof(T) == 4 ? 0x1p-20 : std::is_same_v<T, float16> ? 0x1p-10 : 0x1p-7;
        const double mean_limit = sizeof(T) == 4 ? 2 : 1.05, worst_limit = sizeof(T) == 4 ? 2 : 1.5;
        const double few_limit = few.of_peer * peer_worst + few.of_step * step * (std::sqrt(rms) + 1);
        const bool close = size_ >= many ? mean <= mean_limit * peer_mean && worst <= worst_limit * peer_worst
                                         : worst <= few_limit;
        const bool ok = intact && same && close;
        failures += !ok;
        if (!ok || size_ >= many)
            std::printf(
                "%-4s %s m %lld n %lld k %lld block %d codebook %d nested %d bias %d: mean %.3e (%.3f of "
                "peer) max "
                "%.3e (%.3f)%s%s\n",
                ok ? "ok" : "FAIL", what.c_str(), static_cast<long long>(params.m),
                static_cast<long long>(params.n), static_cast<long long>(params.k), 1 << params.block_shift,
                params.codebook, params.absmax_scale != nullptr, params.bias ? params.bias_dtype : -1, mean,
                mean / peer_mean, worst, worst / peer_worst, intact ? "" : " CANARY", same ? "" : " DIFFERS");
        std::fflush(stdout);
        return ok;
    }

 private:
    int64_t num_, blocks_;
    size_t size_;
    std::vector<float> bias32_host_;
    Buffer<uint8_t> packed_, codes_;
    Buffer<float> absmax_, scale_, offset_, map_, bias32_;
    Buffer<float16> bias16_;
    Buffer<bfloat16> biasb_;
    Buffer<T> input_;
    Buffer<double> exact_, peer_;

 public:
    Buffer<T> output;
    Gemm4bitSkinnyParams params;  // of the skinny kernels; operands_of makes those of the others of it
};

/// Gemm4bitOperands, which the skinny kernels know nothing of.
template <typename Operands>
Operands operands_of(const Gemm4bitSkinnyParams& p) {
    return {p.absmax, p.absmax_scale, p.absmax_offset, p.absmax_codebook, p.bias,       p.output, int(p.m),
            int(p.n), int(p.k),       p.block_shift,   p.codebook,        p.bias_dtype, 0};
}

// ------------------------------------------------------------------------------------------------- time

/// Of the library that CUBLAS names; without it there is no handle and no peer.
struct Cublas {
    void* handle = nullptr;
    int (*gemm)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int,
                const void*, void*, int, int, int, int) = nullptr;
    int (*set_stream)(void*, cudaStream_t) = nullptr;
    Cublas() {
        const char* const name = std::getenv("CUBLAS");
        void* const lib = name ? dlopen(name, RTLD_NOW) : nullptr;
        if (!lib) return;
        const auto create = reinterpret_cast<int (*)(void**)>(dlsym(lib, "cublasCreate_v2"));
        const auto workspace =
            reinterpret_cast<int (*)(void*, void*, size_t)>(dlsym(lib, "cublasSetWorkspace_v2"));
        set_stream = reinterpret_cast<decltype(set_stream)>(dlsym(lib, "cublasSetStream_v2"));
        gemm = reinterpret_cast<decltype(gemm)>(dlsym(lib, "cublasGemmEx"));
        void* space;
        CHECK(cudaMalloc(&space, 64 << 20));
        if (create(&handle))
            handle = nullptr;
        else
            workspace(handle, space, 64 << 20);
    }
    /// In bfloat16.
    void run(int m, int n, int k, const void* x, const void* w, void* y, cudaStream_t stream) {
        const float one = 1.0f, zero = 0.0f;
        set_stream(handle, stream);
        if (const int r = gemm(handle, 1, 0, n, m, k, &one, w, 14, k, x, 14, k, &zero, y, 14, n, 68, -1))
            std::printf("cublasGemmEx: %d\n", r), std::exit(1);
    }
};

/// Normal weights as codes.
__global__ void fill_codes(uint8_t* packed, int64_t n, Thresholds thresholds) {
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n;
         i += int64_t(gridDim.x) * blockDim.x) {
        uint32_t v = 0;
        for (uint32_t half = 0; half < 2; ++half) {
            const uint32_t a = hash32(uint32_t(2 * i + half)), b = hash32(a + 0x9e3779b9u);
            const float x = sqrtf(-2.0f * logf(fminf((a + 1.0f) * 2.3283064e-10f, 1.0f))) *
                            cospif(b * 4.6566129e-10f) * 0.4f;
            uint32_t code = 0;
            for (int k = 0; k < 15; ++k) code += x > thresholds.value[k];
            v = v << 4 | code;
        }
        packed[i] = uint8_t(v);
    }
}
