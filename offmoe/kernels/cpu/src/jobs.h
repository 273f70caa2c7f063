// What the threads do: a layer's experts, or one linear.
#pragma once
#include <vector>

#include "level.h"
#include "pool.h"

namespace offmoe {

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

void read_row(int32_t type, const void* from, int64_t count, float* to);
void round_row(int32_t type, float* values, int64_t count);
void write_row(int32_t type, const float* from, int64_t count, void* to);

// Outputs a task computes: about ten microseconds of weights, a multiple of 16.
int64_t task_outputs(const Matrix& matrix, int64_t most);
// row[i] += bias[begin + i], for up to 512 of them.
void add_bias(int32_t type, const void* bias, int64_t begin, int64_t count, float* row);
// Logits, as floats, to experts and weights. `scores`: room for three numbers an expert.
void run_route(const Route& route, const float* logits, float* scores);

// All return 0, or 1 where there was no memory; or they throw std::bad_alloc.
int32_t run_experts(Pool& pool, const Level& level, Workspace& space, const Call& call);
int32_t run_linear(Pool& pool, const Level& level, Workspace& space, const Linear& call);
int32_t run_norm(const Level& level, Workspace& space, const Norm& call);
int32_t run_attend(Pool& pool, const Level& level, Workspace& space, const Attend& call);
int32_t run_latent(Pool& pool, const Level& level, Workspace& space, const Latent& call);
int32_t run_layer(Pool& pool, const Level& level, Workspace& space, const Layer& call);
int32_t run_encode(Pool& pool, const Level& level, Encode& call);
int32_t run_mamba(Pool& pool, const Level& level, Workspace& space, const Mamba& call);
int32_t run_delta(Pool& pool, const Level& level, Workspace& space, const Delta& call);
// Ends at the first step whose experts are not all in RAM, whose number it returns; else `call.end`. -1: no memory.
int64_t run_program(Pool& pool, const Level& level, Workspace& space, const Program& call);

}  // namespace offmoe
