// Products of 8-bit codes by mma.sync: operands by cp.async in a ring of stages, fragments by ldmatrix, sums in registers.
// Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, arXiv:2208.07339, section 2.
#pragma once
#include "gemm_int8.cuh"

namespace gemm_int8 {

/// A tile of the output, and how the warps of a CTA share it. Warps with different k multiply different columns of each
/// step, and their sums are added at the end.
template <int kRows_, int kColumns_, int kStep_, int kStages_, int kWarpsM, int kWarpsN, int kWarpsK>
struct MmaTile {
    static constexpr int kRows = kRows_;        // of the input
    static constexpr int kColumns = kColumns_;  // of the output: rows of the weight
    static constexpr int kStep = kStep_;        // bytes of a row in one stage
    static constexpr int kStages = kStages_;
    static constexpr int kAlongN = kWarpsN, kAlongK = kWarpsK;
    static constexpr int kThreads = 32 * kWarpsM * kWarpsN * kWarpsK;
    static constexpr int kWarpRows = kRows / kWarpsM, kWarpColumns = kColumns / kWarpsN;
    static constexpr int kTilesM = kWarpRows / 16, kTilesN = kWarpColumns / 8;
    static constexpr int kSlices = kStep / 32 / kWarpsK;  // of 32 columns, of a warp in a step
    static constexpr int kPieces = kStep / 16;            // of a row
    static constexpr int kStageBytes = (kRows + kColumns) * kStep;
    static constexpr int kSharedBytes = kStages * kStageBytes;
    static_assert(kWarpRows % 16 == 0 && kWarpColumns % 16 == 0, "ldmatrix fetches sixteen rows at once");
    static_assert(kPieces <= 8 && kSlices > 0, "eight rows of a fragment lie in 128 bytes or more");
    static_assert((kRows + kColumns) * 48 <= kSharedBytes,
                  "sixteen outliers of every row take the place of the stages");

    /// Where a piece of sixteen bytes lies: eight rows at one piece fall into different banks.
    static __device__ __forceinline__ uint32_t place(int row, int piece) {
        return row * kStep + (piece ^ row / (8 / kPieces) % kPieces) * 16;
    }
};

using LargeTile = MmaTile<128, 128, 64, 4, 2, 4, 1>;
using SmallTile = MmaTile<32, 32, 128, 8, 1, 2, 4>;

/// Tiles of eight blocks of rows side by side, so that what runs at once shares operands in L2.
struct TilePlace {
    int64_t row, column;
};
template <typename Tile>
__device__ __forceinline__ TilePlace place_of_cta(const GemmInt8Params& p) {
    constexpr int64_t kGroup = 8;
    const int64_t tiles_m = (p.m + Tile::kRows - 1) / Tile::kRows;
    const int64_t tiles_n = (p.n + Tile::kColumns - 1) / Tile::kColumns;
    const int64_t group = blockIdx.x / (kGroup * tiles_n), in_group = blockIdx.x % (kGroup * tiles_n);
    const int64_t height = min(kGroup, tiles_m - group * kGroup);
    return {(group * kGroup + in_group % height) * Tile::kRows, in_group / height * Tile::kColumns};
}

/// Requests one step of kNum rows of a matrix; zeros outside of it.
template <typename Tile, int kNum>
__device__ __forceinline__ void request_rows(uint32_t to, const int8_t* matrix, int64_t first_row,
                                             int64_t num_rows, int64_t column, int64_t k) {
    constexpr int kCopies = kNum * Tile::kPieces;
    static_assert(kCopies % Tile::kThreads == 0, "every thread copies as much");
    #pragma unroll
    for (int i = 0; i < kCopies / Tile::kThreads; ++i) {
        const int copy = i * Tile::kThreads + int(threadIdx.x);
        const int row = copy / Tile::kPieces, piece = copy % Tile::kPieces;
        const bool is_inside = first_row + row < num_rows && column + piece * 16 < k;
        const int8_t* const from = matrix + (first_row + row) * k + column + piece * 16;
        copy_later(to + Tile::place(row, piece), is_inside ? from : matrix, is_inside);
    }
}

/// Fragments of one slice, and their products. `input` and `weight` are the stage's, rows of kPitch bytes or swizzled.
template <typename Tile, typename Sum, typename Address, typename Multiply>
__device__ __forceinline__ void multiply_slice(Sum (&sum)[Tile::kTilesM][Tile::kTilesN][4],
                                               const Address& address_a, const Address& address_b,
                                               const Multiply& multiply) {
    uint32_t b[Tile::kTilesN / 2][4];
    #pragma unroll
    for (int j = 0; j < Tile::kTilesN / 2; ++j) load_matrices(b[j], address_b(j * 16));
    #pragma unroll
    for (int i = 0; i < Tile::kTilesM; ++i) {
        uint32_t a[4];
        load_matrices(a, address_a(i * 16));
        #pragma unroll
        for (int j = 0; j < Tile::kTilesN; ++j)
            multiply(sum[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
}

/// What a warp does within the tile.
template <typename Tile>
struct WarpPlace {
    int first_row, first_column, first_slice;
    int lane = threadIdx.x % 32;

    __device__ __forceinline__ WarpPlace() {
        const int warp = threadIdx.x / 32;
        first_column = warp % Tile::kAlongN * Tile::kWarpColumns;
        first_slice = warp / Tile::kAlongN % Tile::kAlongK * Tile::kSlices;
        first_row = warp / (Tile::kAlongN * Tile::kAlongK) * Tile::kWarpRows;
    }
    /// Row and piece of a 16-row fragment of the input that the lane addresses: matrices of 8 rows, then of pieces.
    __device__ __forceinline__ int row_a() const { return first_row + lane % 16; }
    __device__ __forceinline__ int piece_a() const { return lane / 16; }
    /// The same of sixteen rows of the weight: matrices of both pieces, then of rows.
    __device__ __forceinline__ int row_b() const { return first_column + lane % 8 + lane / 16 * 8; }
    __device__ __forceinline__ int piece_b() const { return lane / 8 % 2; }
};

/// Exact sums of the tile; those of all warps along K are in the warps of the first.
template <typename Tile>
__device__ __forceinline__ void multiply_codes(int32_t (&sum)[Tile::kTilesM][Tile::kTilesN][4],
                                               const GemmInt8Params& p, const TilePlace& place,
                                               const WarpPlace<Tile>& warp) {
    const uint32_t shared = shared_address(dynamic_shared());
    const int num_steps = int((p.k + Tile::kStep - 1) / Tile::kStep);
    const auto request = [&](int step) {
        if (step < num_steps) {
            const uint32_t stage = shared + step % Tile::kStages * Tile::kStageBytes;
            const int64_t column = int64_t(step) * Tile::kStep;
            request_rows<Tile, Tile::kRows>(stage, p.input, place.row, p.m, column, p.k);
            request_rows<Tile, Tile::kColumns>(stage + Tile::kRows * Tile::kStep, p.weight, place.column, p.n,
                                               column, p.k);
        }
        end_copy_group();
    };
    #pragma unroll
    for (int i = 0; i < Tile::kStages - 1; ++i) request(i);
    #pragma unroll 1
    for (int step = 0; step < num_steps; ++step) {
        wait_for_copies<Tile::kStages - 2>();
        __syncthreads();  // all have this step, and have left the one whose stage is filled next
        request(step + Tile::kStages - 1);
        const uint32_t input = shared + step % Tile::kStages * Tile::kStageBytes;
        const uint32_t weight = input + Tile::kRows * Tile::kStep;
        #pragma unroll
        for (int slice = 0; slice < Tile::kSlices; ++slice) {
            const int piece = (warp.first_slice + slice) * 2;
            const auto address = [](uint32_t matrix, int row, int piece) {
                return [=](int more) { return matrix + Tile::place(row + more, piece); };
            };
            multiply_slice<Tile>(sum, address(input, warp.row_a(), piece + warp.piece_a()),
                                 address(weight, warp.row_b(), piece + warp.piece_b()),
                                 [](int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
                                     mma_m16n8k32(d, a, b0, b1);
                                 });
        }
    }
    wait_for_copies<0>();
    __syncthreads();
    if constexpr (Tile::kAlongK > 1) add_along_k<Tile>(sum, warp);
}

/// Adds the sums of the warps along K through shared memory. Integers: the order is all the same.
template <typename Tile>
__device__ __forceinline__ void add_along_k(int32_t (&sum)[Tile::kTilesM][Tile::kTilesN][4],
                                            const WarpPlace<Tile>& warp) {
    constexpr int kSums = Tile::kTilesM * Tile::kTilesN * 4;
    static_assert(Tile::kThreads * kSums * 4 <= Tile::kSharedBytes,
                  "sums of all threads fit where the stages were");
    int32_t* const all = reinterpret_cast<int32_t*>(dynamic_shared());
    int32_t* const flat = &sum[0][0][0];
    #pragma unroll
    for (int i = 0; i < kSums; ++i) all[i * Tile::kThreads + threadIdx.x] = flat[i];
    __syncthreads();
    if (warp.first_slice == 0) {
        #pragma unroll
        for (int i = 0; i < kSums; ++i)
            #pragma unroll
            for (int other = 1; other < Tile::kAlongK; ++other)
                flat[i] += all[i * Tile::kThreads + threadIdx.x + other * 32 * Tile::kAlongN];
    }
    __syncthreads();
}

/// Adds the products of the unquantized columns, sixteen at a time, gathered to where the stages were.
template <typename T, typename Tile>
__device__ __forceinline__ void multiply_outliers(float (&sum)[Tile::kTilesM][Tile::kTilesN][4],
                                                  const GemmInt8Params& p, const TilePlace& place,
                                                  const WarpPlace<Tile>& warp) {
    constexpr int kColumns = 16, kPitch = 48;  // bytes: eight rows fall into different banks
    uint8_t* const shared = reinterpret_cast<uint8_t*>(dynamic_shared());
    const uint32_t input = shared_address(shared), weight = input + Tile::kRows * kPitch;
    const T* const source = static_cast<const T*>(p.outlier_input);
    const int num = *p.num_outliers;
    #pragma unroll 1
    for (int first = 0; first < num; first += kColumns) {
        for (int i = threadIdx.x; i < (Tile::kRows + Tile::kColumns) * kColumns; i += Tile::kThreads) {
            const int row = i / kColumns, column = i % kColumns;
            T v = T(0.0f);
            if (first + column < num) {
                const int64_t k = p.outliers[first + column];
                const int64_t m = place.row + row, n = place.column + row - Tile::kRows;
                if (row < Tile::kRows) {
                    if (m < p.m) v = source[m * p.k + k];
                } else if (n < p.n) {
                    v = T(decoded<T>(p.weight[n * p.k + k], weight_scale(p, n)));
                }
            }
            *reinterpret_cast<T*>(shared + row * kPitch + column * int(sizeof(T))) = v;
        }
        __syncthreads();
        if (warp.first_slice == 0) {
            const auto address = [](uint32_t matrix, int row, int piece) {
                return [=](int more) { return matrix + (row + more) * kPitch + piece * 16; };
            };
            multiply_slice<Tile>(sum, address(input, warp.row_a(), warp.piece_a()),
                                 address(weight, warp.row_b(), warp.piece_b()),
                                 [](float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
                                     mma_m16n8k16<std::is_same_v<T, bfloat16>>(d, a, b0, b1);
                                 });
        }
        __syncthreads();
    }
}

/// Two neighbouring outputs.
template <typename T>
struct alignas(2 * sizeof(T)) Pair {
    T first, second;
};

template <typename T, typename Tile, bool kOutliers>
__device__ __forceinline__ void mma(const GemmInt8Params& p) {
    wait_for_earlier_kernels();
    const TilePlace place = place_of_cta<Tile>(p);
    const WarpPlace<Tile> warp;
    int32_t sum[Tile::kTilesM][Tile::kTilesN][4] = {};
    multiply_codes<Tile>(sum, p, place, warp);
    if (!kOutliers && warp.first_slice != 0) return;

    const int64_t first_row = place.row + warp.first_row + warp.lane / 4;
    const int64_t first_column = place.column + warp.first_column + warp.lane % 4 * 2;
    float value[Tile::kTilesM][Tile::kTilesN][4];
    if constexpr (!std::is_same_v<T, int32_t>) {
        float factor[Tile::kTilesM][2];
        #pragma unroll
        for (int i = 0; i < Tile::kTilesM * 2; ++i) {
            const int64_t m = first_row + i * 8;
            factor[i / 2][i % 2] = m < p.m ? row_factor(p.input_scales, m) : 0.0f;
        }
        #pragma unroll
        for (int j = 0; j < Tile::kTilesN; ++j)
            #pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int64_t n = first_column + j * 8 + c;
                const float scale = n < p.n ? weight_scale(p, n) : 0.0f;
                const float bias = n < p.n ? load_bias(p, n) : 0.0f;
                #pragma unroll
                for (int i = 0; i < Tile::kTilesM * 2; ++i)
                    value[i / 2][j][i % 2 * 2 + c] =
                        scaled(sum[i / 2][j][i % 2 * 2 + c], factor[i / 2][i % 2], scale, bias);
            }
    }
    if constexpr (kOutliers) {
        multiply_outliers<T, Tile>(value, p, place, warp);
        if (warp.first_slice != 0) return;
    }

    T* const output = static_cast<T*>(p.output);
    const bool in_pairs = p.n % 2 == 0 && reinterpret_cast<uintptr_t>(output) % sizeof(Pair<T>) == 0;
    #pragma unroll
    for (int i = 0; i < Tile::kTilesM * 2; ++i) {
        const int64_t m = first_row + i * 8;
        if (m >= p.m) continue;
        #pragma unroll
        for (int j = 0; j < Tile::kTilesN; ++j) {
            const int64_t n = first_column + j * 8;
            Pair<T> pair;
            if constexpr (std::is_same_v<T, int32_t>)
                pair = {sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]};
            else
                pair = {T(value[i / 2][j][i % 2 * 2]), T(value[i / 2][j][i % 2 * 2 + 1])};
            T* const to = output + m * p.n + n;
            if (in_pairs) {
                if (n < p.n) *reinterpret_cast<Pair<T>*>(to) = pair;
            } else {
                if (n < p.n) to[0] = pair.first;
                if (n + 1 < p.n) to[1] = pair.second;
            }
        }
    }
}

}  // namespace gemm_int8
