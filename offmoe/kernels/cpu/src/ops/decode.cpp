// One token's norms and attention, with the functions of one instruction set.
#include <numeric>

#include "ops/attend_job.h"

namespace offmoe {
namespace {

// A layer norm of one row of whole vectors, in place; rounded once. `bias` is not read where the call has none.
void centre(const Norm& call, const float* weight, const float* bias, float* x) {
    double totals[kVectorFloats] = {}, squares[kVectorFloats] = {};
    const int64_t end = in_vectors(call.width);
    const auto sum = [](const double* lanes) { return std::accumulate(lanes, lanes + kVectorFloats, 0.0); };
    for (int64_t i = 0; i < end; i += kVectorFloats)
        for (int64_t lane = 0; lane < kVectorFloats; ++lane) totals[lane] += x[i + lane];
    const float mean = static_cast<float>(sum(totals) / static_cast<double>(call.width));
    for (int64_t i = 0; i < call.width; ++i) x[i] -= mean;
    for (int64_t i = 0; i < end; i += kVectorFloats)
        for (int64_t lane = 0; lane < kVectorFloats; ++lane) squares[lane] += static_cast<double>(x[i + lane]) * x[i + lane];
    const float scale = 1.0f / std::sqrt(static_cast<float>(sum(squares) / static_cast<double>(call.width)) + call.eps);
    for (int64_t i = 0; i < call.width; ++i) x[i] = x[i] * scale * weight[i] + (call.bias != nullptr ? bias[i] : 0.0f);
}

}  // namespace

int32_t run_norm(const Isa& isa, Workspace& space, const Norm& call) {
    const int64_t width = in_vectors(call.width), row_bytes = call.width * size_of(call.type);
    float* memory = floats(space.inputs, 3 * width);
    if (memory == nullptr) return 1;
    read_padded(call.type, call.weight, call.width, memory);
    if (call.bias != nullptr) read_padded(call.type, call.bias, call.width, memory + 2 * width);
    for (int64_t row = 0; row < call.rows; ++row) {
        float* x = memory + width;
        read_padded(call.type, static_cast<const uint8_t*>(call.x) + row * row_bytes, call.width, x);
        if (call.kind == CENTRED) {
            centre(call, memory, memory + 2 * width, x);
        } else {
            isa.norm_row(x, memory, call.type, call.width, call.eps, call.kind, x);
        }
        write_row(call.type, x, call.width, static_cast<uint8_t*>(call.y) + row * row_bytes);
    }
    return 0;
}

int32_t run_attend(Pool& pool, const Isa& isa, Workspace& space, const Attend& call) {
    AttendJob job(pool, isa, space, call);
    if (!job.has_memory()) return 1;
    job.prepare();
    if (job.is_shared()) {
        pool.run(job);
    } else {
        for (int64_t task = 0; task < job.num_tasks(0); ++task) job.run(0, task, 0);
    }
    job.finish();
    return 0;
}

}  // namespace offmoe
