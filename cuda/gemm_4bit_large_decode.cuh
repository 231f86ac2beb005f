// 4-bit GEMM for many tokens on sm_90a: one or two warpgroups decode weights into shared memory, two multiply.
// Here: arguments, the layout of shared memory, the walk over tiles, decoding.
// Codes in place, two to a byte, absmax per block: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
//
// A CTA computes output^T for 128 rows of the weight x kTokens tokens. For every row and block of 64 a decoding
// warpgroup computes the sixteen possible weights round(value * absmax) and picks among them with PRMT, so the
// operands of wgmma are bit for bit those of dequantizing to T, whatever the codebook. Both come from shared memory.
#pragma once
#include "gemm_4bit_wgmma.cuh"

/// Arguments of gemm_4bit_large; mirrored by `ops::gemm_4bit::Gemm4bitLargeParams`.
struct Gemm4bitLargeParams {
    TensorMap input;   // [k / 64, m, 64] T: dimensions {64, m, k / 64}, box {64, kTokens, 1}, 128 B swizzle
    TensorMap packed;  // [n, k / 2] bytes, box {64, 32}, 64 B swizzle
    TensorMap output;  // [m, n] T, box {64, kTokens / kParts}, 128 B swizzle; unused unless output_by_tma
    Gemm4bitOperands o;
    int32_t num_row_tiles;    // ceil_div(n, 128)
    int32_t num_token_tiles;  // ceil_div(m, kTokens)
    int32_t
        raster_tokens;  // token tiles that are walked together before the rows move on; at most num_token_tiles
    int32_t output_by_tma;  // rows of the output begin on 16 bytes
};
static_assert(sizeof(Gemm4bitLargeParams) == 512, "keep in step with the Rust mirror");

namespace large {

using namespace wgmma;

/// kParts parts of K, a cluster, add up their sums. kUnit elements share a scale at most.
template <int kTokens_, int kParts_, int kUnit_ = 64>
struct Shape {
    static constexpr int kTokens = kTokens_, kParts = kParts_, kUnit = kUnit_;
    // Warpgroups that decode, in turns; the sums of more tokens leave registers for one. A block takes 1200 to 1450
    // clk where 512 or 1024 are multiplied, with one as with two: beside wgmma few instructions are issued.
    static constexpr int kDecoders = kTokens <= 128 ? 2 : 1;
    static constexpr int kRows = 128, kConsumers = 256, kThreads = kConsumers + 128 * kDecoders;
    static constexpr int kShare = kTokens / kParts;  // tokens whose sums a part adds up

    static constexpr int kInputBytes = kTokens * 128, kWeightBytes = kRows * 128;
    static constexpr int kStageBytes = kInputBytes + kWeightBytes;  // of one block of 64: input, then weight
    static constexpr int kStagingBytes = kTokens * 128;             // of a warpgroup's tile, rounded
    static constexpr int kPairBytes = kRows * 64;                   // codes of two blocks
    static constexpr int kFixedBytes = 2 * kStagingBytes + kDecoders * 2 * kPairBytes + 1024 + 256;
    static constexpr int kStages = (232448 - kFixedBytes) / kStageBytes;
    static constexpr int kStaging = kStages * kStageBytes;
    static constexpr int kCodes = kStaging + 2 * kStagingBytes;
    static constexpr int kMap = kCodes + kDecoders * 2 * kPairBytes;
    static constexpr int kFull = kMap + 1024, kEmpty = kFull + 8 * kStages, kSums = kEmpty + 8 * kStages;
    static constexpr int kPairs = kSums + 8;  // barriers of each decoding warp's two pairs
    static constexpr int kSmemBytes = kFixedBytes + kStages * kStageBytes;

    static_assert(kTokens % (16 * kParts) == 0, "shares are whole matrices");
    static_assert(kStages >= 3, "two stages to multiply while one is filled");
    static_assert(kParts == 1 || kTokens * kRows * 4 <= kStaging, "the sums of the parts fit the ring");
    static_assert(kStageBytes % 1024 == 0 && kStagingBytes % 1024 == 0,
                  "swizzles repeat on absolute addresses");
};

/// One output tile and this CTA's part of K.
struct Tile {
    int row, token;  // the first of each
    int begin, end;  // blocks of 64
};

/// Every role walks the same tiles.
template <typename S>
class Walk {
 public:
    __device__ __forceinline__ explicit Walk(const Gemm4bitLargeParams& p)
        : p_(p), next_(blockIdx.x / S::kParts) {}
    static __device__ __forceinline__ int part() { return blockIdx.x % S::kParts; }

    __device__ __forceinline__ bool operator()(Tile& t) {
        if (next_ >= p_.num_row_tiles * p_.num_token_tiles) return false;
        const int group = next_ / (p_.raster_tokens * p_.num_row_tiles) * p_.raster_tokens;
        const int width = min(p_.raster_tokens, p_.num_token_tiles - group);
        const int inside = next_ - group * p_.num_row_tiles;
        t.row = inside / width * S::kRows;
        t.token = (group + inside % width) * S::kTokens;
        // Parts begin at multiples of four blocks: the scales of four are fetched at once.
        const int num_blocks = p_.o.k / 64, num_fours = (num_blocks + 3) / 4;
        t.begin = min(num_fours * part() / S::kParts * 4, num_blocks);
        t.end = min(num_fours * (part() + 1) / S::kParts * 4, num_blocks);
        next_ += gridDim.x / S::kParts;
        return true;
    }
    /// The next tile with anything to multiply.
    __device__ __forceinline__ bool next_with_blocks(Tile& t) {
        while ((*this)(t))
            if (t.begin < t.end) return true;
        return false;
    }

 private:
    const Gemm4bitLargeParams& p_;
    int next_;
};

/// Requests the input of a stage.
template <typename S>
__device__ __forceinline__ void load_input(const Gemm4bitLargeParams& p, uint32_t base, const Tile& t,
                                           int block, int slot) {
    const uint32_t full = base + S::kFull + 8 * slot;
    barrier_expect(full, S::kInputBytes);
    tma_load(base + slot * S::kStageBytes, &p.input, 0, t.token, block, full);
}

// ------------------------------------------------------------------------------------------------ decoding

/// The sixteen weights of one row and block: their low bytes, their high bytes.
struct Table {
    uint32_t low[4], high[4];
};
template <typename T, typename Codebook, int I = 0>
__device__ __forceinline__ void build_table(Table& t, float absmax) {
    constexpr uint32_t kBits[4] = {Codebook::kValueBits[4 * I], Codebook::kValueBits[4 * I + 1],
                                   Codebook::kValueBits[4 * I + 2], Codebook::kValueBits[4 * I + 3]};
    const uint32_t a = pack_pair<T>(__fmul_rn(__uint_as_float(kBits[0]), absmax),
                                    __fmul_rn(__uint_as_float(kBits[1]), absmax));
    const uint32_t b = pack_pair<T>(__fmul_rn(__uint_as_float(kBits[2]), absmax),
                                    __fmul_rn(__uint_as_float(kBits[3]), absmax));
    t.low[I] = permute_bytes(a, b, 0x6420);
    t.high[I] = permute_bytes(a, b, 0x7531);
    if constexpr (I < 3) build_table<T, Codebook, I + 1>(t, absmax);
}

/// Four weights from sixteen bits of codes. PRMT reads bit 3 of a selector as "replicate the sign", so codes
/// 8..15 come from a second look-up and are merged by a third.
__device__ __forceinline__ void decode_four(uint32_t& first, uint32_t& second, const Table& t, uint32_t index,
                                            uint32_t upper) {
    const uint32_t low = permute_bytes(permute_bytes(t.low[0], t.low[1], index),
                                       permute_bytes(t.low[2], t.low[3], index), upper);
    const uint32_t high = permute_bytes(permute_bytes(t.high[0], t.high[1], index),
                                        permute_bytes(t.high[2], t.high[3], index), upper);
    first = permute_bytes(low, high, 0x4051);  // the high nibble of a byte is the even element
    second = permute_bytes(low, high, 0x6273);
}
__device__ __forceinline__ uint4 decode_eight(const Table& t, uint32_t codes, uint32_t bit) {
    const uint32_t index = codes & 0x77777777, upper = ((codes >> 1) & bit) | 0x32103210;
    uint4 v;
    decode_four(v.x, v.y, t, index, upper);
    decode_four(v.z, v.w, t, index >> 16, upper >> 16);
    return v;
}

/// The scales of this thread's row, two blocks after two blocks, tile after tile; four units are fetched ahead.
template <typename S>
class ScaleStream {
 public:
    static constexpr int kNum = 128 / S::kUnit;  // scales of two blocks

    __device__ __forceinline__ ScaleStream(const Gemm4bitLargeParams& p, uint32_t map)
        : scales_(p.o, map), walk_(p) {
        fetch();
    }
    /// Zero beyond K; anything behind the last tile.
    __device__ __forceinline__ void next(float (&scale)[kNum]) {
        if (left_ <= 0) {
            now_[0] = ahead_[0];
            scales_.decode(now_);
            left_ = ahead_left_;
            fetch();
        }
        scale[0] = __uint_as_float(now_[0].x), scale[1] = __uint_as_float(now_[0].y);
        if constexpr (kNum == 4) scale[2] = __uint_as_float(now_[0].z), scale[3] = __uint_as_float(now_[0].w);
        now_[0].x = now_[0].z, now_[0].y = now_[0].w;
        left_ -= kNum;
    }

 private:
    __device__ __forceinline__ void fetch() {
        if (unit_ >= end_) {
            Tile t;
            if (!walk_.next_with_blocks(t)) return;
            row_ = t.row + threadIdx.x % 128;
            unit_ = t.begin * (64 / S::kUnit), end_ = t.end * (64 / S::kUnit);
        }
        scales_.load(ahead_, row_, 0, unit_);
        ahead_left_ = min(4, end_ - unit_);
        unit_ += 4;
    }

    RowScales<S::kUnit, 1> scales_;
    Walk<S> walk_;
    uint4 now_[1], ahead_[1];
    int row_, unit_ = 0, end_ = 0, ahead_left_ = 0, left_ = 0;
};

/// A decoding warpgroup: a thread owns a row; a warp brings the codes of its 32 rows, two blocks at a time. Of two
/// warpgroups one decodes the even blocks, one the odd.
template <typename T, typename S, typename Codebook>
__device__ __forceinline__ void decode_weights(const Gemm4bitLargeParams& p, uint32_t base) {
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32,
              row = threadIdx.x % 128;
    const uint32_t bit = opaque(0x44444444 + (p.o.k >> 31));  // two immediates would make two LOP3 of one
    const int decoder = __shfl_sync(~0u, (threadIdx.x - S::kConsumers) / 128, 0);
    const uint32_t pairs = base + S::kPairs + 16 * (4 * decoder + warp);
    const uint32_t codes_at = base + S::kCodes + decoder * 2 * S::kPairBytes + warp * 2048;

    Walk<S> walk(p);
    Tile ahead;
    int ahead_block = 0;
    bool more = walk.next_with_blocks(ahead);
    if (more) ahead_block = ahead.begin;
    auto fetch = [&](int slot) {
        if (!more) return;
        if (lane == 0) {
            barrier_expect(pairs + 8 * slot, 2048);
            tma_load(codes_at + slot * S::kPairBytes, &p.packed, 32 * ahead_block, ahead.row + 32 * warp,
                     pairs + 8 * slot);
        }
        ahead_block += 2;
        if (ahead_block >= ahead.end) {
            more = walk.next_with_blocks(ahead);
            ahead_block = ahead.begin;
        }
    };
    fetch(0);
    fetch(1);

    constexpr int kNum = ScaleStream<S>::kNum;
    ScaleStream<S> scales(p, base + S::kMap);
    float scale[kNum], next_scale[kNum];
    scales.next(scale);
    scales.next(next_scale);
    const auto first_of = [&](const float (&of)[kNum]) {
        return S::kDecoders == 2 && decoder ? of[kNum / 2] : of[0];
    };
    Table table;
    build_table<T, Codebook>(table, first_of(scale));

    Ring<S::kStages> ring;
    Ring<2> pair;
    int requested = S::kStages;  // stages whose input multiply requests
    const uint32_t row_at = base + S::kInputBytes + row * 128 + ((row & 7) << 4);
    const uint32_t piece_at[4] = {
        codes_at + swizzled_offset<64>(lane, 0), codes_at + swizzled_offset<64>(lane, 1),
        codes_at + swizzled_offset<64>(lane, 2), codes_at + swizzled_offset<64>(lane, 3)};
    Tile t;
    for (Walk<S> decoded(p); decoded(t);) {
        for (int block = t.begin; block < t.end; block += 2) {
            barrier_wait(pairs + 8 * pair.slot, pair.parity);
            uint4 codes[4];
            #pragma unroll
            for (int i = 0; i < 4; ++i) codes[i] = load_shared_16(piece_at[i] + pair.slot * S::kPairBytes);
            #pragma unroll
            for (int sub = 0; sub < 2; ++sub) {
                if (sub == 1 && block + 1 == t.end) {
                    build_table<T, Codebook>(table, first_of(next_scale));
                    break;
                }
                if (S::kDecoders == 1 || sub == decoder) {
                    uint4 v[8];
                    auto decode = [&](int i) {
                        const uint4& c = codes[2 * sub + i / 4];
                        v[i] = decode_eight(table,
                                            i % 4 == 0   ? c.x
                                            : i % 4 == 1 ? c.y
                                            : i % 4 == 2 ? c.z
                                                         : c.w,
                                            bit);
                    };
                    #pragma unroll
                    for (int i = 0; i < 4; ++i) decode(i);
                    barrier_wait(base + S::kEmpty + 8 * ring.slot, ring.parity ^ 1);
                    if (requested <= 0 && warp == block / 2 % 4 && lane == 0)
                        load_input<S>(p, base, t, block + sub, ring.slot);
                    const uint32_t to = row_at + ring.slot * S::kStageBytes;
                    #pragma unroll
                    for (int i = 0; i < 4; ++i) store_shared_16(to ^ (i << 4), v[i]);
                    if (S::kUnit == 32) build_table<T, Codebook>(table, scale[2 * sub + 1]);
                    #pragma unroll
                    for (int i = 4; i < 8; ++i) {
                        decode(i);
                        store_shared_16(to ^ (i << 4), v[i]);
                    }
                    build_table<T, Codebook>(
                        table, S::kDecoders == 1 && sub == 0 ? scale[kNum / 2] : first_of(next_scale));
                    barrier_arrive(base + S::kFull + 8 * ring.slot);  // each lane answers for its own writes
                }
                --requested;
                ring.advance();
            }
            #pragma unroll
            for (int i = 0; i < kNum; ++i) scale[i] = next_scale[i];
            scales.next(next_scale);
            __syncwarp();  // every lane has used what it had loaded
            fetch(pair.slot);
            pair.advance();
        }
    }
}

}  // namespace large
