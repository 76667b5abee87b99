/* Who works on a product: a pool of our own, or the threads of the OpenMP that torch has in the process. */
#include <stdatomic.h>
#include <stdlib.h>

#include "internal.h"

/* How a thread's floats behave, among it whether those below the smallest normal one are zero. Whoever starts a thread
 * hands on their own: XLA's threads, on which they are zero, might start ours. So each piece of work is done as whoever
 * asked for it has it, and the result does not depend on who took which piece. */
#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
static inline uint64_t float_mode(void) { return _mm_getcsr() & ~0x3fu; } /* without what happened so far */
static inline void set_float_mode(uint64_t mode) { _mm_setcsr((unsigned)mode); }
static inline void relax(void) { _mm_pause(); }
#else
static inline uint64_t float_mode(void) {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
static inline void set_float_mode(uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
static inline void relax(void) { __asm__ volatile("yield"); }
#endif

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
    uint64_t mode;
    _Atomic long next;
};
static void take_shares(void *p) {
    struct shared *s = p;
    const uint64_t before = float_mode();
    long i;
    set_float_mode(s->mode);
    while ((i = atomic_fetch_add_explicit(&s->next, s->step, memory_order_relaxed)) < s->n)
        s->fn(s->job, i, i + s->step < s->n ? i + s->step : s->n);
    set_float_mode(before);
}

/* --- the own pool ------------------------------------------------------------------------------------------------- */

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
typedef SRWLOCK lock;
typedef CONDITION_VARIABLE condition;
#define UNLOCKED SRWLOCK_INIT
#define NOBODY_WAITS CONDITION_VARIABLE_INIT
#define ENTRY DWORD WINAPI
static int taken(lock *l) { return !TryAcquireSRWLockExclusive(l); }
static void acquire(lock *l) { AcquireSRWLockExclusive(l); }
static void let_go(lock *l) { ReleaseSRWLockExclusive(l); }
static void await(condition *c, lock *l) { SleepConditionVariableSRW(c, l, INFINITE, 0); }
static void wake_all(condition *c) { WakeAllConditionVariable(c); }
static void step_aside(void) { SwitchToThread(); }
static double now_us(void) {
    LARGE_INTEGER ticks, frequency;
    QueryPerformanceCounter(&ticks);
    QueryPerformanceFrequency(&frequency);
    return 1e6 * (double)ticks.QuadPart / (double)frequency.QuadPart;
}
static int start_thread(LPTHREAD_START_ROUTINE entry) {
    HANDLE thread = CreateThread(0, 0, entry, 0, 0, 0);
    return thread && CloseHandle(thread);
}
#else
#include <pthread.h>
#include <time.h>
typedef pthread_mutex_t lock;
typedef pthread_cond_t condition;
#define UNLOCKED PTHREAD_MUTEX_INITIALIZER
#define NOBODY_WAITS PTHREAD_COND_INITIALIZER
#define ENTRY void *
static int taken(lock *l) { return pthread_mutex_trylock(l); }
static void acquire(lock *l) { pthread_mutex_lock(l); }
static void let_go(lock *l) { pthread_mutex_unlock(l); }
static void await(condition *c, lock *l) { pthread_cond_wait(c, l); }
static void wake_all(condition *c) { pthread_cond_broadcast(c); }
static void step_aside(void) { nanosleep(&(struct timespec){0, 0}, 0); }
static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e6 * (double)t.tv_sec + 1e-3 * (double)t.tv_nsec;
}
static int start_thread(void *(*entry)(void *)) {
    pthread_t thread;
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    int failed = pthread_create(&thread, &detached, entry, 0);
    pthread_attr_destroy(&detached);
    return !failed;
}
#endif

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
    uint64_t mode;
} work;
static lock busy = UNLOCKED, sleeping = UNLOCKED;
static condition wake = NOBODY_WAITS;
static int started;

static int take(void) {
    uint64_t t = atomic_load_explicit(&ticket, memory_order_acquire);
    while (t & 0xffffffff) {
        if (!atomic_compare_exchange_weak(&ticket, &t, t - 1)) continue;
        long i = (long)(t & 0xffffffff) - 1, last = (i + 1) * work.step;
        set_float_mode(work.mode);
        work.fn(work.job, i * work.step, last < work.n ? last : work.n);
        atomic_fetch_add_explicit(&done, 1, memory_order_release);
        return 1;
    }
    return 0;
}

static ENTRY worker(void *unused) {
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
        acquire(&sleeping);
        atomic_fetch_add(&sleepers, 1);
        while (!(atomic_load(&ticket) & 0xffffffff)) await(&wake, &sleeping);
        atomic_fetch_sub(&sleepers, 1);
        let_go(&sleeping);
    }
    return 0;
}

#if defined(_WIN32)
static void watch_forks(void) {}
#else
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
#endif

/* fn(job, first, last) over 0 ... n - 1 in pieces of `step`. Whoever comes while the pool is busy works alone. */
void mhk_parallel(mhk_range fn, void *job, long n, long step, int threads, int openmp) {
    long pieces = (n + step - 1) / step;
    if (threads > pieces) threads = (int)pieces;
    if (threads > 1 && openmp && gomp_parallel) {
        struct shared s = {fn, job, n, step, float_mode(), 0};
        gomp_parallel(take_shares, &s, (unsigned)threads, 0);
        return;
    }
    if (threads < 2 || taken(&busy)) {
        fn(job, 0, n);
        return;
    }
    watch_forks();
    while (started < threads - 1 && start_thread(worker)) started++; /* whoever there is does the work */
    work.fn = fn, work.job = job, work.n = n, work.step = step, work.mode = float_mode();
    atomic_store(&done, 0);
    static uint64_t number;
    atomic_store(&ticket, ++number << 32 | (uint64_t)pieces);
    if (atomic_load(&sleepers)) {
        acquire(&sleeping);
        wake_all(&wake);
        let_go(&sleeping);
    }
    while (take()) {}
    for (int i = 0; atomic_load_explicit(&done, memory_order_acquire) < pieces; i++) {
        relax();
        if (i > 2000) step_aside();
    }
    let_go(&busy);
}
