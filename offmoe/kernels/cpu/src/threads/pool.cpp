#include "threads/pool.h"

#if !defined(_WIN32)
#include <pthread.h>
#include <signal.h>
#include <unistd.h>
#endif

#include <chrono>
#include <exception>
#include <new>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace offmoe {

// Shared by the pool and its helpers; the last of them frees it. After a fork the child leaves it to its parent's threads,
// whose shares never end there, and makes another.
struct Pool::State {
    std::mutex calls;
    std::mutex mutex;  // guards job, active, stopping, alive
    std::condition_variable wake;
    Job* job = nullptr;
    int32_t active = 0, alive = 0;
    bool stopping = false;
    std::atomic<uint64_t> generation{0};
    std::atomic<int64_t> next[kMaxPhases], done[kMaxPhases];
    std::atomic<int32_t> helping{0};
    std::atomic<bool> failed{false};
};

namespace {

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb");  // `yield` does nothing on most of these processors
#endif
}

#if defined(_WIN32)  // neither forks nor signals that a thread could take
inline int64_t process_number() { return 0; }
struct WithoutSignals {};
#else
inline int64_t process_number() { return getpid(); }
// Within, threads that begin take no signals: those are for Python's.
class WithoutSignals {
public:
    WithoutSignals() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~WithoutSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

private:
    sigset_t before_;
};
#endif

// How long a helper looks for work without letting others run: about what lies between two calls of a layer.
constexpr int64_t kAloneUs = 50;

// Spin for a moment, then let others run: whoever we wait for may need this core.
template <class Ready>
void wait_until(Ready ready) {
    for (int32_t turn = 0; !ready(); ++turn) {
        if (turn < 4000) pause();
        else std::this_thread::yield();
    }
}

}  // namespace

Pool::Pool(int32_t num_threads, int32_t spin_us) : num_threads_(num_threads < 1 ? 1 : num_threads), spin_us_(spin_us) {
    start();
}

std::mutex& Pool::calls() {
    if (process_ != process_number()) start();
    return state_->calls;
}

void Pool::start() {
    process_ = process_number();
    state_ = std::make_shared<State>();
    [[maybe_unused]] const WithoutSignals here;
    for (int32_t worker = 1; worker < num_threads_; ++worker) {
        try {
            std::thread(help, state_, worker, spin_us_).detach();
            ++state_->alive;
        } catch (const std::exception&) {
            break;  // no more threads to be had: those there are do the work
        }
    }
}

void Pool::run(Job& job) {
    State& state = *state_;
    for (int32_t phase = 0; phase < kMaxPhases; ++phase) {
        state.next[phase].store(0, std::memory_order_relaxed);
        state.done[phase].store(0, std::memory_order_relaxed);
    }
    state.failed.store(false, std::memory_order_relaxed);
    {
        std::lock_guard<std::mutex> lock(state.mutex);
        state.job = &job;
        state.generation.fetch_add(1, std::memory_order_release);
    }
    state.wake.notify_all();
    work(state, job, 0);
    {
        std::lock_guard<std::mutex> lock(state.mutex);
        state.job = nullptr;
    }
    wait_until([&] { return state.helping.load(std::memory_order_acquire) == 0; });
    if (state.failed.load(std::memory_order_relaxed)) throw std::bad_alloc();
}

void Pool::work(State& state, Job& job, int32_t worker) {
    for (int32_t phase = 0; phase < job.num_phases(); ++phase) {
        const int64_t num_tasks = job.num_tasks(phase);
        for (;;) {
            const int64_t task = state.next[phase].fetch_add(1, std::memory_order_relaxed);
            if (task >= num_tasks) break;
            try {
                if (!state.failed.load(std::memory_order_relaxed)) job.run(phase, task, worker);
            } catch (...) {  // all that tasks ask for is memory; the others still count theirs, so that nobody waits
                state.failed.store(true, std::memory_order_relaxed);
            }
            state.done[phase].fetch_add(1, std::memory_order_release);
        }
        wait_until([&] { return state.done[phase].load(std::memory_order_acquire) >= num_tasks; });
    }
}

void Pool::help(std::shared_ptr<State> shared, int32_t worker, int32_t spin_us) {
    State* const state = shared.get();
    uint64_t seen = 0;
    for (;;) {
        Job* job;
        const auto begin = std::chrono::steady_clock::now();
        const auto until = begin + std::chrono::microseconds(spin_us), alone = begin + std::chrono::microseconds(kAloneUs);
        for (auto now = begin; state->generation.load(std::memory_order_acquire) == seen && now < until;
             now = std::chrono::steady_clock::now()) {
            if (now > alone) std::this_thread::yield();
            else for (int32_t turn = 0; turn < 16; ++turn) pause();
        }
        {
            std::unique_lock<std::mutex> lock(state->mutex);
            state->wake.wait(lock, [&] { return state->stopping || state->generation.load() != seen; });
            if (state->stopping) {
                if (--state->alive == 0) state->wake.notify_all();
                return;
            }
            seen = state->generation.load();
            job = state->job;
            if (job == nullptr) continue;  // done without us
            state->helping.fetch_add(1, std::memory_order_relaxed);
        }
        work(*state, *job, worker);
        state->helping.fetch_sub(1, std::memory_order_release);
    }
}

void Pool::stop() {
    if (process_ != process_number()) return;
    std::lock_guard<std::mutex> one_call(state_->calls);
    std::unique_lock<std::mutex> lock(state_->mutex);
    state_->stopping = true;
    state_->wake.notify_all();
    state_->wake.wait(lock, [&] { return state_->alive == 0; });
}

}  // namespace offmoe
