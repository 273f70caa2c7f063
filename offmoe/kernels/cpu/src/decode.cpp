// One token's norms and attention, with the functions of one instruction set.
#include "attend_job.h"

namespace offmoe {
namespace {

// A layer norm of one row, in place; rounded once.
void centre(const Norm& call, const float* weight, float* x) {
    double total = 0, squares = 0;
    for (int64_t i = 0; i < call.width; ++i) total += x[i];
    const float mean = static_cast<float>(total / static_cast<double>(call.width));
    for (int64_t i = 0; i < call.width; ++i) {
        x[i] -= mean;
        squares += static_cast<double>(x[i]) * x[i];
    }
    const float scale = 1.0f / std::sqrt(static_cast<float>(squares / static_cast<double>(call.width)) + call.eps);
    for (int64_t i = 0; i < call.width; ++i) {
        float bias = 0;
        if (call.bias != nullptr) read_row(call.type, static_cast<const uint8_t*>(call.bias) + i * size_of(call.type), 1, &bias);
        x[i] = x[i] * scale * weight[i] + bias;
    }
}

}  // namespace

int32_t run_norm(const Level& level, Workspace& space, const Norm& call) {
    const int64_t width = in_vectors(call.width), row_bytes = call.width * size_of(call.type);
    float* memory = floats(space.inputs, 2 * width);
    if (memory == nullptr) return 1;
    read_padded(call.type, call.weight, call.width, memory);
    for (int64_t row = 0; row < call.rows; ++row) {
        float* x = memory + width;
        read_padded(call.type, static_cast<const uint8_t*>(call.x) + row * row_bytes, call.width, x);
        if (call.kind == CENTRED) {
            centre(call, memory, x);
        } else {
            level.norm_row(x, memory, call.type, call.width, call.eps, call.kind, x);
        }
        write_row(call.type, x, call.width, static_cast<uint8_t*>(call.y) + row * row_bytes);
    }
    return 0;
}

int32_t run_attend(Pool& pool, const Level& level, Workspace& space, const Attend& call) {
    AttendJob job(pool, level, space, call);
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
