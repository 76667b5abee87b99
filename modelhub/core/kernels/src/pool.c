/* Who works on a product: a pool of our own, or the threads of the OpenMP that torch has in the process. */
#include <stdatomic.h>
#include <stdlib.h>

#include "internal.h"

static inline void relax(void) {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#else
    __asm__ volatile("yield");
#endif
}

/* --- OpenMP: two pools in one process take each other's cores, so torch's calls use torch's ----------------------- */

static void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static void watch_forks(void);
void mhk_use_openmp(void *function) {
    *(void **)&gomp_parallel = function;
    watch_forks();
}

struct shared {
    mhk_range fn;
    void *job;
    long n, step;
    _Atomic long next;
};
static void take_shares(void *p) {
    struct shared *s = p;
    long i;
    while ((i = atomic_fetch_add_explicit(&s->next, s->step, memory_order_relaxed)) < s->n)
        s->fn(s->job, i, i + s->step < s->n ? i + s->step : s->n);
}

/* --- the own pool ------------------------------------------------------------------------------------------------- */

#if defined(_WIN32)
static void watch_forks(void) {}
/* One thread: Windows has no pthreads, and a pool for it could not be tried. */
void mhk_parallel(mhk_range fn, void *job, long n, long step, int threads, int openmp) {
    (void)step, (void)threads, (void)openmp, (void)take_shares;
    fn(job, 0, n);
}
#else
#include <pthread.h>
#include <time.h>

enum { SPIN_US = 100 }; /* a product follows the one before within that; a sleeping worker takes 10 us to wake */

/* The number of the job in the high half, pieces of it that nobody has taken in the low one. A worker that takes a piece
 * keeps the job from ending, and its fields from changing. */
static _Atomic uint64_t ticket;
static _Atomic long done;
static _Atomic int sleepers;
static struct {
    mhk_range fn;
    void *job;
    long n, step;
} work;
static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER, sleeping = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int started;

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e6 * (double)t.tv_sec + 1e-3 * (double)t.tv_nsec;
}

static int take(void) {
    uint64_t t = atomic_load_explicit(&ticket, memory_order_acquire);
    while (t & 0xffffffff) {
        if (!atomic_compare_exchange_weak(&ticket, &t, t - 1)) continue;
        long i = (long)(t & 0xffffffff) - 1, last = (i + 1) * work.step;
        work.fn(work.job, i * work.step, last < work.n ? last : work.n);
        atomic_fetch_add_explicit(&done, 1, memory_order_release);
        return 1;
    }
    return 0;
}

static void *worker(void *unused) {
    (void)unused;
    for (;;) {
        double end = 0;
        for (int i = 1;; i++) {
            if (take()) {
                i = 0;
                end = 0;
                continue;
            }
            relax();
            if (i % 32) continue;
            double now = now_us();
            if (!end) end = now + SPIN_US;
            else if (now > end) break;
        }
        pthread_mutex_lock(&sleeping);
        atomic_fetch_add(&sleepers, 1);
        while (!(atomic_load(&ticket) & 0xffffffff)) pthread_cond_wait(&wake, &sleeping);
        atomic_fetch_sub(&sleepers, 1);
        pthread_mutex_unlock(&sleeping);
    }
    return 0;
}

static void in_child(void) { /* a fork has none of the threads, nor of OpenMP's, and locks as they were */
    gomp_parallel = 0;
    started = 0;
    atomic_store(&ticket, 0);
    atomic_store(&sleepers, 0);
    pthread_mutex_init(&busy, 0);
    pthread_mutex_init(&sleeping, 0);
    pthread_cond_init(&wake, 0);
}

static void watch_forks(void) {
    static int watched;
    if (!watched) watched = !pthread_atfork(0, 0, in_child);
}

static void start(int workers) {
    watch_forks();
    for (; started < workers; started++) {
        pthread_t thread;
        pthread_attr_t detached;
        pthread_attr_init(&detached);
        pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
        int failed = pthread_create(&thread, &detached, worker, 0);
        pthread_attr_destroy(&detached);
        if (failed) break; /* whoever there is does the work */
    }
}

/* fn(job, first, last) over 0 ... n - 1 in pieces of `step`. Whoever comes while the pool is busy works alone. */
void mhk_parallel(mhk_range fn, void *job, long n, long step, int threads, int openmp) {
    long pieces = (n + step - 1) / step;
    if (threads > pieces) threads = (int)pieces;
    if (threads > 1 && openmp && gomp_parallel) {
        struct shared s = {fn, job, n, step, 0};
        gomp_parallel(take_shares, &s, (unsigned)threads, 0);
        return;
    }
    if (threads < 2 || pthread_mutex_trylock(&busy)) {
        fn(job, 0, n);
        return;
    }
    start(threads - 1);
    work.fn = fn, work.job = job, work.n = n, work.step = step;
    atomic_store(&done, 0);
    static uint64_t number;
    atomic_store(&ticket, ++number << 32 | (uint64_t)pieces);
    if (atomic_load(&sleepers)) {
        pthread_mutex_lock(&sleeping);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&sleeping);
    }
    while (take()) {}
    for (int i = 0; atomic_load_explicit(&done, memory_order_acquire) < pieces; i++) {
        relax();
        if (i > 2000) nanosleep(&(struct timespec){0, 0}, 0);
    }
    pthread_mutex_unlock(&busy);
}
#endif
