// Integer weights x int8 activations for AVX2: `maddubs` multiplies unsigned with signed bytes and adds pairs in 16
// bits. Nibbles and e2m1 (0 to 24) are unsigned; a signed byte lends its sign to x, so that pairs stay within 32,512.
#pragma once
#include <immintrin.h>

#include "int8.h"

namespace offmoe {
namespace {

struct Avx2Unit {
    using Weights = __m256i;
    typedef float Sums __attribute__((vector_size(32)));

    template <int32_t KIND>
    static inline __m256i unpack(const Matrix& matrix, const uint8_t* codes) {
        if constexpr (KIND == INT8) {
            const __m256i flip = _mm256_set1_epi8(static_cast<char>(matrix.code_signed ? 0 : 0x80));
            return _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), flip);
        }
        const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
        const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(pairs), _mm_srli_epi16(pairs, 4), 1);
        const __m256i nibbles = _mm256_and_si256(both, _mm256_set1_epi8(15));
        if constexpr (KIND != MXFP4) return nibbles;
        const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kE2m1));
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), nibbles);
    }

    template <int32_t KIND>
    static inline Sums dot(__m256i w, const int8_t* x) {
        const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        const __m256i pairs = KIND == INT8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(values, w))
                                           : _mm256_maddubs_epi16(w, values);
        return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }

    static inline float total(Sums sums) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
};

}  // namespace
}  // namespace offmoe
