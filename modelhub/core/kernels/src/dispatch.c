/* Which instruction set, in which pieces: the functions of mhk.h but for packing. */
#include <stdlib.h>

#include "internal.h"

/* --- the processor ------------------------------------------------------------------------------------------------ */

#if defined(__x86_64__)
#if !defined(MHK_PROCESSOR) /* tests stand in for other processors */
#include <cpuid.h>
/* By hand: the compilers' __builtin_cpu_supports finds nothing when zig builds. */
static int processor_has(unsigned leaf, unsigned subleaf, int reg, int bit) {
    unsigned r[4];
    return __get_cpuid_count(leaf, subleaf, r, r + 1, r + 2, r + 3) && (r[reg] >> bit & 1);
}
static unsigned processor_saves(void) {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}
#endif
/* A vector register counts only if the system saves it, and xgetbv is there only if the system says so (OSXSAVE). */
enum { SSE = 0x2, AVX = 0x6, AVX512 = 0xe6 };
static int has(unsigned leaf, unsigned subleaf, int reg, int bit, unsigned saved) {
    if (saved != SSE && (!processor_has(1, 0, 2, 27) || (processor_saves() & saved) != saved)) return 0;
    return processor_has(leaf, subleaf, reg, bit);
}
static int sse(void) { /* SSSE3, 4.1, 4.2 */
    return has(1, 0, 2, 9, SSE) && has(1, 0, 2, 19, SSE) && has(1, 0, 2, 20, SSE);
}
static int avx2(void) { return has(7, 0, 1, 5, AVX) && has(1, 0, 2, 12, AVX) && has(1, 0, 2, 29, AVX); }   /* FMA, F16C */
static int avxvnni(void) { return avx2() && has(7, 1, 0, 4, AVX); }
static int avx512(void) { /* F, DQ, BW, VL */
    return avx2() && has(7, 0, 1, 16, AVX512) && has(7, 0, 1, 17, AVX512) && has(7, 0, 1, 30, AVX512) &&
           has(7, 0, 1, 31, AVX512);
}
static int avx512vnni(void) { return avx512() && has(7, 0, 2, 11, AVX512); }
#else
#if defined(__linux__)
#include <sys/auxv.h>
static int dotprod(void) { return getauxval(AT_HWCAP) >> 20 & 1; } /* HWCAP_ASIMDDP */
#else
static int dotprod(void) { return 1; } /* every Apple processor for macOS, and Windows on ARM */
#endif
static int neon(void) { return 1; }
#endif

static const struct {
    const char *name;
    const struct mhk_kernels *kernels;
    int (*there)(void);
} sets[] = { /* the best first */
#if defined(__x86_64__)
    {"avx512-vnni", &mhk_avx512vnni, avx512vnni},
    {"avx512", &mhk_avx512, avx512},
    {"avx-vnni", &mhk_avxvnni, avxvnni},
    {"avx2", &mhk_avx2, avx2},
    {"sse4.2", &mhk_sse, sse},
#else
    {"neon-dotprod", &mhk_dotprod, dotprod},
    {"neon", &mhk_neon, neon},
#endif
};
static int chosen = -1; /* -1: not looked yet; past the end: none */
enum { SETS = sizeof sets / sizeof *sets };

const struct mhk_kernels *mhk_kernels_here(void) {
    if (chosen < 0) {
        int i = 0;
        while (i < SETS && !sets[i].there()) i++;
        chosen = i;
    }
    return chosen < SETS ? sets[chosen].kernels : 0;
}
const char *mhk_isa(void) { return mhk_kernels_here() ? sets[chosen].name : ""; }
int mhk_set_isa(const char *name) {
    for (int i = 0; i < SETS; i++)
        if (!strcmp(sets[i].name, name) && sets[i].there()) {
            chosen = i;
            return 0;
        }
    return -1;
}

static int usual_threads = 1;
int mhk_threads(void) { return usual_threads; }
void mhk_set_threads(int threads) { usual_threads = threads < 1 ? 1 : threads; }

/* --- products ----------------------------------------------------------------------------------------------------- */

static long bytes_of_row(const mhk_matrix *w) {
    if (w->kind == MHK_F32) return 4 * w->k;
    if (w->kind < MHK_INT8) return 2 * w->k;
    return w->k * mhk_bits(w->kind) / 8 + w->k / 16;
}
static int fits(const mhk_matrix *w) {
    return w->kind >= 0 && w->kind < MHK_KINDS && w->n > 0 && w->k > 0 && (w->kind < MHK_INT8 || w->k % MHK_GROUP == 0);
}
/* Outputs that are a piece of work: some 256 KB of weights, whole tiles, at least two pieces a thread. */
static long piece(const mhk_matrix *w, int threads) {
    long step = 262144 / bytes_of_row(w) / MHK_TILE * MHK_TILE, most = (w->n / threads / 2 + MHK_TILE - 1) / MHK_TILE * MHK_TILE;
    if (step > most) step = most;
    return step < MHK_TILE ? MHK_TILE : step;
}

static void products(void *p, long first, long last) {
    const struct mhk_job *job = p;
    job->linear(job, first, last);
}
static void quantised(void *p, long first, long last) {
    const struct mhk_job *job = p;
    const long k = job->w->k, groups = k / MHK_GROUP;
    for (long r = first; r < last; r++)
        job->quantise(job->x + r * k, job->q + r * k, job->scales + r * groups, job->sums + 2 * r * groups, k);
}

int mhk_linear(const mhk_matrix *w, const float *x, float *y, long rows, int threads, int openmp) {
    const struct mhk_kernels *set = mhk_kernels_here();
    if (!set || !fits(w) || rows < 0) return -1;
    if (!rows) return 0;
    if (threads < 1 || bytes_of_row(w) * w->n * rows < 32768) threads = 1;
    struct mhk_job job = {.w = w, .x = x, .y = y, .rows = rows, .linear = set->linear[w->kind], .quantise = set->quantise};
    _Alignas(64) char here[16384];
    char *memory = here, *more = 0;
    if (w->kind >= MHK_INT8) {
        const long groups = w->k / MHK_GROUP, bytes = rows * (w->k + groups * (4 + 8));
        if (bytes > (long)sizeof here) memory = more = malloc((size_t)bytes);
        if (!memory) return -2;
        job.scales = (float *)memory;
        job.sums = (int32_t *)(job.scales + rows * groups);
        job.q = (int8_t *)(job.sums + 2 * rows * groups);
        mhk_parallel(quantised, &job, rows, rows > 16 ? 8 : rows, rows > 16 ? threads : 1, openmp);
    }
    mhk_parallel(products, &job, w->n, piece(w, threads), threads, openmp);
    free(more);
    return 0;
}

struct widening {
    const mhk_matrix *w;
    void (*widen)(const mhk_matrix *, long, float *);
    long first;
    float *out;
};
static void widened(void *p, long first, long last) {
    const struct widening *job = p;
    for (long i = first; i < last; i++) job->widen(job->w, job->first + i, job->out + i * job->w->k);
}
int mhk_widen(const mhk_matrix *w, long first, long count, float *out, int threads, int openmp) {
    const struct mhk_kernels *set = mhk_kernels_here();
    if (!set || !fits(w) || w->kind < MHK_INT8 || first < 0 || count < 0 || first + count > w->n) return -1;
    if (!count) return 0;
    struct widening job = {w, set->widen, first, out};
    long step = 65536 / w->k + 1;
    mhk_parallel(widened, &job, count, step, threads < 1 ? 1 : threads, openmp);
    return 0;
}
int mhk_take(const mhk_matrix *w, const int32_t *ids, long count, float *out) {
    const struct mhk_kernels *set = mhk_kernels_here();
    if (!set || !fits(w) || w->kind < MHK_INT8) return -1;
    int outside = 0;
    for (long i = 0; i < count; i++) {
        long id = ids[i] < 0 ? 0 : ids[i] < w->n ? ids[i] : w->n - 1;
        outside |= id != ids[i];
        set->widen(w, id, out + i * w->k);
    }
    return outside ? MHK_OUTSIDE : 0;
}
int mhk_rms_norm(const float *x, const float *w, float *y, long rows, long n, float eps, float offset) {
    const struct mhk_kernels *set = mhk_kernels_here();
    if (!set || rows < 0 || n < 1) return -1;
    for (long r = 0; r < rows; r++) set->rms_norm(x + r * n, w, y + r * n, n, eps, offset);
    return 0;
}
