// Checks and times the kernels of blockwise_4bit.cu, blockwise_8bit.cu, tensorwise.cu and nested.cu on one
// GPU.
//
// nvcc -std=c++20 -O3 -fmad=false -Xcompiler -ffp-contract=off -I../../cuda -arch=sm_90a blockwise_bench.cu
// Usage: blockwise_bench [check] [time]
#include "blockwise_check.cuh"

/// Variants of one kernel, timed beside the exported one.
template <typename T, int kThreads, int kMinCtas>
__global__ __launch_bounds__(kThreads, kMinCtas) void quantize_4bit_variant(
    const __grid_constant__ Quantize4bitParams p) {
    quantize_4bit<T, Nf4, kThreads>(p);
}
template <typename T, bool kNested, int kRows, int kThreads>
__global__ __launch_bounds__(kThreads) void dequantize_4bit_variant(
    const __grid_constant__ Dequantize4bitParams p) {
    dequantize_4bit<T, Nf4, kNested, kRows, kThreads>(p);
}
template <typename T, int kMany, int kMinCtas>
__global__ __launch_bounds__(256, kMinCtas) void quantize_8bit_variant(
    const __grid_constant__ QuantizeBlockwiseParams p) {
    quantize_blockwise<T, kMany, 1>(p);
}
template <typename T, int kRows, int kThreads>
__global__ __launch_bounds__(kThreads) void dequantize_8bit_variant(
    const __grid_constant__ Dequantize8bitParams p) {
    dequantize_8bit<T, kRows, kThreads>(p);
}

/// Times on 8192 x 8192 elements; each beside the copy of its ratio and size.
template <typename T>
class Timing {
 public:
    explicit Timing(const Pools& pools) : pools_(pools) {
        for (int i = 0; i < kSets; ++i) random_normal(x(i), kN, 100 + i);
    }

    void quantize_4bit_kernels() {
        using E = Entry<T>;
        copy_ = sizeof(T) == 2 ? Copy::of<4, 1>(pools_, 168e6) : Copy::of<8, 1>(pools_, 302e6);
        time_quantize("nf4 64", E::quantize_nf4, 64);
        time_quantize("fp4 64", E::quantize_fp4, 64);
        time_quantize("af4 64", E::quantize_af4, 64);
        for (int block_size : {32, 128, 256, 512, 1024, 2048, 4096})
            time_quantize("nf4 " + std::to_string(block_size), E::quantize_nf4, block_size);
        time_quantize("nf4 64, 5 CTAs", quantize_4bit_variant<T, 256, 5>, 64);
        time_quantize("nf4 64, 6 CTAs", quantize_4bit_variant<T, 256, 6>, 64);
        time_quantize("nf4 64, 3 CTAs of 512 threads", quantize_4bit_variant<T, 512, 3>, 64, 512);
        time_quantize("nf4 64, 2 tiles", E::quantize_nf4, 64, 256, 2);
    }

    void dequantize_4bit_kernels() {
        using E = Entry<T>;
        for (int i = 0; i < kSets; ++i) {
            launch(E::quantize_nf4, {x(i), codes(i), absmax(i), kN, 6}, per_cta<T>(8192));
            launch_quantize_absmax({absmax(i), nested_codes(i), nested_scale(i), nested_scale(i) + kN / 16384,
                                    reinterpret_cast<double*>(nested_scale(i) + kN / 8192), kN / 64});
        }
        copy_ = sizeof(T) == 2 ? Copy::of<1, 4>(pools_, 168e6) : Copy::of<1, 8>(pools_, 302e6);
        for (int repeat = 0; repeat < 2; ++repeat) {
            time_dequantize("nf4 64", E::dequantize_nf4, 2, false);
            time_dequantize("nf4 64 nested", E::dequantize_nested, 2, true);
        }
        time_dequantize("fp4 64", E::dequantize_fp4, 2, false);
        time_dequantize("af4 64", E::dequantize_af4, 2, false);
        time_dequantize("nf4 64, 1 row", dequantize_4bit_variant<T, false, 1, 256>, 1, false);
        time_dequantize("nf4 64, 4 rows", dequantize_4bit_variant<T, false, 4, 256>, 4, false);
        time_dequantize("nf4 64 nested, 4 rows", dequantize_4bit_variant<T, true, 4, 256>, 4, true);
        time_dequantize("nf4 64 nested, 512 threads", dequantize_4bit_variant<T, true, 2, 512>, 2, true, 512);
    }

    void quantize_8bit_kernels() {
        const auto product = Entry<T>::quantize_8bit;
        copy_ = sizeof(T) == 2 ? Copy::of<2, 1>(pools_, 201e6) : Copy::of<4, 1>(pools_, 336e6);
        for (int block_size : {64, 256, 1024, 4096})
            time_quantize_8bit("dynamic", product, dynamic_map(), block_size);
        for (int num_small : {0, 264, 528, 1056})
            time_quantize_8bit("dynamic", product, dynamic_map(), 256, kManyTiles, num_small);
        time_quantize_8bit("dynamic", quantize_8bit_variant<T, 2, 4>, dynamic_map(), 256, 2);
        time_quantize_8bit("dynamic", quantize_8bit_variant<T, 5, 4>, dynamic_map(), 256, 5);
        time_quantize_8bit("dynamic, 3 CTAs", quantize_8bit_variant<T, kManyTiles, 3>, dynamic_map(), 256);
        time_quantize_8bit("dynamic, 5 CTAs", quantize_8bit_variant<T, kManyTiles, 5>, dynamic_map(), 256);
        const std::pair<const char*, Map> maps[] = {{"unsigned", unsigned_dynamic_map()},
                                                    {"linear", linear_map()},
                                                    {"e4m3", fp8_map(4, 3)},
                                                    {"e5m2", fp8_map(5, 2)},
                                                    {"normal", normal_map()},
                                                    {"crowded", crowded_map()}};
        for (const auto& [name, map] : maps) {
            time_quantize_8bit(name, product, map, 256);
            time_quantize_8bit(name, quantize_8bit_variant<T, 2, 4>, map, 256, 2);
            time_quantize_8bit(name, quantize_8bit_variant<T, 5, 4>, map, 256, 5);
        }
    }

    void dequantize_8bit_kernels() {
        const Buffer<float> map(dynamic_map());
        for (int i = 0; i < kSets; ++i)
            launch(Entry<T>::quantize_8bit, {x(i), map.data(), codes(i), absmax(i), kN, 8},
                   per_cta<T>(2 * 8192));
        copy_ = sizeof(T) == 2 ? Copy::of<1, 2>(pools_, 201e6) : Copy::of<1, 4>(pools_, 336e6);
        time_dequantize_8bit("256", Entry<T>::dequantize_8bit, map.data(), 2);
        time_dequantize_8bit("256, 1 row x 512", dequantize_8bit_variant<T, 1, 512>, map.data(), 1, 512);
        time_dequantize_8bit("256, 2 rows x 512", dequantize_8bit_variant<T, 2, 512>, map.data(), 2, 512);
        time_dequantize_8bit("256, 4 rows x 256", dequantize_8bit_variant<T, 4, 256>, map.data(), 4);
    }

    void tensorwise_kernels() {
        const Buffer<float> map(dynamic_map());
        const Buffer<uint32_t> partials(1024);
        copy_ = sizeof(T) == 2 ? Copy::of<4, 1>(pools_, 335e6) : Copy::of<8, 1>(pools_, 604e6);
        const float us = time_us(kSets, [&](int i, cudaStream_t s) {
            launch_quantize_tensor<T>({x(i), map.data(), codes(i), absmax(i), partials.data(), kN, 0}, s);
        });
        report(label("quantize, whole tensor, both passes"), us, kN * (2.0 * sizeof(T) + 1), copy_);
    }

 private:
    static constexpr int64_t kN = 8192ll * 8192;
    static constexpr int kSets = sizeof(T) == 2 ? 6 : 3;
    const Pools& pools_;
    Copy copy_;  // of the group

    static std::string label(const std::string& what) { return std::string(Entry<T>::kName) + " " + what; }
    T* x(int i) const { return reinterpret_cast<T*>(pools_.a) + i * kN; }
    uint8_t* codes(int i) const { return pools_.b + i * 2 * kN; }
    float* absmax(int i) const { return reinterpret_cast<float*>(codes(i) + kN); }
    uint8_t* nested_codes(int i) const { return codes(i) + kN + kN / 4; }
    float* nested_scale(int i) const { return reinterpret_cast<float*>(codes(i) + kN + kN / 2); }

    void time_quantize(const std::string& what, void (*kernel)(Quantize4bitParams), int block_size,
                       int threads = 256, int tiles = 1) const {
        const float us = time_us(kSets, [&](int i, cudaStream_t s) {
            launch(kernel, {x(i), codes(i), absmax(i), kN, log2_of(block_size)},
                   per_cta<T>(int64_t(tiles) * 32 * threads), s, threads);
        });
        report(label("quantize " + what), us, kN * (sizeof(T) + 0.5 + 4.0 / block_size), copy_);
    }
    void time_dequantize(const std::string& what, void (*kernel)(Dequantize4bitParams), int rows, bool nested,
                         int threads = 256) const {
        const float us = time_us(kSets, [&](int i, cudaStream_t s) {
            const void* const statistics = nested ? static_cast<const void*>(nested_codes(i)) : absmax(i);
            launch(
                kernel,
                {codes(i), statistics, nested_scale(i), nested_scale(i) + kN / 16384, nullptr, x(i), kN, 6},
                per_cta<T>(rows * 8 * threads), s, threads);
        });
        const double bytes = kN * (sizeof(T) + 0.5 + (nested ? 1.0 + 4.0 / 256 : 4.0) / 64);
        report(label("dequantize " + what), us, bytes, copy_);
    }
    void time_quantize_8bit(const std::string& what, void (*kernel)(QuantizeBlockwiseParams), const Map& map,
                            int block_size, int many = kManyTiles, int num_small = 792) const {
        const Buffer<float> device_map(map);
        const int64_t num_large = ceil_div(ceil_div(kN, kCtaElements<T>) - num_small, many);
        const float us = time_us(kSets, [&](int i, cudaStream_t s) {
            launch(kernel, {x(i), device_map.data(), codes(i), absmax(i), kN, log2_of(block_size)},
                   ceil_div(kN, num_small + num_large), s);
        });
        report(label("quantize 8-bit " + what + " " + std::to_string(block_size) + ", tiles " +
                     std::to_string(many) + ", small CTAs " + std::to_string(num_small)),
               us, kN * (sizeof(T) + 1 + 4.0 / block_size), copy_);
    }
    void time_dequantize_8bit(const std::string& what, void (*kernel)(Dequantize8bitParams), const float* map,
                              int rows, int threads = 256) const {
        const float us = time_us(kSets, [&](int i, cudaStream_t s) {
            launch(kernel, {codes(i), absmax(i), map, x(i), kN, 8}, per_cta<T>(rows * 8 * threads), s,
                   threads);
        });
        report(label("dequantize 8-bit " + what), us, kN * (sizeof(T) + 1 + 4.0 / 256), copy_);
    }
};

template <typename T>
void time_type(const Pools& pools) {
    Timing<T> timing(pools);
    timing.quantize_4bit_kernels();
    timing.dequantize_4bit_kernels();
    timing.quantize_8bit_kernels();
    timing.dequantize_8bit_kernels();
    timing.tensorwise_kernels();
}

/// Kernels that know no dtype.
void time_bytes(const Pools& pools) {
    constexpr int64_t n = 1ll << 28, kAbsmax = 1 << 20;
    const Copy down = Copy::of<2, 1>(pools, 402e6), up = Copy::of<1, 2>(pools, 402e6);
    const float pack_us = time_us(2, [&](int i, cudaStream_t s) {
        launch(pack_4bit, {pools.a + i * n, pools.b + i * n, n, 7}, 8192, s);
    });
    report("pack_4bit of 2^28", pack_us, n * 1.5, down);
    const float unpack_us = time_us(2, [&](int i, cudaStream_t s) {
        launch(unpack_4bit, {pools.b + i * n, pools.a + i * n, n}, 8192, s);
    });
    report("unpack_4bit of 2^28", unpack_us, n * 1.5, up);
    float* const absmax = reinterpret_cast<float*>(pools.a);
    float* const scale = reinterpret_cast<float*>(pools.b + kAbsmax);
    double* const sums = reinterpret_cast<double*>(scale + 2 * kAbsmax);
    for (bool wide : {false, true}) {  // sums that are exact in any order, and sums that are not
        std::vector<float> values(kAbsmax);
        for (int64_t i = 0; i < kAbsmax; ++i)
            values[i] = std::ldexp(1.0f + float(i * 2654435761u % 4096) / 4096, wide ? -int(i % 97) : 0);
        CHECK(cudaMemcpy(absmax, values.data(), kAbsmax * 4, cudaMemcpyHostToDevice));
        const float us = time_us(4, [&](int, cudaStream_t s) {
            launch_quantize_absmax({absmax, pools.b, scale, scale + kAbsmax, sums, kAbsmax}, s);
        });
        std::printf("quantize_absmax of 2^20, %s total  %.2f us\n", wide ? "serial" : "exact", us);
    }
}

int main(int argc, char** argv) {
    const auto has = [&](const char* word) {
        return std::any_of(argv + 1, argv + argc, [&](const char* a) { return !std::strcmp(a, word); });
    };
    if (has("check")) check_all(has("small") ? (1 << 17) + 37 : (1 << 22) + 37);
    if (has("time")) {
        const Pools pools;
        Copy::of<1, 1>(pools, 2e9);
        time_type<bfloat16>(pools);
        time_type<float16>(pools);
        time_type<float>(pools);
        time_bytes(pools);
    }
    return failures != 0;
}
