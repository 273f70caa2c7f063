// Rows of codes x activations in 16-bit integers, for AVX2: `vpmaddwd` multiplies sixteen pairs exactly and adds up each two.
// An output is added up in an order that does not depend on T.
#pragma once
#include "isa/avx2/int16_codes.h"

namespace offmoe {
namespace {

// One scale in each half of the lanes: of `ordered`, the pair-th of both halves.
OFFMOE_INLINE __m256 pair_of(__m256 ordered, int pair) {
    switch (pair) {
        case 0: return _mm256_permute_ps(ordered, 0x00);
        case 1: return _mm256_permute_ps(ordered, 0x55);
        case 2: return _mm256_permute_ps(ordered, 0xaa);
        default: return _mm256_permute_ps(ordered, 0xff);
    }
}

// Even ones in the lower half, odd ones in the upper, for `pair_of`.
OFFMOE_INLINE __m256 in_order(__m256 scales) {
    return _mm256_permutevar8x32_ps(scales, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
}

// T rows of x and what they come to with one row of weights, 256 columns after 256 columns.
template <int32_t KIND, int T>
struct Int16Sums {
    Int16Sums(const Int16Row& row, const void* const* x) {
        for (int t = 0; t < T; ++t) {
            numbers[t] = static_cast<const uint8_t*>(x[t]) + kFormBytes;
            floats[t] = static_cast<const uint8_t*>(x[t]) + row.floats_at;
        }
    }

    // 256 columns whose codes have the scales `scales`; `less`: what is taken away for zero points, or null.
    OFFMOE_INLINE void scale(const float* scales, const float* less) {
        const __m256 of_codes = _mm256_loadu_ps(scales);
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) {
            const __m256 some = _mm256_mul_ps(of_codes, load<__m256>(floats[t]));
            if constexpr (is_paired(KIND)) ordered[t][0] = in_order(some);
            else _mm256_store_ps(stored[t], some);
            if (less != nullptr) taken[t] = _mm256_fmadd_ps(_mm256_loadu_ps(less), load<__m256>(floats[t] + 32), taken[t]);
        }
        next();
    }

    // A block of Q4_K or Q5_K: four scales and four minima, twice.
    OFFMOE_INLINE void scale_with_minima(const uint8_t* block) {
        const uint64_t both = load<uint64_t>(block + 4), third = load<uint32_t>(block + 12);
        const uint64_t first = both & 0x3f3f3f3f3f3f3f3fu;
        const uint64_t second = ((third | third << 28) & 0x0f0f0f0f0f0f0f0fu) | (both >> 2 & 0x3030303030303030u);
        const __m128i halves = _mm_set1_epi32(load<int32_t>(block));
        const __m256 unit = _mm256_permutevar_ps(_mm256_cvtph_ps(halves), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
        const __m256 scales[2] = {_mm256_mul_ps(eight_floats(first), unit), _mm256_mul_ps(eight_floats(second), unit)};
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) {
            OFFMOE_UNROLL
            for (int i = 0; i < 2; ++i) {
                const __m256 some = _mm256_mul_ps(scales[i], load<__m256>(floats[t] + 32 * i));
                _mm256_store_ps(stored[t] + 8 * i, some);
                taken[t] = _mm256_add_ps(taken[t], some);  // its upper half counts
            }
        }
        next();
    }

    // A block of Q6_K: sixteen scales.
    OFFMOE_INLINE void scale_halves(const uint8_t* block) {
        const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
        const __m128i bytes = _mm_shuffle_epi8(load<__m128i>(block + 192), order);
        const __m256 unit = _mm256_set1_ps(f16_at(block + 208));
        const __m256 scales[2] = {
            _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), unit),
            _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))), unit)};
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) {
            OFFMOE_UNROLL
            for (int i = 0; i < 2; ++i) {
                ordered[t][i] = _mm256_mul_ps(scales[i], load<__m256>(floats[t] + 32 * i));
                taken[t] = _mm256_fmadd_ps(scales[i], load<__m256>(floats[t] + 64 + 32 * i), taken[t]);
            }
        }
        next();
    }

    // 256 columns.
    OFFMOE_INLINE void multiply(const uint8_t* codes, uint8_t flip) {
        OFFMOE_UNROLL
        for (int pair = 0; pair < 4; ++pair) {
            __m256i w[4];
            unpack_64<KIND>(codes, pair, flip, w);
            OFFMOE_UNROLL
            for (int t = 0; t < T; ++t) {
                const uint8_t* from = numbers[t] + 128 * pair;
                const __m256i first = _mm256_add_epi32(product(w[0], from), product(w[1], from + 32));
                const __m256i second = _mm256_add_epi32(product(w[2], from + 64), product(w[3], from + 96));
                if constexpr (is_paired(KIND)) {
                    add_to(sums[pair % 2][t], _mm256_add_epi32(first, second), pair_of(ordered[t][0], pair));
                } else if constexpr (in_halves(KIND)) {
                    add_to(sums[0][t], first, pair_of(ordered[t][pair / 2], pair % 2 * 2));
                    add_to(sums[1][t], second, pair_of(ordered[t][pair / 2], pair % 2 * 2 + 1));
                } else {
                    const int at = has_minima(KIND) ? 2 * pair + pair / 2 * 4 : 2 * pair;
                    add_to(sums[0][t], first, _mm256_set1_ps(stored[t][at]));
                    add_to(sums[1][t], second, _mm256_set1_ps(stored[t][at + 1]));
                }
            }
        }
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) numbers[t] += 2 * kChunkColumns;
    }

    inline void store(float* out, int64_t stride) const {
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) {
            __m256 less = taken[t];
            if constexpr (has_minima(KIND)) less = _mm256_blend_ps(less, _mm256_setzero_ps(), 15);
            out[t * stride] = Avx2Vectors::total(_mm256_sub_ps(_mm256_add_ps(sums[0][t], sums[1][t]), less));
        }
    }

private:
    OFFMOE_INLINE void next() {
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) floats[t] += 4 * chunk_floats(KIND);
    }

    static OFFMOE_INLINE __m256 eight_floats(uint64_t bytes) {
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes))));
    }

    static OFFMOE_INLINE __m256i product(__m256i w, const uint8_t* from) { return _mm256_madd_epi16(w, load<__m256i>(from)); }

    static OFFMOE_INLINE void add_to(__m256& sum, __m256i products, __m256 scale) {
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), scale, sum);
    }

    const uint8_t *numbers[T], *floats[T];
    __m256 sums[2][T] = {}, taken[T] = {};
    __m256 ordered[T][2];
    alignas(32) float stored[T][16];
};

// Further ahead than floats ask: a row takes a third of the time.
OFFMOE_INLINE void prefetch_int16(const uint8_t* from) { __builtin_prefetch(from + 8192, 0, 3); }

template <int32_t KIND, int T>
void int16_blocks(const Matrix& matrix, int64_t row, const void* const* x, float* out, int64_t stride) {
    constexpr bool kSmall = block_columns(KIND) == kPiece;
    constexpr int64_t kBytes = block_bytes(KIND) * (kSmall ? kChunkPieces : 1);
    Int16Sums<KIND, T> sums(Int16Row(matrix), x);
    const uint8_t* from = matrix.codes + row * matrix.row_bytes;
    const int64_t whole = matrix.columns / kChunkColumns, rest = matrix.columns % kChunkColumns / kPiece;
    const auto scale = [&](const uint8_t* codes) {
        if constexpr (has_minima(KIND)) return sums.scale_with_minima(codes);
        else if constexpr (in_halves(KIND)) return sums.scale_halves(codes);
        else {
            const BlockScales<KIND> scales(codes, kChunkPieces);
            sums.scale(scales.scale, KIND == Q4_0 ? scales.scale : nullptr);
        }
    };
    const uint8_t* const end = from + whole * kBytes;
    for (; from < end; from += kBytes) {
        OFFMOE_UNROLL
        for (int64_t line = 0; line < kBytes; line += 64) prefetch_int16(from + line);
        scale(from);
        sums.multiply(from, 0);
    }
    if (kSmall && rest != 0) {
        alignas(32) uint8_t last[kBytes] = {};
        std::memcpy(last, from, rest * block_bytes(KIND));
        scale(last);
        sums.multiply(last, 0);
    }
    sums.store(out, stride);
}

template <int32_t KIND, bool LESS, int T>
void int16_groups(const Matrix& matrix, int64_t row, const void* const* x, float* out, int64_t stride) {
    constexpr int64_t kBytes = KIND == INT8 ? kChunkColumns : kChunkColumns / 2;
    const uint8_t flip = matrix.code_signed ? 0 : 128;
    const int64_t count = num_pieces(matrix);
    const uint8_t* from = matrix.codes + row * matrix.row_bytes;
    const uint8_t* end = from + row_code_bytes(matrix);
    Int16Sums<KIND, T> sums(Int16Row(matrix), x);
    PieceScales scales(matrix, row);
    if constexpr (T == 1) scales.prefetch(row + kRowsAhead);
    for (int64_t first = 0; first < count; first += PieceScales::kAtOnce) {
        const int64_t some = count - first < PieceScales::kAtOnce ? count - first : PieceScales::kAtOnce;
        scales.template load_from<LESS>(first, some, KIND == INT4 ? 0 : flip);
        const auto add = [&](const uint8_t* codes, int64_t at) {
            sums.scale(scales.scale + at, LESS ? scales.less + at : KIND == INT4 ? scales.scale + at : nullptr);
            sums.multiply(codes, flip);
        };
        int64_t at = 0;
        for (; at < some && end - from >= kBytes; at += kChunkPieces, from += kBytes) {
            OFFMOE_UNROLL
            for (int64_t line = 0; line < kBytes; line += 64) prefetch_int16(from + line);
            add(from, at);
        }
        if (at >= some) continue;
        alignas(32) uint8_t last[kBytes] = {};
        add(static_cast<uint8_t*>(std::memcpy(last, from, end - from)), at);
    }
    sums.store(out, stride);
}

template <int32_t KIND, bool LESS, int T>
void int16_rows(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, float* out, int64_t stride) {
    for (int64_t row = begin; row < end; ++row, ++out) {
        if constexpr (is_blocks(KIND)) int16_blocks<KIND, T>(matrix, row, x, out, stride);
        else int16_groups<KIND, LESS, T>(matrix, row, x, out, stride);
    }
}

template <int32_t KIND, bool LESS>
void int16_kind(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, int32_t num_x, float* out,
                int64_t stride) {
    for (; begin < end; begin += 8, out += 8) {  // a second pass finds the rows in the cache
        const int64_t stop = begin + 8 < end ? begin + 8 : end;
        int32_t t = 0;
        for (; t + 4 <= num_x; t += 4) int16_rows<KIND, LESS, 4>(matrix, begin, stop, x + t, out + t * stride, stride);
        for (; t < num_x; ++t) int16_rows<KIND, LESS, 1>(matrix, begin, stop, x + t, out + t * stride, stride);
    }
}

// Rows of x that are all in integers.
inline void int16_products(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, int32_t num_x,
                           float* out, int64_t stride) {
    const bool zeros = matrix.zeros != nullptr;
    switch (matrix.kind) {
        case INT8:
            if (zeros || matrix.zero != (matrix.code_signed ? 0 : 128))
                return int16_kind<INT8, true>(matrix, begin, end, x, num_x, out, stride);
            return int16_kind<INT8, false>(matrix, begin, end, x, num_x, out, stride);
        case INT4:
            if (zeros) return int16_kind<INT4, true>(matrix, begin, end, x, num_x, out, stride);
            return int16_kind<INT4, false>(matrix, begin, end, x, num_x, out, stride);
        case MXFP4: return int16_kind<MXFP4, false>(matrix, begin, end, x, num_x, out, stride);
        case Q4_0: return int16_kind<Q4_0, false>(matrix, begin, end, x, num_x, out, stride);
        case Q8_0: return int16_kind<Q8_0, false>(matrix, begin, end, x, num_x, out, stride);
        case Q4_K: return int16_kind<Q4_K, false>(matrix, begin, end, x, num_x, out, stride);
        case Q5_K: return int16_kind<Q5_K, false>(matrix, begin, end, x, num_x, out, stride);
        case Q6_K: return int16_kind<Q6_K, false>(matrix, begin, end, x, num_x, out, stride);
        case IQ4_NL: return int16_kind<IQ4_NL, false>(matrix, begin, end, x, num_x, out, stride);
        case IQ4_XS: return int16_kind<IQ4_XS, false>(matrix, begin, end, x, num_x, out, stride);
        default: return int16_kind<MXFP4_BLOCKS, false>(matrix, begin, end, x, num_x, out, stride);
    }
}

}  // namespace
}  // namespace offmoe
