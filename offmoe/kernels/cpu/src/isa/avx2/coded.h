// Rows of codes x floats for AVX2, and F16C, which every processor with AVX2 has.
#pragma once
#include <immintrin.h>

#include "isa/generic/coded.h"

namespace offmoe {
namespace {

// Two vectors of sixteen float16 numbers, each 2^-8 of the e4m3 that `codes` are: those of every 16 bytes' first half, and
// of the second.
inline void fp8_to_f16(__m256i codes, __m256i* halves) {
    const __m256i none = _mm256_setzero_si256();
    const __m256i above[2] = {_mm256_unpacklo_epi8(none, codes), _mm256_unpackhi_epi8(none, codes)};
    for (int i = 0; i < 2; ++i) {
        // The sign stays, magnitudes move one down; what was the sign's copy goes.
        const __m256i moved = _mm256_and_si256(_mm256_srai_epi16(above[i], 1), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
        const __m256i magnitude = _mm256_and_si256(moved, _mm256_set1_epi16(0x7fff));
        halves[i] = _mm256_or_si256(moved, _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3f80)));  // NaN
    }
}

struct Avx2Vectors {
    typedef float Vec __attribute__((vector_size(32)));
    // Bytes are moved to the tops of 32-bit numbers.
    static constexpr float kScale = 0x1p-24f, kFp8Scale = 0x1p8f;
    static constexpr int kSums = 2, kMostRows = 4;  // what 16 registers hold
    static constexpr bool kTables = true;
    struct Weights {
        __m256 parts[4];
    };

    static OFFMOE_INLINE Weights widen(I8x32 bytes) {
        Weights w;
        OFFMOE_UNROLL
        for (int i = 0; i < 4; ++i) {  // the i-th byte of every four
            const int top = i << 24 | 0x808080;
            const __m256i places = _mm256_setr_epi32(top, top + (4 << 24), top + (8 << 24), top + (12 << 24), top,
                                                     top + (4 << 24), top + (8 << 24), top + (12 << 24));
            w.parts[i] = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(bits<__m256i>(bytes), places));
        }
        return w;
    }

    static OFFMOE_INLINE Weights widen_fp8(U8x32 codes) {
        __m256i halves[2];
        fp8_to_f16(bits<__m256i>(codes), halves);
        return {{_mm256_cvtph_ps(_mm256_castsi256_si128(halves[0])), _mm256_cvtph_ps(_mm256_castsi256_si128(halves[1])),
                 _mm256_cvtph_ps(_mm256_extracti128_si256(halves[0], 1)),
                 _mm256_cvtph_ps(_mm256_extracti128_si256(halves[1], 1))}};
    }

    template <int32_t KIND>
    static OFFMOE_INLINE Weights dense(const uint8_t* from) {
        Weights w;
        OFFMOE_UNROLL
        for (int i = 0; i < 4; ++i) {
            if constexpr (KIND == DENSE_F32) w.parts[i] = load<__m256>(from + 32 * i);
            else if constexpr (KIND == DENSE_F16) w.parts[i] = _mm256_cvtph_ps(load<__m128i>(from + 16 * i));
            else w.parts[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from + 16 * i)), 16));
        }
        return w;
    }

    // What nibbles mean is a bfloat16 number, twice that of e2m1: looked up byte by byte.
    template <int32_t KIND>
    static OFFMOE_INLINE Weights of_table(U8x32 nibbles) {
        constexpr Table table = table_of(KIND);
        const __m256i all = bits<__m256i>(nibbles);
        const __m256i lower = _mm256_shuffle_epi8(twice(table.lower), all), upper = _mm256_shuffle_epi8(twice(table.upper), all);
        const __m256i first = _mm256_unpacklo_epi8(lower, upper), second = _mm256_unpackhi_epi8(lower, upper);
        const __m256i odd = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
        return {{_mm256_castsi256_ps(_mm256_slli_epi32(first, 16)), _mm256_castsi256_ps(_mm256_and_si256(first, odd)),
                 _mm256_castsi256_ps(_mm256_slli_epi32(second, 16)), _mm256_castsi256_ps(_mm256_and_si256(second, odd))}};
    }

    // The tables of a row of PACKED.
    struct Exponents {
        explicit OFFMOE_INLINE Exponents(const ::offmoe::Exponents& of)
            : upper(twice(of.upper)), lower(twice(of.lower)) {}

        __m256i upper, lower;
    };

    static OFFMOE_INLINE Weights packed(const uint8_t* numbers, const uint8_t* indices, const Exponents& exponents) {
        const PackedWords words = unpack_words(numbers, indices, exponents.upper, exponents.lower);
        const __m256i odd = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
        return {{_mm256_castsi256_ps(_mm256_slli_epi32(words.first, 16)), _mm256_castsi256_ps(_mm256_and_si256(words.first, odd)),
                 _mm256_castsi256_ps(_mm256_slli_epi32(words.second, 16)),
                 _mm256_castsi256_ps(_mm256_and_si256(words.second, odd))}};
    }

    struct Table {
        uint8_t lower[16], upper[16];
    };

    static constexpr Table table_of(int32_t kind) {
        Table table = {};
        for (int i = 0; i < 16; ++i) {
            const int e2m1 = i % 8 < 4 ? i % 8 : i % 8 < 6 ? 2 * (i % 8) - 4 : 4 * (i % 8) - 16;
            const int value = is_iq4(kind) ? kIq4[i] : kind == Q4_K ? i : kind == INT4 || kind == Q4_0 ? i - 8 : i < 8 ? e2m1 : -e2m1;
            int magnitude = value < 0 ? -value : value, exponent = 134;
            if (magnitude == 0) continue;
            while (magnitude < 128) magnitude *= 2, --exponent;
            table.lower[i] = static_cast<uint8_t>((exponent & 1) << 7 | (magnitude & 127));
            table.upper[i] = static_cast<uint8_t>((value < 0 ? 128 : 0) | exponent >> 1);
        }
        return table;
    }

    static OFFMOE_INLINE __m256i twice(const uint8_t* bytes) { return _mm256_broadcastsi128_si256(load<__m128i>(bytes)); }

    static OFFMOE_INLINE Vec dot(const Weights& w, const float* x) {
        __m256 sum = _mm256_mul_ps(w.parts[0], _mm256_loadu_ps(x));
        OFFMOE_UNROLL
        for (int i = 1; i < 4; ++i) sum = _mm256_fmadd_ps(w.parts[i], _mm256_loadu_ps(x + 8 * i), sum);
        return sum;
    }

    static OFFMOE_INLINE Vec dot_halves(const Weights& w, const float* x, float a, float b) {
        return dot(w, x) * _mm256_insertf128_ps(_mm256_set1_ps(a), _mm_set1_ps(b), 1);
    }

    static OFFMOE_INLINE U8x32 nibbles(const uint8_t* codes) {
        const __m256i moved = _mm256_srlv_epi32(twice(codes), _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
        return bits<U8x32>(_mm256_and_si256(moved, _mm256_set1_epi8(15)));
    }

    static OFFMOE_INLINE I8x32 e2m1_twice(U8x32 nibble) {
        return bits<I8x32>(_mm256_shuffle_epi8(twice(reinterpret_cast<const uint8_t*>(kE2m1Twice)), bits<__m256i>(nibble)));
    }

    static OFFMOE_INLINE I8x32 iq4(U8x32 nibble) {
        return bits<I8x32>(_mm256_shuffle_epi8(twice(reinterpret_cast<const uint8_t*>(kIq4)), bits<__m256i>(nibble)));
    }

    static OFFMOE_INLINE Vec add_scaled(Vec sums, Vec dots, float scale) {
        return _mm256_fmadd_ps(dots, _mm256_set1_ps(scale), sums);
    }

    static OFFMOE_INLINE float total(Vec sums) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
    }

    static int64_t place(int32_t kind, int64_t at) {
        if (is_nibbles(kind)) return at % 8 / 4 * 16 + at / 16 * 8 + at % 4 * 2 + at / 8 % 2;
        return kind == FP8 || is_dense(kind) ? at : at % 8 * 4 + at / 8;
    }
};

}  // namespace
}  // namespace offmoe
