// Quantised rows x bfloat16 for AVX-512.
//
// 64 bytes of codes become two or four vectors of 32 bfloat16 numbers, whatever order is cheap; x is prepared in the
// same order. After their products lane j of 16 holds columns that share a scale, and the scale is applied there, once.
#pragma once
#include "groups_avx512.h"

namespace offmoe {
namespace {

// int4 and mxfp4: 128 columns. Seen as 32 words of 16 bits, the i-th nibble of word l is column 4 l + i, found in a
// table of bfloat16. The look-up takes five bits of the word, so the table has every value twice.
struct Nibbles {
    static constexpr int kVectors = 4;
    static constexpr int64_t kColumns = 128;

    explicit Nibbles(const Matrix& matrix) {
        static const float e2m1_values[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
        alignas(64) uint16_t values[32];
        for (int nibble = 0; nibble < 32; ++nibble) {
            const int code = nibble & 15;
            // With zero points codes stay as they are.
            float value = static_cast<float>(matrix.zeros ? code : code - matrix.zero);
            if (matrix.kind == MXFP4) value = code & 8 ? -e2m1_values[code & 7] : e2m1_values[code & 7];
            values[nibble] = static_cast<uint16_t>(bits<uint32_t>(value) >> 16);
        }
        table = load_512(values);
    }

    inline void unpack(__m512i word, __m512i* w) const {
        w[0] = _mm512_permutexvar_epi16(word, table);
        w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4), table);
        w[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 8), table);
        w[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 12), table);
    }

    static int64_t column_at(int64_t at) { return at / 128 * 128 + at % 32 * 4 + at % 128 / 32; }
    static int64_t zero_bias(const Matrix&) { return 0; }

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

    static inline __m512i with_sign(__m512i magnitude, __m512i code) {  // magnitude | (code & 0x80)
        return _mm512_ternarylogic_epi32(magnitude, code, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
    }

    // For tables of 0 to 127.
    inline void signed_bytes(__m512i number, __m512i* w) const {
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
    explicit Fp8(const Matrix&)
        : ByteTables([](int code) {
              U8x16 one = {};
              one[0] = static_cast<uint8_t>(code);
              return float(from_fp8(one)[0]);
          }) {}

    inline void unpack(__m512i code, __m512i* w) const {
        const __m512i low = _mm512_permutex2var_epi8(lows[0], code, lows[1]);
        const __m512i high = with_sign(_mm512_permutex2var_epi8(highs[0], code, highs[1]), code);
        w[0] = _mm512_unpacklo_epi8(low, high);
        w[1] = _mm512_unpackhi_epi8(low, high);
    }

    static int64_t zero_bias(const Matrix&) { return 0; }
};

// Codes become signed first, less 128 where they were not.
struct Int8 : ByteTables {
    explicit Int8(const Matrix& matrix)
        : ByteTables([](int code) { return static_cast<float>(code); }),
          flip(_mm512_set1_epi8(static_cast<char>(matrix.code_signed ? 0 : 0x80))) {}

    inline void unpack(__m512i code, __m512i* w) const { signed_bytes(_mm512_xor_si512(code, flip), w); }

    static int64_t zero_bias(const Matrix& matrix) { return matrix.code_signed ? 0 : 128; }

    __m512i flip;
};

// What a step of the loop over columns needs. With zero points, what they take away is subtracted from a group's sum: x's
// prepared row ends with sums of its own.
template <class Unpacker, bool ZEROS>
struct Inner {
    static constexpr int kVectors = Unpacker::kVectors;
    static constexpr int64_t kColumns = Unpacker::kColumns;

    explicit Inner(const Matrix& matrix) : unpacker(matrix), sums_at(2 * padded(matrix.columns)) {
        alignas(64) int32_t group_of_lane[kLanes];
        for (int lane = 0; lane < kLanes; ++lane)
            group_of_lane[lane] = static_cast<int32_t>(
                matrix.group >= kColumns ? 0 : Unpacker::column_at(2 * lane) / matrix.group);
        lanes = load_512(group_of_lane);
    }

    template <int R, int T>
    inline void add(__m512 (&sums)[R][T], const __m512i* code, const RowGroups* of_rows, int64_t group,
                    const uint8_t* const* x, int64_t column) const {
        __m512i w[R][kVectors];
        __m512 scale[R], zero[R];
        OFFMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            unpacker.unpack(code[r], w[r]);
            scale[r] = spread(of_rows[r].scales + group);
            if constexpr (ZEROS) zero[r] = spread(of_rows[r].zeros + group);
        }
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
            for (int r = 0; r < R; ++r) {
                if constexpr (ZEROS)
                    part[r] = _mm512_fnmadd_ps(zero[r], load_floats(x[t] + sums_at + column / kColumns * 64), part[r]);
                sums[r][t] = _mm512_fmadd_ps(part[r], scale[r], sums[r][t]);
            }
        }
    }

    // At most four groups in a step, each in the lanes of its columns.
    inline __m512 spread(const float* of_groups) const {
        return _mm512_permutexvar_ps(lanes, _mm512_broadcast_f32x4(_mm_loadu_ps(of_groups)));
    }

    Unpacker unpacker;
    int64_t sums_at;
    __m512i lanes;
};

template <class Unpacker, bool ZEROS>
struct Coded {
    static constexpr int64_t kColumns = Unpacker::kColumns;
    static constexpr int kRowsForFew = 2;
    static constexpr int64_t kStep = kChunk;

    explicit Coded(const Matrix& matrix)
        : matrix(matrix), inner(matrix), chunks_a_group((matrix.group + kColumns - 1) / kColumns),
          groups_a_chunk(matrix.group < kColumns ? kColumns / matrix.group : 1) {}

    void start(int64_t row, int count) {
        codes_of_first = matrix.codes + row * matrix.row_bytes;
        const int64_t num = num_groups(matrix);
        for (int r = 0; r < count; ++r) {
            load_scales(matrix, row + r, num, groups[r]);
            if constexpr (ZEROS) load_zeros(matrix, row + r, num, Unpacker::zero_bias(matrix), groups[r]);
        }
    }

    // Adds columns [first, last) of rows [r, r + R) of those that were started; `sums`: T a row.
    template <int R, int T>
    void block(int r, const void* const* x, int64_t first, int64_t last, __m512* sums_of_rows) const {
        const uint8_t* codes[R];
        const uint8_t* xs[T];
        __m512 sums[R][T];
        begin_block(codes_of_first + r * matrix.row_bytes, matrix.row_bytes, x, sums_of_rows, codes, xs, sums);
        const Inner<Unpacker, ZEROS> here = inner;  // in registers
        const int64_t ahead = ahead_bytes(matrix, R, T);
        int64_t column = first, at = first / kColumns * 64, group = 0, left = chunks_a_group;
        if (first > 0) {
            group = first / matrix.group;
            left -= first / kColumns % chunks_a_group;
        }
        for (; column + kColumns <= last; column += kColumns, at += 64) {
            __m512i code[R];
            OFFMOE_UNROLL
            for (int i = 0; i < R; ++i) {
                code[i] = load_512(codes[i] + at);
                prefetch(codes[i] + at + ahead);
            }
            here.template add<R, T>(sums, code, groups + r, group, xs, column);
            if (--left == 0) {
                group += groups_a_chunk;
                left = chunks_a_group;
            }
        }
        if (column < last) {
            __m512i code[R];
            const __mmask64 rest = first_bytes((last - column) * 64 / kColumns);
            OFFMOE_UNROLL
            for (int i = 0; i < R; ++i) code[i] = _mm512_maskz_loadu_epi8(rest, codes[i] + at);
            here.template add<R, T>(sums, code, groups + r, group, xs, column);
        }
        end_block(sums, sums_of_rows);
    }

private:
    const Matrix& matrix;
    const Inner<Unpacker, ZEROS> inner;
    const int64_t chunks_a_group, groups_a_chunk;
    const uint8_t* codes_of_first = nullptr;
    RowGroups groups[kBlockRows];
};

}  // namespace
}  // namespace offmoe
