// Whether more threads want to run than the machine has cores, by the count that Linux keeps of those that can.
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

    // `num_asleep` threads of the caller's are not in the count, and will want a core soon. Two counts have to agree before the answer
    // changes, for a moment's work of the system's is none of another process. Where nothing can be counted, there is none.
    static bool is_seen(Clock::time_point now, int num_asleep) {
        static std::atomic<Clock::rep> due{0};
        static std::atomic<bool> before{false}, seen{false};
        Clock::rep planned = due.load(std::memory_order_relaxed);
        if (now.time_since_epoch().count() > planned &&
            due.compare_exchange_strong(planned, (now + BETWEEN_COUNTS).time_since_epoch().count())) {
            const int num_running = num_runnable();
            const bool is_crowded = num_running > 0 && num_running + num_asleep > num_cores();
            if (is_crowded == before.exchange(is_crowded)) seen.store(is_crowded, std::memory_order_relaxed);
        }
        return seen.load(std::memory_order_relaxed);
    }

  private:
    static constexpr auto BETWEEN_COUNTS = std::chrono::milliseconds(4); // a count takes some microseconds

#if defined(__linux__)
    static int num_cores() {
        static const int cores = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
        return cores;
    }

    static int num_runnable() { // the caller is one of them; 0 where the system does not say
        static const int file = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
        char text[64];
        const ssize_t size = file < 0 ? 0 : pread(file, text, sizeof text - 1, 0);
        int count = 0;
        if (size <= 0) return 0;
        text[size] = 0;
        return std::sscanf(text, "%*s %*s %*s %d/", &count) == 1 ? count : 0;
    }
#else
    static int num_cores() { return 1; }
    static int num_runnable() { return 0; }
#endif
};
