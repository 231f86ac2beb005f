// Checks and times the kernels of gemm_4bit_skinny_sm90.cu on one H100 or H200.
//
// nvcc -std=c++20 -O3 -fmad=false -I../../cuda -gencode=arch=compute_90a,code=sm_90a gemm_4bit_skinny_sm90_bench.cu
// -ldl
// Usage: gemm_4bit_skinny_sm90_bench [check [small]] [time]
#include "gemm_4bit_skinny_sm90.cu"
#include "gemm_4bit_check.cuh"
#include <map>

// --------------------------------------------------------------------------------------- plan, launch

using Params = Gemm4bitSkinnySm90Params;
using Kernel = void (*)(Params);
#define KERNEL(name) {#name, gemm_4bit_skinny_##name}
#define KERNELS_OF(tokens, dtype) \
    KERNEL(columns8192_##dtype##_##tokens), KERNEL(columns14336_##dtype##_##tokens)
#define KERNELS(dtype) KERNELS_OF(1, dtype), KERNELS_OF(2, dtype), KERNELS_OF(4, dtype), KERNELS_OF(8, dtype)
static const std::map<std::string, Kernel> kKernels = {KERNELS(bfloat16), KERNELS(nested_bfloat16),
                                                       KERNELS(float16), KERNELS(nested_float16)};

struct Plan {
    std::string kernel;
    unsigned grid, threads, shared_bytes, cluster;
};

/// The table at the top of gemm_4bit_skinny_sm90.cu.
bool fits(int64_t m, int64_t k, int block_shift, bool nested) {
    const int64_t block = int64_t(1) << block_shift, per_copy = nested ? 16 : 4;
    const bool has_half_panel = m > 4 && k > 8192;
    return k <= 14336 && k % 256 == 0 && m <= 8 && block >= 64 &&
           block <= (has_half_panel && !nested ? 256
                     : nested                  ? 128
                                               : 512) &&
           k % (per_copy * block) == 0;
}
/// Fills the tiles of `p`. `grid` 0: the plan's own.
template <typename T>
Plan make_plan(Gemm4bitSkinnyParams& p, int64_t grid = 0) {
    static const int num_sms = [] {
        cudaDeviceProp properties;
        CHECK(cudaGetDeviceProperties(&properties, 0));
        return properties.multiProcessorCount;
    }();
    const int tokens = p.m <= 2 ? int(p.m) : p.m <= 4 ? 4 : 8;
    const bool wide = p.k > 8192;
    const unsigned cluster = wide && tokens == 8 ? 2 : 1;
    const int64_t num_tiles = ceil_div(p.n, 16 * cluster);
    grid = std::min(num_tiles, (grid ? grid : int64_t(num_sms)) / cluster);
    p.tiles_per_cta = int(num_tiles / grid);
    p.num_larger_ctas = int(num_tiles % grid);
    const std::string name =
        std::string(wide ? "columns14336_" : "columns8192_") + (p.absmax_scale ? "nested_" : "") +
        (std::is_same_v<T, bfloat16> ? "bfloat16_" : "float16_") + std::to_string(tokens);
    const unsigned threads = (tokens == 8 || (tokens == 4 && wide) ? 576 : 320) + (p.absmax_scale ? 32 : 0);
    const unsigned shared = (tokens == 1   ? 107664
                             : tokens == 2 ? 108688
                             : tokens == 4 ? (wide ? 118928 : 112784)
                                           : (wide ? 148624 : 127120)) +
                            (p.absmax_scale ? 6144 : 0);
    return {name, unsigned(grid) * cluster, threads, shared, cluster};
}

Params make_params(const Gemm4bitSkinnyParams& p, bool weights_ready) {
    const cuuint64_t n = p.n, k = p.k, item = p.absmax_scale ? 1 : 4, row = k >> p.block_shift;
    const bool halves = p.m > 4 && p.k > 8192;
    const cuuint32_t panel = halves ? 1024 : 2048, rows = halves ? 32 : 16;
    const cuuint32_t scales = std::max(panel >> p.block_shift, cuuint32_t(16 / item));
    const auto type = p.absmax_scale ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    return {encode<TensorMap>(p.packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, {128, n, k / 256}, {k / 2, 128},
                              {128, rows, panel / 256}, 128, CU_TENSOR_MAP_L2_PROMOTION_L2_128B),
            encode<TensorMap>(p.absmax, type, {row, n}, {row * item}, {scales, rows},
                              p.absmax_scale ? 0 : int(scales * item), CU_TENSOR_MAP_L2_PROMOTION_L2_128B),
            p, weights_ready, 0};
}

void launch(const Plan& plan, const Params& q, bool dependent, cudaStream_t stream = nullptr) {
    const Kernel kernel = kKernels.at(plan.kernel);
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared_bytes)));
    launch_kernel(kernel, q, {plan.grid, plan.threads, plan.shared_bytes, plan.cluster}, dependent, stream);
}

// ----------------------------------------------------------------------------------------------- checks

struct Case {
    int64_t m, n, k;
    int block_shift = 6, codebook = 0;
    bool nested = false, own_map = false;
    int bias_dtype = -1;  // none
    int64_t grid = 0;
    int num_runs = 6;
};

/// Odd runs: three launches that overlap.
template <typename T>
void check(const Case& c) {
    Product<T> product(c);
    const Plan plan = make_plan<T>(product.params, c.grid);
    const auto run_it = [&](int run) {
        for (int i = 0; i < (run % 2 ? 3 : 1); ++i)
            launch(plan, make_params(product.params, run % 2), run % 2);
    };
    product.check(plan.kernel + " grid " + std::to_string(plan.grid), c.num_runs, 2000, run_it, {1.5, 0.5});
}

template <typename T>
void check_type(bool small) {
    for (int64_t m : {1, 2, 3, 4, 5, 8})
        for (int64_t k : {256, 1024, 2304, 4096, 8192, 11008, 14336})
            for (int shift = 6; shift <= 9; ++shift)
                for (bool nested : {false, true}) {
                    if (!fits(m, k, shift, nested) || (small && (k > 4096 || m == 4 || shift > 7))) continue;
                    const int64_t n = k == 256 ? 15 : k == 1024 ? 64 : k == 2304 ? 100 : 145;
                    check<T>({m, n, k, shift, int(m + shift) % 3, nested, shift == 6, int(n + m) % 4 - 1,
                              k == 4096 ? 3 : 0, small ? 2 : 6});
                }
    if (small) return;
    for (int64_t m : {1, 2, 4, 8})
        for (int64_t k : {4096, 8192, 14336})
            if (fits(m, k, 6, false)) check<T>({m, 4096, k, 6, int(m % 3), false, false, 0, 0, 40});
}

/// Output into input, many times, with and without dependent launch.
void check_chain() {
    const int64_t n = 4096;
    const Buffer<uint8_t> packed(n * n / 2);
    fill_bytes<<<264, 256>>>(packed.data(), n * n / 2, 7);
    const Buffer<float> absmax(std::vector<float>(n * n / 64, 0.03f));
    for (int64_t m : {1, 2, 4, 8}) {
        std::vector<bfloat16> results[2];
        for (bool dependent : {false, true}) {
            const Buffer<bfloat16> a(m * n), b(m * n);
            random_normal(a.data(), m * n, 9);
            Gemm4bitSkinnyParams p = {};
            p.packed = packed.data(), p.absmax = absmax.data();
            p.m = m, p.n = n, p.k = n, p.block_shift = 6;
            const Plan plan = make_plan<bfloat16>(p);
            for (int i = 0; i < 60; ++i) {
                p.input = i % 2 ? b.data() : a.data(), p.output = i % 2 ? a.data() : b.data();
                launch(plan, make_params(p, dependent), dependent);
            }
            results[dependent] = a.download();
        }
        const bool same = !std::memcmp(results[0].data(), results[1].data(), results[0].size() * 2);
        failures += !same;
        std::printf("%s chain m %lld, last %g\n", same ? "ok  " : "FAIL", static_cast<long long>(m),
                    double(float(results[0][0])));
    }
}

// ------------------------------------------------------------------------------------------------ times

void time_all() {
    constexpr int64_t kBytes = 360ll << 20, kMaxM = 8, kMaxK = 14336, kMaxN = 28672;
    const Buffer<uint8_t> packed(kBytes), codes(kBytes / 32);
    const Buffer<float> absmax(kBytes / 16);
    const Buffer<bfloat16> input(4 * kMaxM * kMaxK), output(4 * kMaxM * kMaxN);
    fill_codes<<<132 * 8, 256>>>(packed.data(), kBytes, Nf4::kThresholds);
    fill_bytes<<<264, 256>>>(codes.data(), kBytes / 32, 3);
    random_normal(absmax.data(), kBytes / 16, 3);
    random_normal(input.data(), 4 * kMaxM * kMaxK, 4);
    constexpr int64_t kShapes[][2] = {
        {4096, 4096}, {14336, 4096}, {4096, 14336}, {8192, 8192}, {28672, 8192}};
    for (bool nested : {false, true})
        for (const auto& [n, k] : kShapes)
            for (int64_t m : {1, 2, 4, 8}) {
                if (!fits(m, k, 6, nested)) continue;
                const int64_t bytes = n * k / 2;
                const int copies = int(std::min<int64_t>(24, kBytes / bytes));
                std::vector<Params> calls;
                Plan plan;
                float us[2];
                for (int dependent = 0; dependent < 2; ++dependent) {
                    calls.clear();
                    for (int i = 0; i < copies; ++i) {
                        Gemm4bitSkinnyParams p = {};
                        p.input = input.data() + i % 4 * kMaxM * kMaxK;
                        p.output = output.data() + i % 4 * kMaxM * kMaxN;
                        p.packed = packed.data() + i * bytes;
                        p.absmax = absmax.data() + i * bytes / 32;
                        if (nested) {
                            p.absmax = codes.data() + i * bytes / 32;
                            p.absmax_scale = p.absmax_offset = absmax.data();
                        }
                        p.m = m, p.n = n, p.k = k, p.block_shift = 6;
                        plan = make_plan<bfloat16>(p);
                        calls.push_back(make_params(p, dependent));
                    }
                    us[dependent] = time_us(copies, [&](int i, cudaStream_t stream) {
                        launch(plan, calls[size_t(i)], dependent, stream);
                    });
                }
                const double total =
                    double(n * k) * (nested ? 0.5 + 1.0 / 64 : 0.5625) + 2.0 * double(m * (n + k));
                const double floor_us = total / 4.4e6;
                std::printf("m %lld n %5lld k %5lld  %-30s %7.2f us %3.0f %% of %5.2f, dependent %7.2f us\n",
                            static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(k),
                            plan.kernel.c_str(), us[0], 100 * floor_us / us[0], floor_us, us[1]);
                std::fflush(stdout);
            }
}

int main(int argc, char** argv) {
    const auto has = [&](const char* word) {
        return std::any_of(argv + 1, argv + argc, [&](const char* a) { return !std::strcmp(a, word); });
    };
    if (has("check")) {
        check_type<bfloat16>(has("small"));
        check_type<float16>(has("small"));
        if (!has("small")) check_chain();
        std::printf("check: %d failures\n", failures);
    }
    if (has("time")) time_all();
    return failures != 0;
}
