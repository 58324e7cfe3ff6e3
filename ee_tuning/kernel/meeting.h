// Where the threads of a call wait for each other, some hundred times a token.
#pragma once

#include <algorithm>
#include <atomic>

#include <omp.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

// A thread that comes early looks for the others for a while, then sleeps until they have come. Looking is fast, and takes a core from the
// very thread that is waited for where other processes are busy. So who looked in vain twice sleeps at once at the next meetings, at more
// and more of them as long as that goes on. One object for each parallel region.
class Meeting {
  public:
    void wait() {
        static thread_local Patience patience;
        const int num_threads = omp_get_num_threads(), seen = round.load();
        if (num_threads == 1) return;
        if (arrived.fetch_add(1) + 1 == num_threads) {
            arrived.store(0);
            round.store(seen + 1);
            if (num_asleep.load()) wake();
        } else if (!look(patience, seen)) {
            num_asleep.fetch_add(1);
            while (round.load() == seen) sleep(seen);
            num_asleep.fetch_sub(1);
        }
    }

  private:
    static constexpr int LOOKS = 1000, LEAST_REST = 16, MOST_REST = 256;  // a look takes some 25 ns
    struct Patience {
        int in_vain = 0, rest = 0, next_rest = LEAST_REST;
    };
    std::atomic<int> arrived{0}, round{0}, num_asleep{0};

    bool look(Patience &patience, int seen) {
        const int looks = patience.rest > 0 ? 1 : LOOKS;
        for (int i = 0; i < looks; ++i) {
            if (round.load() != seen) {
                if (!patience.rest) patience = Patience{};
                return true;
            }
            pause();
        }
        if (patience.rest > 0) --patience.rest;
        else if (++patience.in_vain >= 2) {
            patience.rest = patience.next_rest;
            patience.next_rest = std::min(2 * patience.next_rest, MOST_REST);
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
