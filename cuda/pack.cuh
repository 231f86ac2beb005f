// Codes to bytes and back: two 4-bit codes to a byte (even element in the high nibble), four bytes to a word, words to
// memory.
#pragma once
#include <cstdint>
#include "ptx.cuh"

/// kNum (4 or 8) codes, element 0 in the high nibble of the lowest byte.
template <int kNum>
__device__ __forceinline__ uint32_t pack_nibbles(const uint32_t (&code)[kNum]) {
    uint32_t packed = 0;
    #pragma unroll
    for (int i = kNum - 2; i >= 0; i -= 2) packed = (packed * 16 + code[i]) * 16 + code[i + 1];
    return packed;
}

/// Shift that brings the code of element i to the low four bits.
__device__ __forceinline__ constexpr int nibble_shift(int i) { return 8 * (i / 2) + (i % 2 ? 0 : 4); }

/// Byte `kByte` of four words, in order.
template <int kByte>
__device__ __forceinline__ uint32_t gather_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    constexpr uint32_t kPick = kByte | (kByte + 4) << 4;
    return __byte_perm(__byte_perm(a, b, kPick), __byte_perm(c, d, kPick), 0x5410);
}

/// 0xff for each of four floats whose sign bit is set.
__device__ __forceinline__ uint32_t sign_mask(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return permute_bytes(permute_bytes(a, b, 0x00fb), permute_bytes(c, d, 0x00fb), 0x5410);
}

/// The same from the packed sixteen-bit words of elements 0-1 and 2-3.
__device__ __forceinline__ uint32_t sign_mask(uint32_t w01, uint32_t w23) {
    return permute_bytes(w01, w23, 0xfdb9);
}

/// Writes the codes of one vector, four to a word, as far as there are elements left. kFull promises
/// alignment and that all are there.
template <bool kFull, int kVector>
__device__ __forceinline__ void store_codes(uint8_t* codes, int64_t left,
                                            const uint32_t (&word)[kVector / 4]) {
    if constexpr (kFull && kVector == 8) {
        *reinterpret_cast<uint2*>(codes) = make_uint2(word[0], word[1]);
    } else if constexpr (kFull) {
        *reinterpret_cast<uint32_t*>(codes) = word[0];
    } else {
        #pragma unroll
        for (int j = 0; j < kVector; ++j)
            if (j < left) codes[j] = uint8_t(word[j / 4] >> (8 * (j % 4)));
    }
}
