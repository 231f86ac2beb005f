// Checks and times variants of gemm_4bit_mid on one sm_90a GPU.
//
// nvcc -std=c++20 -O3 -fmad=false -I../../cuda -gencode arch=compute_90a,code=sm_90a gemm_4bit_mid_bench.cu -ldl
// Usage: gemm_4bit_mid_bench [check] [small] [time] [ncu]; CUBLAS names the cuBLAS library, without it there is no
// peer.
#include <cuda.h>
#include <dlfcn.h>
#include <random>
#include "gemm_4bit_mid.cuh"
#include "harness.cuh"

// ------------------------------------------------------------------------------------------------ variants

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, 1) kernel_of(const __grid_constant__ Gemm4bitMidParams p) {
    gemm_4bit_mid<T, S>(p);
}

using Kernel = void (*)(Gemm4bitMidParams);
struct Variant {
    int tokens, tiles, groups, blocks, unit, row_bytes, stages, threads, smem_bytes, looks_ahead;
    Kernel bf16, fp16;
    std::string name() const {
        char s[64];
        std::snprintf(s, sizeof s, "%dx%d g%d b%d s%d a%d%s", tokens, 64 * tiles, groups, blocks, stages,
                      looks_ahead, unit == 32 ? " u32" : "");
        return s;
    }
};
template <typename S>
Variant variant_of() {
#ifdef ONLY_BF16
    constexpr Kernel fp16 = nullptr;
#else
    constexpr Kernel fp16 = kernel_of<float16, S>;
#endif
    return {S::kTokens,
            S::kTiles,
            S::kGroups,
            S::kStageBlocks,
            S::kUnit,
            S::kRowBytes,
            S::kStages,
            S::kThreads,
            S::kSmemBytes,
            S::kLooksAhead,
            kernel_of<bfloat16, S>,
            fp16};
}
#ifndef VARIANTS
#define VARIANTS_OF(unit, groups)                                                       \
    V(16, 1, 4, 4, unit)                                                                \
    V(16, 2, 2, 4, unit) V(32, 1, 4, 2, unit) V(32, 2, 2, 4, unit) V(64, 1, 3, 2, unit) \
        V(64, 2, groups, 2, unit) V(128, 1, 2, 2, unit) V(128, 2, 1, 2, unit, true)
#define VARIANTS VARIANTS_OF(64, 2) VARIANTS_OF(32, 1)  // those of gemm_4bit_mid_sm90.cu
#endif
#define V(...) variant_of<mid::Shape<__VA_ARGS__>>(),
static const Variant kVariants[] = {VARIANTS};

// ---------------------------------------------------------------------------------------------- launching

static CUresult (*encode_tiled)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill);

static void set_up() {
    cudaDriverEntryPointQueryResult found;
    void* entry;
    CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
    encode_tiled = reinterpret_cast<decltype(encode_tiled)>(entry);
    for (const Variant& v : kVariants)
        for (Kernel k : {v.bf16, v.fp16})
            if (k) CHECK(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, v.smem_bytes));
}

static TensorMap encode(const void* data, CUtensorMapDataType type, std::vector<cuuint64_t> sizes,
                        std::vector<cuuint64_t> strides, std::vector<cuuint32_t> box,
                        CUtensorMapSwizzle swizzle) {
    CUtensorMap map;
    const cuuint32_t steps[3] = {1, 1, 1};
    const CUresult r =
        encode_tiled(&map, type, cuuint32_t(sizes.size()), const_cast<void*>(data), sizes.data(),
                     strides.data(), box.data(), steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS) std::printf("cuTensorMapEncodeTiled: %d\n", r), std::exit(1);
    TensorMap out;
    static_assert(sizeof map == sizeof out);
    std::memcpy(&out, &map, sizeof out);
    return out;
}

struct Plan {
    const Variant* v;
    int rows, parts;
    int most_ctas = 132;  // of those that take several tiles
};

static Gemm4bitMidParams params_of(const Plan& plan, const Gemm4bitOperands& o, const void* input,
                                   const void* packed, bool is_half) {
    Gemm4bitMidParams p = {};
    const Variant& v = *plan.v;
    const cuuint64_t k = cuuint64_t(o.k), m = cuuint64_t(o.m), n = cuuint64_t(o.n);
    p.input = encode(input, is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                     {64, m, k / 64}, {2 * k, 128}, {64, cuuint32_t(v.tokens), cuuint32_t(v.blocks)},
                     CU_TENSOR_MAP_SWIZZLE_128B);
    p.packed = encode(packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, {k / 2, n}, {k / 2},
                      {cuuint32_t(v.row_bytes), cuuint32_t(plan.rows)},
                      v.row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B);
    p.o = o;
    p.rows_per_tile = plan.rows;
    return p;
}

static void launch(const Plan& plan, const Gemm4bitMidParams& p, bool is_half, bool dependent,
                   cudaStream_t stream) {
    const Variant& v = *plan.v;
    cudaLaunchConfig_t config = {};
    const int64_t tiles = ceil_div(p.o.n, plan.rows);
    const int64_t clusters = plan.parts > 1 ? tiles : ceil_div(tiles, ceil_div(tiles, plan.most_ctas));
    config.gridDim = dim3(unsigned(clusters * plan.parts), unsigned(ceil_div(p.o.m, v.tokens)));
    config.blockDim = v.threads, config.dynamicSmemBytes = v.smem_bytes, config.stream = stream;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = plan.parts, attributes[0].val.clusterDim.y = 1,
    attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attributes, config.numAttrs = dependent ? 2 : 1;
    CHECK(cudaLaunchKernelEx(&config, is_half ? v.fp16 : v.bf16, p));
}

// --------------------------------------------------------------------------------------------- reference

struct HostValues {
    float value[3][16];
};
template <typename Codebook>
void fill_values(float (&value)[16]) {
    for (int i = 0; i < 16; ++i) value[i] = from_bits(Codebook::kValueBits[i]);
}

/// exact: float64; peer: weights rounded to T, exact sums, one rounding to T. One warp an output.
template <typename T>
__global__ void reference(Gemm4bitOperands o, const T* input, const uint8_t* packed, HostValues values,
                          double* exact_to, double* peer_to) {
    const int64_t i = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) / 32;
    const int lane = threadIdx.x % 32;
    if (i >= int64_t(o.m) * o.n) return;
    const int64_t row = i % o.n, token = i / o.n;
    double exact = 0, rounded = 0;
    for (int64_t j = lane; j < o.k; j += 32) {
        const int64_t element = row * o.k + j, block = element >> o.block_shift;
        const uint32_t code = packed[element / 2] >> (element % 2 ? 0 : 4) & 15;
        float absmax;
        if (o.absmax_scale) {
            const float* const map = o.absmax_codebook ? o.absmax_codebook : kDynamicMap.value;
            absmax = __fadd_rn(
                __fmul_rn(map[static_cast<const uint8_t*>(o.absmax)[block]], o.absmax_scale[block / 256]),
                *o.absmax_offset);
        } else {
            absmax = static_cast<const float*>(o.absmax)[block];
        }
        const float weight = __fmul_rn(values.value[o.codebook][code], absmax),
                    x = float(input[token * o.k + j]);
        exact += double(weight) * x;
        rounded += double(float(T(weight))) * x;
    }
    for (int d = 16; d > 0; d /= 2)
        exact += __shfl_xor_sync(~0u, exact, d), rounded += __shfl_xor_sync(~0u, rounded, d);
    if (lane) return;
    const float bias = wgmma::load_bias(o, int(row));
    exact_to[i] = exact + bias;
    peer_to[i] = double(float(T(float(rounded + bias))));
}

struct Case {
    int m, n, k, rows, parts;
    int block_shift = 6, codebook = 0;
    bool nested = false, own_map = false;
    int bias_dtype = -1;  // none
    int repeats = 30;
    bool dependent = true;
};

template <typename T>
bool check(const Variant& v, const Case& c) {
    static uint32_t seed = 0;
    constexpr bool kHalf = std::is_same_v<T, float16>;
    seed += 101;
    const int64_t num = int64_t(c.n) * c.k, blocks = ceil_div(num, int64_t(1) << c.block_shift);
    std::mt19937 random(seed);
    const auto uniform = [&] { return float(random() >> 8) * 0x1p-24f; };
    std::vector<uint8_t> packed(num / 2), codes(blocks);
    for (size_t i = 0; i + 4 <= packed.size(); i += 4) {
        const uint32_t r = random();
        std::memcpy(&packed[i], &r, 4);
    }
    for (uint8_t& b : codes) b = uint8_t(random());
    std::vector<float> absmax(blocks), scale(ceil_div(blocks, 256)), map(256), bias32(c.n);
    for (float& f : absmax) f = 0.01f + 0.1f * uniform();
    for (float& f : scale) f = 0.01f + 0.05f * uniform();
    for (float& f : map) f = 2 * uniform() - 1;
    for (float& f : bias32) f = 2 * uniform() - 1;
    const std::vector<float16> bias16(bias32.begin(), bias32.end());
    const std::vector<bfloat16> biasb(bias32.begin(), bias32.end());
    const Buffer<uint8_t> d_packed(packed), d_codes(codes);
    const Buffer<float> d_absmax(absmax), d_scale(scale), d_offset(std::vector<float>{0.08f}), d_map(map),
        d_bias32(bias32);
    const Buffer<float16> d_bias16(bias16);
    const Buffer<bfloat16> d_biasb(biasb);
    const Buffer<T> d_input(size_t(c.m) * c.k);
    random_normal(d_input.data(), int64_t(c.m) * c.k, seed);
    Buffer<double> exact(size_t(c.m) * c.n), peer(size_t(c.m) * c.n);
    const Buffer<T> output(size_t(c.m) * c.n);
    const void* const biases[4] = {nullptr, d_bias32.data(), d_bias16.data(), d_biasb.data()};
    Gemm4bitOperands o = {c.nested ? static_cast<const void*>(d_codes.data()) : d_absmax.data(),
                          c.nested ? d_scale.data() : nullptr,
                          c.nested ? d_offset.data() : nullptr,
                          c.own_map ? d_map.data() : nullptr,
                          biases[c.bias_dtype + 1],
                          output.data(),
                          c.m,
                          c.n,
                          c.k,
                          c.block_shift,
                          c.codebook,
                          std::max(c.bias_dtype, 0),
                          0};
    HostValues values;
    fill_values<Nf4>(values.value[0]);
    fill_values<Fp4>(values.value[1]);
    fill_values<Af4>(values.value[2]);
    reference<T><<<unsigned(ceil_div(int64_t(c.m) * c.n, 8)), 256>>>(o, d_input.data(), d_packed.data(),
                                                                     values, exact.data(), peer.data());
    CHECK(cudaDeviceSynchronize());
    Plan plan = {&v, c.rows, c.parts};
    bool same = true;
    std::vector<T> first;
    for (int run = 0; run < c.repeats; ++run) {
        o.weights_ready = run % 2;
        plan.most_ctas = run % 5 == 4 ? 3 : 132;
        launch(plan, params_of(plan, o, d_input.data(), d_packed.data(), kHalf), kHalf,
               c.dependent && run % 3, nullptr);
        CHECK(cudaDeviceSynchronize());
        const std::vector<T> now = output.download();
        if (run == 0) first = now;
        same &= !std::memcmp(first.data(), now.data(), now.size() * sizeof(T));
    }
    const bool intact = output.intact();
    const std::vector<double> e = exact.download(), q = peer.download();
    double mean = 0, peer_mean = 0, worst = 0, peer_worst = 0, rms = 0;
    for (size_t i = 0; i < e.size(); ++i) {
        const double d = std::abs(double(float(first[i])) - e[i]), dp = std::abs(q[i] - e[i]);
        mean += d / double(e.size()), peer_mean += dp / double(e.size());
        worst = std::max(worst, d == d ? d : INFINITY), peer_worst = std::max(peer_worst, dp);
        rms += e[i] * e[i] / double(e.size());
    }
    const bool close = mean <= 1.05 * peer_mean && worst <= 1.5 * peer_worst;
    const bool ok = intact && same && close;
    failures += !ok;
    std::printf(
        "%-4s %-18s %s m %3d n %5d k %5d rows %3d parts %d block %4d codebook %d nested %d bias %2d: mean "
        "%.3f of peer, max %.3f%s%s\n",
        ok ? "ok" : "FAIL", v.name().c_str(), kHalf ? "fp16" : "bf16", c.m, c.n, c.k, c.rows, c.parts,
        1 << c.block_shift, c.codebook, c.nested, c.bias_dtype, mean / peer_mean, worst / peer_worst,
        intact ? "" : " CANARY", same ? "" : " DIFFERS");
    std::fflush(stdout);
    return ok;
}

static void check_all(bool small) {
    for (const Variant& v : kVariants) {
        const int rows = 64 * v.tiles, t = v.tokens, s = v.unit == 32 ? 5 : 6, repeats = small ? 2 : 30;
        const auto both = [&](Case c) {
            c.repeats = repeats;
            check<bfloat16>(v, c);
            if (v.fp16) check<float16>(v, c);
        };
        both({t, 2 * rows, 1024, rows, 1, s});
        if (small) {
            both({t - 3, rows + 33, 832, rows, 2, s, 1, true, false, 0});
            continue;
        }
        both({t - 3, rows + 33, 832, rows, 2, s, 1, true, false, 0});
        both({t + 5, 3 * rows - 7, 2112, rows - 16, 1, s, 2, true, true, 1});
        both({t, 1000, 4160, rows, 2, s + 1, 0, true, false, 2});
        both({t - 1, 1028, 5312, rows, 2, s + 1, 0, false, false, 2});
        both({t - 1, 260, 4096, rows, 4, s + 3, 1, false, false, -1});
        both({t, 4096, 4096, rows, 2, s, 0, false, false, -1});
        both({t, 3584, 14336, rows - 16, 1, s, 0, false, false, -1});
        both({t, 100, 64, rows, 2, s, 0, false, false, -1});
    }
}

// --------------------------------------------------------------------------------------------------- time

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
    void run(int m, int n, int k, const void* x, const void* w, void* y, cudaStream_t stream) {
        const float one = 1.0f, zero = 0.0f;
        set_stream(handle, stream);
        if (const int r = gemm(handle, 1, 0, n, m, k, &one, w, 14, k, x, 14, k, &zero, y, 14, n, 68, -1))
            std::printf("cublasGemmEx: %d\n", r), std::exit(1);
    }
};

/// Normal weights as codes of NF4.
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

struct Goal {
    int m, n, k;
    float goal, peer;
};
static const Goal kGoals[] = {
    {16, 4096, 4096, 4.5f, 9.4f},    {16, 14336, 4096, 10.5f, 16.5f}, {16, 4096, 14336, 10.5f, 17.1f},
    {16, 8192, 8192, 12, 16.9f},     {16, 28672, 8192, 36.5f, 52.3f}, {32, 4096, 4096, 5, 10.7f},
    {32, 14336, 4096, 12, 20.7f},    {32, 4096, 14336, 12, 20.9f},    {32, 8192, 8192, 13.5f, 21.6f},
    {32, 28672, 8192, 40.5f, 57.7f}, {64, 4096, 4096, 6.5f, 12},      {64, 14336, 4096, 15.5f, 22.5f},
    {64, 4096, 14336, 15.5f, 22.3f}, {64, 8192, 8192, 17, 25.2f},     {64, 28672, 8192, 53.5f, 85},
    {128, 4096, 4096, 9, 15.4f},     {128, 14336, 4096, 25, 30.6f},   {128, 4096, 14336, 25, 31.4f},
    {128, 8192, 8192, 28.5f, 34.9f}, {128, 28672, 8192, 93, 103.8f},
};

static void time_all(bool is_brief, int only_m, int only_n, int only_k) {
    constexpr int64_t kPackedBytes = 360ll << 20;
    const Buffer<uint8_t> packed(kPackedBytes);
    const Buffer<float> absmax(kPackedBytes / 16);
    const Buffer<bfloat16> input(4ll * 128 * 14336), output(4ll * 128 * 28672);
    Cublas cublas;
    const Buffer<bfloat16> dense(cublas.handle ? 2ll * 28672 * 8192 : 1);
    fill_codes<<<132 * 8, 256>>>(packed.data(), kPackedBytes, Nf4::kThresholds);
    random_normal(absmax.data(), kPackedBytes / 16, 3);
    random_normal(input.data(), 4ll * 128 * 14336, 4);
    if (cublas.handle) random_normal(dense.data(), 2ll * 28672 * 8192, 5);
    CHECK(cudaDeviceSynchronize());
    for (const Goal& g : kGoals) {
        if ((only_m && g.m != only_m) || (only_n && g.n != only_n) || (only_k && g.k != only_k)) continue;
        const int64_t bytes = int64_t(g.n) * g.k / 2;
        const int copies = int(std::min<int64_t>(24, kPackedBytes / bytes));
        const double total = double(g.n) * g.k * 0.5625 + 2.0 * g.m * (g.n + g.k),
                     flop = 2.0 * g.m * g.n * g.k;
        const double floor_us = std::max(total / 4.4e6, flop / 790e6);
        struct Result {
            float us, plain;
            std::string what;
        };
        std::vector<Result> results;
        for (const Variant& v : kVariants) {
            if (v.unit != 64 || v.tokens < g.m || v.tokens >= 2 * g.m) continue;
            std::vector<std::pair<int, int>> plans;  // rows, parts
            const int max_rows = 64 * v.tiles;
            for (int parts : {1, 2}) {
                // The fewest rows that make the fewest waves, and all rows.
                for (int slots : {132 / parts}) {
                    const int64_t waves = ceil_div(ceil_div(g.n, max_rows), slots);
                    const int rows = int(ceil_div(ceil_div(g.n, waves * slots), 16) * 16);
                    if (rows < max_rows && rows > max_rows / 2) plans.push_back({rows, parts});
                }
                plans.push_back({max_rows, parts});
            }
            std::sort(plans.begin(), plans.end());
            plans.erase(std::unique(plans.begin(), plans.end()), plans.end());
            for (const auto& [rows, parts] : plans) {
                const int64_t ctas = ceil_div(g.n, rows) * parts;
                if (ctas < 60 || (ctas > 132 && ctas < 200) || (parts > 1 && ctas > 140)) continue;
                const Plan plan = {&v, rows, parts};
                std::vector<Gemm4bitMidParams> calls;
                for (int i = 0; i < copies; ++i) {
                    Gemm4bitOperands o = {absmax.data() + i * (bytes / 32),
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          output.data() + i % 4 * (128ll * 28672),
                                          g.m,
                                          g.n,
                                          g.k,
                                          6,
                                          0,
                                          0,
                                          1};
                    calls.push_back(params_of(plan, o, input.data() + i % 4 * (128ll * 14336),
                                              packed.data() + i * bytes, false));
                }
                const float us = time_us(
                    copies, [&](int i, cudaStream_t s) { launch(plan, calls[size_t(i)], false, true, s); });
                const float plain = is_brief ? 0 : time_us(copies, [&](int i, cudaStream_t s) {
                    launch(plan, calls[size_t(i)], false, false, s);
                });
                char what[128];
                std::snprintf(what, sizeof what, "%-16s rows %3d parts %d grid %3d", v.name().c_str(), rows,
                              parts, int(ctas));
                results.push_back({us, plain, what});
            }
        }
        if (results.empty()) continue;
        std::sort(results.begin(), results.end(),
                  [](const Result& a, const Result& b) { return a.us < b.us; });
        float cublas_us = 0;
        if (cublas.handle && g.m >= 64)
            cublas_us = time_us(2, [&](int i, cudaStream_t s) {
                cublas.run(g.m, g.n, g.k, input.data(), dense.data() + i * int64_t(g.n) * g.k, output.data(),
                           s);
            });
        std::printf("M %3d  %5d x %5d  goal %5.1f (%5.1f) floor %5.1f cuBLAS %6.2f\n", g.m, g.n, g.k, g.goal,
                    g.peer, floor_us, cublas_us);
        for (size_t i = 0; i < results.size() && i < size_t(9); ++i)
            std::printf("    %-44s %7.2f us PDL %7.2f plain  %5.1f %% of floor%s\n", results[i].what.c_str(),
                        results[i].us, results[i].plain, 100 * floor_us / results[i].us,
                        results[i].us < g.goal   ? "  GOAL"
                        : results[i].us < g.peer ? ""
                                                 : "  SLOWER THAN PEER");
        std::fflush(stdout);
    }
}

int main(int argc, char** argv) {
    const auto has = [&](const char* word) {
        return std::any_of(argv + 1, argv + argc, [&](const char* a) { return !std::strcmp(a, word); });
    };
    set_up();
    if (has("check")) {
        check_all(has("small"));
        std::printf("check: %d failures\n", failures);
    }
    const auto number = [&](int i) { return argc > i ? std::atoi(argv[i]) : 0; };
    if (has("time"))
        time_all(has("brief"), number(argc > 2 && !std::strcmp(argv[argc - 1], "brief") ? 99 : 2), number(3),
                 number(4));
    return failures != 0;
}
