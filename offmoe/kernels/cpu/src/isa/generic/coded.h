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
//   Weights packed(numbers, indices, Exponents)  32 of PACKED without an escape
//   U8x32 nibbles(codes)                  of 16 bytes: the low ones, then the high ones
//   I8x32 e2m1_twice(nibbles), iq4(nibbles) numbers
//   Weights of_table<KIND>(nibbles)       what 32 nibbles mean (twice e2m1), with kTables; others come by way of `widen`
//   Vec dot(weights, x)                   sums of their products, in lanes
//   Vec dot_halves(weights, x, a, b)      the same, the first 16 columns times a, the others times b
//   Vec add_scaled(sums, dots, scale)     sums + dots * scale, with one rounding where the processor has it: said, not left to
//                                         the compiler, as sums by other kernels must have the same bits
//   float total(sums)                     the lanes in one fixed order
//   int64_t place(kind, at)               which of the 32 the at-th float of x is multiplied with
//   kSums, kMostRows                      what registers are enough for: sums of a row, rows at once
#pragma once
#include "isa/generic/packed.h"
#include "isa/generic/pieces.h"

namespace offmoe {
namespace {

// Bits move from byte to byte: to be masked.
OFFMOE_INLINE U8x32 shifted(U8x32 bytes, int count) { return bits<U8x32>(bits<U16x16>(bytes) >> count); }
OFFMOE_INLINE U8x32 times_16(U8x32 bytes) { return bits<U8x32>(bits<U16x16>(bytes) << 4); }  // of numbers below 16

constexpr bool is_nibbles(int32_t kind) {
    return kind == INT4 || kind == MXFP4 || kind == Q4_0 || kind == MXFP4_BLOCKS || kind == Q4_K || is_iq4(kind);
}

// 32 nibbles; of a block of 256 columns the part-th 32.
template <class Unit, int32_t KIND>
OFFMOE_INLINE U8x32 nibbles_of(const uint8_t* from, int part) {
    if constexpr (KIND == Q4_K) return shifted(load<U8x32>(from + 16 + 32 * (part / 2)), 4 * (part & 1)) & 15;
    else if constexpr (KIND == IQ4_XS) return Unit::nibbles(from + 8 + 16 * part);
    else return Unit::nibbles(from + (KIND == Q4_0 || KIND == IQ4_NL ? 2 : KIND == MXFP4_BLOCKS ? 1 : 0));
}

// 32 codes as signed bytes. `flip` is taken from bytes.
template <class Unit, int32_t KIND>
OFFMOE_INLINE I8x32 signed_bytes(const uint8_t* from, int part, uint8_t flip) {
    if constexpr (KIND == INT8) return bits<I8x32>(load<U8x32>(from) ^ flip);
    if constexpr (KIND == Q8_0) return load<I8x32>(from + 2);
    if constexpr (KIND == MXFP4 || KIND == MXFP4_BLOCKS) return Unit::e2m1_twice(nibbles_of<Unit, KIND>(from, part));
    if constexpr (is_iq4(KIND)) return Unit::iq4(nibbles_of<Unit, KIND>(from, part));
    if constexpr (is_nibbles(KIND)) return bits<I8x32>(nibbles_of<Unit, KIND>(from, part)) - (KIND == Q4_K ? 0 : 8);
    if constexpr (KIND == Q5_K) {
        const U8x32 low = shifted(load<U8x32>(from + 48 + 32 * (part / 2)), 4 * (part & 1)) & 15;
        return bits<I8x32>(low | times_16(shifted(load<U8x32>(from + 16), part) & 1));
    }
    const int half = part / 4, quarter = part % 4;
    const U8x32 low = shifted(load<U8x32>(from + 64 * half + 32 * (quarter & 1)), quarter / 2 * 4) & 15;
    const U8x32 high = shifted(load<U8x32>(from + 128 + 32 * half), 2 * quarter) & 3;
    return bits<I8x32>(low | times_16(high)) - 32;
}

// What the parts of a block of 256 columns are multiplied with, and what the sums of x are: taken away. Or of up to eight
// blocks of 32, with zeros after the last.
template <int32_t KIND>
struct BlockScales {
    BlockScales(const uint8_t* from, int64_t count) {
        if constexpr (block_columns(KIND) == kPiece) {
            if (count >= 8) set(0, small_blocks(from));
            else for (int64_t i = 0; i < 8; ++i) scale[i] = i < count ? small_block(from + i * block_bytes(KIND)) : 0.0f;
        }
        if constexpr (KIND == Q6_K) {
            const float all = f16_at(from + 208);
            set(0, eight_signed(load<uint64_t>(from + 192)) * all);
            set(8, eight_signed(load<uint64_t>(from + 200)) * all);
        }
        if constexpr (KIND == IQ4_XS) set(0, (eight_unsigned(iq4_scales(from)) - 32.0f) * f16_at(from));
        if constexpr (KIND == Q4_K || KIND == Q5_K) {  // eight scales, eight minima
            uint32_t packed[4];
            six_bits(from + 4, packed);
            set(0, eight_unsigned(packed[0] | uint64_t{packed[1]} << 32) * f16_at(from));
            set(8, eight_unsigned(packed[2] | uint64_t{packed[3]} << 32) * f16_at(from + 2));
        }
    }

    OFFMOE_INLINE void set(int at, F32x8 numbers) { std::memcpy(scale + at, &numbers, sizeof numbers); }

    static OFFMOE_INLINE float small_block(const uint8_t* from) {
        return KIND == MXFP4_BLOCKS ? half_of_power(from[0]) : f16_at(from);
    }

    static OFFMOE_INLINE F32x8 small_blocks(const uint8_t* from) {
        constexpr int64_t size = block_bytes(KIND);
        if constexpr (KIND == MXFP4_BLOCKS) {
            uint64_t four[2];
            for (int i = 0; i < 2; ++i, from += 4 * size)
                four[i] = (from[0] | uint64_t{from[size]} << 8) | (uint64_t{from[2 * size]} << 16 | uint64_t{from[3 * size]} << 24);
            return eight_half_powers(four[0] | four[1] << 32);
        } else {
            U16x8 halves;
            OFFMOE_UNROLL
            for (int i = 0; i < 8; ++i) halves[i] = load<uint16_t>(from + i * size);
            return eight_f16(halves);
        }
    }

    alignas(64) float scale[16];
};

inline int64_t whole_eights(int64_t count) { return (count + 7) / 8 * 8; }

inline int64_t coded_prepared_bytes(const Matrix& matrix, int32_t type) {
    if (!takes_codes(matrix)) return general_prepared_bytes(matrix, type);
    return ((num_pieces(matrix) * kPiece + whole_eights(num_pieces(matrix))) * 4 + 63) / 64 * 64;
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
    float unit = matrix.kind == FP8 ? Unit::kFp8Scale : Unit::kScale;
    if (is_dense(matrix.kind) || (Unit::kTables && is_nibbles(matrix.kind))) unit = 1.0f;
    if (matrix.kind == MXFP4) unit *= 0.5f;  // of twice the numbers
    for (int64_t piece = 0; piece < count; ++piece, out += kPiece) {
        float last[kPiece] = {};
        const int64_t begin = piece * kPiece, left = matrix.columns - begin;
        std::memcpy(last, x + begin, (left < kPiece ? left : kPiece) * sizeof(float));
        for (int64_t at = 0; at < kPiece; ++at) out[at] = last[column_at[at]] * unit;
        sums[piece] = sum(load<F32x16>(last) + load<F32x16>(last + kLanes));
    }
    for (int64_t piece = count; piece < whole_eights(count); ++piece) sums[piece] = 0.0f;
}

// T rows of x and what they come to with one row of weights, piece after piece. Pieces go to the Unit's kSums sums by turns,
// which need not wait for each other: `turn` is the piece's number, constant where loops are unrolled.
template <class Unit, int32_t KIND, int T>
struct RowSums {
    static constexpr int kSums = Unit::kSums;

    RowSums(const void* const* x, int64_t num_pieces) : sums_at(num_pieces * kPiece) {
        for (int t = 0; t < T; ++t) xs[t] = static_cast<const float*>(x[t]);
    }

    OFFMOE_INLINE void add(const typename Unit::Weights& w, int64_t piece, int64_t turn, float scale) {
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) {
            typename Unit::Vec& sum = sums[turn % kSums][t];
            sum = Unit::add_scaled(sum, Unit::dot(w, xs[t] + piece * kPiece), scale);
        }
    }

    OFFMOE_INLINE void add(const typename Unit::Weights& w, int64_t piece, int64_t turn) {
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) sums[turn % kSums][t] += Unit::dot(w, xs[t] + piece * kPiece);
    }

    OFFMOE_INLINE void add_halves(const typename Unit::Weights& w, int64_t piece, int64_t turn, const float* scales) {
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t)
            sums[turn % kSums][t] += Unit::dot_halves(w, xs[t] + piece * kPiece, scales[0], scales[1]);
    }

    // What zero points or minima of eight pieces come to.
    OFFMOE_INLINE void take(int64_t piece, const float* less) {
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) taken[t] += load<F32x8>(less) * load<F32x8>(xs[t] + sums_at + piece);
    }

    inline void store(float* out, int64_t stride) const {
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) {
            float less = 0.0f;
            for (int lane = 0; lane < 8; ++lane) less += taken[t][lane];
            const typename Unit::Vec sum = kSums == 1 ? sums[0][t] : sums[0][t] + sums[kSums - 1][t];
            out[t * stride] = Unit::total(sum) - less;
        }
    }

    const float* xs[T];
    const int64_t sums_at;
    typename Unit::Vec sums[kSums][T] = {};
    F32x8 taken[T] = {};
};

// 32 codes for `RowSums`.
template <class Unit, int32_t KIND>
OFFMOE_INLINE typename Unit::Weights weights_of(const uint8_t* from, int part, uint8_t flip) {
    if constexpr (KIND == FP8) return Unit::widen_fp8(load<U8x32>(from));
    else if constexpr (Unit::kTables && is_nibbles(KIND)) return Unit::template of_table<KIND>(nibbles_of<Unit, KIND>(from, part));
    else return Unit::widen(signed_bytes<Unit, KIND>(from, part, flip));
}

constexpr int64_t kNear = 2048, kFar = 16384, kRowsAhead = 4;

// Far ahead only for rows that are read faster than codes are computed.
template <int32_t KIND>
OFFMOE_INLINE void prefetch_codes(const uint8_t* from) {
    if constexpr (is_dense(KIND)) __builtin_prefetch(from + kFar, 0, 2);
    __builtin_prefetch(from + kNear, 0, 3);
}

// The first codes and scales of rows [begin, end), which nobody asked for yet.
inline void prefetch_rows(const Matrix& matrix, int64_t begin, int64_t end) {
    const int64_t num_rows = end - begin, codes = matrix.row_bytes * num_rows, scales = matrix.scale_row_bytes * kRowsAhead;
    const uint8_t* from = matrix.codes + begin * matrix.row_bytes;
    for (int64_t at = 0; at < codes && at < kFar; at += 64) __builtin_prefetch(from + at, 0, 2);
    if (is_dense(matrix.kind) || is_blocks(matrix.kind)) return;
    from = scales_of(matrix, begin);
    for (int64_t at = 0; at < scales; at += 64) __builtin_prefetch(from + at, 0, 3);
}

template <class Unit, int32_t KIND, int T>
void dense_row(const Matrix& matrix, int64_t row, const void* const* x, float* out, int64_t stride) {
    constexpr int64_t kBytes = kPiece * code_bits(KIND) / 8;
    const int64_t whole = matrix.columns / kPiece;
    const uint8_t* from = matrix.codes + row * matrix.row_bytes;
    RowSums<Unit, KIND, T> sums(x, num_pieces(matrix));
    const auto add = [&](const uint8_t* numbers, int64_t piece, int64_t turn) {
        sums.add(Unit::template dense<KIND>(numbers), piece, turn);
    };
    int64_t piece = 0;
    for (; piece + 2 <= whole; piece += 2, from += 2 * kBytes) {
        for (int64_t line = 0; line < 2 * kBytes; line += 64) prefetch_codes<KIND>(from + line);
        add(from, piece, 0);
        add(from + kBytes, piece + 1, 1);
    }
    if (piece < whole) add(from, piece, 0);
    if (whole < num_pieces(matrix)) {
        alignas(64) uint8_t last[kBytes] = {};
        std::memcpy(last, from + (whole - piece) * kBytes, row_code_bytes(matrix) - whole * kBytes);
        if (whole % 2) add(last, whole, 1);
        else add(last, whole, 0);
    }
    sums.store(out, stride);
}

// As `dense_row` adds them, and so with the same bits.
template <class Unit, int T>
void packed_row(const Matrix& matrix, int64_t row, const void* const* x, float* out, int64_t stride) {
    PackedRow from(matrix, row);
    const typename Unit::Exponents exponents(from.exponents);
    RowSums<Unit, PACKED, T> sums(x, from.num_pieces);
    const auto add = [&](const uint8_t* numbers, const uint8_t* indices, int64_t piece, int64_t turn) {
        if (__builtin_expect(piece == from.next_piece, 0)) {
            alignas(64) uint16_t words[kPackedPiece];
            from.words(piece, words);
            sums.add(Unit::template dense<DENSE_BF16>(reinterpret_cast<const uint8_t*>(words)), piece, turn);
        } else {
            sums.add(Unit::packed(numbers, indices, exponents), piece, turn);
        }
    };
    const uint8_t* chunk = from.codes;
    int64_t piece = 0;
    for (; piece + 4 <= from.num_pieces; piece += 4, chunk += 192) {
        for (int64_t line = 0; line < 192; line += 64) prefetch_codes<PACKED>(chunk + line);
        OFFMOE_UNROLL
        for (int64_t i = 0; i < 4; ++i) add(chunk + 32 * i, chunk + 128 + 16 * i, piece + i, i);
    }
    for (; piece < from.num_pieces; ++piece) {
        if (piece % 2) add(from.numbers(piece), from.indices(piece), piece, 1);
        else add(from.numbers(piece), from.indices(piece), piece, 0);
    }
    sums.store(out, stride);
}

// GGUF's blocks of 32 or 256 columns, eight pieces at a time.
template <class Unit, int32_t KIND, int T>
void block_row(const Matrix& matrix, int64_t row, const void* const* x, float* out, int64_t stride) {
    constexpr bool kSmall = block_columns(KIND) == kPiece;
    constexpr int64_t kBytes = block_bytes(KIND) * (kSmall ? 8 : 1);
    const int64_t count = num_pieces(matrix);
    RowSums<Unit, KIND, T> sums(x, count);
    const uint8_t* from = matrix.codes + row * matrix.row_bytes;
    for (int64_t piece = 0; piece < count; piece += 8, from += kBytes) {
        for (int64_t line = 0; line < kBytes; line += 64) prefetch_codes<KIND>(from + line);
        const BlockScales<KIND> scales(from, count - piece);
        OFFMOE_UNROLL
        for (int part = 0; part < 8; ++part) {
            if (kSmall && piece + part >= count) break;
            const auto w = weights_of<Unit, KIND>(kSmall ? from + part * block_bytes(KIND) : from, kSmall ? 0 : part, 0);
            if constexpr (KIND == Q6_K) sums.add_halves(w, piece + part, part, scales.scale + 2 * part);
            else sums.add(w, piece + part, part, scales.scale[part]);
        }
        if constexpr (KIND == Q4_K || KIND == Q5_K) sums.take(piece, scales.scale + 8);
    }
    sums.store(out, stride);
}

// Codes with scales of groups.
template <class Unit, int32_t KIND, bool LESS, int T>
void group_row(const Matrix& matrix, int64_t row, const void* const* x, float* out, int64_t stride) {
    constexpr int64_t kBytes = KIND == INT8 || KIND == FP8 ? 32 : 16, kLine = T == 1 ? 64 / kBytes : 2;
    const uint8_t flip = matrix.code_signed ? 0 : 128;
    const int64_t whole = matrix.columns / kPiece, count = num_pieces(matrix);
    const uint8_t* from = matrix.codes + row * matrix.row_bytes;
    RowSums<Unit, KIND, T> sums(x, count);
    PieceScales scales(matrix, row);
    if constexpr (T == 1) scales.prefetch(row + kRowsAhead);
    const auto add = [&](const uint8_t* codes, int64_t piece, int64_t at, int64_t turn) {
        sums.add(weights_of<Unit, KIND>(codes, 0, flip), piece, turn, scales.scale[at]);
    };
    for (int64_t first = 0; first < count; first += PieceScales::kAtOnce) {
        const int64_t some = count - first < PieceScales::kAtOnce ? count - first : PieceScales::kAtOnce;
        scales.template load_from<LESS>(first, some, KIND == INT4 ? 8 : flip);
        if constexpr (LESS) for (int64_t at = 0; at < some; at += 8) sums.take(first + at, scales.less + at);
        const int64_t here = first + some > whole ? whole - first : some;
        int64_t at = 0;
        for (; at + kLine <= here; at += kLine, from += kLine * kBytes) {
            prefetch_codes<KIND>(from);
            OFFMOE_UNROLL
            for (int64_t i = 0; i < kLine; ++i) add(from + i * kBytes, first + at + i, at + i, i);
        }
        for (; at < some; ++at, from += kBytes) {
            alignas(32) uint8_t last[kPiece] = {};
            std::memcpy(last, from, at < here ? kBytes : row_code_bytes(matrix) - whole * kBytes);
            if (at % 2) add(last, first + at, at, 1);
            else add(last, first + at, at, 0);
        }
    }
    sums.store(out, stride);
}

template <class Unit, int32_t KIND, bool LESS, int T>
void coded_rows(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, float* out, int64_t stride) {
    for (int64_t row = begin; row < end; ++row, ++out) {
        if constexpr (KIND == PACKED) packed_row<Unit, T>(matrix, row, x, out, stride);
        else if constexpr (is_dense(KIND)) dense_row<Unit, KIND, T>(matrix, row, x, out, stride);
        else if constexpr (is_blocks(KIND)) block_row<Unit, KIND, T>(matrix, row, x, out, stride);
        else group_row<Unit, KIND, LESS, T>(matrix, row, x, out, stride);
    }
}

template <class Unit, int32_t KIND, bool LESS>
void coded_kind(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, int32_t num_x, float* out,
                int64_t stride) {
    if constexpr (Unit::kMostRows == 8)
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
    if (num_x <= 2) prefetch_rows(matrix, begin, end);
    for (; begin < end; begin += 8, out += 8) {  // a second pass finds the rows in the cache
        const int64_t stop = begin + 8 < end ? begin + 8 : end;
        switch (matrix.kind) {
            case DENSE_F32: coded_kind<Unit, DENSE_F32, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case DENSE_BF16: coded_kind<Unit, DENSE_BF16, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case DENSE_F16: coded_kind<Unit, DENSE_F16, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case PACKED: coded_kind<Unit, PACKED, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case INT8:
                if (zeros || matrix.zero != (matrix.code_signed ? 0 : 128))
                    coded_kind<Unit, INT8, true>(matrix, begin, stop, x, num_x, out, stride);
                else
                    coded_kind<Unit, INT8, false>(matrix, begin, stop, x, num_x, out, stride);
                break;
            case INT4:
                if (zeros || matrix.zero != 8) coded_kind<Unit, INT4, true>(matrix, begin, stop, x, num_x, out, stride);
                else coded_kind<Unit, INT4, false>(matrix, begin, stop, x, num_x, out, stride);
                break;
            case MXFP4: coded_kind<Unit, MXFP4, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case FP8: coded_kind<Unit, FP8, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case Q4_0: coded_kind<Unit, Q4_0, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case Q8_0: coded_kind<Unit, Q8_0, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case Q4_K: coded_kind<Unit, Q4_K, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case Q5_K: coded_kind<Unit, Q5_K, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case Q6_K: coded_kind<Unit, Q6_K, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case IQ4_NL: coded_kind<Unit, IQ4_NL, false>(matrix, begin, stop, x, num_x, out, stride); break;
            case IQ4_XS: coded_kind<Unit, IQ4_XS, false>(matrix, begin, stop, x, num_x, out, stride); break;
            default: coded_kind<Unit, MXFP4_BLOCKS, false>(matrix, begin, stop, x, num_x, out, stride); break;
        }
    }
}

}  // namespace
}  // namespace offmoe
