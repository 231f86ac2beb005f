// Checks and times the kernels of gemm_int8 for Hopper and candidates for them on one sm_90a GPU, beside cuBLASLt.
//
// nvcc -std=c++20 -O3 -fmad=false -I../../cuda -gencode arch=compute_90a,code=sm_90a gemm_int8_bench.cu -ldl
// Usage: gemm_int8_bench [check [small]] [time [m n k]] [sustained [m n k]]; CUBLASLT names cuBLASLt's library. cuBLASLt
// writes raw int32, the kernels scale, add a bias and write bfloat16. All times of a row come from interleaved rounds:
// from 1024 tokens on power limits the clock, so log clock and power beside `sustained`, where a round is one second.
#include <memory>
#include "gemm_int8_candidates.cu"
#include "gemm_int8_check.cuh"
#include "gemm_int8_skinny_sm90.cu"
#include "gemm_int8_sm90.cu"
#include "launch.cuh"

// ------------------------------------------------------------------------------------------------ variants

using TileKernel = void (*)(GemmInt8Sm90Params);
using SkinnyKernel = void (*)(GemmInt8SkinnyParams);

/// Outputs of kernels, in this order.
constexpr int kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kInt32 = 3;
template <typename Output>
constexpr int kOutput = std::is_same_v<Output, float>     ? kFloat32
                        : std::is_same_v<Output, float16> ? kFloat16
                        : std::is_same_v<Output, int32_t> ? kInt32
                                                          : kBfloat16;

/// One shape of tiles; a null kernel: not compiled for that output.
struct Tiles {
    const char* name;
    int tokens, columns, cluster, threads, shared_bytes;
    TileKernel kernels[4];
    bool is_planned;
};
struct Skinny {
    const char* name;
    int tokens, columns, parts, threads, shared_bytes;
    SkinnyKernel kernels[4];
    bool is_planned;
};
template <int kTokens, int kConsumers, int kStages, int kCluster, bool kSplit>
Tiles tiles_of(const char* name, std::array<TileKernel, 4> k, bool is_planned) {
    using S = gemm_int8::Shape<int8_t, bfloat16, kTokens, kConsumers, kStages, kCluster, kSplit>;
    return {name,      kTokens, S::kColumns, kCluster, S::kThreads, S::kSharedBytes, {k[0], k[1], k[2], k[3]},
            is_planned};
}
template <int kTokens, int kColumns, int kStages, int kParts>
Skinny skinny_of(const char* name, std::array<SkinnyKernel, 4> k, bool is_planned) {
    using S = gemm_int8::SkinnyShape<int8_t, bfloat16, kTokens, kColumns, kStages, kParts>;
    return {name,      kTokens, kColumns, kParts, S::kThreads, S::kSharedBytes, {k[0], k[1], k[2], k[3]},
            is_planned};
}
#define ALL_OUTPUTS(kernel) {kernel##_float32, kernel##_float16, kernel##_bfloat16, kernel##_int32}
#define PLANNED_TILES(name, ...) tiles_of<__VA_ARGS__>(#name, ALL_OUTPUTS(gemm_int8_tile##name), true),
#define PLANNED_SKINNY(name, ...) skinny_of<__VA_ARGS__>(#name, ALL_OUTPUTS(gemm_int8_skinny_##name), true),
#define TILES(name, ...) \
    tiles_of<__VA_ARGS__>(#name, {nullptr, nullptr, gemm_int8_tile##name##_bfloat16, nullptr}, false),
#define SKINNY(name, ...) \
    skinny_of<__VA_ARGS__>(#name, {nullptr, nullptr, gemm_int8_skinny_##name##_bfloat16, nullptr}, false),
static const std::vector<Tiles> kTiles = {PLANNED_TILES(256x128, 256, 2, 4, 1, false)  //
                                          PLANNED_TILES(128x128, 128, 2, 6, 1, false)  //
                                          QBITS_TILE_CANDIDATES(TILES)};
static const std::vector<Skinny> kSkinny = {PLANNED_SKINNY(16x128k1, 16, 128, 5, 1)    //
                                            PLANNED_SKINNY(16x64k1, 16, 64, 10, 1)     //
                                            PLANNED_SKINNY(16x64k2, 16, 64, 10, 2)     //
                                            PLANNED_SKINNY(16x64k4, 16, 64, 10, 4)     //
                                            PLANNED_SKINNY(64x64k1, 64, 64, 6, 1)      //
                                            PLANNED_SKINNY(64x64k2, 64, 64, 6, 2)      //
                                            PLANNED_SKINNY(64x64k4, 64, 64, 6, 4)      //
                                            PLANNED_SKINNY(128x128k1, 128, 128, 5, 1)  //
                                            PLANNED_SKINNY(128x128k2, 128, 128, 5, 2)  //
                                            QBITS_SKINNY_CANDIDATES(SKINNY)};

// ---------------------------------------------------------------------------------------------- launching

static int num_sms;

static void set_up() {
    CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0));
    const auto allow = [](const auto& variants) {
        for (const auto& v : variants)
            for (auto k : v.kernels)
                if (k)
                    CHECK(
                        cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, v.shared_bytes));
    };
    allow(kTiles);
    allow(kSkinny);
}

static GemmInt8Operands operands_of(const Scales& s, int m, int n, int k, void* output, bool weights_ready) {
    return {s.input, s.weight, s.bias, output, m, n, k, s.weight_stride, s.bias_dtype, weights_ready};
}
static TensorMap codes_map(const int8_t* codes, int rows, int k, int box_rows,
                           CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
    return encode<TensorMap>(codes, CU_TENSOR_MAP_DATA_TYPE_UINT8, {cuuint64_t(k), cuuint64_t(rows)},
                             {cuuint64_t(k)}, {128, cuuint32_t(box_rows)}, 128, promotion);
}

/// max_clusters: fewer than fit, so that small problems walk several tiles.
struct TileLaunch {
    GemmInt8Sm90Params params = {};
    LaunchShape shape;
    TileKernel kernel;

    TileLaunch(const Tiles& v, int output_kind, const GemmInt8Operands& o, const int8_t* input,
               const int8_t* weight, int raster = 8, int max_clusters = 1 << 20) {
        const int size = output_kind == kFloat32 || output_kind == kInt32 ? 4 : 2;
        kernel = v.kernels[output_kind];
        params.input = codes_map(input, o.m, o.k, v.tokens / v.cluster);
        params.weight = codes_map(weight, o.n, o.k, v.columns);
        params.output_by_tma =
            int64_t(o.n) * size % 16 == 0 && reinterpret_cast<uintptr_t>(o.output) % 16 == 0;
        if (params.output_by_tma)
            params.output = encode<TensorMap>(
                o.output, size == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_UINT32,
                {cuuint64_t(o.n), cuuint64_t(o.m)}, {cuuint64_t(o.n) * cuuint64_t(size)},
                {cuuint32_t(128 / size), cuuint32_t(128 / size)}, 128);
        params.o = o;
        params.num_token_tiles = int(ceil_div(o.m, v.tokens));
        params.num_column_tiles = int(ceil_div(o.n, v.columns * v.cluster));
        params.raster_tokens = std::min(raster, params.num_token_tiles);
        const int clusters =
            std::min({params.num_token_tiles * params.num_column_tiles, num_sms / v.cluster, max_clusters});
        shape = {unsigned(clusters * v.cluster), unsigned(v.threads), unsigned(v.shared_bytes),
                 unsigned(v.cluster)};
    }
    void run(cudaStream_t stream, bool dependent = true) const {
        launch_kernel(kernel, params, shape, dependent, stream);
    }
};
struct SkinnyLaunch {
    GemmInt8SkinnyParams params = {};
    LaunchShape shape;
    SkinnyKernel kernel;

    SkinnyLaunch(const Skinny& v, int output_kind, const GemmInt8Operands& o, const int8_t* input,
                 const int8_t* weight,
                 CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
        kernel = v.kernels[output_kind];
        params.input = codes_map(input, o.m, o.k, v.tokens, promotion);
        params.weight = codes_map(weight, o.n, o.k, v.columns, promotion);
        params.o = o;
        shape = {dim3(unsigned(ceil_div(o.n, v.columns) * v.parts), unsigned(ceil_div(o.m, v.tokens))),
                 unsigned(v.threads), unsigned(v.shared_bytes), unsigned(v.parts)};
    }
    void run(cudaStream_t stream, bool dependent = true) const {
        launch_kernel(kernel, params, shape, dependent, stream);
    }
};

// ------------------------------------------------------------------------------------------------ checks

template <typename Output>
static void check_output(Product& product, int runs) {
    const Case& c = product.c;
    constexpr int kKind = kOutput<Output>;
    static const char* const kNames[] = {"float32", "float16", "bfloat16", "int32"};
    const auto operands = [&](int run, Output* output) {
        return operands_of(product.scales(), c.m, c.n, c.k, output, run % 2);
    };
    for (const Tiles& v : kTiles)
        if (v.kernels[kKind])
            product.check<Output>(
                std::string(v.name) + " " + kNames[kKind], runs, [&](int run, Output* output) {
                    TileLaunch(v, kKind, operands(run, output), product.input.data(), product.weight.data(),
                               run % 2 ? 2 : 8, run % 3 ? 1 << 20 : 2)
                        .run(nullptr, run % 3 != 1);
                });
    for (const Skinny& v : kSkinny)
        if (v.kernels[kKind] && c.m <= 1100)
            product.check<Output>(
                std::string(v.name) + " " + kNames[kKind], runs, [&](int run, Output* output) {
                    SkinnyLaunch(v, kKind, operands(run, output), product.input.data(), product.weight.data())
                        .run(nullptr, run % 3 != 1);
                });
}

static void check_all(bool small) {
    std::vector<Case> cases = {
        {1, 1, 16},
        {7, 255, 1040, Codes::kUniform, true, 255, 1},
        {129, 257, 1040, Codes::kNormal, false, 257, 2, 1},
        {300, 264, 272, Codes::kNormal, true, 1, 0},
    };
    if (!small)
        for (const Case& c : std::initializer_list<Case>{
                 {16, 4096, 4096, Codes::kNormal, true, 4096, 0},
                 {64, 1288, 4096, Codes::kNormal, true, 1288, 2},
                 {127, 127, 112, Codes::kNormal, true, 0, 0},
                 {128, 128, 128},
                 {257, 129, 128, Codes::kNormal, true, 129, 0},
                 {256, 256, 512},
                 {513, 1000, 2000, Codes::kUniform, true, 1000, 1},
                 {1021, 1283, 1040, Codes::kNormal, true, 1283, 0},
                 {300, 400, 131056, Codes::kLargest, true, 1, 0},
                 {4096, 5120, 1280, Codes::kNormal, true, 5120, 0},
                 {3000, 5000, 144},
                 {8192, 8192, 8192, Codes::kNormal, true, 8192, 2},
                 {16384, 4096, 4096, Codes::kNormal, true, 4096, 0},
             })
            cases.push_back(c);
    for (const Case& c : cases) {
        Product product(c);
        const int runs = int64_t(c.m) * c.n > 1 << 24 ? 2 : small ? 3 : 7;
        check_output<float>(product, runs);
        check_output<float16>(product, runs);
        check_output<bfloat16>(product, runs);
        Product raw(Case{c.m, c.n, c.k, c.codes, false, 0, -1, c.offset});
        check_output<int32_t>(raw, runs);
    }
    std::printf("check: %d launches, %d failures\n", Product::num_checks, failures);
}

// --------------------------------------------------------------------------------------------------- time

struct Goal {
    int m, n, k;
    float us,
        peer_us;  // the goal with 16-bit output; raw int32 by torch._int_mm on another day, 0: not measured
};
static std::vector<Goal> goals() {
    struct Row {
        int n, k;
        float us[6], peer_us[3];  // of 1, 16, 256, 1024, 4096, 16384 tokens; of the last three
    };
    static const Row kRows[] = {
        {4096, 4096, {6.5f, 6.5f, 10.5f, 24.7f, 105, 424}, {51.7f, 160.1f, 634.8f}},
        {14336, 4096, {17, 17, 26.4f, 86.2f, 372, 1482}, {157.2f, 554.8f, 2247}},
        {4096, 14336, {17, 17, 32, 93.3f, 372, 1471}, {137.5f, 515.9f, 2040}},
        {8192, 8192, {19, 19, 27.5f, 105, 424, 1693}, {150.9f, 606.4f, 2485}},
        {5120, 1280, {3.5f, 4, 5.3f, 13.6f, 43.2f, 167}, {24.2f, 91.6f, 367.9f}},
        {1280, 5120, {3.5f, 3.5f, 5.3f, 13.6f, 43.2f, 158}, {32.3f, 80.5f, 246.3f}},
        {28672, 8192, {67, 67, 0, 0, 0, 0}, {0, 0, 0}},
    };
    std::vector<Goal> all;
    for (const Row& r : kRows) {
        const int tokens[] = {1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384};
        for (int m : tokens) {
            const int i = m == 1       ? 0
                          : m == 16    ? 1
                          : m == 256   ? 2
                          : m == 1024  ? 3
                          : m == 4096  ? 4
                          : m == 16384 ? 5
                                       : -1;
            if (r.n == 28672 && m > 64) continue;
            all.push_back({m, r.n, r.k, i < 0 ? 0 : r.us[i], i < 3 ? 0 : r.peer_us[i - 3]});
        }
    }
    all.push_back({8192, 8192, 8192, 710, 0});
    return all;
}

/// Operands that rotate through more memory than L2 has.
struct Arena {
    static constexpr int64_t kCodeBytes = 1ll << 30, kOutputBytes = 2ll << 30;
    Buffer<int8_t> codes{size_t(kCodeBytes)};
    Buffer<uint8_t> outputs{size_t(kOutputBytes)};
    Buffer<float> scales{1 << 17};
    CublasLt peer;
    Arena() {
        random_codes(codes.data(), kCodeBytes, 1);
        fill_scales<<<64, 256>>>(scales.data(), 1 << 17, 2);
        CHECK(cudaDeviceSynchronize());
    }
};

struct Row {
    std::vector<std::string> names;
    std::vector<std::function<void(int, cudaStream_t)>> calls;
};

/// One call for each variant that could be the fastest; `copies` sets of operands.
static Row row_of(Arena& arena, const Goal& g, int copies, bool rasters) {
    Row row;
    const int64_t codes = (int64_t(g.m) + g.n) * g.k, output_bytes = int64_t(g.m) * g.n * 4;
    const auto input = [=, &arena](int i) { return arena.codes.data() + i * codes; };
    const auto weight = [=, &arena](int i) { return arena.codes.data() + i * codes + int64_t(g.m) * g.k; };
    const auto output = [=, &arena](int i) { return arena.outputs.data() + i * output_bytes; };
    const Scales scales = {arena.scales.data(), arena.scales.data(), 1, arena.scales.data(), 0};
    const auto add = [&]<typename Launch>(const std::string& name, std::vector<Launch> launches) {
        auto shared = std::make_shared<std::vector<Launch>>(std::move(launches));
        row.names.push_back(name);
        row.calls.push_back([shared](int i, cudaStream_t s) { (*shared)[size_t(i)].run(s); });
    };
    const auto operands = [&](int i) { return operands_of(scales, g.m, g.n, g.k, output(i), true); };
    for (const Tiles& v : kTiles) {
        if (g.m <= 64 || (v.tokens == 128 && g.m > 4096)) continue;
        for (int raster : {8, 4, 16}) {
            if (raster != 8 && !(rasters && v.is_planned)) continue;
            std::vector<TileLaunch> launches;
            for (int i = 0; i < copies; ++i)
                launches.emplace_back(v, kBfloat16, operands(i), input(i), weight(i), raster);
            add(std::string(v.name) + (raster == 8 ? "" : " raster " + std::to_string(raster)), launches);
        }
    }
    for (const Skinny& v : kSkinny) {
        // Tiles no larger than needed, but for the next smaller size; of 128 tokens as long as a round holds all
        const bool fits = v.tokens == 128
                              ? g.m > 64 && ceil_div(g.n, v.columns) * ceil_div(g.m, 128) <= num_sms
                              : g.m <= v.tokens && v.tokens <= (g.m <= 1 ? 16 : 4 * g.m);
        if (!fits) continue;
        for (auto promotion : {CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B}) {
            const bool is_other = promotion == CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
            if (is_other && !v.is_planned) continue;
            std::vector<SkinnyLaunch> launches;
            for (int i = 0; i < copies; ++i)
                launches.emplace_back(v, kBfloat16, operands(i), input(i), weight(i), promotion);
            add(std::string(v.name) + (is_other ? " L2 128" : ""), launches);
        }
    }
    if (arena.peer.is_there() && g.m > 16 &&
        arena.peer.plan(g.m, g.n, g.k, input(0), weight(0), reinterpret_cast<int32_t*>(output(0)))) {
        row.names.push_back("cuBLASLt");
        row.calls.push_back([=, &arena](int i, cudaStream_t s) {
            arena.peer.run(input(i), weight(i), reinterpret_cast<int32_t*>(output(i)), s);
        });
    }
    return row;
}

/// The shapes that the numbers leave in, fastest variants first.
static void time_all(bool sustained, int only_m, int only_n, int only_k) {
    Arena arena;
    std::vector<Goal> shapes = goals();
    if (sustained)
        shapes = {{8192, 8192, 8192, 758, 0},
                  {16384, 8192, 8192, 1517, 0},
                  {4096, 14336, 4096, 332, 0},
                  {16384, 1280, 5120, 148, 0}};
    for (const Goal& g : shapes) {
        if ((only_m && g.m != only_m) || (only_n && g.n != only_n) || (only_k && g.k != only_k)) continue;
        const int64_t codes = (int64_t(g.m) + g.n) * g.k, output_bytes = int64_t(g.m) * g.n * 4;
        const int copies =
            int(std::min({int64_t(64), Arena::kCodeBytes / codes, Arena::kOutputBytes / output_bytes,
                          std::max(int64_t(2), int64_t(256 << 20) / (codes + output_bytes / 2) + 1)}));
        const double ops = 2.0 * g.m * g.n * g.k;
        const double bytes = double(codes) + 2.0 * g.m * g.n,
                     floor_us = std::max(ops / 1828e6, bytes / 4.4e6);
        const Row row = row_of(arena, g, copies, sustained);
        const std::vector<float> us = sustained ? interleave(row.calls, copies, float(floor_us), 1e6f, 1)
                                                : interleave(row.calls, copies, float(floor_us));
        std::vector<size_t> order(us.size());
        for (size_t i = 0; i < order.size(); ++i) order[i] = i;
        std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return us[a] < us[b]; });
        std::printf(
            "M %5d  %5d x %5d  goal %6.1f (%6.1f) floor %6.1f, best %5.0f TOPS %3.0f %% of floor:", g.m, g.n,
            g.k, g.us, g.peer_us, floor_us, ops / us[order[0]] * 1e-6, 100 * floor_us / us[order[0]]);
        for (size_t i : order) std::printf("  %s %.1f", row.names[i].c_str(), us[i]);
        std::printf("\n");
        std::fflush(stdout);
    }
}

int main(int argc, char** argv) {
    const auto has = [&](const char* word) {
        return std::any_of(argv + 1, argv + argc, [&](const char* a) { return !std::strcmp(a, word); });
    };
    const auto number = [&](int i) { return argc > i ? std::atoi(argv[i]) : 0; };
    set_up();
    if (has("check")) check_all(has("small"));
    if (has("time")) time_all(false, number(2), number(3), number(4));
    if (has("sustained")) time_all(true, number(2), number(3), number(4));
    return failures != 0;
}
