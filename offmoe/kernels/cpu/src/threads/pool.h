// Threads that help with one job at a time.
//
// A job is phases of numbered tasks. Whoever is free takes the next task; a phase begins when every task of the one
// before is done. The caller works too, so a helper that the scheduler holds back delays nothing: what it did not take
// is done without it. Helpers look for work for a short while after a job, then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

namespace offmoe {

class Job {
public:
    virtual ~Job() = default;
    virtual int32_t num_phases() const = 0;
    virtual int64_t num_tasks(int32_t phase) const = 0;
    // `worker`: below the number of threads, no two at a time alike. Called by several threads at once.
    virtual void run(int32_t phase, int64_t task, int32_t worker) = 0;
};

class Pool {
public:
    // `num_threads` with the caller's. `spin_us`: how long a helper looks for work before it sleeps.
    Pool(int32_t num_threads, int32_t spin_us);
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // Held by who runs jobs, one at a time. In a forked child: another one, with new helpers.
    std::mutex& calls();
    // Returns when all is done. Throws std::bad_alloc, when no helper has the job any more, where a task threw.
    void run(Job& job);
    // Ends the helpers; run() then works alone. Takes `calls` itself.
    void stop();
    int32_t num_threads() const { return num_threads_; }

private:
    struct State;
    static constexpr int32_t kMaxPhases = 12;
    static void help(std::shared_ptr<State> shared, int32_t worker, int32_t spin_us);
    static void work(State& state, Job& job, int32_t worker);
    void start();

    const int32_t num_threads_, spin_us_;
    int64_t process_ = 0;
    std::shared_ptr<State> state_;
};

}  // namespace offmoe
