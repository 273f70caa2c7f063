// Bfloat16 rows to PACKED ones, and back.
#pragma once
#include <algorithm>

#include "isa/generic/packed.h"

namespace offmoe {
namespace {

constexpr uint32_t kMostEscapesOfRow = 0xffff;

inline int exponent_of(uint16_t number) { return number >> 7 & 255; }

// Of `count` numbers: the smallest and the largest exponent.
inline void exponent_range(const uint16_t* numbers, int64_t count, int& smallest, int& largest) {
    uint16_t low = 0x7f80, high = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint16_t exponent = numbers[i] & 0x7f80;
        low = std::min(low, exponent);
        high = std::max(high, exponent);
    }
    smallest = low >> 7;
    largest = high >> 7;
}

// The exponents under the largest one; zeros, where there are any, are the other one.
inline PackedHead likely_head(const uint16_t* numbers, int64_t count) {
    int smallest, largest;
    exponent_range(numbers, count, smallest, largest);
    const int base = std::max(largest - (kNeighbours - 1), 0);
    const int other = smallest == 0 ? 0 : std::max(base - 1, 0);
    return {0, 0, static_cast<uint8_t>(base), static_cast<uint8_t>(other)};
}

// The neighbours that most numbers have, and of the rest the one that most have. An index of nought must not mean infinity:
// what fills the last piece is multiplied with zeros.
inline PackedHead best_head(const uint16_t* numbers, int64_t count) {
    int64_t found[256] = {}, inside = 0, most = 0;
    for (int64_t i = 0; i < count; ++i) ++found[exponent_of(numbers[i])];
    for (int exponent = 0; exponent < kNeighbours; ++exponent) inside += found[exponent];
    most = inside;
    int base = 0;
    for (int first = 1; first + kNeighbours <= 256; ++first) {
        inside += found[first + kNeighbours - 1] - found[first - 1];
        if (inside > most) {
            most = inside;
            base = first;
        }
    }
    int other = base == 0 ? kNeighbours : 0;
    for (int exponent = 0; exponent < 256; ++exponent)
        if ((exponent < base || exponent >= base + kNeighbours) && found[exponent] > found[other]) other = exponent;
    return {0, 0, static_cast<uint8_t>(base), static_cast<uint8_t>(other)};
}

// 32 numbers to bytes and indices; gives which are escapes, a bit a place.
inline uint32_t pack_piece(const uint16_t* from, const PackedHead& head, uint8_t* numbers, uint8_t* indices) {
#if defined(__AVX2__)
    const __m256i first = load<__m256i>(from), second = load<__m256i>(from + 16), mantissa = _mm256_set1_epi16(0x7f);
    const __m256i low = _mm256_permute2x128_si256(first, second, 0x20), high = _mm256_permute2x128_si256(first, second, 0x31);
    const __m256i bytes = _mm256_or_si256(_mm256_and_si256(low, mantissa), _mm256_slli_epi16(_mm256_and_si256(high, mantissa), 8));
    const __m256i signs = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(low, 8), _mm256_set1_epi16(0x80)),
                                          _mm256_and_si256(high, _mm256_set1_epi16(static_cast<int16_t>(0x8000))));
    const __m256i exponents = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(low, 7), _mm256_set1_epi16(0xff)),
                                              _mm256_slli_epi16(_mm256_srli_epi16(high, 7), 8));
    const __m256i number = _mm256_permute4x64_epi64(_mm256_or_si256(bytes, signs), 0xd8);
    const __m256i exponent = _mm256_permute4x64_epi64(exponents, 0xd8);
    const __m256i above = _mm256_sub_epi8(exponent, _mm256_set1_epi8(static_cast<char>(head.base)));
    const __m256i inside = _mm256_cmpeq_epi8(_mm256_min_epu8(above, _mm256_set1_epi8(kNeighbours - 1)), above);
    const __m256i other = _mm256_cmpeq_epi8(exponent, _mm256_set1_epi8(static_cast<char>(head.other)));
    const __m256i index = _mm256_blendv_epi8(_mm256_and_si256(other, _mm256_set1_epi8(kNeighbours)), above, inside);
    const __m128i halves = _mm_or_si128(_mm256_castsi256_si128(index), _mm_slli_epi16(_mm256_extracti128_si256(index, 1), 4));
    std::memcpy(numbers, &number, sizeof number);
    std::memcpy(indices, &halves, sizeof halves);
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_or_si256(inside, other)));
#else
    uint8_t index_at[kPackedPiece];
    uint32_t escapes = 0;
    for (int64_t column = 0; column < kPackedPiece; ++column) {
        const int64_t place = packed_place(column);
        const int exponent = exponent_of(from[column]), above = exponent - head.base;
        const bool inside = above >= 0 && above < kNeighbours, other = exponent == head.other;
        numbers[place] = static_cast<uint8_t>((from[column] >> 8 & 128) | (from[column] & 127));
        index_at[place] = static_cast<uint8_t>(inside ? above : other ? kNeighbours : 0);
        if (!inside && !other) escapes |= 1u << place;
    }
    for (int i = 0; i < 16; ++i) indices[i] = static_cast<uint8_t>(index_at[i] | index_at[16 + i] << 4);
    return escapes;
#endif
}

// All pieces of a row; gives how many of its numbers are escapes, of which the first `most` are written to `escapes`.
inline uint32_t pack_pieces(const uint16_t* from, int64_t columns, const PackedHead& head, uint8_t* codes, uint32_t* escapes,
                            uint32_t most) {
    const int64_t pieces = packed_pieces(columns);
    uint32_t count = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t begin = piece * kPackedPiece, chunk = std::min<int64_t>(4, pieces - piece / 4 * 4);
        uint8_t* at = codes + piece / 4 * 192;
        const uint16_t* numbers = from + begin;
        uint16_t last[kPackedPiece];
        if (columns - begin < kPackedPiece) {
            std::fill_n(last, kPackedPiece, static_cast<uint16_t>(head.base << 7));
            std::copy_n(numbers, columns - begin, last);
            numbers = last;
        }
        if (pack_piece(numbers, head, at + 32 * (piece % 4), at + 32 * chunk + 16 * (piece % 4)) == 0) continue;
        for (int64_t column = 0; column < kPackedPiece; ++column) {
            const int exponent = exponent_of(numbers[column]), above = exponent - head.base;
            if ((above >= 0 && above < kNeighbours) || exponent == head.other) continue;
            if (count < most) escapes[count] = static_cast<uint32_t>(begin + column) << 8 | static_cast<uint32_t>(exponent);
            ++count;
        }
    }
    return count;
}

// Escapes of a row that are found before there is a place for them.
constexpr uint32_t kFewEscapes = 64;

inline void pack_row(const Pack& call, int64_t row) {
    const uint16_t* from = static_cast<const uint16_t*>(call.values) + row * call.columns;
    uint8_t* codes = call.codes + row * call.row_bytes;
    uint32_t few[kFewEscapes];
    PackedHead head = likely_head(from, call.columns);
    uint32_t count = pack_pieces(from, call.columns, head, codes, few, kFewEscapes);
    if (count > call.columns / 1024) {
        const PackedHead best = best_head(from, call.columns);
        if (best.base != head.base || best.other != head.other) {
            head = best;
            count = pack_pieces(from, call.columns, head, codes, few, kFewEscapes);
        }
    }
    if (count > 0) {
        head.first = __atomic_fetch_add(call.num_escapes, count, __ATOMIC_RELAXED);
        if (count > kMostEscapesOfRow) {  // no head says so many
            __atomic_fetch_add(call.num_escapes, static_cast<uint32_t>(call.most_escapes) + 1, __ATOMIC_RELAXED);
            return;
        }
        if (int64_t{head.first} + count > call.most_escapes) return;
        head.count = static_cast<uint16_t>(count);
        if (count <= kFewEscapes) std::copy_n(few, count, call.escapes + head.first);
        else pack_pieces(from, call.columns, head, codes, call.escapes + head.first, count);
    }
    std::memcpy(static_cast<uint8_t*>(call.heads) + row * int64_t{sizeof head}, &head, sizeof head);
}

inline void pack_rows(const Pack& call) {
    for (int64_t row = 0; row < call.rows; ++row) pack_row(call, row);
}

inline void unpack_row(const Matrix& matrix, int64_t row, uint16_t* to) {
    PackedRow from(matrix, row);
#if defined(__AVX2__)
    const __m256i upper = _mm256_broadcastsi128_si256(load<__m128i>(from.exponents.upper));
    const __m256i lower = _mm256_broadcastsi128_si256(load<__m128i>(from.exponents.lower));
#endif
    for (int64_t piece = 0; piece < from.num_pieces; ++piece) {
        const int64_t begin = piece * kPackedPiece, count = std::min(kPackedPiece, matrix.columns - begin);
        uint16_t last[kPackedPiece];
        uint16_t* words = count < kPackedPiece ? last : to + begin;
#if defined(__AVX2__)
        if (piece != from.next_piece) store_words(unpack_words(from.numbers(piece), from.indices(piece), upper, lower), words);
        else from.words(piece, words);
#else
        from.words(piece, words);
#endif
        if (count < kPackedPiece) std::memcpy(to + begin, last, static_cast<size_t>(2 * count));
    }
}

inline void unpack_rows(const Unpack& call, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
        unpack_row(*call.matrix, row, reinterpret_cast<uint16_t*>(static_cast<uint8_t*>(call.to) + (row - call.begin) * call.to_row_bytes));
}

}  // namespace
}  // namespace offmoe
