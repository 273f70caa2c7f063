// Quantised rows x bfloat16 for AVX-512.
//
// 64 bytes of codes become two or four vectors of 32 bfloat16 numbers, whatever order is cheap; x is prepared in the
// same order. After their products lane j of 16 holds columns that share a scale, and the scale is applied there, once.
#pragma once
#include "isa/avx512/groups.h"

namespace offmoe {
namespace {

// int4 and mxfp4: 128 columns. Seen as 32 words of 16 bits, the i-th nibble of word l is column 4 l + i, found in a
// table of bfloat16. The look-up takes five bits of the word, so the table has every value twice.
struct Nibbles {
    static constexpr int kVectors = 4;
    static constexpr int64_t kColumns = 128;
    static constexpr bool kStoredScales = true;

    explicit Nibbles(const Matrix& matrix) {
        static const float e2m1_values[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
        alignas(64) uint16_t values[32];
        for (int nibble = 0; nibble < 32; ++nibble) {
            const int code = nibble & 15;
            float value = static_cast<float>(code - (matrix.zeros ? zero_bias(matrix) : matrix.zero));
            if (matrix.kind == MXFP4) value = code & 8 ? -e2m1_values[code & 7] : e2m1_values[code & 7];
            values[nibble] = static_cast<uint16_t>(bits<uint32_t>(value) >> 16);
        }
        table = load_512(values);
    }

    OFFMOE_INLINE void unpack(__m512i word, __m512i* w) const {
        w[0] = _mm512_permutexvar_epi16(word, table);
        w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4), table);
        w[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 8), table);
        w[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 12), table);
    }

    static int64_t column_at(int64_t at) { return at / 128 * 128 + at % 32 * 4 + at % 128 / 32; }
    static int64_t zero_bias(const Matrix&) { return 8; }  // small numbers, whose sums lose little

    __m512i table;
};

// Both bytes of the bfloat16 of 128 magnitudes, looked up by seven bits. Low and high bytes are joined within 16: of
// every 16 columns the first vector has the first eight.
struct ByteTables {
    static constexpr int kVectors = 2;
    static constexpr int64_t kColumns = 64;

    template <class Value>
    explicit ByteTables(Value value) {
        alignas(64) uint8_t low[128], high[128];
        for (int code = 0; code < 128; ++code) {
            const uint32_t found = bits<uint32_t>(value(code));
            low[code] = static_cast<uint8_t>(found >> 16);
            high[code] = static_cast<uint8_t>(found >> 24);
        }
        for (int half = 0; half < 2; ++half) {
            lows[half] = load_512(low + 64 * half);
            highs[half] = load_512(high + 64 * half);
        }
    }

    static OFFMOE_INLINE __m512i with_sign(__m512i magnitude, __m512i code) {  // magnitude | (code & 0x80)
        return _mm512_ternarylogic_epi32(magnitude, code, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
    }

    // For tables of 0 to 127.
    OFFMOE_INLINE void signed_bytes(__m512i number, __m512i* w) const {
        const __m512i magnitude = _mm512_abs_epi8(number);
        const __m512i low = _mm512_permutex2var_epi8(lows[0], magnitude, lows[1]);
        __m512i high = _mm512_permutex2var_epi8(highs[0], magnitude, highs[1]);
        // -128 is the one magnitude of eight bits: 0xc300, whose low byte is that of 0.
        high = _mm512_mask_mov_epi8(high, _mm512_movepi8_mask(magnitude), _mm512_set1_epi8(0x43));
        high = with_sign(high, number);
        w[0] = _mm512_unpacklo_epi8(low, high);
        w[1] = _mm512_unpackhi_epi8(low, high);
    }

    static int64_t column_at(int64_t at) { return at / 64 * 64 + at % 32 / 8 * 16 + at % 64 / 32 * 8 + at % 8; }

    __m512i lows[2], highs[2];
};

struct Fp8 : ByteTables {
    static constexpr bool kStoredScales = false;  // a number for 128 rows

    explicit Fp8(const Matrix&)
        : ByteTables([](int code) {
              U8x16 one = {};
              one[0] = static_cast<uint8_t>(code);
              return float(from_fp8(one)[0]);
          }) {}

    OFFMOE_INLINE void unpack(__m512i code, __m512i* w) const {
        const __m512i low = _mm512_permutex2var_epi8(lows[0], code, lows[1]);
        const __m512i high = with_sign(_mm512_permutex2var_epi8(highs[0], code, highs[1]), code);
        w[0] = _mm512_unpacklo_epi8(low, high);
        w[1] = _mm512_unpackhi_epi8(low, high);
    }

    static int64_t zero_bias(const Matrix&) { return 0; }
};

// Codes become signed first, less 128 where they were not.
struct Int8 : ByteTables {
    static constexpr bool kStoredScales = true;

    explicit Int8(const Matrix& matrix)
        : ByteTables([](int code) { return static_cast<float>(code); }),
          flip(_mm512_set1_epi8(static_cast<char>(matrix.code_signed ? 0 : 0x80))) {}

    OFFMOE_INLINE void unpack(__m512i code, __m512i* w) const { signed_bytes(_mm512_xor_si512(code, flip), w); }

    static int64_t zero_bias(const Matrix& matrix) { return matrix.code_signed ? 0 : 128; }

    __m512i flip;
};

// What a step of the loop over columns needs.
template <class Unpacker>
struct Inner {
    static constexpr int kVectors = Unpacker::kVectors;
    static constexpr int64_t kColumns = Unpacker::kColumns;

    explicit Inner(const Matrix& matrix) : unpacker(matrix) {
        alignas(64) int32_t group_of_lane[kLanes];
        alignas(64) int8_t place[4 * kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
            const int group = static_cast<int>(matrix.group >= kColumns ? 0 : Unpacker::column_at(2 * lane) / matrix.group);
            group_of_lane[lane] = group;
            const bool byte = matrix.scale_type == E8M0;
            for (int i = 0; i < 2; ++i) place[4 * lane + i] = -1;  // a zero
            place[4 * lane + 2] = static_cast<int8_t>(byte ? -1 : 2 * group);
            place[4 * lane + 3] = static_cast<int8_t>(byte ? group : 2 * group + 1);
        }
        lanes = load_512(group_of_lane);
        places = load_512(place);
    }

    template <int R, int T>
    OFFMOE_INLINE void add(__m512 (&sums)[R][T], const __m512i* code, const __m512* scale, const uint8_t* const* x,
                    int64_t column) const {
        __m512i w[R][kVectors];
        OFFMOE_UNROLL
        for (int r = 0; r < R; ++r) unpacker.unpack(code[r], w[r]);
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) {
            __m512 part[R];
            clear(part);
            OFFMOE_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                const __m512i values = load_512(x[t] + 2 * column + 64 * v);
                OFFMOE_UNROLL
                for (int r = 0; r < R; ++r) part[r] = dot(part[r], w[r][v], values);
            }
            OFFMOE_UNROLL
            for (int r = 0; r < R; ++r) sums[r][t] = _mm512_fmadd_ps(part[r], scale[r], sums[r][t]);
        }
    }

    // At most four groups in a step, each in the lanes of its columns.
    OFFMOE_INLINE __m512 spread(const float* of_groups) const {
        return _mm512_permutexvar_ps(lanes, _mm512_broadcast_f32x4(_mm_loadu_ps(of_groups)));
    }

    // The same from where they are stored, eight bytes of them: what `load_scales` makes.
    template <int TYPE>
    OFFMOE_INLINE __m512 spread_stored(const uint8_t* of_groups) const {
        const __m512i found = _mm512_shuffle_epi8(_mm512_set1_epi64(load<int64_t>(of_groups)), places);
        if constexpr (TYPE == BF16) return _mm512_castsi512_ps(found);
        return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_srli_epi32(found, 1), _mm512_set1_epi32(0x00400000)));
    }

    Unpacker unpacker;
    __m512i lanes, places;
};

// With zero points, what they take away from a row's sum is one product more: zero times scale, group by group, with the
// groups' sums of x, which follow its prepared row.
template <class Unpacker, bool ZEROS>
struct Coded {
    static constexpr int64_t kColumns = Unpacker::kColumns;
    static constexpr int kRowsForFew = 2;
    static constexpr int kRowsForOne = 2;
    static constexpr int64_t kStep = kChunk;

    explicit Coded(const Matrix& matrix)
        : matrix(matrix), inner(matrix), chunks_a_group((matrix.group + kColumns - 1) / kColumns),
          groups_a_chunk(matrix.group < kColumns ? kColumns / matrix.group : 1) {}

    // `few`: one or two rows of x. Then scales are unpacked with the codes, eight bytes at a time, but for the last rows,
    // where these bytes could lie beside the matrix.
    void start(int64_t row, int count, bool few) {
        codes_of_first = matrix.codes + row * matrix.row_bytes;
        scales_of_first = scales_of(matrix, row);
        const int32_t type = matrix.scale_type;
        const bool inside = (matrix.rows - row - count) * matrix.scale_row_bytes >= 8 && matrix.group_rows == 1;
        const bool known = type == BF16 || type == E8M0;
        stored = few && inside && known && (!ZEROS || matrix.zeros_packed) ? type : F32;
        const int64_t num = num_groups(matrix);
        first_row = row;
        if (few) prefetch_groups(row + count, count);
        for (int r = 0; r < count && stored == F32; ++r) {
            load_scales(matrix, row + r, num, groups[r]);
            if constexpr (ZEROS) {
                load_zeros(matrix, row + r, num, Unpacker::zero_bias(matrix), groups[r]);
                scale_zeros(num, groups[r]);
            }
        }
    }

    // Adds columns [first, last) of rows [r, r + R) of those that were started; `sums`: T a row.
    template <int R, int T>
    void block(int r, const void* const* x, int64_t first, int64_t last, __m512* sums_of_rows) const {
        if (!in_blocks(T) && Unpacker::kStoredScales && stored == BF16) columns<R, T, BF16>(r, x, first, last, sums_of_rows);
        else if (!in_blocks(T) && Unpacker::kStoredScales && stored == E8M0) columns<R, T, E8M0>(r, x, first, last, sums_of_rows);
        else columns<R, T, F32>(r, x, first, last, sums_of_rows);
        if (ZEROS && last == matrix.columns) take_zeros<R, T>(r, x, sums_of_rows);
    }

private:
    // What is read of the next rows' scales and zero points by `start`, or of zero points after the columns.
    void prefetch_groups(int64_t row, int count) const {
        if (stored == F32) prefetch_first(scales_of(matrix, row), matrix.scale_row_bytes, count, kFarBytes);
        if (ZEROS && matrix.zeros_packed) {
            const int64_t per_word = 32 / code_bits(matrix.kind);
            const uint8_t* words = matrix.zeros + row / per_word * matrix.zero_row_bytes;
            prefetch_first(words, matrix.zero_row_bytes, (count + per_word - 1) / per_word, kFarBytes);
        }
    }

    template <int R, int T>
    void take_zeros(int r, const void* const* x, __m512* sums_of_rows) const {
        const int64_t num = num_groups(matrix), sums_at = 2 * padded(matrix.columns);
        OFFMOE_UNROLL
        for (int i = 0; i < R; ++i) {
            const PackedZeros packed(matrix, first_row + r + i, Unpacker::zero_bias(matrix));
            for (int64_t group = 0; group < num; group += kLanes) {
                __m512 zeros;
                if (stored == F32) zeros = load_floats(groups[r + i].zeros + group);
                else zeros = packed.scaled(scales_of_first + (r + i) * matrix.scale_row_bytes, group, num);
                OFFMOE_UNROLL
                for (int t = 0; t < T; ++t) {
                    const __m512 sums = load_floats(static_cast<const uint8_t*>(x[t]) + sums_at + 4 * group);
                    sums_of_rows[i * T + t] = _mm512_fnmadd_ps(zeros, sums, sums_of_rows[i * T + t]);
                }
            }
        }
    }

    // SCALES: how they are stored, or F32 where `start` has loaded them.
    template <int R, int T, int SCALES>
    void columns(int r, const void* const* x, int64_t first, int64_t last, __m512* sums_of_rows) const {
        const uint8_t *codes[R], *scales[R], *xs[T];
        __m512 sums[R][T];
        begin_block(codes_of_first + r * matrix.row_bytes, matrix.row_bytes, x, sums_of_rows, codes, xs, sums);
        const Inner<Unpacker> here = inner;  // in registers
        const int64_t ahead = ahead_bytes(matrix, R, T), rows_ahead = kFarBytes / matrix.row_bytes + 1;
        int64_t column = first, at = first / kColumns * 64, group = 0, left = chunks_a_group;
        if (first > 0) {
            group = first / matrix.group;
            left -= first / kColumns % chunks_a_group;
        }
        OFFMOE_UNROLL
        for (int i = 0; i < R && SCALES != F32; ++i) {
            scales[i] = scales_of_first + (r + i) * matrix.scale_row_bytes;
            const uint8_t* next = scales[i] + rows_ahead * matrix.scale_row_bytes;
            for (int64_t line = 0; line < matrix.scale_row_bytes; line += 64) prefetch_far(next + line);
        }
        for (; column < last; column += kColumns, at += 64) {
            __m512i code[R];
            __m512 scale[R];
            const int64_t rest = (last - column) * 64 / kColumns;
            OFFMOE_UNROLL
            for (int i = 0; i < R; ++i) {
                if (rest >= 64) code[i] = load_512(codes[i] + at);
                else code[i] = _mm512_maskz_loadu_epi8(first_bytes(rest), codes[i] + at);
                if constexpr (!in_blocks(T)) prefetch_far(codes[i] + at + kFarBytes);
                prefetch(codes[i] + at + ahead);
                if constexpr (SCALES == F32) scale[i] = here.spread(groups[r + i].scales + group);
                else scale[i] = here.template spread_stored<SCALES>(scales[i] + group * (SCALES == BF16 ? 2 : 1));
            }
            here.template add<R, T>(sums, code, scale, xs, column);
            if (--left == 0) {
                group += groups_a_chunk;
                left = chunks_a_group;
            }
        }
        end_block(sums, sums_of_rows);
    }

    const Matrix& matrix;
    const Inner<Unpacker> inner;
    const int64_t chunks_a_group, groups_a_chunk;
    const uint8_t *codes_of_first = nullptr, *scales_of_first = nullptr;
    int32_t stored = F32;
    int64_t first_row = 0;
    RowGroups groups[kBlockRows];
};

}  // namespace
}  // namespace offmoe
