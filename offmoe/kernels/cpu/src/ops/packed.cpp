// Rows of PACKED to numbers, some rows a task.
#include <algorithm>

#include "ops/jobs.h"

namespace offmoe {
namespace {

constexpr int64_t kTaskValues = 1 << 17;

class UnpackJob : public Job {
public:
    UnpackJob(const Isa& isa, const Unpack& call)
        : isa_(isa), call_(call), rows_a_task_(std::max<int64_t>(kTaskValues / call.matrix->columns, 1)) {}

    int32_t num_phases() const override { return 1; }
    int64_t num_tasks(int32_t) const override { return (call_.end - call_.begin + rows_a_task_ - 1) / rows_a_task_; }
    void run(int32_t, int64_t task, int32_t) override {
        const int64_t begin = call_.begin + task * rows_a_task_;
        isa_.unpack(call_, begin, std::min(begin + rows_a_task_, call_.end));
    }

private:
    const Isa& isa_;
    const Unpack& call_;
    const int64_t rows_a_task_;
};

}  // namespace

int32_t run_unpack(Pool& pool, const Isa& isa, const Unpack& call) {
    UnpackJob job(isa, call);
    pool.run(job);
    return 0;
}

}  // namespace offmoe
