// 64 codes as 16-bit integers, in the order in which int16_rows.h has the activations: not negative where zero points
// are taken away (`int16_zero`), and times what `int16_factor` says.
#pragma once
#include "isa/avx2/int16_rows.h"

namespace offmoe {
namespace {

OFFMOE_INLINE __m256i low_nibbles(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }

// Signed bytes at the bottom and at the top of 16 bits.
OFFMOE_INLINE __m256i signed_even(__m256i bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8); }
OFFMOE_INLINE __m256i signed_odd(__m256i bytes) { return _mm256_srai_epi16(bytes, 8); }

// The nibbles of pieces 2 * pair and 2 * pair + 1.
template <int32_t KIND>
OFFMOE_INLINE __m256i paired_nibbles(const uint8_t* from, int pair) {
    if constexpr (KIND == INT4 || KIND == MXFP4) return load<__m256i>(from + 32 * pair);
    if constexpr (KIND == IQ4_XS) return load<__m256i>(from + 8 + 32 * pair);
    constexpr int64_t size = block_bytes(KIND);
    const uint8_t* codes = from + 2 * pair * size + size - 16;
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load<__m128i>(codes)), load<__m128i>(codes + size), 1);
}

template <int32_t KIND>
OFFMOE_INLINE void unpack_paired(const uint8_t* from, int pair, __m256i* w) {
    const __m256i all = paired_nibbles<KIND>(from, pair), nibble = _mm256_set1_epi16(15), byte = _mm256_set1_epi16(255);
    if constexpr (is_tabled(KIND)) {
        const __m256i table = Avx2Vectors::twice(reinterpret_cast<const uint8_t*>(is_iq4(KIND) ? kIq4 : kE2m1Twice));
        const __m256i low = _mm256_shuffle_epi8(table, low_nibbles(all));
        const __m256i high = _mm256_shuffle_epi8(table, low_nibbles(_mm256_srli_epi16(all, 4)));
        const bool large = !is_iq4(KIND);  // small numbers stay 256 times as large
        w[0] = large ? _mm256_slli_epi16(low, 8) : signed_even(low);
        w[1] = large ? _mm256_slli_epi16(high, 8) : signed_even(high);
        w[2] = large ? _mm256_andnot_si256(byte, low) : signed_odd(low);
        w[3] = large ? _mm256_andnot_si256(byte, high) : signed_odd(high);
    } else {
        w[0] = _mm256_and_si256(all, nibble);
        w[1] = _mm256_and_si256(_mm256_srli_epi16(all, 4), nibble);
        w[2] = _mm256_and_si256(_mm256_srli_epi16(all, 8), nibble);
        w[3] = _mm256_srli_epi16(all, 12);
    }
}

// The part-th 32 codes of INT8, Q8_0, Q5_K or Q6_K as bytes.
template <int32_t KIND>
OFFMOE_INLINE __m256i code_bytes(const uint8_t* from, int part, uint8_t flip) {
    if constexpr (KIND == INT8) return _mm256_xor_si256(load<__m256i>(from + 32 * part), _mm256_set1_epi8(static_cast<char>(flip)));
    if constexpr (KIND == Q8_0) return load<__m256i>(from + part * block_bytes(Q8_0) + 2);
    if constexpr (KIND == Q5_K) {
        const __m256i low = load<__m256i>(from + 48 + part / 2 * 32), high = load<__m256i>(from + 16);
        const __m256i fifth = part < 4 ? _mm256_slli_epi16(high, 4 - part) : _mm256_srli_epi16(high, part - 4);
        return _mm256_or_si256(low_nibbles(part % 2 == 0 ? low : _mm256_srli_epi16(low, 4)),
                               _mm256_and_si256(fifth, _mm256_set1_epi8(0x10)));
    }
    const int half = part / 4, quarter = part % 4;
    const __m256i low = load<__m256i>(from + 64 * half + 32 * (part % 2)), high = load<__m256i>(from + 128 + 32 * half);
    const __m256i upper = quarter < 2 ? _mm256_slli_epi16(high, 4 - 2 * quarter) : _mm256_srli_epi16(high, 2 * quarter - 4);
    return _mm256_or_si256(low_nibbles(quarter < 2 ? low : _mm256_srli_epi16(low, 4)),
                           _mm256_and_si256(upper, _mm256_set1_epi8(0x30)));
}

template <int32_t KIND>
OFFMOE_INLINE void unpack_64(const uint8_t* from, int pair, uint8_t flip, __m256i* w) {
    if constexpr (is_paired(KIND)) return unpack_paired<KIND>(from, pair, w);
    if constexpr (KIND == Q4_K) {
        const __m256i all = load<__m256i>(from + 16 + 32 * pair), above = _mm256_srli_epi16(all, 8);
        w[0] = _mm256_and_si256(all, _mm256_set1_epi16(15));
        w[1] = _mm256_and_si256(above, _mm256_set1_epi16(15));
        w[2] = _mm256_and_si256(all, _mm256_set1_epi16(0xf0));  // sixteen times as large
        w[3] = _mm256_and_si256(above, _mm256_set1_epi16(0xf0));
        return;
    }
    OFFMOE_UNROLL
    for (int i = 0; i < 2; ++i) {
        const __m256i bytes = code_bytes<KIND>(from, 2 * pair + i, flip);
        const bool has_sign = KIND == INT8 || KIND == Q8_0;
        w[2 * i] = has_sign ? signed_even(bytes) : _mm256_and_si256(bytes, _mm256_set1_epi16(255));
        w[2 * i + 1] = has_sign ? signed_odd(bytes) : _mm256_srli_epi16(bytes, 8);
    }
}

}  // namespace
}  // namespace offmoe
