// Rows of weights x floats, 32 columns at a time: codes are small whole numbers that become floats, and the scale is
// applied to the sum of their products. x is never rounded.
//
// A prepared row: x in the order in which `Unit` has the 32 numbers of a piece, zeros after the last, then a sum a piece,
// which zero points and minima are multiplied with. An output is added up in an order that does not depend on T.
//
// `Unit` has an instruction set's vectors:
//   Weights widen(bytes)                  32 signed bytes, divided by kScale
//   Weights widen_fp8(codes)              32 numbers of e4m3, divided by kFp8Scale
//   Weights dense<KIND>(from)             32 dense ones
//   Vec dot(weights, x)                   sums of their products, in lanes
//   Vec dot_halves(weights, x, a, b)      the same, the first 16 columns times a, the others times b
//   Vec splat(number), float total(sums)  the lanes in one fixed order
//   U8x32 nibbles(codes)                  of 16 bytes: the low ones, then the high ones
//   int64_t place(kind, at)               which of the 32 the at-th float of x is multiplied with
#pragma once
#include "general.h"

namespace offmoe {
namespace {

typedef uint8_t U8x32 __attribute__((vector_size(32)));
typedef int8_t I8x32 __attribute__((vector_size(32)));

constexpr int64_t kPiece = 32;

constexpr bool is_dense(int32_t kind) { return kind <= DENSE_F16; }

// Whether these kernels multiply it; others are left to the general ones.
inline bool takes_codes(const Matrix& matrix) {
    if (is_blocks(matrix.kind) || is_dense(matrix.kind)) return !matrix.transposed;
    return (matrix.group % kPiece == 0 || matrix.group >= matrix.columns);
}

inline int64_t num_pieces(const Matrix& matrix) { return (matrix.columns + kPiece - 1) / kPiece; }

// Bits move from byte to byte: to be masked.
inline U8x32 shifted(U8x32 bytes, int count) { return bits<U8x32>(bits<U16x16>(bytes) >> count); }
inline U8x32 times_16(U8x32 bytes) { return bits<U8x32>(bits<U16x16>(bytes) << 4); }  // of numbers below 16

// Twice e2m1 by its four bits: 0 1 2 3 4 6 8 12 is the largest of three lines.
inline I8x32 e2m1_twice(U8x32 nibble) {
    const I8x32 magnitude = bits<I8x32>(nibble & 7), steep = magnitude + magnitude - 4, steeper = 4 * magnitude - 16;
    const I8x32 some = magnitude > steep ? magnitude : steep, value = some > steeper ? some : steeper;
    return bits<I8x32>(nibble) > 7 ? -value : value;
}

// A row's scales as floats, for kAtOnce pieces at a time, and what zero points come to with them.
struct PieceScales {
    static constexpr int64_t kAtOnce = 64;

    explicit PieceScales(const Matrix& matrix, int64_t row)
        : matrix(matrix), row(row), from(scales_of(matrix, row)),
          pieces_a_group(matrix.group >= matrix.columns ? num_pieces(matrix) : matrix.group / kPiece) {}

    // Of `count` pieces from `first` on, a multiple of kAtOnce. `bias` is taken from the codes already.
    template <bool LESS>
    void load_from(int64_t first, int64_t count, int64_t bias) {
        const int64_t whole = pieces_a_group == 1 && (!LESS || matrix.zeros_packed) ? count / kLanes * kLanes : 0;
        for (int64_t i = 0; i < whole; i += kLanes) {
            sixteen(first + i, scale + i);
            if constexpr (LESS) sixteen_zeros(first + i, static_cast<float>(bias), scale + i, less + i);
        }
        int64_t group = (first + whole) / pieces_a_group, left = (group + 1) * pieces_a_group - first - whole;
        for (int64_t i = whole; i < count; ++group, left = pieces_a_group) {
            const float one = scale_at(matrix, from, group);
            const float zeros = LESS ? static_cast<float>(zero_at(matrix, row, group) - bias) * one : 0.0f;
            for (; left > 0 && i < count; --left, ++i) {
                scale[i] = one;
                if constexpr (LESS) less[i] = zeros;
            }
        }
    }

    alignas(64) float scale[kAtOnce], less[kAtOnce];

private:
    // Plain loops: some compilers take vectors of 64 bytes apart where the processor's are smaller.
    inline void sixteen(int64_t group, float* to) const {
        if (matrix.scale_type == F32) {
            std::memcpy(to, from + 4 * group, kLanes * sizeof(float));
        } else if (matrix.scale_type == F16) {
            const F32x16 some = from_f16(load<U16x16>(from + 2 * group));
            std::memcpy(to, &some, sizeof some);
        } else if (matrix.scale_type == BF16) {
            for (int64_t i = 0; i < kLanes; ++i) to[i] = bits<float>(uint32_t{load<uint16_t>(from + 2 * (group + i))} << 16);
        } else {
            for (int64_t i = 0; i < kLanes; ++i) {
                const uint32_t power = uint32_t{from[group + i]} << 23;
                to[i] = bits<float>(power > 0x00400000u ? power : 0x00400000u);
            }
        }
    }

    inline void sixteen_zeros(int64_t group, float bias, const float* scales, float* to) const {
        const int64_t width = code_bits(matrix.kind), per_word = 32 / width;
        const uint8_t* words = matrix.zeros + row / per_word * matrix.zero_row_bytes + 4 * group;
        const uint32_t shift = static_cast<uint32_t>(row % per_word * width), mask = (1u << width) - 1u;
        for (int64_t i = 0; i < kLanes; ++i) {
            const int32_t zero = static_cast<int32_t>((load<uint32_t>(words + 4 * i) >> shift) & mask);
            to[i] = (static_cast<float>(zero) - bias) * scales[i];
        }
    }

    const Matrix& matrix;
    const int64_t row;
    const uint8_t* const from;
    const int64_t pieces_a_group;
};

// 32 codes as signed bytes; of a block of 256 columns the part-th 32. `zero` and `flip` are taken from the codes.
template <class Unit, int32_t KIND>
inline I8x32 signed_bytes(const uint8_t* from, int part, int8_t zero, uint8_t flip) {
    if constexpr (KIND == INT8) return bits<I8x32>(load<U8x32>(from) ^ flip);
    if constexpr (KIND == INT4) return bits<I8x32>(Unit::nibbles(from)) - zero;
    if constexpr (KIND == MXFP4) return Unit::e2m1_twice(Unit::nibbles(from));
    if constexpr (KIND == Q8_0) return load<I8x32>(from + 2);
    if constexpr (KIND == Q4_0) return bits<I8x32>(Unit::nibbles(from + 2)) - 8;
    if constexpr (KIND == MXFP4_BLOCKS) return Unit::e2m1_twice(Unit::nibbles(from + 1));
    if constexpr (KIND == Q4_K || KIND == Q5_K) {
        const U8x32 pairs = load<U8x32>(from + (KIND == Q5_K ? 48 : 16) + 32 * (part / 2));
        const U8x32 low = shifted(pairs, 4 * (part & 1)) & 15;
        if constexpr (KIND == Q4_K) return bits<I8x32>(low);
        return bits<I8x32>(low | times_16(shifted(load<U8x32>(from + 16), part) & 1));
    }
    const int half = part / 4, quarter = part % 4;
    const U8x32 low = shifted(load<U8x32>(from + 64 * half + 32 * (quarter & 1)), quarter / 2 * 4) & 15;
    const U8x32 high = shifted(load<U8x32>(from + 128 + 32 * half), 2 * quarter) & 3;
    return bits<I8x32>(low | times_16(high)) - 32;
}

// What a block's parts are multiplied with, and what the sums of x are: taken away.
template <int32_t KIND>
struct BlockScales {
    explicit BlockScales(const uint8_t* from) {
        if constexpr (KIND == MXFP4_BLOCKS) scale[0] = half_of_power(from[0]);
        if constexpr (KIND == Q4_0 || KIND == Q8_0) scale[0] = f16_at(from);
        if constexpr (KIND == Q6_K) {
            const F32x16 each = __builtin_convertvector(load<I8x16>(from + 192), F32x16) * f16_at(from + 208);
            std::memcpy(scale, &each, sizeof each);
        }
        if constexpr (KIND == Q4_K || KIND == Q5_K) {
            uint32_t packed[4];
            six_bits(from + 4, packed);
            const F32x16 both = to_floats(wide_bytes(reinterpret_cast<const uint8_t*>(packed)));
            std::memcpy(scale, &both, sizeof both);  // eight scales, eight minima
            const float all = f16_at(from), least = f16_at(from + 2);
            for (int i = 0; i < 8; ++i) scale[i] *= all;
            for (int i = 8; i < 16; ++i) scale[i] *= least;
        }
    }

    alignas(64) float scale[16];
};

inline int64_t coded_prepared_bytes(const Matrix& matrix, int32_t type) {
    if (!takes_codes(matrix)) return general_prepared_bytes(matrix, type);
    return (num_pieces(matrix) * (kPiece + 1) * 4 + 63) / 64 * 64;
}

template <class Unit>
void coded_prepare(const Matrix& matrix, int32_t type, const float* x, void* prepared) {
    if (!takes_codes(matrix)) return general_prepare(matrix, type, x, prepared);
    const int64_t count = num_pieces(matrix);
    float *out = static_cast<float*>(prepared), *sums = out + count * kPiece;
    int64_t column_at[kPiece];
    for (int64_t at = 0; at < kPiece; ++at) {
        const int64_t place = Unit::place(matrix.kind, at);
        column_at[at] = in_nibbles(matrix) ? place % 16 * 2 + place / 16 : place;
    }
    // A power of two, and in x, as scales may be the smallest numbers that there are.
    float unit = matrix.kind == FP8 ? Unit::kFp8Scale : matrix.kind == MXFP4 ? Unit::kScale * 0.5f : Unit::kScale;
    if (is_dense(matrix.kind)) unit = 1.0f;
    for (int64_t piece = 0; piece < count; ++piece, out += kPiece) {
        float last[kPiece] = {};
        const int64_t begin = piece * kPiece, left = matrix.columns - begin;
        std::memcpy(last, x + begin, (left < kPiece ? left : kPiece) * sizeof(float));
        for (int64_t at = 0; at < kPiece; ++at) out[at] = last[column_at[at]] * unit;
        sums[piece] = sum(load<F32x16>(last) + load<F32x16>(last + kLanes));
    }
}

// T rows of x and what they come to with one row of weights, piece after piece.
template <class Unit, int T>
struct RowSums {
    RowSums(const void* const* x, int64_t num_pieces) : num_columns(num_pieces * kPiece) {
        for (int t = 0; t < T; ++t) xs[t] = static_cast<const float*>(x[t]);
    }

    inline void add(const typename Unit::Weights& w, int64_t piece, float scale) {
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) sums[t] += Unit::dot(w, xs[t] + piece * kPiece) * Unit::splat(scale);
    }

    inline void add(const typename Unit::Weights& w, int64_t piece) {
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) sums[t] += Unit::dot(w, xs[t] + piece * kPiece);
    }

    inline void add_halves(const typename Unit::Weights& w, int64_t piece, const float* scales) {
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) sums[t] += Unit::dot_halves(w, xs[t] + piece * kPiece, scales[0], scales[1]);
    }

    inline void take(int64_t piece, float less) {
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) taken[t] += less * xs[t][num_columns + piece];
    }

    inline void store(float* out, int64_t stride) const {
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) out[t * stride] = Unit::total(sums[t]) - taken[t];
    }

    const float* xs[T];
    const int64_t num_columns;
    typename Unit::Vec sums[T] = {};
    float taken[T] = {};
};

inline void prefetch_codes(const uint8_t* from) {
    __builtin_prefetch(from + 16384, 0, 2);
    __builtin_prefetch(from + 2048, 0, 3);
}

template <class Unit, int32_t KIND, int T>
void dense_row(const Matrix& matrix, int64_t row, const void* const* x, float* out, int64_t stride) {
    constexpr int64_t kBytes = kPiece * code_bits(KIND) / 8;
    const int64_t whole = matrix.columns / kPiece;
    const uint8_t* from = matrix.codes + row * matrix.row_bytes;
    RowSums<Unit, T> sums(x, num_pieces(matrix));
    for (int64_t piece = 0; piece < whole; ++piece, from += kBytes) {
        for (int64_t line = 0; line < kBytes; line += 64) prefetch_codes(from + line);
        sums.add(Unit::template dense<KIND>(from), piece);
    }
    if (whole < num_pieces(matrix)) {
        alignas(64) uint8_t last[kBytes] = {};
        std::memcpy(last, from, row_code_bytes(matrix) - whole * kBytes);
        sums.add(Unit::template dense<KIND>(last), whole);
    }
    sums.store(out, stride);
}

// GGUF's blocks of 32 or 256 columns.
template <class Unit, int32_t KIND, int T>
void block_row(const Matrix& matrix, int64_t row, const void* const* x, float* out, int64_t stride) {
    constexpr int kParts = block_columns(KIND) == 256 ? 8 : 1;
    RowSums<Unit, T> sums(x, num_pieces(matrix));
    const uint8_t* from = matrix.codes + row * matrix.row_bytes;
    for (int64_t piece = 0; piece < num_pieces(matrix); piece += kParts, from += block_bytes(KIND)) {
        for (int64_t line = 0; line < block_bytes(KIND); line += 64) prefetch_codes(from + line);
        const BlockScales<KIND> scales(from);
        OFFMOE_UNROLL
        for (int part = 0; part < kParts; ++part) {
            const typename Unit::Weights w = Unit::widen(signed_bytes<Unit, KIND>(from, part, 0, 0));
            if constexpr (KIND == Q6_K) sums.add_halves(w, piece + part, scales.scale + 2 * part);
            else sums.add(w, piece + part, scales.scale[part]);
            if constexpr (KIND == Q4_K || KIND == Q5_K) sums.take(piece + part, scales.scale[8 + part]);
        }
    }
    sums.store(out, stride);
}

// Codes with scales of groups.
template <class Unit, int32_t KIND, bool LESS, int T>
void group_row(const Matrix& matrix, int64_t row, const void* const* x, float* out, int64_t stride) {
    constexpr int64_t kBytes = KIND == INT8 || KIND == FP8 ? 32 : 16, kLine = T == 1 ? 64 / kBytes : 1;
    const int8_t zero = static_cast<int8_t>(LESS ? 8 : matrix.zero);
    const uint8_t flip = matrix.code_signed ? 0 : 128;
    const int64_t whole = matrix.columns / kPiece, count = num_pieces(matrix);
    const uint8_t* from = matrix.codes + row * matrix.row_bytes;
    RowSums<Unit, T> sums(x, count);
    PieceScales scales(matrix, row);
    const auto add = [&](const uint8_t* codes, int64_t piece, int64_t at) {
        if constexpr (KIND == FP8) sums.add(Unit::widen_fp8(load<U8x32>(codes)), piece, scales.scale[at]);
        else sums.add(Unit::widen(signed_bytes<Unit, KIND>(codes, 0, zero, flip)), piece, scales.scale[at]);
        if constexpr (LESS) sums.take(piece, scales.less[at]);
    };
    for (int64_t first = 0; first < count; first += PieceScales::kAtOnce) {
        const int64_t some = count - first < PieceScales::kAtOnce ? count - first : PieceScales::kAtOnce;
        scales.template load_from<LESS>(first, some, KIND == INT4 ? 8 : flip);
        const int64_t here = first + some > whole ? whole - first : some;
        int64_t at = 0;
        for (; at + kLine <= here; at += kLine, from += kLine * kBytes) {
            prefetch_codes(from);
            OFFMOE_UNROLL
            for (int64_t i = 0; i < kLine; ++i) add(from + i * kBytes, first + at + i, at + i);
        }
        for (; at < here; ++at, from += kBytes) add(from, first + at, at);
        if (at == some) continue;
        alignas(32) uint8_t last[kPiece] = {};  // columns that are no whole piece
        std::memcpy(last, from, row_code_bytes(matrix) - whole * kBytes);
        add(last, whole, at);
    }
    sums.store(out, stride);
}

template <class Unit, int32_t KIND, bool LESS, int T>
void coded_rows(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, float* out, int64_t stride) {
    for (int64_t row = begin; row < end; ++row, ++out) {
        if constexpr (is_dense(KIND)) dense_row<Unit, KIND, T>(matrix, row, x, out, stride);
        else if constexpr (is_blocks(KIND)) block_row<Unit, KIND, T>(matrix, row, x, out, stride);
        else group_row<Unit, KIND, LESS, T>(matrix, row, x, out, stride);
    }
}

template <class Unit, int32_t KIND, bool LESS>
void coded_kind(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, int32_t num_x, float* out,
                int64_t stride) {
    for (; num_x >= 8; num_x -= 8, x += 8, out += 8 * stride)
        coded_rows<Unit, KIND, LESS, 8>(matrix, begin, end, x, out, stride);
    for (; num_x >= 4; num_x -= 4, x += 4, out += 4 * stride)
        coded_rows<Unit, KIND, LESS, 4>(matrix, begin, end, x, out, stride);
    for (; num_x > 0; --num_x, ++x, out += stride) coded_rows<Unit, KIND, LESS, 1>(matrix, begin, end, x, out, stride);
}

template <class Unit>
void coded_multiply(const Matrix& matrix, int32_t type, int64_t begin, int64_t end, const void* const* x, int32_t num_x,
                    float* out, int64_t stride) {
    if (!takes_codes(matrix)) return general_multiply(matrix, type, begin, end, x, num_x, out, stride);
    const bool zeros = matrix.zeros != nullptr;
    for (; begin < end; begin += 8, out += 8) {  // a second pass finds the rows in the cache
        const int64_t stop = begin + 8 < end ? begin + 8 : end;
        switch (matrix.kind) {
            case DENSE_F32: coded_kind<Unit, DENSE_F32, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case DENSE_BF16: coded_kind<Unit, DENSE_BF16, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case DENSE_F16: coded_kind<Unit, DENSE_F16, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case INT8:
                if (zeros || matrix.zero != (matrix.code_signed ? 0 : 128))
                    coded_kind<Unit, INT8, true>(matrix, begin, stop, x, num_x, out, stride);
                else
                    coded_kind<Unit, INT8, false>(matrix, begin, stop, x, num_x, out, stride);
                break;
            case INT4:
                if (zeros) coded_kind<Unit, INT4, true>(matrix, begin, stop, x, num_x, out, stride);
                else coded_kind<Unit, INT4, false>(matrix, begin, stop, x, num_x, out, stride);
                break;
            case MXFP4: coded_kind<Unit, MXFP4, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case FP8: coded_kind<Unit, FP8, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case Q4_0: coded_kind<Unit, Q4_0, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case Q8_0: coded_kind<Unit, Q8_0, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case Q4_K: coded_kind<Unit, Q4_K, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case Q5_K: coded_kind<Unit, Q5_K, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case Q6_K: coded_kind<Unit, Q6_K, false>(matrix, begin, stop, x, num_x, out, stride); break;
            default: coded_kind<Unit, MXFP4_BLOCKS, false>(matrix, begin, stop, x, num_x, out, stride); break;
        }
    }
}

// The compiler's own vectors.
struct AnyVectors {
    using Vec = F32x16;
    static constexpr float kScale = 1.0f, kFp8Scale = 1.0f;
    struct Weights {
        F32x16 first, second;
    };
    struct Halves {
        U8x16 first, second;
    };

    static inline Weights widen(I8x32 bytes) {
        const Halves halves = bits<Halves>(bytes);
        return {__builtin_convertvector(bits<I8x16>(halves.first), F32x16),
                __builtin_convertvector(bits<I8x16>(halves.second), F32x16)};
    }

    static inline Weights widen_fp8(U8x32 codes) {
        const Halves halves = bits<Halves>(codes);
        return {from_fp8(halves.first), from_fp8(halves.second)};
    }

    template <int32_t KIND>
    static inline Weights dense(const uint8_t* from) {
        if constexpr (KIND == DENSE_F32) return {load<F32x16>(from), load<F32x16>(from + 64)};
        else if constexpr (KIND == DENSE_F16) return {from_f16(load<U16x16>(from)), from_f16(load<U16x16>(from + 32))};
        else return {from_bf16(load<U16x16>(from)), from_bf16(load<U16x16>(from + 32))};
    }

    static inline F32x16 dot(const Weights& w, const float* x) {
        return w.first * load<F32x16>(x) + w.second * load<F32x16>(x + kLanes);
    }

    static inline F32x16 dot_halves(const Weights& w, const float* x, float a, float b) {
        return w.first * load<F32x16>(x) * a + w.second * load<F32x16>(x + kLanes) * b;
    }

    static inline U8x32 nibbles(const uint8_t* codes) {
        const U8x16 both = load<U8x16>(codes);
        return bits<U8x32>(Halves{both & 15, both >> 4});
    }

    static inline I8x32 e2m1_twice(U8x32 nibble) { return offmoe::e2m1_twice(nibble); }
    static inline F32x16 splat(float number) { return offmoe::splat(number); }
    static inline float total(F32x16 sums) { return sum(sums); }

    static int64_t place(int32_t, int64_t at) { return at; }
};

}  // namespace
}  // namespace offmoe
