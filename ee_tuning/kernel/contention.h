// Whether threads of this process wait for cores that others use, by the time that Linux counts between the moment at which a thread can run
// and the one at which it does. Unlike a count of all runnable threads, it follows the cores and quotas that this process may use.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdio>

#if defined(__linux__)
#include <fcntl.h>
#include <unistd.h>
#endif

class Contention {
  public:
    using Clock = std::chrono::steady_clock;

    // Whether a thread waited for a core lately. Called by each thread now and then; where the system counts nothing, the answer is no.
    static bool is_seen(Clock::time_point now) {
        static std::atomic<Clock::rep> end{0};
        static thread_local Count last{now, run_delay()};
        if (now - last.at > WINDOW) {
            const Count count{now, run_delay()};
            if ((count.delay - last.delay) * SHARE > count.at - last.at) end.store((now + LASTS).time_since_epoch().count());
            last = count;
        }
        return now.time_since_epoch().count() < end.load(std::memory_order_relaxed);
    }

  private:
    static constexpr auto WINDOW = std::chrono::milliseconds(8), LASTS = std::chrono::milliseconds(40);
    static constexpr int SHARE = 7; // beside one busy process threads wait for 23 to 45% of the time, alone for at most 3%
    struct Count {
        Clock::time_point at;
        std::chrono::nanoseconds delay;
    };

    static std::chrono::nanoseconds run_delay() { // of this thread, since it began
        long long delay = 0;
#if defined(__linux__)
        const int file = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
        char text[80];
        const ssize_t size = file < 0 ? 0 : read(file, text, sizeof text - 1);
        if (file >= 0) close(file);
        text[size > 0 ? size : 0] = 0;
        if (std::sscanf(text, "%*s %lld", &delay) != 1) delay = 0;
#endif
        return std::chrono::nanoseconds(delay);
    }
};
