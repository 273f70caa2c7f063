// AVX-512: codes and bfloat16 by its own kernels, other floats by others, everything else as on any processor.
#include <type_traits>
#include <vector>

#include "isa/avx512/blocks.h"
#include "isa/avx512/dense.h"
#include "isa/avx512/packed.h"
#include "isa/avx512/products.h"
#include "isa/generic/activate.h"
#include "isa/generic/attend.h"
#include "isa/generic/coded.h"
#include "isa/generic/decode.h"

namespace offmoe {
namespace {

// Whether there is a kernel for its products with bfloat16.
bool is_fast(const Matrix& matrix) {
    if (matrix.transposed) return false;
    if (matrix.kind == DENSE_BF16 || matrix.kind == PACKED || is_blocks(matrix.kind)) return true;
    if (matrix.kind < INT8 || num_groups(matrix) > kMostGroups) return false;
    if (matrix.kind == INT8 && !matrix.zeros && matrix.zero != (matrix.code_signed ? 0 : 128)) return false;
    if (in_nibbles(matrix) && matrix.columns % 8 != 0) return false;
    const int64_t columns = in_nibbles(matrix) ? Nibbles::kColumns : ByteTables::kColumns;
    return matrix.group >= matrix.columns || matrix.group % columns == 0 || matrix.group == 32 || matrix.group == 64;
}

// A float16 number is the exact sum of two bfloat16 ones: codes are multiplied with both, but for bytes, which are
// converted faster than that.
bool in_two(const Matrix& matrix, int32_t type) {
    return type == F16 && !is_dense(matrix.kind) && matrix.kind != INT8 && matrix.kind != Q8_0 && is_fast(matrix);
}

bool needs_sums(const Matrix& matrix) { return matrix.zeros != nullptr && matrix.kind != PACKED; }
bool has_minima(const Matrix& matrix) { return matrix.kind == Q4_K || matrix.kind == Q5_K; }

// With zero points a sum for each group, to the end of a vector; with minima sixteen for every 256 columns.
int64_t fast_bytes(const Matrix& matrix) {
    if (has_minima(matrix)) return 2 * padded(matrix.columns) + matrix.columns / 256 * 64;
    const int64_t num_sums = needs_sums(matrix) ? (num_groups(matrix) + kLanes - 1) / kLanes * kLanes : 0;
    return 2 * padded(matrix.columns) + 4 * num_sums;
}

// Where the second of two begins: not a multiple of 4096 bytes behind the first.
int64_t second_at(const Matrix& matrix) { return fast_bytes(matrix) + 192; }

int64_t prepared_bytes(const Matrix& matrix, int32_t type) {
    if (in_two(matrix, type)) return second_at(matrix) + fast_bytes(matrix);
    return type == BF16 && is_fast(matrix) ? fast_bytes(matrix) : coded_prepared_bytes(matrix, type);
}

// The sum of each group's numbers, then zeros to the end of a vector.
void prepare_group_sums(const Matrix& matrix, const float* x, float* sums) {
    const int64_t num = num_groups(matrix);
    for (int64_t group = 0; group < num; ++group) {
        int64_t column = group * matrix.group;
        const int64_t end = column + matrix.group < matrix.columns ? column + matrix.group : matrix.columns;
        F32x16 lanes = {};
        for (; column + kLanes <= end; column += kLanes) lanes += load<F32x16>(x + column);
        sums[group] = sum(lanes);
        for (; column < end; ++column) sums[group] += x[column];
    }
    for (int64_t group = num; group % kLanes != 0; ++group) sums[group] = 0.0f;
}

// 128 columns as Nibbles has them: of the numbers' tops, the i-th of every four go to the i-th vector.
void prepare_nibbles(const float* x, uint16_t* out) {
    alignas(64) static const uint16_t kPairs[32] = {0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60,
                                                    1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61};
    const __m512i first_two = load_512(kPairs), last_two = _mm512_add_epi16(first_two, _mm512_set1_epi16(2));
    __m512i tops[4], halves[4];
    for (int i = 0; i < 4; ++i) {
        const __m512i low = load_512(x + 32 * i), high = load_512(x + 32 * i + 16);
        tops[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(low, 16))),
                                     _mm512_cvtepi32_epi16(_mm512_srli_epi32(high, 16)), 1);
    }
    // Of 64 columns: the first and the second of every four, then the third and the fourth.
    for (int i = 0; i < 2; ++i) {
        halves[2 * i] = _mm512_permutex2var_epi16(tops[2 * i], first_two, tops[2 * i + 1]);
        halves[2 * i + 1] = _mm512_permutex2var_epi16(tops[2 * i], last_two, tops[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        const __m512i even = _mm512_shuffle_i64x2(halves[i], halves[2 + i], 0x44), odd = _mm512_shuffle_i64x2(halves[i], halves[2 + i], 0xee);
        _mm512_storeu_si512(out + 64 * i, even);
        _mm512_storeu_si512(out + 64 * i + 32, odd);
    }
}

// Bfloat16, zeros after the last.
template <class Order>
void prepare_chunks(const Matrix& matrix, const float* x, uint16_t* out) {
    const int64_t all = padded(matrix.columns);
    int64_t at = 0;
    if constexpr (std::is_same_v<Order, Nibbles>)
        for (; at + Nibbles::kColumns <= matrix.columns; at += Nibbles::kColumns) prepare_nibbles(x + at, out + at);
    for (; at < all; ++at) {
        const int64_t column = Order::column_at(at);
        out[at] = column < matrix.columns ? static_cast<uint16_t>(bits<uint32_t>(x[column]) >> 16) : 0;
    }
    if (needs_sums(matrix)) prepare_group_sums(matrix, x, reinterpret_cast<float*>(out + all));
}

// For every 256 columns eight zeros, where the scales are, and the sums that the minima are multiplied with.
void prepare_minima(const Matrix& matrix, const float* x, float* sums) {
    for (int64_t column = 0; column < matrix.columns; column += 256, sums += kLanes)
        for (int64_t group = 0; group < 8; ++group) {
            F32x16 both = load<F32x16>(x + column + 32 * group);
            both += load<F32x16>(x + column + 32 * group + kLanes);
            sums[group] = 0.0f;
            sums[8 + group] = sum(both);
        }
}

void prepare_blocks(const Matrix& matrix, const float* x, uint16_t* out) {
    switch (matrix.kind) {
        case Q4_0: return prepare_chunks<PairNibbles<Q4_0>>(matrix, x, out);
        case MXFP4_BLOCKS: return prepare_chunks<PairNibbles<MXFP4_BLOCKS>>(matrix, x, out);
        case IQ4_NL: return prepare_chunks<PairNibbles<IQ4_NL>>(matrix, x, out);
        case IQ4_XS: return prepare_chunks<GroupsOfIq4>(matrix, x, out);
        case Q8_0: return prepare_chunks<PairQ8>(matrix, x, out);
        case Q6_K: return prepare_chunks<GroupsOf16>(matrix, x, out);
        default: break;
    }
    prepare_chunks<GroupsOf32<Q4_K>>(matrix, x, out);
    prepare_minima(matrix, x, reinterpret_cast<float*>(out + padded(matrix.columns)));
}

void prepare_fast(const Matrix& matrix, const float* x, uint16_t* out) {
    if (is_blocks(matrix.kind)) return prepare_blocks(matrix, x, out);
    if (in_nibbles(matrix)) return prepare_chunks<Nibbles>(matrix, x, out);
    if (!is_dense(matrix.kind)) return prepare_chunks<ByteTables>(matrix, x, out);
    for (int64_t column = 0; column < matrix.columns; ++column)
        out[column] = static_cast<uint16_t>(bits<uint32_t>(x[column]) >> 16);
    std::memset(out + matrix.columns, 0, 2 * (padded(matrix.columns) - matrix.columns));
}

void prepare(const Matrix& matrix, int32_t type, const float* x, void* prepared) {
    uint16_t* out = static_cast<uint16_t*>(prepared);
    if (in_two(matrix, type)) {
        std::vector<float> part(matrix.columns), rest(x, x + matrix.columns);
        for (int64_t i = 0; i < matrix.columns; ++i) {
            part[i] = bits<float>(bits<uint32_t>(x[i]) & 0xffff0000u);
            rest[i] -= part[i];
        }
        prepare_fast(matrix, part.data(), out);
        return prepare_fast(matrix, rest.data(), out + second_at(matrix) / 2);
    }
    if (type == BF16 && is_fast(matrix)) return prepare_fast(matrix, x, out);
    avx512_prepare_floats(matrix, type, x, prepared);
}

template <class Kernel, int R, int T>
void run_rows(Kernel& kernel, int64_t columns, int count, const void* const* x, float* out, int64_t stride) {
    const int64_t step = in_blocks(T) ? kBlockColumns / T / Kernel::kStep * Kernel::kStep : columns;
    __m512 sums[kBlockRows * T];
    for (int i = 0; i < count * T; ++i) sums[i] = _mm512_setzero_ps();
    for (int64_t first = 0; first < columns; first += step) {
        const int64_t last = first + step < columns ? first + step : columns;
        int r = 0;
        for (; r + R <= count; r += R) kernel.template block<R, T>(r, x, first, last, sums + r * T);
        for (; r < count; ++r) kernel.template block<1, T>(r, x, first, last, sums + r * T);
    }
    for (int r = 0; r < count; ++r)
        for (int t = 0; t < T; ++t) out[t * stride + r] = _mm512_reduce_add_ps(sums[r * T + t]);
}

template <class Kernel>
void run_kernel(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, int32_t num_x, float* out,
                int64_t stride) {
    Kernel kernel(matrix);
    const bool few = !in_blocks(num_x);
    if (few) prefetch_first(matrix.codes + begin * matrix.row_bytes, matrix.row_bytes, end - begin, kFarBytes);
    for (; begin < end; begin += kBlockRows, out += kBlockRows) {
        const int count = static_cast<int>(begin + kBlockRows < end ? kBlockRows : end - begin);
        kernel.start(begin, count, few);
        const void* const* from = x;
        float* to = out;
        for (int32_t left = num_x; left > 0; left -= kMostX, from += kMostX, to += kMostX * stride) {
            switch (left) {
                case 1: run_rows<Kernel, Kernel::kRowsForOne, 1>(kernel, matrix.columns, count, from, to, stride); break;
                case 2: run_rows<Kernel, Kernel::kRowsForOne, 2>(kernel, matrix.columns, count, from, to, stride); break;
                case 3: run_rows<Kernel, Kernel::kRowsForFew, 3>(kernel, matrix.columns, count, from, to, stride); break;
                case 4: run_rows<Kernel, Kernel::kRowsForFew, 4>(kernel, matrix.columns, count, from, to, stride); break;
                case 5: run_rows<Kernel, 2, 5>(kernel, matrix.columns, count, from, to, stride); break;
                case 6: run_rows<Kernel, 2, 6>(kernel, matrix.columns, count, from, to, stride); break;
                case 7: run_rows<Kernel, 2, 7>(kernel, matrix.columns, count, from, to, stride); break;
                default: run_rows<Kernel, 2, kMostX>(kernel, matrix.columns, count, from, to, stride); break;
            }
        }
    }
}

void multiply_fast(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, int32_t num_x, float* out,
                   int64_t stride) {
    const bool zeros = matrix.zeros != nullptr;
    switch (matrix.kind) {
        case DENSE_BF16: return run_kernel<Dense>(matrix, begin, end, x, num_x, out, stride);
        case PACKED: return run_kernel<Packed>(matrix, begin, end, x, num_x, out, stride);
        case FP8: return run_kernel<Coded<Fp8, false>>(matrix, begin, end, x, num_x, out, stride);
        case Q4_0: return run_kernel<Blocks<PairNibbles<Q4_0>>>(matrix, begin, end, x, num_x, out, stride);
        case MXFP4_BLOCKS: return run_kernel<Blocks<PairNibbles<MXFP4_BLOCKS>>>(matrix, begin, end, x, num_x, out, stride);
        case IQ4_NL: return run_kernel<Blocks<PairNibbles<IQ4_NL>>>(matrix, begin, end, x, num_x, out, stride);
        case IQ4_XS: return run_kernel<Blocks<GroupsOfIq4>>(matrix, begin, end, x, num_x, out, stride);
        case Q8_0: return run_kernel<Blocks<PairQ8>>(matrix, begin, end, x, num_x, out, stride);
        case Q4_K: return run_kernel<Blocks<GroupsOf32<Q4_K>>>(matrix, begin, end, x, num_x, out, stride);
        case Q5_K: return run_kernel<Blocks<GroupsOf32<Q5_K>>>(matrix, begin, end, x, num_x, out, stride);
        case Q6_K: return run_kernel<Blocks<GroupsOf16>>(matrix, begin, end, x, num_x, out, stride);
        case INT8:
            if (zeros) return run_kernel<Coded<Int8, true>>(matrix, begin, end, x, num_x, out, stride);
            return run_kernel<Coded<Int8, false>>(matrix, begin, end, x, num_x, out, stride);
        default:
            if (zeros) return run_kernel<Coded<Nibbles, true>>(matrix, begin, end, x, num_x, out, stride);
            return run_kernel<Coded<Nibbles, false>>(matrix, begin, end, x, num_x, out, stride);
    }
}

void multiply_in_two(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, int32_t num_x, float* out,
                     int64_t stride) {
    constexpr int64_t kRows = 256;
    const int64_t second = second_at(matrix);
    float sums[kMostX * kRows];
    for (; begin < end; begin += kRows, out += kRows) {
        const int64_t count = begin + kRows < end ? kRows : end - begin;
        for (int32_t first = 0; first < num_x; first += kMostX / 2) {
            const int32_t some = num_x - first < kMostX / 2 ? num_x - first : kMostX / 2;
            const void* parts[kMostX];
            for (int32_t t = 0; t < 2 * some; ++t)
                parts[t] = static_cast<const uint8_t*>(x[first + t / 2]) + (t % 2 ? second : 0);
            multiply_fast(matrix, begin, begin + count, parts, 2 * some, sums, kRows);
            for (int32_t t = 0; t < some; ++t)
                for (int64_t row = 0; row < count; ++row)
                    out[(first + t) * stride + row] = sums[2 * t * kRows + row] + sums[(2 * t + 1) * kRows + row];
        }
    }
}

void multiply(const Matrix& matrix, int32_t type, int64_t begin, int64_t end, const void* const* x, int32_t num_x,
              float* out, int64_t stride) {
    if (in_two(matrix, type)) return multiply_in_two(matrix, begin, end, x, num_x, out, stride);
    if (type == BF16 && is_fast(matrix)) return multiply_fast(matrix, begin, end, x, num_x, out, stride);
    avx512_multiply_floats(matrix, type, begin, end, x, num_x, out, stride);
}

}  // namespace

const Isa kAvx512 = {"avx512", prepared_bytes, prepare, multiply, general_activate,
                       norm_row, rotate, attend_any, delta_rule, mamba_rule, encode_avx512, pack_avx512, unpack_avx512};

}  // namespace offmoe
