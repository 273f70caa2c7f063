// One token's norms and attention, with the functions of one instruction set.
#include "attend_job.h"

namespace offmoe {

int32_t run_norm(const Level& level, Workspace& space, const Norm& call) {
    const int64_t width = in_vectors(call.width), row_bytes = call.width * size_of(call.type);
    float* memory = floats(space.inputs, 2 * width);
    if (memory == nullptr) return 1;
    read_padded(call.type, call.weight, call.width, memory);
    for (int64_t row = 0; row < call.rows; ++row) {
        read_padded(call.type, static_cast<const uint8_t*>(call.x) + row * row_bytes, call.width, memory + width);
        level.norm_row(memory + width, memory, call.type, call.width, call.eps, call.kind, memory + width);
        write_row(call.type, memory + width, call.width, static_cast<uint8_t*>(call.y) + row * row_bytes);
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
