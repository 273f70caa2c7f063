// A matrix to codes and scales, some groups a task.
#include <atomic>

#include "ops/jobs.h"

namespace offmoe {
namespace {

constexpr int64_t kTaskValues = 1 << 16;

class EncodeJob : public Job {
public:
    EncodeJob(const Isa& isa, const Encode& call)
        : isa_(isa), call_(call), groups_a_task_(kTaskValues / call.group) {}

    int32_t num_phases() const override { return 1; }
    int64_t num_tasks(int32_t) const override { return (call_.num_groups + groups_a_task_ - 1) / groups_a_task_; }
    void run(int32_t, int64_t task, int32_t) override {
        const int64_t begin = task * groups_a_task_, end = begin + groups_a_task_;
        if (!isa_.encode(call_, begin, end < call_.num_groups ? end : call_.num_groups)) is_finite = false;
    }

    std::atomic<bool> is_finite{true};

private:
    const Isa& isa_;
    const Encode& call_;
    const int64_t groups_a_task_;
};

}  // namespace

int32_t run_encode(Pool& pool, const Isa& isa, Encode& call) {
    EncodeJob job(isa, call);
    pool.run(job);
    call.is_finite = job.is_finite ? 1 : 0;
    return 0;
}

}  // namespace offmoe
