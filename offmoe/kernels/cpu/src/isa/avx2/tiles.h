// Several rows of x at once for AVX2, with weights that are numbers: 256 columns of eight rows of weights become floats in
// the first cache, and are multiplied there with every row of x, in blocks of as many sums as there are registers. The order
// of an output's sums is that of coded.h, so it has the same bits whether its row comes alone or with others.
#pragma once
#include <algorithm>
#include <optional>

#include "isa/avx2/coded.h"

namespace offmoe {
namespace {

constexpr int64_t kTileRows = 8, kTilePieces = 8;  // of weights: 8 KiB of floats
constexpr int64_t kTileX = 32;                     // rows of x for which a tile is unpacked once
constexpr int64_t kBlockRows = 4;                  // with three rows of x: twelve sums in 16 registers

struct FloatTile {
    alignas(64) float weights[kTileRows][kTilePieces][kPiece];
    float scales[kTileRows][kTilePieces];  // of codes
};

// Of a row of x with each row of a tile: what even pieces and odd pieces come to.
typedef float TileSums[kTileRows][2][8];

OFFMOE_INLINE void store_piece(const Avx2Vectors::Weights& w, float* to) {
    OFFMOE_UNROLL
    for (int i = 0; i < 4; ++i) _mm256_store_ps(to + 8 * i, w.parts[i]);
}

template <int32_t KIND>
OFFMOE_INLINE void fill_piece(const uint8_t* from, float* to) {
    Avx2Vectors::Weights w;
    if constexpr (is_dense(KIND)) w = Avx2Vectors::dense<KIND>(from);
    else w = Avx2Vectors::widen_fp8(load<U8x32>(from));
    store_piece(w, to);
}

// A row of PACKED, which is unpacked tile by tile.
struct PackedTileRow {
    PackedTileRow(const Matrix& matrix, int64_t row) : from(matrix, row), exponents(from.exponents) {}

    void fill(int64_t first, int64_t count, FloatTile& tile, int64_t at) {
        for (int64_t piece = 0; piece < count; ++piece) {
            const int64_t here = first + piece;
            if (__builtin_expect(here == from.next_piece, 0)) {
                alignas(64) uint16_t words[kPackedPiece];
                from.words(here, words);
                store_piece(Avx2Vectors::dense<DENSE_BF16>(reinterpret_cast<const uint8_t*>(words)), tile.weights[at][piece]);
            } else {
                store_piece(Avx2Vectors::packed(from.numbers(here), from.indices(here), exponents), tile.weights[at][piece]);
            }
        }
    }

    PackedRow from;
    Avx2Vectors::Exponents exponents;
};

// `count` pieces of a row from `first` on, a multiple of kTilePieces, as the at-th row of the tile.
template <int32_t KIND>
void fill_row(const Matrix& matrix, int64_t row, int64_t first, int64_t count, FloatTile& tile, int64_t at) {
    constexpr int64_t kBytes = kPiece * code_bits(KIND) / 8;
    const uint8_t *codes = matrix.codes + row * matrix.row_bytes, *from = codes + first * kBytes;
    const int64_t whole = std::min(count, matrix.columns / kPiece - first);
    for (int64_t piece = 0; piece < whole; ++piece) fill_piece<KIND>(from + piece * kBytes, tile.weights[at][piece]);
    if (whole < count) {
        alignas(64) uint8_t last[kBytes] = {};
        std::memcpy(last, from + whole * kBytes, row_code_bytes(matrix) - (first + whole) * kBytes);
        fill_piece<KIND>(last, tile.weights[at][whole]);
    }
    if constexpr (!is_dense(KIND)) {
        PieceScales scales(matrix, row);
        scales.template load_from<false>(first, count, 0);
        std::memcpy(tile.scales[at], scales.scale, sizeof tile.scales[at]);
    }
}

// A piece of R rows of x with four rows of weights. `x`, `w`: its first numbers; `sums`: of the first row of both.
template <int R, bool SCALED>
OFFMOE_INLINE void multiply_piece(const float* const (&x)[R], int64_t at, const float* w, const float* scales, float* sums) {
    constexpr int64_t kNextW = kTilePieces * kPiece, kNextX = sizeof(TileSums) / sizeof(float), kNextSum = kNextX / kTileRows;
    __m256 dots[R][kBlockRows];
    OFFMOE_UNROLL
    for (int i = 0; i < 4; ++i) {
        __m256 xs[R];
        OFFMOE_UNROLL
        for (int r = 0; r < R; ++r) xs[r] = _mm256_loadu_ps(x[r] + at + 8 * i);
        OFFMOE_UNROLL
        for (int n = 0; n < kBlockRows; ++n) {
            const __m256 weight = _mm256_load_ps(w + n * kNextW + 8 * i);
            OFFMOE_UNROLL
            for (int r = 0; r < R; ++r)
                dots[r][n] = i == 0 ? _mm256_mul_ps(weight, xs[r]) : _mm256_fmadd_ps(weight, xs[r], dots[r][n]);
        }
    }
    OFFMOE_UNROLL
    for (int n = 0; n < kBlockRows; ++n) {
        OFFMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            float* sum = sums + r * kNextX + n * kNextSum;
            const __m256 before = _mm256_load_ps(sum);
            __m256 after = _mm256_add_ps(before, dots[r][n]);
            if constexpr (SCALED) after = _mm256_fmadd_ps(dots[r][n], _mm256_broadcast_ss(scales + n * kTilePieces), before);
            _mm256_store_ps(sum, after);
        }
    }
}

// The codes of the next tile, asked for while this one is multiplied: two rows with each block, a piece at a time. All at
// once would be more than a core can wait for.
struct NextTile {
    const uint8_t* row;
    int64_t row_bytes, piece_bytes, rows_left;

    OFFMOE_INLINE void prefetch(int64_t piece) const {
        __builtin_prefetch(row + piece * piece_bytes, 0, 3);
        __builtin_prefetch(row + row_bytes + piece * piece_bytes, 0, 3);
    }

    void done() {
        rows_left -= 2;
        if (rows_left > 0) row += 2 * row_bytes;
    }
};

template <int R, bool SCALED>
void multiply_block(const FloatTile& tile, int64_t row, const float* const* from, int64_t count, TileSums* all,
                    NextTile& next) {
    const float *x[R], *w = tile.weights[row][0], *scales = tile.scales[row];
    for (int r = 0; r < R; ++r) x[r] = from[r];
    float* sums = all[0][row][0];
    int64_t piece = 0;
    for (; piece + 2 <= count; piece += 2) {
        next.prefetch(piece);
        next.prefetch(piece + 1);
        multiply_piece<R, SCALED>(x, piece * kPiece, w + piece * kPiece, scales + piece, sums);
        multiply_piece<R, SCALED>(x, (piece + 1) * kPiece, w + (piece + 1) * kPiece, scales + piece + 1, sums + 8);
    }
    if (piece < count) multiply_piece<R, SCALED>(x, piece * kPiece, w + piece * kPiece, scales + piece, sums);
    next.done();
}

template <int R, bool SCALED>
inline void multiply_blocks(const FloatTile& tile, int64_t num_rows, const float* const* x, int64_t first, int64_t count,
                            TileSums* sums, NextTile& next) {
    const float* here[R];
    for (int r = 0; r < R; ++r) here[r] = x[r] + first * kPiece;
    for (int64_t row = 0; row < num_rows; row += kBlockRows) multiply_block<R, SCALED>(tile, row, here, count, sums, next);
}

// Three rows of x at a time, or two, and one where there is no other.
template <bool SCALED>
void multiply_tile(const FloatTile& tile, int64_t num_rows, const float* const* x, int64_t num_x, int64_t first,
                   int64_t count, TileSums* sums, NextTile next) {
    int64_t t = 0;
    for (int64_t left = num_x; left == 3 || left > 4; left = num_x - t) {
        multiply_blocks<3, SCALED>(tile, num_rows, x + t, first, count, sums + t, next);
        t += 3;
    }
    for (; t + 2 <= num_x; t += 2) multiply_blocks<2, SCALED>(tile, num_rows, x + t, first, count, sums + t, next);
    if (t < num_x) multiply_blocks<1, SCALED>(tile, num_rows, x + t, first, count, sums + t, next);
}

// Outputs [begin, end) of up to kTileX rows of x.
template <int32_t KIND>
void multiply_tiles(const Matrix& matrix, int64_t begin, int64_t end, const float* const* x, int64_t num_x, float* out,
                    int64_t stride) {
    constexpr int64_t kBytes = kPiece * code_bits(KIND) / 8;
    const int64_t all_pieces = num_pieces(matrix);
    FloatTile tile;
    alignas(64) TileSums sums[kTileX];
    for (; begin < end; begin += kTileRows, out += kTileRows) {
        const int64_t num_rows = std::min(kTileRows, end - begin);
        const int64_t filled = (num_rows + kBlockRows - 1) / kBlockRows * kBlockRows;
        std::memset(sums, 0, num_x * sizeof sums[0]);
        std::optional<PackedTileRow> packed[kTileRows];
        if constexpr (KIND == PACKED)
            for (int64_t n = 0; n < filled; ++n) packed[n].emplace(matrix, begin + std::min(n, num_rows - 1));
        for (int64_t first = 0; first < all_pieces; first += kTilePieces) {
            const int64_t count = std::min(kTilePieces, all_pieces - first);
            for (int64_t n = 0; n < filled; ++n)  // the last one again, where a block has no other
                if constexpr (KIND == PACKED) packed[n]->fill(first, count, tile, n);
                else fill_row<KIND>(matrix, begin + std::min(n, num_rows - 1), first, count, tile, n);
            const bool is_last = first + count == all_pieces;
            const uint8_t* next = matrix.codes + begin * matrix.row_bytes;
            next += is_last ? kTileRows * matrix.row_bytes : (first + count) * kBytes;
            multiply_tile<!is_dense(KIND)>(tile, num_rows, x, num_x, first, count, sums,
                                           {next, matrix.row_bytes, kBytes, kTileRows});
        }
        for (int64_t t = 0; t < num_x; ++t)
            for (int64_t n = 0; n < num_rows; ++n) {
                const __m256 even = _mm256_load_ps(sums[t][n][0]), odd = _mm256_load_ps(sums[t][n][1]);
                out[t * stride + n] = Avx2Vectors::total(_mm256_add_ps(even, odd));
            }
    }
}

// Whether tiles are faster. Without them, two rows and four are as fast; and up to twelve that are so narrow that four of
// them fill half of the first cache are a fifth faster.
inline bool takes_tiles(const Matrix& matrix, int32_t num_x) {
    const bool is_many = num_x > 12 || (matrix.columns > 1024 && num_x > 2 && num_x != 4);
    return is_many && (is_dense(matrix.kind) || matrix.kind == FP8) && takes_codes(matrix);
}

// Any number of rows of x. `takes_tiles` is true of `matrix`.
inline void tiled_multiply(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, int32_t num_x, float* out,
                           int64_t stride) {
    for (int64_t t = 0; t < num_x; t += kTileX, out += kTileX * stride) {
        const float* rows[kTileX];
        const int64_t some = std::min<int64_t>(kTileX, num_x - t);
        for (int64_t i = 0; i < some; ++i) rows[i] = static_cast<const float*>(x[t + i]);
        switch (matrix.kind) {
            case DENSE_F32: multiply_tiles<DENSE_F32>(matrix, begin, end, rows, some, out, stride); break;
            case DENSE_BF16: multiply_tiles<DENSE_BF16>(matrix, begin, end, rows, some, out, stride); break;
            case DENSE_F16: multiply_tiles<DENSE_F16>(matrix, begin, end, rows, some, out, stride); break;
            case PACKED: multiply_tiles<PACKED>(matrix, begin, end, rows, some, out, stride); break;
            default: multiply_tiles<FP8>(matrix, begin, end, rows, some, out, stride); break;
        }
    }
}

}  // namespace
}  // namespace offmoe
