// Checks and times the kernels of gemm_4bit_skinny.cu on one GPU.
//
// nvcc -std=c++20 -O3 -fmad=false -I../../cuda -arch=sm_90a gemm_4bit_skinny_bench.cu -ldl
// Usage: gemm_4bit_skinny_bench [check [small]] [time [brief]]
#include "gemm_4bit_skinny.cu"
#include "gemm_4bit_check.cuh"
#include <map>

// --------------------------------------------------------------------------------------- plan, launch

using Kernel = void (*)(Gemm4bitSkinnyParams);
#define KERNEL(name) {#name, gemm_4bit_skinny_##name}
#define SIMT_KERNELS(dtype)                                                                         \
    KERNEL(words_##dtype##_1), KERNEL(words_##dtype##_4), KERNEL(words_nested_##dtype##_1),         \
        KERNEL(words_nested_##dtype##_4), KERNEL(general_##dtype##_1), KERNEL(general_##dtype##_4), \
        KERNEL(general_nested_##dtype##_1), KERNEL(general_nested_##dtype##_4)
#define MMA_KERNELS(dtype)                                                              \
    KERNEL(rows32_##dtype##_4), KERNEL(rows32_##dtype##_8), KERNEL(rows64_##dtype##_4), \
        KERNEL(rows64_##dtype##_8), KERNEL(rows32_block32_##dtype##_4)
static const std::map<std::string, Kernel> kKernels = {
    SIMT_KERNELS(float32),       SIMT_KERNELS(float16), SIMT_KERNELS(bfloat16),      MMA_KERNELS(float16),
    MMA_KERNELS(nested_float16), MMA_KERNELS(bfloat16), MMA_KERNELS(nested_bfloat16)};

template <typename T>
constexpr const char* kName = "float32";
template <>
constexpr const char* kName<float16> = "float16";
template <>
constexpr const char* kName<bfloat16> = "bfloat16";

struct Plan {
    std::string kernel;
    unsigned grid, threads, shared_bytes;
};

/// What a plan may be told to do instead of its own choice; 0 leaves it the choice.
struct Force {
    unsigned threads = 0, rows = 0;
    bool simt = false;
};

/// The table at the top of gemm_4bit_skinny.cu; fills the tiles of `p`.
template <typename T>
Plan make_plan(Gemm4bitSkinnyParams& p, unsigned num_sms, Force force = {}) {
    const std::string nested = p.absmax_scale ? "nested_" : "", name = nested + kName<T> + "_";
    const auto aligned = [](const void* q, uintptr_t bytes) {
        return reinterpret_cast<uintptr_t>(q) % bytes == 0;
    };
    if (sizeof(T) == 2 && !force.simt && p.k % 64 == 0 && p.k <= 1 << 24 && aligned(p.packed, 16) &&
        aligned(p.input, 16)) {
        const int64_t num_tiles = ceil_div(p.n, 16), sms = num_sms;
        const bool small = num_tiles > 4 * sms || (num_tiles > sms && num_tiles <= 2 * sms && p.k <= 4096);
        const unsigned threads = force.threads ? force.threads : small ? 256 : 512;
        const bool is_block32 = p.block_shift == 5;
        const int64_t slots = sms * (512 / threads);
        const int64_t rows = is_block32 ? 32 : force.rows ? force.rows : num_tiles <= 2 * slots ? 32 : 64;
        const int64_t grid = std::min(num_tiles, ceil_div(num_tiles, slots * (rows / 16)) * slots);
        p.tiles_per_cta = int(num_tiles / grid);
        p.num_larger_ctas = int(num_tiles % grid);
        return {"rows" + std::to_string(rows) + (is_block32 ? "_block32_" : "_") + name +
                    (is_block32 || p.m <= 4 ? "4" : "8"),
                unsigned(grid), threads, unsigned(33792 + threads * rows)};
    }
    const bool words = p.k % 8 == 0 && aligned(p.packed, 4) && aligned(p.input, 16);
    return {(words ? "words_" : "general_") + name + (p.m == 1 ? "1" : "4"), unsigned(ceil_div(p.n, 8)), 256,
            0};
}

void launch(const Plan& plan, const Gemm4bitSkinnyParams& p, cudaStream_t stream = nullptr) {
    const Kernel kernel = kKernels.at(plan.kernel);
    if (plan.shared_bytes)
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(plan.shared_bytes)));
    kernel<<<plan.grid, plan.threads, plan.shared_bytes, stream>>>(p);
    CHECK(cudaGetLastError());
}

unsigned num_sms() {
    static const unsigned num = [] {
        cudaDeviceProp properties;
        CHECK(cudaGetDeviceProperties(&properties, 0));
        return unsigned(properties.multiProcessorCount);
    }();
    return num;
}

// ----------------------------------------------------------------------------------------------- checks

struct Case {
    int64_t m, n, k;
    int block_shift = 6, codebook = 0;
    bool nested = false, own_map = false;
    int bias_dtype = -1;  // none
    size_t offset = 0;    // elements from an aligned address
    Force force = {};
};

template <typename T>
void check(const Case& c) {
    Product<T> product(c, c.offset);
    const Plan plan = make_plan<T>(product.params, num_sms(), c.force);
    const std::string what = plan.kernel + " offset " + std::to_string(c.offset);
    product.check(what, 20, 2000, [&](int) { launch(plan, product.params); });
}

template <typename T>
void check_type(bool small) {
    for (Force force : {Force{}, Force{256, 32}, Force{256, 64}, Force{512, 64}, Force{0, 0, true}}) {
        if (sizeof(T) == 4 && force.threads) continue;
        for (int64_t m : {1, 2, 3, 5, 8, 9, 17})
            for (int64_t n : {1, 15, 64, 100, 145})
                for (int64_t k : {1, 31, 32, 63, 64, 96, 100, 2112})
                    if (k % 64 == 0 || !force.threads)
                        check<T>({m, n, k, 6, int(m % 3), false, false, int(n % 4) - 1, 0, force});
        for (int shift = 5; shift <= 12; ++shift)
            for (int codebook = 0; codebook < 3; ++codebook)
                for (bool nested : {false, true})
                    for (int64_t k : {320, 328, 333})
                        if (k % 64 == 0 || !force.threads)
                            check<T>({5, 40, k, shift, codebook, nested, shift % 2 == 0, shift % 4 - 1,
                                      size_t(k == 333), force});
        for (size_t offset : {1, 2, 4, 8, 16}) check<T>({3, 65, 320, 6, 0, true, false, 1, offset, force});
        check<T>({3, 33, 0, 6, 0, false, false, 0, 0, force});
        if (!small)
            for (int64_t m : {1, 2, 3, 5, 8, 9, 17})
                for (int64_t k : {2112, 4096})
                    check<T>({m, 4096, k, m % 2 ? 6 : 7, int(m % 3), m == 5, false, 0, 0, force});
    }
}

// ------------------------------------------------------------------------------------------------ times

/// Weights that rotate through 360 MB; their codes are those of a normal distribution.
struct WeightPool {
    static constexpr int64_t kPackedBytes = 360ll << 20, kMaxM = 32, kMaxK = 16384, kMaxN = 32768;
    Buffer<uint8_t> packed{kPackedBytes};
    Buffer<float> absmax{kPackedBytes / 16};
    Buffer<bfloat16> input{4 * kMaxM * kMaxK}, output{4 * kMaxM * kMaxN};
    Buffer<float> input32{kMaxM * kMaxK}, output32{kMaxM * kMaxN};
};

template <typename T>
void time_shape(const WeightPool& pool, int64_t m, int64_t n, int64_t k, bool nested, Force force) {
    const int64_t bytes = n * k / 2, blocks = n * k / 64;
    const int copies = int(std::min<int64_t>(24, WeightPool::kPackedBytes / bytes));
    std::vector<Gemm4bitSkinnyParams> calls;
    Plan plan;
    for (int i = 0; i < copies; ++i) {
        Gemm4bitSkinnyParams p = {};
        if constexpr (sizeof(T) == 2) {
            p.input = pool.input.data() + i % 4 * WeightPool::kMaxM * WeightPool::kMaxK;
            p.output = pool.output.data() + i % 4 * WeightPool::kMaxM * WeightPool::kMaxN;
        } else {
            p.input = pool.input32.data();
            p.output = pool.output32.data();
        }
        p.packed = pool.packed.data() + i * bytes;
        p.absmax = pool.absmax.data() + i * blocks;
        if (nested) p.absmax_scale = pool.absmax.data(), p.absmax_offset = pool.absmax.data();
        p.m = m, p.n = n, p.k = k, p.block_shift = 6;
        plan = make_plan<T>(p, num_sms(), force);
        calls.push_back(p);
    }
    const float us =
        time_us(copies, [&](int i, cudaStream_t stream) { launch(plan, calls[size_t(i)], stream); });
    const double total = double(n * k) * (nested ? 0.5 + 1.0 / 64 : 0.5625) + double(sizeof(T) * m * (n + k));
    const double floor_us = total / 4.4e6;
    std::printf("m %2lld n %5lld k %5lld  %-28s %3u x %3u  %7.2f us  floor %5.2f us  %3.0f %%\n",
                static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(k),
                plan.kernel.c_str(), plan.grid, plan.threads, us, floor_us, 100 * floor_us / us);
    std::fflush(stdout);
}

void time_all(bool brief) {
    const WeightPool pool;
    fill_codes<<<132 * 8, 256>>>(pool.packed.data(), WeightPool::kPackedBytes, Nf4::kThresholds);
    random_normal(pool.absmax.data(), WeightPool::kPackedBytes / 16, 3);
    random_normal(pool.input.data(), 4 * WeightPool::kMaxM * WeightPool::kMaxK, 4);
    random_normal(pool.input32.data(), WeightPool::kMaxM * WeightPool::kMaxK, 5);
    CHECK(cudaDeviceSynchronize());
    constexpr int64_t kShapes[][2] = {{4096, 4096}, {14336, 4096}, {4096, 14336},
                                      {8192, 8192}, {28672, 8192}, {1024, 4096}};
    for (int64_t m : brief ? std::vector<int64_t>{1, 8} : std::vector<int64_t>{1, 2, 4, 8, 16, 32})
        for (const auto& [n, k] : kShapes)
            for (Force force : {Force{512, 32}, Force{512, 64}, Force{256, 32}, Force{256, 64}}) {
                if (m > 8 && force.rows == 32) continue;
                time_shape<bfloat16>(pool, m, n, k, false, force);
            }
    if (brief) return;
    for (int64_t m : {1, 8}) {
        for (const auto& [n, k] : kShapes) time_shape<bfloat16>(pool, m, n, k, true, {});
        for (const auto& [n, k] : kShapes) time_shape<bfloat16>(pool, m, n, k, false, {0, 0, true});
        for (const auto& [n, k] : kShapes) time_shape<float>(pool, m, n, k, false, {});
    }
}

int main(int argc, char** argv) {
    const auto has = [&](const char* word) {
        return std::any_of(argv + 1, argv + argc, [&](const char* a) { return !std::strcmp(a, word); });
    };
    if (has("check")) {
        check_type<bfloat16>(has("small"));
        check_type<float16>(has("small"));
        check_type<float>(has("small"));
        std::printf("check: %d failures\n", failures);
    }
    if (has("time")) time_all(has("brief"));
    return failures != 0;
}
