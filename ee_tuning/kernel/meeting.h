// Where the threads of a call wait for each other, some hundred times a token.
#pragma once

#include <atomic>
#include <chrono>

#include <omp.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#include "contention.h"

// A thread that comes early looks for the others for a while, then sleeps until they have come. Looking is fast, and takes a core from the
// very thread that is waited for where other processes want it, too: then threads sleep at once. One object for each parallel region.
class Meeting {
  public:
    void wait() {
        const int num_threads = omp_get_num_threads(), seen = round.load();
        if (num_threads == 1) return;
        if (arrived.fetch_add(1) + 1 == num_threads) {
            arrived.store(0);
            round.store(seen + 1);
            if (num_asleep.load()) wake();
        } else if (!look(seen)) {
            num_asleep.fetch_add(1);
            while (round.load() == seen) sleep(seen);
            num_asleep.fetch_sub(1);
        }
    }

  private:
    using Clock = Contention::Clock;
    static constexpr auto LOOKING = std::chrono::microseconds(50); // waking up takes as long where the core went idle meanwhile
    static constexpr int LOOKS_PER_CLOCK = 16;                     // a look takes 10 to 40 ns, by processor
    std::atomic<int> arrived{0}, round{0}, num_asleep{0};

    bool look(int seen) {
        auto now = Clock::now();
        const auto until = Contention::is_seen(now) ? now : now + LOOKING;
        for (; now < until; now = Clock::now()) {
            for (int i = 0; i < LOOKS_PER_CLOCK; ++i) {
                if (round.load() != seen) return true;
                pause();
            }
        }
        return false;
    }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("isb");
#endif
    }

#if defined(__linux__)
    void sleep(int seen) { syscall(SYS_futex, reinterpret_cast<int *>(&round), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0); }
    void wake() { syscall(SYS_futex, reinterpret_cast<int *>(&round), FUTEX_WAKE_PRIVATE, omp_get_num_threads(), nullptr, nullptr, 0); }
#else
    void sleep(int) { sched_yield(); }
    void wake() {}
#endif
};
