// Rows of weights in pieces of 32 columns, and the scales of those.
#pragma once
#include "isa/generic/general.h"

namespace offmoe {
namespace {

typedef uint8_t U8x32 __attribute__((vector_size(32)));
typedef int8_t I8x32 __attribute__((vector_size(32)));
typedef float F32x4 __attribute__((vector_size(16)));
typedef int8_t I8x8 __attribute__((vector_size(8)));

constexpr int64_t kPiece = 32;

// Whether a weight is a number by itself, without a scale.
constexpr bool is_dense(int32_t kind) { return kind <= DENSE_F16 || kind == PACKED; }

// Whether these kernels multiply it; others are left to the general ones.
inline bool takes_codes(const Matrix& matrix) {
    if (is_blocks(matrix.kind) || is_dense(matrix.kind)) return !matrix.transposed;
    return (matrix.group % kPiece == 0 || matrix.group >= matrix.columns);
}

inline int64_t num_pieces(const Matrix& matrix) { return (matrix.columns + kPiece - 1) / kPiece; }

OFFMOE_INLINE F32x8 eight_f16(U16x8 halves) {
#if defined(__F16C__)
    return bits<F32x8>(_mm256_cvtph_ps(bits<__m128i>(halves)));
#elif defined(__aarch64__)
    const float16x8_t all = bits<float16x8_t>(halves);
    const float32x4_t floats[2] = {vcvt_f32_f16(vget_low_f16(all)), vcvt_high_f32_f16(all)};
    return load<F32x8>(floats);
#else
    const U16x8 twice[2] = {halves, halves};
    const F32x16 all = from_f16(load<U16x16>(twice));
    return load<F32x8>(&all);
#endif
}

// Eight bytes, as they are, as floats, and as what e8m0 has them for.
OFFMOE_INLINE I32x8 eight_bytes(uint64_t bytes) {
#if defined(__AVX2__)
    return bits<I32x8>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes))));
#else
    return __builtin_convertvector(bits<U8x8>(bytes), I32x8);
#endif
}
OFFMOE_INLINE F32x8 eight_unsigned(uint64_t bytes) { return __builtin_convertvector(eight_bytes(bytes), F32x8); }
OFFMOE_INLINE F32x8 eight_signed(uint64_t bytes) {
    return __builtin_convertvector(eight_bytes(bytes ^ 0x8080808080808080u) - 128, F32x8);
}
OFFMOE_INLINE F32x8 eight_powers(uint64_t bytes) {
    const I32x8 exponents = eight_bytes(bytes);
    return bits<F32x8>(exponents << 23 | ((exponents - 1) >> 31 & 0x00400000));  // 2^-127
}
OFFMOE_INLINE F32x8 eight_half_powers(uint64_t bytes) {
    const I32x8 exponents = eight_bytes(bytes), small = (exponents - 2) >> 31;
    return bits<F32x8>((((exponents & 1) + 1) << 21 & small) | ((exponents - 1) << 23 & ~small));
}

// A row's scales as floats, for kAtOnce pieces at a time, and what zero points come to with them.
struct PieceScales {
    static constexpr int64_t kAtOnce = 64;

    explicit PieceScales(const Matrix& matrix, int64_t row)
        : matrix(matrix), row(row), from(scales_of(matrix, row)),
          pieces_a_group(matrix.group >= matrix.columns ? num_pieces(matrix) : matrix.group / kPiece) {
        if (!matrix.zeros_packed) return;
        const int64_t width = code_bits(matrix.kind), per_word = 32 / width;
        words = matrix.zeros + row / per_word * matrix.zero_row_bytes;
        shift = static_cast<uint32_t>(row % per_word * width);
        mask = (1u << width) - 1u;
    }

    // Of `count` pieces from `first` on, a multiple of kAtOnce, with zeros up to a multiple of eight. `bias` is taken from
    // the codes already.
    template <bool LESS>
    inline void load_from(int64_t first, int64_t count, int64_t bias) {
        if (pieces_a_group == 1) {
            groups<LESS>(first, count, bias, scale, less);
        } else {
            alignas(32) float group_scale[kAtOnce], group_less[kAtOnce];
            const int64_t begin = first / pieces_a_group;
            groups<LESS>(begin, (first + count - 1) / pieces_a_group + 1 - begin, bias, group_scale, group_less);
            spread(group_scale, first - begin * pieces_a_group, count, scale);
            if constexpr (LESS) spread(group_less, first - begin * pieces_a_group, count, less);
        }
        for (int64_t i = count; i % 8; ++i) scale[i] = less[i] = 0.0f;
    }

    // What another row reads.
    inline void prefetch(int64_t row) const {
        const uint8_t* first = scales_of(matrix, row);
        for (int64_t at = 0; at < matrix.scale_row_bytes; at += 64) __builtin_prefetch(first + at);
        if (!matrix.zeros_packed || row % (32 / code_bits(matrix.kind)) != 0) return;
        first = matrix.zeros + row * code_bits(matrix.kind) / 32 * matrix.zero_row_bytes;
        for (int64_t at = 0; at < matrix.zero_row_bytes; at += 64) __builtin_prefetch(first + at);
    }

    alignas(64) float scale[kAtOnce + 8], less[kAtOnce + 8];

private:
    // Each group's number to its pieces, of which `done` are before these, and maybe to seven more.
    inline void spread(const float* numbers, int64_t done, int64_t count, float* to) const {
        if (pieces_a_group == 4) {  // the most usual
            for (int64_t i = 0; i < count; i += 4) {
                const F32x4 four = splat<F32x4>(numbers[i / 4]);
                std::memcpy(to + i, &four, sizeof four);
            }
            return;
        }
        for (int64_t i = -done; i < count; i += pieces_a_group, ++numbers) {
            const F32x8 eight = splat<F32x8>(*numbers);
            const int64_t stop = i + pieces_a_group < count ? i + pieces_a_group : count;
            for (int64_t at = i < 0 ? 0 : i; at < stop; at += 8) std::memcpy(to + at, &eight, sizeof eight);
        }
    }

    template <bool LESS>
    inline void groups(int64_t first, int64_t count, int64_t bias, float* scales, float* zeros) const {
        const int64_t whole = !LESS || matrix.zeros_packed ? count / 8 * 8 : 0;
        for (int64_t i = 0; i < whole; i += 8) {
            const F32x8 some = eight_scales(first + i);
            std::memcpy(scales + i, &some, sizeof some);
            if constexpr (LESS) {
                const F32x8 taken = (eight_zeros(first + i) - static_cast<float>(bias)) * some;
                std::memcpy(zeros + i, &taken, sizeof taken);
            }
        }
        for (int64_t i = whole; i < count; ++i) {
            scales[i] = scale_at(matrix, from, first + i);
            if constexpr (LESS) zeros[i] = static_cast<float>(zero_at(matrix, row, first + i) - bias) * scales[i];
        }
    }

    OFFMOE_INLINE F32x8 eight_scales(int64_t group) const {
        if (matrix.scale_type == F32) return load<F32x8>(from + 4 * group);
        if (matrix.scale_type == BF16)
            return bits<F32x8>(__builtin_convertvector(load<U16x8>(from + 2 * group), U32x8) << 16);
        if (matrix.scale_type == F16) return eight_f16(load<U16x8>(from + 2 * group));
        return eight_powers(load<uint64_t>(from + group));
    }

    OFFMOE_INLINE F32x8 eight_zeros(int64_t group) const {
        const U32x8 zeros = (load<U32x8>(words + 4 * group) >> shift) & mask;
        return __builtin_convertvector(bits<I32x8>(zeros), F32x8);
    }

    const Matrix& matrix;
    const int64_t row;
    const uint8_t* const from;
    const int64_t pieces_a_group;
    const uint8_t* words = nullptr;  // of packed zero points
    uint32_t shift = 0, mask = 0;
};

}  // namespace
}  // namespace offmoe
