// Checks and times the kernels of gemm_4bit_skinny_sm90.cu on one H100 or H200.
//
// nvcc -std=c++20 -O3 -fmad=false -I../../cuda -gencode=arch=compute_90a,code=sm_90a gemm_4bit_skinny_sm90_bench.cu
// Usage: gemm_4bit_skinny_sm90_bench [check [small]] [time]
#include "gemm_4bit_skinny_sm90.cu"
#include "harness.cuh"
#include <cuda.h>
#include <map>
#include <random>

// --------------------------------------------------------------------------------------- plan, launch

using Params = Gemm4bitSkinnySm90Params;
using Kernel = void (*)(Params);
#define KERNEL(name) {#name, gemm_4bit_skinny_##name}
#define KERNELS(dtype)                                                                                   \
    KERNEL(columns8192_##dtype##_1), KERNEL(columns14336_##dtype##_1), KERNEL(columns14336_##dtype##_2), \
        KERNEL(columns8192_##dtype##_4), KERNEL(columns14336_##dtype##_4)
static const std::map<std::string, Kernel> kKernels = {
    KERNELS(bfloat16),       KERNELS(nested_bfloat16),       KERNELS(float16),
    KERNELS(nested_float16), KERNEL(columns8192_bfloat16_8), KERNEL(columns8192_float16_8)};

struct Plan {
    std::string kernel;
    unsigned grid, threads, shared_bytes;
};

/// The table at the top of gemm_4bit_skinny_sm90.cu.
bool fits(int64_t m, int64_t k, int block_shift, bool nested) {
    const int64_t block = int64_t(1) << block_shift;
    return k <= (m > 4 ? 8192 : 14336) && k % 256 == 0 && m <= (nested ? 4 : 8) && block >= 64 &&
           block <= (nested ? 128 : 512) && k % ((nested ? 16 : 4) * block) == 0;
}
/// Fills the tiles of `p`. `grid` 0: the plan's own.
template <typename T>
Plan make_plan(Gemm4bitSkinnyParams& p, int64_t grid = 0) {
    static const int num_sms = [] {
        cudaDeviceProp properties;
        CHECK(cudaGetDeviceProperties(&properties, 0));
        return properties.multiProcessorCount;
    }();
    const int64_t num_tiles = ceil_div(p.n, 16);
    grid = std::min(num_tiles, grid ? grid : int64_t(num_sms));
    p.tiles_per_cta = int(num_tiles / grid);
    p.num_larger_ctas = int(num_tiles % grid);
    const int tokens = p.m <= 2 ? int(p.m) : p.m <= 4 ? 4 : 8;
    const bool wide = tokens == 2 || p.k > 8192;
    const std::string name =
        std::string(wide ? "columns14336_" : "columns8192_") + (p.absmax_scale ? "nested_" : "") +
        (std::is_same_v<T, bfloat16> ? "bfloat16_" : "float16_") + std::to_string(tokens);
    const unsigned shared = tokens == 1 ? 108640 : tokens == 2 ? 109664 : tokens == 4 ? 111712 : 124000;
    return {name, unsigned(grid), tokens == 8 ? 576u : 320u, shared};
}

template <int kRank>
TensorMap encode(const void* data, CUtensorMapDataType type, const cuuint64_t (&dims)[kRank],
                 const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank], int row_bytes) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode_tiled = [] {
        void* f;
        cudaDriverEntryPointQueryResult result;
        CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault,
                                               &result));
        return Encode(f);
    }();
    const cuuint32_t ones[3] = {1, 1, 1};
    const auto swizzle = row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                         : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                         : row_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                           : CU_TENSOR_MAP_SWIZZLE_NONE;
    CUtensorMap map;
    if (encode_tiled(&map, type, kRank, const_cast<void*>(data), dims, strides, box, ones,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)) {
        std::printf("the map must be encodable\n");
        std::exit(1);
    }
    TensorMap v;
    std::memcpy(&v, &map, sizeof(v));
    return v;
}

Params make_params(const Gemm4bitSkinnyParams& p, bool weights_ready) {
    const cuuint64_t n = p.n, k = p.k, item = p.absmax_scale ? 1 : 4, row = k >> p.block_shift;
    const cuuint32_t panel = 2048u >> p.block_shift;
    const auto type = p.absmax_scale ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    return {encode<3>(p.packed, CU_TENSOR_MAP_DATA_TYPE_UINT8, {128, n, k / 256}, {k / 2, 128}, {128, 16, 8},
                      128),
            encode<2>(p.absmax, type, {row, n}, {row * item}, {panel, 16}, int(panel * item)), p,
            weights_ready, 0};
}

void launch(const Plan& plan, const Params& q, bool dependent, cudaStream_t stream = nullptr) {
    const Kernel kernel = kKernels.at(plan.kernel);
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared_bytes)));
    cudaLaunchConfig_t config = {};
    config.gridDim = plan.grid, config.blockDim = plan.threads, config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = stream;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute, config.numAttrs = dependent;
    CHECK(cudaLaunchKernelEx(&config, kernel, q));
}

// -------------------------------------------------------------------------------------------- reference

struct HostValues {
    float value[3][16];
};
template <typename Codebook>
void fill_values(float (&value)[16]) {
    for (int i = 0; i < 16; ++i) value[i] = from_bits(Codebook::kValueBits[i]);
}

/// One warp an output: in float64, and with weights rounded to T and one rounding to T.
template <typename T>
__global__ void reference(Gemm4bitSkinnyParams p, HostValues values, double* exact_output,
                          double* peer_output) {
    const int64_t o = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) / 32;
    const int lane = threadIdx.x % 32;
    if (o >= p.m * p.n) return;
    const int64_t row = o % p.n, token = o / p.n;
    double exact = 0, rounded = 0;
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
    }
    for (int d = 16; d > 0; d /= 2) {
        exact += __shfl_xor_sync(~0u, exact, d);
        rounded += __shfl_xor_sync(~0u, rounded, d);
    }
    const float bias = load_bias(p, row);
    if (lane) return;
    exact_output[o] = exact + bias;
    peer_output[o] = double(float(T(float(rounded + bias))));
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

__global__ void fill_bytes(uint8_t* data, int64_t n, uint32_t seed) {
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n;
         i += int64_t(gridDim.x) * blockDim.x)
        data[i] = uint8_t(hash32(uint32_t(i) + seed) >> 11);
}

template <typename T>
void check(const Case& c) {
    static uint32_t seed = 0;
    seed += 101;
    std::mt19937 random(seed);
    const auto uniform = [&] { return float(random() >> 8) * 0x1p-24f; };
    const int64_t num = c.n * c.k, blocks = ceil_div(num, int64_t(1) << c.block_shift);
    std::vector<float> absmax(blocks), scale(ceil_div(blocks, 256)), map(256), bias32(c.n);
    for (float& v : absmax) v = 0.01f + 0.1f * uniform();
    for (float& v : scale) v = 0.01f + 0.05f * uniform();
    for (float& v : map) v = 2 * uniform() - 1;
    for (float& v : bias32) v = 2 * uniform() - 1;
    const std::vector<float16> bias16(bias32.begin(), bias32.end());
    const std::vector<bfloat16> biasb(bias32.begin(), bias32.end());
    const Buffer<uint8_t> packed(num / 2), absmax_codes(blocks);
    fill_bytes<<<264, 256>>>(packed.data(), num / 2, seed);
    fill_bytes<<<264, 256>>>(absmax_codes.data(), blocks, seed + 1);
    const Buffer<float> d_absmax(absmax), d_scale(scale), d_offset(std::vector<float>{0.08f}), d_map(map),
        d_bias32(bias32);
    const Buffer<float16> d_bias16(bias16);
    const Buffer<bfloat16> d_biasb(biasb);
    const Buffer<T> input(c.m * c.k);
    random_normal(input.data(), c.m * c.k, seed + 2);
    const Buffer<double> exact(c.m * c.n), peer(c.m * c.n);
    const void* const biases[4] = {nullptr, d_bias32.data(), d_bias16.data(), d_biasb.data()};
    const Buffer<T> output(c.m * c.n);
    Gemm4bitSkinnyParams p = {input.data(),
                              packed.data(),
                              c.nested ? static_cast<const void*>(absmax_codes.data()) : d_absmax.data(),
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
                              std::max(c.bias_dtype, 0)};
    const Plan plan = make_plan<T>(p, c.grid);
    HostValues values;
    fill_values<Nf4>(values.value[0]);
    fill_values<Fp4>(values.value[1]);
    fill_values<Af4>(values.value[2]);
    reference<T><<<unsigned(ceil_div(c.m * c.n, 8)), 256>>>(p, values, exact.data(), peer.data());
    CHECK(cudaGetLastError());

    // Odd runs: three launches that overlap.
    bool same = true;
    std::vector<T> first;
    for (int run = 0; run < c.num_runs; ++run) {
        for (int i = 0; i < (run % 2 ? 3 : 1); ++i) launch(plan, make_params(p, run % 2), run % 2);
        const std::vector<T> now = output.download();
        if (run == 0) first = now;
        same &= !std::memcmp(first.data(), now.data(), now.size() * sizeof(T));
    }
    const bool intact = output.intact();
    const std::vector<double> e = exact.download(), q = peer.download();
    double mean = 0, peer_mean = 0, worst = 0, peer_worst = 0, rms = 0;
    for (size_t i = 0; i < e.size(); ++i) {
        const double d = std::abs(double(float(first[i])) - e[i]), dp = std::abs(q[i] - e[i]);
        mean += d / double(e.size());
        peer_mean += dp / double(e.size());
        worst = std::max(worst, d == d ? d : INFINITY);
        peer_worst = std::max(peer_worst, dp);
        rms += e[i] * e[i] / double(e.size());
    }
    // Few outputs: the mean and maximum of a handful of roundings say little, so only gross errors count.
    const bool many = e.size() >= 2000;
    const double step = std::is_same_v<T, float16> ? 0x1p-10 : 0x1p-7;
    const bool close = many ? mean <= 1.05 * peer_mean && worst <= 1.5 * peer_worst
                            : worst <= 1.5 * peer_worst + step * (std::sqrt(rms) + 1) / 2;
    const bool ok = intact && same && close;
    failures += !ok;
    if (!ok || many)
        std::printf(
            "%s%s%s %-30s m %lld n %5lld k %5lld block %3d codebook %d bias %2d grid %3u: mean %.3e (%.3f of "
            "peer) max %.3e (%.3f)\n",
            ok ? "ok  " : "FAIL", intact ? "" : " canary", same ? "" : " differs", plan.kernel.c_str(),
            static_cast<long long>(c.m), static_cast<long long>(c.n), static_cast<long long>(c.k),
            1 << c.block_shift, c.codebook, c.bias_dtype, plan.grid, mean, mean / peer_mean, worst,
            worst / peer_worst);
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

__global__ void fill_codes(uint8_t* packed, int64_t n, Thresholds thresholds) {
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n;
         i += int64_t(gridDim.x) * blockDim.x) {
        uint8_t v = 0;
        for (uint32_t half = 0; half < 2; ++half) {
            const uint32_t a = hash32(uint32_t(2 * i + half)), b = hash32(a + 0x9e3779b9u);
            const float x = sqrtf(-2.0f * logf(fminf((a + 1.0f) * 2.3283064e-10f, 1.0f))) *
                            cospif(b * 4.6566129e-10f) * 0.4f;
            int code = 0;
            for (int k = 0; k < 15; ++k) code += x > thresholds.value[k];
            v = uint8_t(v << 4 | code);
        }
        packed[i] = v;
    }
}

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
