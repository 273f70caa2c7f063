// AVX-512 with int8 activations: integer weights by VNNI, everything else as kAvx512 has it.
#include "int8_avx2.h"
#include "int8_avx512.h"

namespace offmoe {
namespace {

int64_t prepared_bytes(const Matrix& matrix, int32_t type) {
    if (!takes_int8(matrix) || !takes_vnni(matrix)) return int8_prepared_bytes<kAvx512>(matrix, type);
    if (matrix.kind != INT8) return (matrix.columns + 127) / 128 * chunk_bytes<NibbleBytes<false>>();
    return (matrix.columns + 63) / 64 * chunk_bytes<PlainBytes>();
}

void prepare(const Matrix& matrix, int32_t type, const float* x, void* prepared) {
    if (!takes_int8(matrix) || !takes_vnni(matrix)) return int8_prepare<kAvx512>(matrix, type, x, prepared);
    uint8_t* to = static_cast<uint8_t*>(prepared);
    if (matrix.kind == INT8) return prepare_vnni<PlainBytes>(matrix, x, to);
    if (matrix.kind == MXFP4) return prepare_vnni<NibbleBytes<true>>(matrix, x, to);
    prepare_vnni<NibbleBytes<false>>(matrix, x, to);
}

// `count` rows of weights x T rows of x, R and R: sums of a block of columns wait in memory for the next one.
template <class Kernel, int R, int T>
void run_rows(const Kernel& kernel, int64_t columns, int count, const void* const* x, float* out, int64_t stride) {
    const int64_t step = in_blocks(T) ? kBlockColumns / T / kChunk * kChunk : columns;
    __m512 sums[kBlockRows * T];
    for (int i = 0; i < count * T; ++i) sums[i] = _mm512_setzero_ps();
    for (int64_t first = 0; first < columns; first += step) {
        const int64_t last = std::min(first + step, columns);
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
        const int count = static_cast<int>(std::min<int64_t>(kBlockRows, end - begin));
        kernel.start(begin, count, few);
        const void* const* from = x;
        float* to = out;
        int32_t left = num_x;
        for (; left >= 8; left -= 8, from += 8, to += 8 * stride)
            run_rows<Kernel, 2, 8>(kernel, matrix.columns, count, from, to, stride);
        for (; left >= 4; left -= 4, from += 4, to += 4 * stride)
            run_rows<Kernel, 2, 4>(kernel, matrix.columns, count, from, to, stride);
        for (; left >= 2; left -= 2, from += 2, to += 2 * stride)
            run_rows<Kernel, 2, 2>(kernel, matrix.columns, count, from, to, stride);
        if (left == 1) run_rows<Kernel, 2, 1>(kernel, matrix.columns, count, from, to, stride);
    }
}

void multiply(const Matrix& matrix, int32_t type, int64_t begin, int64_t end, const void* const* x, int32_t num_x,
              float* out, int64_t stride) {
    if (!takes_int8(matrix) || !takes_vnni(matrix))
        return int8_multiply<Avx2Unit, kAvx512>(matrix, type, begin, end, x, num_x, out, stride);
    const bool zeros = matrix.zeros != nullptr;
    if (matrix.kind == MXFP4)
        return run_kernel<Bytes<NibbleBytes<true>, false>>(matrix, begin, end, x, num_x, out, stride);
    if (matrix.kind == INT4 && zeros)
        return run_kernel<Bytes<NibbleBytes<false>, true>>(matrix, begin, end, x, num_x, out, stride);
    if (matrix.kind == INT4)
        return run_kernel<Bytes<NibbleBytes<false>, false>>(matrix, begin, end, x, num_x, out, stride);
    if (zeros) return run_kernel<Bytes<PlainBytes, true>>(matrix, begin, end, x, num_x, out, stride);
    run_kernel<Bytes<PlainBytes, false>>(matrix, begin, end, x, num_x, out, stride);
}

}  // namespace

const Rounding kAvx512Int8 = {prepared_bytes, prepare, multiply};

}  // namespace offmoe
