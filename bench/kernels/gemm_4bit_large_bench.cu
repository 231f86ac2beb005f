// Checks and times variants of gemm_4bit_large on one sm_90a GPU, beside cuBLAS on dequantized weights.
//
// nvcc -std=c++20 -O3 -fmad=false -I../../cuda -gencode arch=compute_90a,code=sm_90a gemm_4bit_large_bench.cu -ldl
// Usage: gemm_4bit_large_bench [check] [small] [time [m n k]]; CUBLAS names the cuBLAS library, without it there is no
// peer. All times of a row come from interleaved rounds: from 1024 tokens on power limits the clock.
#include <functional>
#include <memory>
#include "gemm_4bit_large.cuh"
#include "gemm_4bit_check.cuh"

// ------------------------------------------------------------------------------------------------ variants

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, 1) kernel_of(const __grid_constant__ Gemm4bitLargeParams p) {
    gemm_4bit_large<T, S>(p);
}

using Kernel = void (*)(Gemm4bitLargeParams);
struct Variant {
    int tokens, parts, unit, threads, smem_bytes;
    Kernel bf16, fp16;
    std::string name() const {
        char s[64];
        std::snprintf(s, sizeof s, "%dk%d%s", tokens, parts, unit == 32 ? " u32" : "");
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
    return {S::kTokens, S::kParts, S::kUnit, S::kThreads, S::kSmemBytes, kernel_of<bfloat16, S>, fp16};
}
#ifndef VARIANTS
#define VARIANTS V(256, 1) V(256, 2) V(128, 1) V(128, 2) V(256, 1, 32) V(128, 2, 32)
#endif
#define V(...) variant_of<large::Shape<__VA_ARGS__>>(),
static const Variant kVariants[] = {VARIANTS};

// ---------------------------------------------------------------------------------------------- launching

static int num_sms;

static void set_up() {
    CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0));
    for (const Variant& v : kVariants)
        for (Kernel k : {v.bf16, v.fp16})
            if (k) CHECK(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, v.smem_bytes));
}

struct Plan {
    const Variant* v;
    int grid, num_row_tiles, num_token_tiles, raster_tokens;
};
/// max_clusters: fewer than fit, so that small problems walk several tiles.
static Plan plan_of(const Variant& v, int m, int n, int raster, int max_clusters = 1 << 20) {
    Plan p = {&v, 0, int(ceil_div(n, 128)), int(ceil_div(m, v.tokens)), 0};
    const int tiles = p.num_row_tiles * p.num_token_tiles, size = v.parts;
    p.raster_tokens = std::min(raster, p.num_token_tiles);
    p.grid = size * (v.parts > 1 ? tiles : std::min({tiles, num_sms / size, max_clusters}));
    return p;
}

static Gemm4bitLargeParams params_of(const Plan& plan, const Gemm4bitOperands& o, const void* input,
                                     const void* packed, bool is_half) {
    Gemm4bitLargeParams p = {};
    const Variant& v = *plan.v;
    const cuuint64_t k = cuuint64_t(o.k), m = cuuint64_t(o.m), n = cuuint64_t(o.n);
    const CUtensorMapDataType type =
        is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    p.input =
        encode<TensorMap>(input, type, {64, m, k / 64}, {2 * k, 128}, {64, cuuint32_t(v.tokens), 1}, 128);
    p.packed = encode<TensorMap>(packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, {k / 2, n}, {k / 2}, {64, 32}, 64);
    p.output_by_tma = o.n % 8 == 0 && reinterpret_cast<uintptr_t>(o.output) % 16 == 0;
    if (p.output_by_tma)
        p.output =
            encode<TensorMap>(o.output, type, {n, m}, {2 * n}, {64, cuuint32_t(v.tokens / v.parts)}, 128);
    p.o = o;
    p.num_row_tiles = plan.num_row_tiles, p.num_token_tiles = plan.num_token_tiles;
    p.raster_tokens = plan.raster_tokens;
    return p;
}

static void launch(const Plan& plan, const Gemm4bitLargeParams& p, bool is_half, bool dependent,
                   cudaStream_t stream) {
    const Variant& v = *plan.v;
    const LaunchShape shape = {unsigned(plan.grid), unsigned(v.threads), unsigned(v.smem_bytes),
                               unsigned(v.parts)};
    launch_kernel(is_half ? v.fp16 : v.bf16, p, shape, dependent, stream);
}

// ------------------------------------------------------------------------------------------------ checks

struct Case {
    int m, n, k, raster;
    int block_shift = 6, codebook = 0;
    bool nested = false, own_map = false;
    int bias_dtype = -1;  // none
    int max_clusters = 1 << 20;
    int repeats = 30;
    bool dependent = true;
};

template <typename T>
void check(const Variant& v, const Case& c) {
    constexpr bool kHalf = std::is_same_v<T, float16>;
    Product<T> product(c);
    auto o = operands_of<Gemm4bitOperands>(product.params);
    const Plan plan = plan_of(v, c.m, c.n, c.raster, c.max_clusters);
    const std::string what =
        v.name() + (kHalf ? " fp16 raster " : " bf16 raster ") + std::to_string(c.raster);
    product.check(what, c.repeats, 0, [&](int run) {
        o.weights_ready = run % 2;
        launch(plan, params_of(plan, o, product.params.input, product.params.packed, kHalf), kHalf,
               c.dependent && run % 3, nullptr);
    });
}

static void check_all(bool small) {
    for (const Variant& v : kVariants) {
        const int t = v.tokens, s = v.unit == 32 ? 5 : 6;
        const auto both = [&](Case c) {
            c.repeats = small ? 2 : 30;
            check<bfloat16>(v, c);
            if (v.fp16) check<float16>(v, c);
        };
        both({t, 256, 576, 8, s});
        both({t + 5, 264, 832, 2, s, 1, true, false, 0, 1});
        if (small) continue;
        both({2 * t + 5, 377, 2112, 2, s, 2, true, true, 1, 1});
        both({2 * t - 3, 1000, 4160, 8, s + 1, 0, true, false, 2, 2});
        both({t - 1, 1028, 5312, 8, s + 1, 0, false, false, 2});
        both({t, 260, 4096, 8, s + 3, 1, false, false, -1});
        both({t - 1, 3584, 4096, 8, s, 0, false, false, -1});
        both({t, 100, 64, 8, s, 0, false, false, -1});
        both({3 * t, 520, 128, 2, s, 0, false, false, -1, 3});
    }
}

// --------------------------------------------------------------------------------------------------- time

struct Goal {
    int m, n, k;
    float goal, peer;
};
static const Goal kGoals[] = {
    {256, 4096, 4096, 15.5f, 21.3f}, {256, 14336, 4096, 47.5f, 50.3f}, {256, 8192, 8192, 55.5f, 58.9f},
    {256, 28672, 8192, 187, 196},    {512, 4096, 4096, 27, 29.9f},     {512, 14336, 4096, 96, 99.8f},
    {512, 8192, 8192, 101, 105.4f},  {512, 28672, 8192, 349, 360.5f},  {1024, 4096, 4096, 51.5f, 53.4f},
    {1024, 14336, 4096, 170, 176},   {1024, 8192, 8192, 191, 193},     {1024, 28672, 8192, 665, 665},
    {4096, 4096, 4096, 201, 203},    {4096, 14336, 4096, 672, 680},    {4096, 8192, 8192, 780, 789},
    {4096, 28672, 8192, 2739, 2767},
};

static void time_all(int only_m, int only_n, int only_k) {
    constexpr int64_t kPackedBytes = 360ll << 20, kMaxOut = 4096ll * 28672, kMaxWeight = 28672ll * 8192;
    const Buffer<uint8_t> packed(kPackedBytes);
    const Buffer<float> absmax(kPackedBytes / 16);
    const Buffer<bfloat16> input(4096ll * 8192), output(2 * kMaxOut);
    Cublas cublas;
    const Buffer<bfloat16> dense(cublas.handle ? 2 * kMaxWeight : 1);
    fill_codes<<<132 * 8, 256>>>(packed.data(), kPackedBytes, Nf4::kThresholds);
    random_normal(absmax.data(), kPackedBytes / 16, 3);
    random_normal(input.data(), 4096ll * 8192, 4);
    if (cublas.handle) random_normal(dense.data(), 2 * kMaxWeight, 5);
    CHECK(cudaDeviceSynchronize());
    for (const Goal& g : kGoals) {
        if ((only_m && g.m != only_m) || (only_n && g.n != only_n) || (only_k && g.k != only_k)) continue;
        const int64_t bytes = int64_t(g.n) * g.k / 2;
        const int copies = int(std::min<int64_t>(24, kPackedBytes / bytes));
        const double flop = 2.0 * g.m * g.n * g.k, floor_us = flop / 790e6;
        std::vector<Plan> plans;
        std::vector<std::function<void(int, cudaStream_t)>> calls;
        std::vector<std::string> names;
        for (const Variant& v : kVariants) {
            if (v.unit != 64 || v.tokens / 2 >= g.m || (v.tokens == 128 && g.m > 1024)) continue;
            for (int raster : {2, 8, 32}) {
                const Plan plan = plan_of(v, g.m, g.n, raster);
                if (raster > 2 && raster / 4 >= plan.num_token_tiles) continue;
                if (v.parts > 1 && plan.grid > num_sms) continue;
                auto params = std::make_shared<std::vector<Gemm4bitLargeParams>>();
                for (int i = 0; i < copies; ++i) {
                    Gemm4bitOperands o = {absmax.data() + i * (bytes / 32),
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          output.data() + i % 2 * kMaxOut,
                                          g.m,
                                          g.n,
                                          g.k,
                                          6,
                                          0,
                                          0,
                                          1};
                    params->push_back(params_of(plan, o, input.data(), packed.data() + i * bytes, false));
                }
                names.push_back(v.name() + " raster " + std::to_string(plan.raster_tokens));
                calls.push_back(
                    [=](int i, cudaStream_t s) { launch(plan, (*params)[size_t(i)], false, true, s); });
            }
        }
        if (cublas.handle) {
            const int64_t weight = int64_t(g.n) * g.k;
            const int num = int(2 * kMaxWeight / weight);
            names.push_back("cuBLAS");
            calls.push_back([&, num, weight](int i, cudaStream_t s) {
                cublas.run(g.m, g.n, g.k, input.data(), dense.data() + i % num * weight,
                           output.data() + i % 2 * kMaxOut, s);
            });
        }
        const std::vector<float> us = interleave(calls, copies, float(floor_us * 1.2));
        std::printf("M %4d  %5d x %5d  goal %6.1f (%6.1f) floor %6.1f:", g.m, g.n, g.k, g.goal, g.peer,
                    floor_us);
        for (size_t i = 0; i < us.size(); ++i) std::printf("  %s %.1f", names[i].c_str(), us[i]);
        std::printf("\n");
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
    if (has("time")) time_all(number(2), number(3), number(4));
    return failures != 0;
}
