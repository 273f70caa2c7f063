// What the threads do: a layer's experts, or one linear.
#pragma once
#include <vector>

#include "isa/isa.h"
#include "ops/values.h"
#include "threads/pool.h"

namespace offmoe {

// Most outputs of a task.
constexpr int64_t kMostOutputs = 512;
// Bytes between prepared rows: a page apart they would share one set of the first cache.
constexpr int64_t kApart = 192;

// Memory that is aligned to a cache line and kept from call to call.
class Scratch {
public:
    ~Scratch();
    uint8_t* reserve(int64_t num_bytes);  // null where there is no memory

private:
    uint8_t* address_ = nullptr;
    int64_t size_ = 0;
};

// What one pool's jobs keep between calls. Used by one job at a time.
struct Workspace {
    Scratch inputs, hidden, hidden_inputs, outputs, layer;
    std::vector<const void*> rows, hidden_rows;
    std::vector<int64_t> first_task[2];  // of every expert, and the end
};

// Outputs a task computes: about ten microseconds of weights, a multiple of 16.
int64_t task_outputs(const Matrix& matrix, int64_t most);
// row[i] += bias[begin + i], for up to kMostOutputs of them.
void add_bias(int32_t type, const void* bias, int64_t begin, int64_t count, float* row);
// Logits, as floats, to experts and weights. `scores`: room for three numbers an expert.
void run_route(const Route& route, const float* logits, float* scores);

// All return 0, or 1 where there was no memory; or they throw std::bad_alloc.
int32_t run_experts(Pool& pool, const Isa& isa, Workspace& space, const Call& call);
int32_t run_linear(Pool& pool, const Isa& isa, Workspace& space, const Linear& call);
int32_t run_norm(const Isa& isa, Workspace& space, const Norm& call);
int32_t run_attend(Pool& pool, const Isa& isa, Workspace& space, const Attend& call);
int32_t run_latent(Pool& pool, const Isa& isa, Workspace& space, const Latent& call);
int32_t run_layer(Pool& pool, const Isa& isa, Workspace& space, const Layer& call);
int32_t run_encode(Pool& pool, const Isa& isa, Encode& call);
int32_t run_unpack(Pool& pool, const Isa& isa, const Unpack& call);
int32_t run_mamba(Pool& pool, const Isa& isa, Workspace& space, const Mamba& call);
int32_t run_delta(Pool& pool, const Isa& isa, Workspace& space, const Delta& call);
// Ends at the first step whose experts are not all in RAM, whose number it returns; else `call.end`. -1: no memory.
int64_t run_program(Pool& pool, const Isa& isa, Workspace& space, const Program& call);

}  // namespace offmoe
