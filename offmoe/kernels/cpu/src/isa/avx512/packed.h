// PACKED x bfloat16 for AVX-512: unpacked to the words that dense.h loads, and added up as it adds them.
#pragma once
#include "isa/avx512/dense.h"
#include "isa/generic/packed.h"

namespace offmoe {
namespace {

// 64 columns at a time. Two of its pieces lie side by side: bytes and half bytes are put in the order in which `unpack`
// joins the halves of words.
struct PackedOrder {
    PackedOrder() {
        alignas(64) uint8_t number_at[64], index_at[64], shift[64];
        for (int byte = 0; byte < 64; ++byte) {
            const int column = byte / 16 * 8 + byte % 8, piece = byte % 16 / 8;  // of w[piece]
            const int place = static_cast<int>(packed_place(column));
            number_at[byte] = static_cast<uint8_t>(32 * piece + place);
            // The eight columns of a group of eight bytes need four bytes of indices, both halves of each.
            const int of_group = static_cast<int>(packed_place(byte / 16 * 8 + byte % 4)) % 16;
            index_at[byte] = static_cast<uint8_t>(16 * piece + of_group);
            shift[byte] = static_cast<uint8_t>(byte % 4 * 8 + (place < 16 ? 0 : 4));
        }
        numbers = load_512(number_at);
        indices = load_512(index_at);
        shifts = load_512(shift);
    }

    __m512i numbers, indices, shifts;
};

struct Packed {
    static constexpr int kRowsForOne = 1, kRowsForFew = 1;
    static constexpr int64_t kStep = kChunk;

    explicit Packed(const Matrix& matrix) : matrix(matrix), order() {}

    void start(int64_t row, int, bool) { first_row = row; }

    template <int R, int T>
    void block(int r, const void* const* x, int64_t first, int64_t last, __m512* sums_of_rows) const {
        for (int i = 0; i < R; ++i) one_row<T>(first_row + r + i, x, first, last, sums_of_rows + i * T);
    }

    template <int T>
    void one_row(int64_t row, const void* const* x, int64_t first, int64_t last, __m512* sums_of_row) const {
        PackedRow from(matrix, row);
        from.go_to(first / kPackedPiece);
        const __m512i upper = _mm512_broadcast_i32x4(load<__m128i>(from.exponents.upper));
        const __m512i lower = _mm512_broadcast_i32x4(load<__m128i>(from.exponents.lower));
        const uint8_t *codes[1], *xs[T];
        __m512 sums[1][T];
        begin_block(from.codes, matrix.row_bytes, x, sums_of_row, codes, xs, sums);
        const int64_t ahead = ahead_bytes(matrix, 1, T);
        for (int64_t column = first; column < last; column += 64) {
            const int64_t piece = column / kPackedPiece;
            const uint8_t* chunk = from.chunk(piece);
            prefetch(chunk + ahead + 96 * (column / 64 % 2));
            prefetch(chunk + ahead + 96 * (column / 64 % 2) + 64);
            __m512i w[1][2];
            if (__builtin_expect(from.next_piece >= 0 && from.next_piece < piece + 2, 0)) {
                alignas(64) uint16_t words[64] = {};
                from.words(piece, words);
                if (piece + 1 < from.num_pieces) from.words(piece + 1, words + kPackedPiece);
                w[0][0] = load_512(words);
                w[0][1] = load_512(words + kPackedPiece);
            } else if (piece % 4 + 2 <= from.chunk_pieces(piece)) {
                unpack(load_512(from.numbers(piece)), load<__m256i>(from.indices(piece)), upper, lower, w[0]);
            } else {  // the last piece
                const __m512i numbers = _mm512_zextsi256_si512(load<__m256i>(from.numbers(piece)));
                unpack(numbers, _mm256_zextsi128_si256(load<__m128i>(from.indices(piece))), upper, lower, w[0]);
                w[0][1] = _mm512_setzero_si512();
            }
            Dense::add<1, T>(sums, &w[0][0], xs, 2 * column);
            if (column + kPackedPiece < last) Dense::add<1, T>(sums, &w[0][1], xs, 2 * column + 64);
        }
        end_block(sums, sums_of_row);
    }

    OFFMOE_INLINE void unpack(__m512i numbers, __m256i halves, __m512i upper, __m512i lower, __m512i* w) const {
        const __m512i sign = _mm512_set1_epi8(-128);
        const __m512i number = _mm512_permutexvar_epi8(order.numbers, numbers);
        const __m512i bytes = _mm512_permutexvar_epi8(order.indices, _mm512_castsi256_si512(halves));
        const __m512i index = _mm512_and_si512(_mm512_multishift_epi64_epi8(order.shifts, bytes), _mm512_set1_epi8(15));
        // upper | (number & sign), lower | (number & ~sign)
        const __m512i high = _mm512_ternarylogic_epi64(_mm512_shuffle_epi8(upper, index), number, sign, 0xf8);
        const __m512i low = _mm512_ternarylogic_epi64(_mm512_shuffle_epi8(lower, index), number, sign, 0xf4);
        w[0] = _mm512_unpacklo_epi8(low, high);
        w[1] = _mm512_unpackhi_epi8(low, high);
    }

    const Matrix& matrix;
    const PackedOrder order;
    int64_t first_row = 0;
};

}  // namespace
}  // namespace offmoe
