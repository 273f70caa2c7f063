// AVX-512: bfloat16 by its own kernels, everything else as on any processor.
#include "activate.h"
#include "nibbles_avx512.h"
#include "wide_avx512.h"

namespace offmoe {
namespace {

// Whether `multiply` has a kernel of its own for it; what the tables and lanes of those kernels take for granted.
bool is_fast(const Matrix& matrix, int32_t type) {
    if (type != BF16 || matrix.transposed) return false;
    switch (matrix.kind) {
        case DENSE_BF16: return true;
        case INT8: return matrix.group % 32 == 0 || matrix.group >= matrix.columns;
        case FP8: return matrix.group % 64 == 0 || matrix.group >= matrix.columns;
        case INT4: case MXFP4:
            return matrix.columns % 8 == 0 &&
                   (matrix.group == 32 || matrix.group == 64 || matrix.group % kChunk == 0 || matrix.group >= matrix.columns);
        default: return false;
    }
}

int64_t prepared_bytes(const Matrix& matrix, int32_t type) {
    if (!is_fast(matrix, type)) return general_prepared_bytes(matrix, type);
    return padded(matrix.columns) * 2 + (matrix.kind == INT4 ? padded(matrix.columns) / 2 : 0);
}

// The column that stands at `at` in a prepared row.
inline int64_t column_at(int32_t kind, int64_t at) {
    if (kind == FP8) return at / 64 * 64 + at % 32 / 8 * 16 + at % 64 / 32 * 8 + at % 8;
    if (kind == INT4 || kind == MXFP4) return at / kChunk * kChunk + at % 32 * 4 + at % kChunk / 32;
    return at;
}

void prepare(const Matrix& matrix, int32_t type, const float* x, void* prepared) {
    if (!is_fast(matrix, type)) return general_prepare(matrix, type, x, prepared);
    uint16_t* out = static_cast<uint16_t*>(prepared);
    const int64_t all = padded(matrix.columns);
    for (int64_t at = 0; at < all; ++at) {
        const int64_t column = column_at(matrix.kind, at);
        out[at] = column < matrix.columns ? static_cast<uint16_t>(bits<uint32_t>(x[column]) >> 16) : 0;
    }
    if (matrix.kind != INT4) return;
    float* sums = reinterpret_cast<float*>(out + all);
    for (int64_t lane = 0; lane < all / 8; ++lane) {
        sums[lane] = 0.0f;
        for (int64_t column = 8 * lane; column < 8 * lane + 8 && column < matrix.columns; ++column) sums[lane] += x[column];
    }
}

template <template <int, int> class Kernel, int R, int T>
void run_rows(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, float* out, int64_t stride) {
    int64_t row = begin;
    for (; row + R <= end; row += R, out += R) Kernel<R, T>::run(matrix, row, x, out, stride);
    for (; row < end; ++row, ++out) Kernel<1, T>::run(matrix, row, x, out, stride);
}

template <template <int, int> class Kernel>
void run_kernel(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, int32_t num_x, float* out, int64_t stride) {
    // Few rows at a time, so that a second pass finds them in the cache.
    for (const int64_t step = num_x > kMostX ? 16 : end - begin; begin < end; begin += step, out += step) {
        const int64_t stop = begin + step < end ? begin + step : end;
        float* to = out;
        const void* const* from = x;
        for (int32_t left = num_x; left > 0; left -= kMostX, from += kMostX, to += kMostX * stride) {
            switch (left) {
                case 1: run_rows<Kernel, 4, 1>(matrix, begin, stop, from, to, stride); break;
                case 2: run_rows<Kernel, 4, 2>(matrix, begin, stop, from, to, stride); break;
                case 3: run_rows<Kernel, 2, 3>(matrix, begin, stop, from, to, stride); break;
                case 4: run_rows<Kernel, 2, 4>(matrix, begin, stop, from, to, stride); break;
                case 5: run_rows<Kernel, 2, 5>(matrix, begin, stop, from, to, stride); break;
                case 6: run_rows<Kernel, 2, 6>(matrix, begin, stop, from, to, stride); break;
                case 7: run_rows<Kernel, 2, 7>(matrix, begin, stop, from, to, stride); break;
                default: run_rows<Kernel, 2, kMostX>(matrix, begin, stop, from, to, stride); break;
            }
        }
    }
}

void multiply(const Matrix& matrix, int32_t type, int64_t begin, int64_t end, const void* const* x, int32_t num_x, float* out, int64_t stride) {
    if (!is_fast(matrix, type)) return general_multiply(matrix, type, begin, end, x, num_x, out, stride);
    switch (matrix.kind) {
        case DENSE_BF16: return run_kernel<Dense>(matrix, begin, end, x, num_x, out, stride);
        case FP8: return run_kernel<Fp8>(matrix, begin, end, x, num_x, out, stride);
        case INT8:
            if (matrix.code_signed) return run_kernel<Int8<true>::Rows>(matrix, begin, end, x, num_x, out, stride);
            return run_kernel<Int8<false>::Rows>(matrix, begin, end, x, num_x, out, stride);
        default:
            if (matrix.zeros) return run_kernel<Nibbles<true>::Rows>(matrix, begin, end, x, num_x, out, stride);
            return run_kernel<Nibbles<false>::Rows>(matrix, begin, end, x, num_x, out, stride);
    }
}

}  // namespace

const Level kAvx512 = {"avx512", prepared_bytes, prepare, multiply, general_activate};

}  // namespace offmoe
