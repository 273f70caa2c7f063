// Bfloat16 numbers in 12 bits, without loss (../../../../docs/formats.md has the form bit by bit).
//
// A number's sign and mantissa are a byte; its exponent is an index of four bits into sixteen exponents, of which each row
// has its own. An exponent that is none of them is an escape: its index means nothing, and the row's list of escapes has it.
// A row is cut into chunks of 128 columns, the last one shorter, each the bytes of its columns and then their indices; both
// in pieces of 32 columns, within which they lie in the order in which AVX2 unpacks them (`packed_place`).
#pragma once
#include "isa/generic/vectors.h"

namespace offmoe {
namespace {

constexpr int64_t kPackedPiece = 32, kPackedChunk = 128;
constexpr int kNeighbours = 15;  // exponents that follow each other; the sixteenth is any

// Of a row: escapes [first, first + count), exponents base to base + 14, and one more.
struct PackedHead {
    uint32_t first;
    uint16_t count;
    uint8_t base, other;
};
static_assert(sizeof(PackedHead) == 8, "as in files");

// Where column `column` of a piece lies among its 32 bytes; its index is the half byte of that number, in 16 bytes: byte
// place % 16, the low half for the first 16 places.
constexpr int64_t packed_place(int64_t column) {
    const int64_t eight = column / 8, at = column % 8;
    return eight / 2 * 8 + at / 4 * 16 + at % 4 * 2 + eight % 2;
}

inline int64_t packed_pieces(int64_t columns) { return (columns + kPackedPiece - 1) / kPackedPiece; }

// An escape: its column, and in the lowest byte its exponent.
inline int64_t escape_piece(uint32_t escape) { return escape >> 13; }

// The two bytes of a number that has one of a row's exponents, but for sign and mantissa.
struct Exponents {
    explicit Exponents(const PackedHead& head) {
        U8x16 exponents = U8x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + head.base;
        exponents[kNeighbours] = head.other;
        const U8x16 halves = exponents >> 1 & 127, rest = exponents << 7;
        std::memcpy(upper, &halves, sizeof upper);
        std::memcpy(lower, &rest, sizeof lower);
    }

    alignas(16) uint8_t upper[16], lower[16];
};

// 32 numbers in the order of their columns. `numbers`: signs and mantissas; `indices`: 16 bytes.
inline void unpack_piece(const uint8_t* numbers, const uint8_t* indices, const Exponents& exponents, uint16_t* to) {
    for (int64_t column = 0; column < kPackedPiece; ++column) {
        const int64_t place = packed_place(column);
        const int index = place < 16 ? indices[place] & 15 : indices[place - 16] >> 4;
        const uint32_t upper = exponents.upper[index] | (numbers[place] & 128u);
        to[column] = static_cast<uint16_t>(upper << 8 | exponents.lower[index] | (numbers[place] & 127u));
    }
}

#if defined(__AVX2__)
// The same; `first` and `second`: columns 0, 8, 1, 9, ... 7, 15, and 16, 24, ... 31.
struct PackedWords {
    __m256i first, second;
};

OFFMOE_INLINE PackedWords unpack_words(const uint8_t* numbers, const uint8_t* indices, __m256i upper, __m256i lower) {
    const __m256i both = _mm256_broadcastsi128_si256(load<__m128i>(indices)), sign = _mm256_set1_epi8(-128);
    const __m256i index = _mm256_and_si256(_mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)), _mm256_set1_epi8(15));
    const __m256i number = load<__m256i>(numbers);
    const __m256i high = _mm256_or_si256(_mm256_shuffle_epi8(upper, index), _mm256_and_si256(number, sign));
    const __m256i low = _mm256_or_si256(_mm256_shuffle_epi8(lower, index), _mm256_andnot_si256(sign, number));
    return {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
}

OFFMOE_INLINE void store_words(PackedWords words, uint16_t* to) {
    // Even words are columns 0 to 7, odd ones 8 to 15.
    const __m256i low = _mm256_set1_epi32(0xffff);
    const __m256i even = _mm256_packus_epi32(_mm256_and_si256(words.first, low), _mm256_and_si256(words.second, low));
    const __m256i odd = _mm256_packus_epi32(_mm256_srli_epi32(words.first, 16), _mm256_srli_epi32(words.second, 16));
    // Lanes: columns 0-3 16-19 | 4-7 20-23, and 8-11 24-27 | 12-15 28-31.
    const __m256i a = _mm256_permute4x64_epi64(even, 0xd8), b = _mm256_permute4x64_epi64(odd, 0xd8);
    std::memcpy(to, &a, 16);
    std::memcpy(to + 8, &b, 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), _mm256_extracti128_si256(a, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 24), _mm256_extracti128_si256(b, 1));
}
#endif

// A row of a matrix of kind PACKED, piece by piece from the first on.
class PackedRow {
public:
    PackedRow(const Matrix& matrix, int64_t row)
        : head(load<PackedHead>(matrix.scales + row * matrix.scale_row_bytes)), exponents(head),
          codes(matrix.codes + row * matrix.row_bytes), num_pieces(packed_pieces(matrix.columns)),
          escape(matrix.zeros + 4 * int64_t{head.first}), left(head.count) {
        next_piece = left > 0 ? escape_piece(load<uint32_t>(escape)) : -1;
    }

    // Skips the escapes of earlier pieces.
    void go_to(int64_t piece) {
        while (next_piece >= 0 && next_piece < piece) take();
    }

    OFFMOE_INLINE int64_t chunk_pieces(int64_t piece) const {
        const int64_t rest = num_pieces - piece / 4 * 4;
        return rest < 4 ? rest : 4;
    }

    OFFMOE_INLINE const uint8_t* chunk(int64_t piece) const { return codes + piece / 4 * 192; }
    OFFMOE_INLINE const uint8_t* numbers(int64_t piece) const { return chunk(piece) + 32 * (piece % 4); }
    OFFMOE_INLINE const uint8_t* indices(int64_t piece) const {
        return chunk(piece) + 32 * chunk_pieces(piece) + 16 * (piece % 4);
    }

    // A piece's numbers with its escapes put in. Pieces are asked for in their order.
    void words(int64_t piece, uint16_t* to) {
        unpack_piece(numbers(piece), indices(piece), exponents, to);
        for (go_to(piece); next_piece == piece; take()) {
            const uint32_t found = load<uint32_t>(escape);
            uint16_t& word = to[(found >> 8) % kPackedPiece];
            word = static_cast<uint16_t>((word & 0x807fu) | (found & 255u) << 7);
        }
    }

    const PackedHead head;
    const Exponents exponents;
    const uint8_t* const codes;
    const int64_t num_pieces;
    int64_t next_piece;  // with an escape, or -1

private:
    void take() {
        escape += 4;
        next_piece = --left > 0 ? escape_piece(load<uint32_t>(escape)) : -1;
    }

    const uint8_t* escape;
    int64_t left;
};

}  // namespace
}  // namespace offmoe
