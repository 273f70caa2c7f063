// Consecutive layers of one token, as long as the experts that their routers choose are in RAM.
#include <algorithm>
#include <chrono>

#include "jobs.h"

namespace offmoe {
namespace {

constexpr int64_t kBlock = 512;

int64_t now_ns() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

// to = x + y, rounded; of `type` all three.
void add_rows(int32_t type, const void* x, const void* y, int64_t count, void* to) {
    const int64_t size = type == F32 ? 4 : 2;
    float sums[kBlock], values[kBlock];
    for (int64_t begin = 0; begin < count; begin += kBlock) {
        const int64_t num = std::min(kBlock, count - begin), at = begin * size;
        read_row(type, static_cast<const uint8_t*>(x) + at, num, sums);
        read_row(type, static_cast<const uint8_t*>(y) + at, num, values);
        for (int64_t i = 0; i < num; ++i) sums[i] += values[i];
        write_row(type, sums, num, static_cast<uint8_t*>(to) + at);
    }
}

// Notes what the router chose; false where one of them is not in RAM.
bool look_up(const Step& step) {
    const int64_t* ids = step.layer->route.ids;
    bool all = true;
    for (int32_t k = 0; k < step.experts->top_k; ++k) {
        step.ids[k] = static_cast<int32_t>(ids[k]);
        step.chosen[k] = step.table[ids[k]];
        all = all && step.chosen[k] != nullptr;
    }
    return all;
}

}  // namespace

int64_t run_run(Pool& pool, const Level& level, Workspace& space, const Run& call) {
    const int64_t began = now_ns();
    for (int64_t i = call.begin; i < call.end; ++i) {
        Step& step = call.steps[i];
        Layer& layer = *step.layer;
        layer.attend.num_rows = call.num_rows[i];
        const int32_t type = layer.attend.type;
        if (run_layer(pool, level, space, layer)) return -1;
        step.routed_ns = now_ns() - began;
        const void* added = nullptr;
        if (step.experts != nullptr) {
            if (!look_up(step)) return i;
            if (run_experts(pool, level, space, *step.experts)) return -1;
            added = step.experts->total;
        }
        if (step.mlp != nullptr) {
            if (run_experts(pool, level, space, *step.mlp)) return -1;
            if (added != nullptr) add_rows(type, added, step.mlp->y, layer.width, step.mlp->y);
            added = step.mlp->y;
        }
        add_rows(type, layer.state, added, layer.width, step.output);
        step.ended_ns = now_ns() - began;
    }
    return call.end;
}

}  // namespace offmoe
