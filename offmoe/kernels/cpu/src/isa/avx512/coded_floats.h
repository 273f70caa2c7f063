// Rows of codes x floats for AVX-512: for x that is not bfloat16.
#pragma once
#include "isa/avx2/coded.h"

namespace offmoe {
namespace {

struct Avx512Vectors {
    typedef float Vec __attribute__((vector_size(64)));
    static constexpr float kScale = 1.0f, kFp8Scale = 0x1p8f;
    static constexpr int kSums = 2, kMostRows = 8;
    static constexpr bool kTables = false;
    struct Weights {
        __m512 first, second;
    };

    static OFFMOE_INLINE Weights widen(I8x32 bytes) {
        const __m256i all = bits<__m256i>(bytes);
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(all))),
                _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(all, 1)))};
    }

    static OFFMOE_INLINE Weights widen_fp8(U8x32 codes) {
        __m256i halves[2];
        fp8_to_f16(bits<__m256i>(codes), halves);
        return {_mm512_cvtph_ps(halves[0]), _mm512_cvtph_ps(halves[1])};
    }

    template <int32_t KIND>
    static OFFMOE_INLINE Weights dense(const uint8_t* from) {
        if constexpr (KIND == DENSE_F32) return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 64)};
        else if constexpr (KIND == DENSE_F16) return {_mm512_cvtph_ps(load<__m256i>(from)), _mm512_cvtph_ps(load<__m256i>(from + 32))};
        else return {from_bf16_512(from), from_bf16_512(from + 32)};
    }

    using Exponents = Avx2Vectors::Exponents;
    static OFFMOE_INLINE Weights packed(const uint8_t* numbers, const uint8_t* indices, const Exponents& exponents) {
        const Avx2Vectors::Weights w = Avx2Vectors::packed(numbers, indices, exponents);
        return {_mm512_insertf32x8(_mm512_castps256_ps512(w.parts[0]), w.parts[1], 1),
                _mm512_insertf32x8(_mm512_castps256_ps512(w.parts[2]), w.parts[3], 1)};
    }

    static OFFMOE_INLINE __m512 from_bf16_512(const uint8_t* from) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16));
    }

    static OFFMOE_INLINE Vec dot(const Weights& w, const float* x) {
        return _mm512_fmadd_ps(w.second, _mm512_loadu_ps(x + 16), _mm512_mul_ps(w.first, _mm512_loadu_ps(x)));
    }

    static OFFMOE_INLINE Vec dot_halves(const Weights& w, const float* x, float a, float b) {
        const __m512 first = _mm512_mul_ps(w.first, _mm512_loadu_ps(x)), second = _mm512_mul_ps(w.second, _mm512_loadu_ps(x + 16));
        return _mm512_fmadd_ps(second, _mm512_set1_ps(b), _mm512_mul_ps(first, _mm512_set1_ps(a)));
    }

    static OFFMOE_INLINE U8x32 nibbles(const uint8_t* codes) { return Avx2Vectors::nibbles(codes); }
    static OFFMOE_INLINE I8x32 e2m1_twice(U8x32 nibble) { return Avx2Vectors::e2m1_twice(nibble); }
    static OFFMOE_INLINE I8x32 iq4(U8x32 nibble) { return Avx2Vectors::iq4(nibble); }
    static OFFMOE_INLINE Vec add_scaled(Vec sums, Vec dots, float scale) {
        return _mm512_fmadd_ps(dots, _mm512_set1_ps(scale), sums);
    }
    static OFFMOE_INLINE float total(Vec sums) { return _mm512_reduce_add_ps(sums); }

    // Of e4m3, bytes 0 to 7 and 16 to 23 come first.
    static int64_t place(int32_t kind, int64_t at) { return kind == FP8 ? at / 16 * 8 + at % 16 / 8 * 16 + at % 8 : at; }
};

}  // namespace
}  // namespace offmoe
