// Checks and times variants of gemm_4bit_mid on one sm_90a GPU.
//
// nvcc -std=c++20 -O3 -fmad=false -I../../cuda -gencode arch=compute_90a,code=sm_90a gemm_4bit_mid_bench.cu -ldl
// Usage: gemm_4bit_mid_bench [check] [small] [time] [ncu]; CUBLAS names the cuBLAS library, without it there is no
// peer.
#include "gemm_4bit_mid.cuh"
#include "gemm_4bit_check.cuh"

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
#define VARIANTS_OF(unit) \
    V(16, 1, 4, 4, unit)  \
    V(16, 2, 2, 4, unit)  \
    V(32, 1, 4, 2, unit)  \
    V(32, 2, 2, 4, unit)  \
    V(64, 1, 3, 2, unit) V(64, 2, 1, 2, unit, true) V(128, 1, 2, 2, unit) V(128, 2, 1, 2, unit, true)
#define VARIANTS VARIANTS_OF(64) VARIANTS_OF(32)  // those of gemm_4bit_mid_sm90.cu
#endif
#define V(...) variant_of<mid::Shape<__VA_ARGS__>>(),
static const Variant kVariants[] = {VARIANTS};

// ---------------------------------------------------------------------------------------------- launching

static void set_up() {
    for (const Variant& v : kVariants)
        for (Kernel k : {v.bf16, v.fp16})
            if (k) CHECK(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, v.smem_bytes));
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
    p.input = encode<TensorMap>(
        input, is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, {64, m, k / 64},
        {2 * k, 128}, {64, cuuint32_t(v.tokens), cuuint32_t(v.blocks)}, 128);
    p.packed = encode<TensorMap>(packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, {k / 2, n}, {k / 2},
                                 {cuuint32_t(v.row_bytes), cuuint32_t(plan.rows)}, v.row_bytes);
    const cuuint64_t block = cuuint64_t(1) << o.block_shift, columns = cuuint64_t(64) * v.blocks;
    p.scales_by_copy =
        !o.absmax_scale && block == cuuint64_t(v.unit) && k / block % 4 == 0 && columns / block % 4 == 0;
    if (p.scales_by_copy)
        p.absmax =
            encode<TensorMap>(o.absmax, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, {k / block, n}, {4 * (k / block)},
                              {cuuint32_t(columns / block), cuuint32_t(plan.rows)}, 0);
    p.o = o;
    p.rows_per_tile = plan.rows;
    return p;
}

static void launch(const Plan& plan, const Gemm4bitMidParams& p, bool is_half, bool dependent,
                   cudaStream_t stream) {
    const Variant& v = *plan.v;
    const int64_t tiles = ceil_div(p.o.n, plan.rows);
    const int64_t clusters = plan.parts > 1 ? tiles : ceil_div(tiles, ceil_div(tiles, plan.most_ctas));
    const dim3 grid(unsigned(clusters * plan.parts), unsigned(ceil_div(p.o.m, v.tokens)));
    const LaunchShape shape = {grid, unsigned(v.threads), unsigned(v.smem_bytes), unsigned(plan.parts)};
    launch_kernel(is_half ? v.fp16 : v.bf16, p, shape, dependent, stream);
}

// ------------------------------------------------------------------------------------------------ checks

struct Case {
    int m, n, k, rows, parts;
    int block_shift = 6, codebook = 0;
    bool nested = false, own_map = false;
    int bias_dtype = -1;  // none
    int repeats = 30;
    bool dependent = true;
};

template <typename T>
void check(const Variant& v, const Case& c) {
    constexpr bool kHalf = std::is_same_v<T, float16>;
    Product<T> product(c);
    auto o = operands_of<Gemm4bitOperands>(product.params);
    Plan plan = {&v, c.rows, c.parts};
    const std::string what = v.name() + (kHalf ? " fp16 rows " : " bf16 rows ") + std::to_string(c.rows) +
                             " parts " + std::to_string(c.parts);
    product.check(what, c.repeats, 0, [&](int run) {
        o.weights_ready = run % 2;
        plan.most_ctas = run % 5 == 4 ? 3 : 132;
        launch(plan, params_of(plan, o, product.params.input, product.params.packed, kHalf), kHalf,
               c.dependent && run % 3, nullptr);
    });
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
                for (Gemm4bitMidParams& call : calls) call.o.weights_ready = 0;
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
