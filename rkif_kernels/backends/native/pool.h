// Threads that persist between calls, and the distribution of tiles to them.
#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "elements.h"

class Pool {
  public:
    // The pool of this process. A forked child has none of the parent's threads, so it starts its own.
    static Pool& of_process() {
        static std::atomic<Pool*> current{nullptr};
        static const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
        (void)registered;
        Pool* pool = current.load();
        if (pool) return *pool;
        Pool* made = new Pool;
        if (current.compare_exchange_strong(pool, made)) return *made;
        delete made;
        return *pool;
    }

    // Call body(thread) on up to `threads` threads, including this one, and wait for all. There are fewer threads if
    // another call uses the pool or no thread can be started, so the body must loop until no work is left.
    // If a body throws an exception, it is thrown again after all bodies have ended.
    void run(int threads, const std::function<void(int)>& body) {
        if (threads <= 1) return body(0);  // without the lock, so that a larger call can use the threads
        std::unique_lock<std::mutex> only(in_use_, std::try_to_lock);
        if (!only.owns_lock()) return body(0);
        std::unique_lock<std::mutex> lock(mutex_);
        try {
            for (int next = static_cast<int>(started_); next < threads - 1; ++next) {
                std::thread([this, next] { work(next); }).detach();
                ++started_;
            }
        } catch (const std::system_error&) {
        }
        body_ = &body;
        active_ = left_ = std::min<int>(threads - 1, started_);
        ++call_;
        failure_ = nullptr;
        lock.unlock();
        wake_.notify_all();
        std::exception_ptr own = outcome(body, 0);
        lock.lock();
        done_.wait(lock, [this] { return left_ == 0; });
        if (!own) own = failure_;
        lock.unlock();
        if (own) std::rethrow_exception(own);
    }

  private:
    static std::exception_ptr outcome(const std::function<void(int)>& body, int thread) noexcept {
        try {
            body(thread);
            return nullptr;
        } catch (...) {
            return std::current_exception();
        }
    }

    void work(int index) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (uint64_t seen = 0;;) {
            wake_.wait(lock, [&] { return call_ != seen; });
            seen = call_;
            if (index >= active_) continue;
            const std::function<void(int)>* body = body_;
            lock.unlock();
            const std::exception_ptr failure = outcome(*body, index + 1);
            lock.lock();
            if (failure) failure_ = failure;
            if (--left_ == 0) done_.notify_one();
        }
    }

    std::exception_ptr failure_;  // of another thread's body in this call
    std::mutex in_use_, mutex_;
    std::condition_variable wake_, done_;
    const std::function<void(int)>* body_ = nullptr;
    int started_ = 0, active_ = 0, left_ = 0;
    uint64_t call_ = 0;
};

// The tiles of lists of tensors, in order.
class Tiles {
  public:
    explicit Tiles(const Lists& lists) : lists_(lists), first_(lists.tensors + 1, 0) {
        for (int64_t t = 0; t < lists.tensors; ++t) first_[t + 1] = first_[t] + (lists.numels[t] + TILE - 1) / TILE;
    }

    int64_t size() const { return first_.back(); }

    int threads(int most) const {
        return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(most, size() / TILES_A_THREAD)));
    }

    struct Place {
        int64_t tensor, start, size;
    };

    Place operator[](int64_t tile) const {
        const int64_t tensor = std::upper_bound(first_.begin(), first_.end(), tile) - first_.begin() - 1;
        const int64_t start = (tile - first_[tensor]) * TILE;
        return {tensor, start, std::min(TILE, lists_.numels[tensor] - start)};
    }

    // Call body(thread, tile, place) once for every tile. A thread takes the next few tiles whenever it is idle. So a
    // thread on a busy core processes fewer tiles, and the others do not wait long for it.
    template <class Body>
    void for_each(int most_threads, Body body) const {
        std::atomic<int64_t> next{0};
        const int64_t tiles = size();
        Pool::of_process().run(threads(most_threads), [&](int thread) {
            for (int64_t first; (first = next.fetch_add(TILES_AT_ONCE, std::memory_order_relaxed)) < tiles;)
                for (int64_t tile = first; tile < std::min(first + TILES_AT_ONCE, tiles); ++tile)
                    body(thread, tile, (*this)[tile]);
        });
    }

  private:
    static constexpr int64_t TILES_A_THREAD = 8;  // minimum of work for which a thread is woken
    static constexpr int64_t TILES_AT_ONCE = 4;

    const Lists& lists_;
    std::vector<int64_t> first_;
};
