// wgmma of sm_90a: 64 rows of one operand by up to 256 rows, "tokens", of the other. Groups, operands, products of 16-bit
// floats and of 8-bit codes.
#pragma once
#include <type_traits>
#include "dtype.cuh"

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// Keeps the compiler from moving the computation of a fragment below the fence that precedes its wgmma, or
/// the use of an accumulator above the wait that completes it: it knows of no dependence.
template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&a)[kCount]) {
    #pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(a[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(int32_t (&a)[kCount]) {
    #pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(a[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(float (&a)[kCount]) {
    #pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(a[i])::"memory");
}
/// The same value, but one that the compiler keeps in a register in place of computing it again. For whole
/// warps.
__device__ __forceinline__ uint32_t opaque(uint32_t v) { return __shfl_sync(~0u, v, threadIdx.x % 32); }

/// Descriptor of a K-major operand in shared memory under the 128 B swizzle: 8 rows are 1024 bytes apart. One
/// k16 step adds 2.
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t address) {
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
           uint64_t(1) << 62;
}

// Sums of one wgmma, which are all operands of one statement, so that the compiler keeps them in place. `c` is the
// constraint of one: QBITS_FLOAT or QBITS_INT.
#define QBITS_FLOAT(x) "+f"(x)
#define QBITS_INT(x) "+r"(x)
#define QBITS_ACC4(c, i) c(acc[i]), c(acc[i + 1]), c(acc[i + 2]), c(acc[i + 3])
#define QBITS_ACC8(c, i) QBITS_ACC4(c, i), QBITS_ACC4(c, i + 4)
#define QBITS_ACC16(c, i) QBITS_ACC8(c, i), QBITS_ACC8(c, i + 8)
#define QBITS_ACC32(c, i) QBITS_ACC16(c, i), QBITS_ACC16(c, i + 16)
#define QBITS_ACC64(c, i) QBITS_ACC32(c, i), QBITS_ACC32(c, i + 32)
#define QBITS_NAMES4 "%0,%1,%2,%3"
#define QBITS_NAMES8 QBITS_NAMES4 ",%4,%5,%6,%7"
#define QBITS_NAMES16 QBITS_NAMES8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define QBITS_NAMES32 QBITS_NAMES16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define QBITS_NAMES64                                                                                       \
    QBITS_NAMES32                                                                                           \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56," \
    "%57,%58,%59,%60,%61,%62,%63"
#define QBITS_NAMES96                                                                                       \
    QBITS_NAMES64                                                                                           \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88," \
    "%89,%90,%91,%92,%93,%94,%95"
#define QBITS_NAMES128                                                                                       \
    QBITS_NAMES96                                                                                            \
    ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116," \
    "%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define QBITS_WGMMA(shape, type, keep, names, inputs, ...)                                           \
    asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" names "}, " inputs \
                 ", " keep ", 1, 1, 0;"                                                              \
                 : __VA_ARGS__                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define QBITS_WGMMA_TYPES(shape, names, inputs, ...)                 \
    if constexpr (std::is_same_v<T, float16> && kAdd)                \
        QBITS_WGMMA(shape, "f16", "1", names, inputs, __VA_ARGS__);  \
    else if constexpr (std::is_same_v<T, float16>)                   \
        QBITS_WGMMA(shape, "f16", "0", names, inputs, __VA_ARGS__);  \
    else if constexpr (kAdd)                                         \
        QBITS_WGMMA(shape, "bf16", "1", names, inputs, __VA_ARGS__); \
    else                                                             \
        QBITS_WGMMA(shape, "bf16", "0", names, inputs, __VA_ARGS__)

/// acc[64 rows, kTokens] += a[64 rows, 16] b[kTokens, 16]^T, without kAdd = in place of +=; kTokens / 2
/// accumulators per thread.
template <typename T, int kTokens, bool kAdd = true>
__device__ __forceinline__ void wgmma_k16(float (&acc)[kTokens / 2], const uint32_t* a, uint64_t b) {
    if constexpr (kTokens == 16) {
        QBITS_WGMMA_TYPES("m64n16k16", QBITS_NAMES8, "{%8,%9,%10,%11}, %12", QBITS_ACC8(QBITS_FLOAT, 0));
    } else if constexpr (kTokens == 32) {
        QBITS_WGMMA_TYPES("m64n32k16", QBITS_NAMES16, "{%16,%17,%18,%19}, %20", QBITS_ACC16(QBITS_FLOAT, 0));
    } else if constexpr (kTokens == 64) {
        QBITS_WGMMA_TYPES("m64n64k16", QBITS_NAMES32, "{%32,%33,%34,%35}, %36", QBITS_ACC32(QBITS_FLOAT, 0));
    } else if constexpr (kTokens == 128) {
        QBITS_WGMMA_TYPES("m64n128k16", QBITS_NAMES64, "{%64,%65,%66,%67}, %68", QBITS_ACC32(QBITS_FLOAT, 0),
                          QBITS_ACC32(QBITS_FLOAT, 32));
    } else {
        static_assert(kTokens == 256, "wgmma is written out for 16, 32, 64, 128 and 256 tokens");
        QBITS_WGMMA_TYPES("m64n256k16", QBITS_NAMES128, "{%128,%129,%130,%131}, %132",
                          QBITS_ACC32(QBITS_FLOAT, 0), QBITS_ACC32(QBITS_FLOAT, 32),
                          QBITS_ACC32(QBITS_FLOAT, 64), QBITS_ACC32(QBITS_FLOAT, 96));
    }
}

#define QBITS_WGMMA_SHARED(shape, type, names, a_name, b_name, ...)                                  \
    asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" names "}, " a_name \
                 ", " b_name ", 1, 1, 1, 0, 0;"                                                      \
                 : __VA_ARGS__                                                                       \
                 : "l"(a), "l"(b))
#define QBITS_WGMMA_SHARED_TYPES(shape, names, a_name, b_name, ...)           \
    if constexpr (std::is_same_v<T, float16>)                                 \
        QBITS_WGMMA_SHARED(shape, "f16", names, a_name, b_name, __VA_ARGS__); \
    else                                                                      \
        QBITS_WGMMA_SHARED(shape, "bf16", names, a_name, b_name, __VA_ARGS__)

/// acc[64 rows, kTokens] += a[64 rows, 16] b[kTokens, 16]^T, both operands by descriptors.
template <typename T, int kTokens>
__device__ __forceinline__ void wgmma_k16_shared(float (&acc)[kTokens / 2], uint64_t a, uint64_t b) {
    if constexpr (kTokens == 128) {
        QBITS_WGMMA_SHARED_TYPES("m64n128k16", QBITS_NAMES64, "%64", "%65", QBITS_ACC32(QBITS_FLOAT, 0),
                                 QBITS_ACC32(QBITS_FLOAT, 32));
    } else if constexpr (kTokens == 192) {
        QBITS_WGMMA_SHARED_TYPES("m64n192k16", QBITS_NAMES96, "%96", "%97", QBITS_ACC32(QBITS_FLOAT, 0),
                                 QBITS_ACC32(QBITS_FLOAT, 32), QBITS_ACC32(QBITS_FLOAT, 64));
    } else {
        static_assert(kTokens == 256, "wgmma is written out for 128, 192 and 256 tokens");
        QBITS_WGMMA_SHARED_TYPES("m64n256k16", QBITS_NAMES128, "%128", "%129", QBITS_ACC32(QBITS_FLOAT, 0),
                                 QBITS_ACC32(QBITS_FLOAT, 32), QBITS_ACC32(QBITS_FLOAT, 64),
                                 QBITS_ACC32(QBITS_FLOAT, 96));
    }
}

/// What the tensor cores sum products of two 8-bit codes in: exactly in int32, or in float32.
template <typename Code>
using CodeSum = std::conditional_t<std::is_same_v<Code, int8_t>, int32_t, float>;

// `keep`: "1" adds, "0" replaces. Codes that are floats would end in ", 1, 1": neither operand negated.
#define QBITS_WGMMA_CODES(shape, names, inputs, keep, ...)                                             \
    asm volatile("wgmma.mma_async.sync.aligned." shape ".s32.s8.s8 {" names "}, " inputs ", " keep ";" \
                 : __VA_ARGS__                                                                         \
                 : "l"(a), "l"(b))
#define QBITS_WGMMA_CODES_KEEP(shape, names, inputs, ...)          \
    if constexpr (kAdd)                                            \
        QBITS_WGMMA_CODES(shape, names, inputs, "1", __VA_ARGS__); \
    else                                                           \
        QBITS_WGMMA_CODES(shape, names, inputs, "0", __VA_ARGS__)

/// acc[64 rows, kTokens] += a[64 rows, 32] b[kTokens, 32]^T of 8-bit codes, without kAdd = in place of +=; both operands
/// by descriptors, of which one k32 step adds 2.
template <typename Code, int kTokens, bool kAdd = true>
__device__ __forceinline__ void wgmma_k32(CodeSum<Code>* acc, uint64_t a, uint64_t b) {
    static_assert(std::is_same_v<Code, int8_t>, "e4m3 and e5m2 are to follow");
    if constexpr (kTokens == 8) {
        QBITS_WGMMA_CODES_KEEP("m64n8k32", QBITS_NAMES4, "%4, %5", QBITS_ACC4(QBITS_INT, 0));
    } else if constexpr (kTokens == 16) {
        QBITS_WGMMA_CODES_KEEP("m64n16k32", QBITS_NAMES8, "%8, %9", QBITS_ACC8(QBITS_INT, 0));
    } else if constexpr (kTokens == 32) {
        QBITS_WGMMA_CODES_KEEP("m64n32k32", QBITS_NAMES16, "%16, %17", QBITS_ACC16(QBITS_INT, 0));
    } else if constexpr (kTokens == 64) {
        QBITS_WGMMA_CODES_KEEP("m64n64k32", QBITS_NAMES32, "%32, %33", QBITS_ACC32(QBITS_INT, 0));
    } else if constexpr (kTokens == 128) {
        QBITS_WGMMA_CODES_KEEP("m64n128k32", QBITS_NAMES64, "%64, %65", QBITS_ACC64(QBITS_INT, 0));
    } else {
        static_assert(kTokens == 256, "wgmma is written out for 8, 16, 32, 64, 128 and 256 tokens");
        QBITS_WGMMA_CODES_KEEP("m64n256k32", QBITS_NAMES128, "%128, %129", QBITS_ACC64(QBITS_INT, 0),
                               QBITS_ACC64(QBITS_INT, 64));
    }
}
#undef QBITS_WGMMA_CODES
#undef QBITS_WGMMA_CODES_KEEP
#undef QBITS_WGMMA_SHARED
#undef QBITS_WGMMA_SHARED_TYPES
#undef QBITS_NAMES96
#undef QBITS_FLOAT
#undef QBITS_INT
#undef QBITS_ACC4
#undef QBITS_ACC8
#undef QBITS_ACC16
#undef QBITS_ACC32
#undef QBITS_ACC64
#undef QBITS_NAMES4
#undef QBITS_NAMES8
#undef QBITS_NAMES16
#undef QBITS_NAMES32
#undef QBITS_NAMES64
#undef QBITS_NAMES128
#undef QBITS_WGMMA
#undef QBITS_WGMMA_TYPES
