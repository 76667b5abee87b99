/* Which instruction set, in which pieces: the functions of mhk.h but for packing. */
#include <math.h>
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

struct together {
    struct mhk_job jobs[MHK_TOGETHER];
    long first[MHK_TOGETHER + 1], steps[MHK_TOGETHER]; /* first: number of a job's first piece */
};
static void products(void *p, long first, long last) {
    const struct together *all = p;
    for (long i = first; i < last; i++) {
        long m = 0;
        while (i >= all->first[m + 1]) m++;
        const long n = all->jobs[m].w->n, from = (i - all->first[m]) * all->steps[m], to = from + all->steps[m];
        all->jobs[m].linear(all->jobs + m, from, to < n ? to : n);
    }
}
static void quantised(void *p, long first, long last) {
    const struct mhk_job *job = p;
    const long k = job->w->k, groups = k / MHK_GROUP;
    for (long r = first; r < last; r++)
        job->quantise(job->x + r * k, job->q + r * k, job->scales + r * groups, job->sums + 2 * r * groups, k);
}

int mhk_linears(const mhk_matrix *w, long count, const float *x, float *const *y, long rows, int threads, int openmp) {
    const struct mhk_kernels *set = mhk_kernels_here();
    if (!set || count < 1 || count > MHK_TOGETHER || rows < 0) return -1;
    long bytes = 0;
    int integers = 0;
    for (long m = 0; m < count; m++) {
        if (!fits(w + m) || w[m].k != w->k) return -1;
        bytes += bytes_of_row(w + m) * w[m].n;
        integers |= w[m].kind >= MHK_INT8;
    }
    if (!rows) return 0;
    if (threads < 1 || bytes * rows < 32768) threads = 1;
    struct mhk_job job = {.w = w, .x = x, .rows = rows, .quantise = set->quantise};
    _Alignas(64) char here[16384];
    char *memory = here, *more = 0;
    if (integers) {
        const long groups = w->k / MHK_GROUP, needed = rows * (w->k + groups * (4 + 8));
        if (needed > (long)sizeof here) memory = more = malloc((size_t)needed);
        if (!memory) return -2;
        job.scales = (float *)memory;
        job.sums = (int32_t *)(job.scales + rows * groups);
        job.q = (int8_t *)(job.sums + 2 * rows * groups);
        mhk_parallel(quantised, &job, rows, rows > 16 ? 8 : rows, rows > 16 ? threads : 1, openmp);
    }
    struct together all;
    all.first[0] = 0;
    for (long m = 0; m < count; m++) {
        all.jobs[m] = job;
        all.jobs[m].w = w + m, all.jobs[m].y = y[m], all.jobs[m].linear = set->linear[w[m].kind];
        all.steps[m] = piece(w + m, threads);
        all.first[m + 1] = all.first[m] + (w[m].n + all.steps[m] - 1) / all.steps[m];
    }
    mhk_parallel(products, &all, all.first[count], 1, threads, openmp);
    free(more);
    return 0;
}
int mhk_linear(const mhk_matrix *w, const float *x, float *y, long rows, int threads, int openmp) {
    return mhk_linears(w, 1, x, &y, rows, threads, openmp);
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

/* --- what is between the products --------------------------------------------------------------------------------- */

struct attending {
    struct mhk_attention a;
    const struct mhk_attention_kernels *set;
    float *y;
};
static void attended(void *p, long first, long last) {
    const struct attending *job = p;
    for (long i = first; i < last; i++) job->set->attend(&job->a, i);
}
/* The weighted sum of what the pieces of a key head have found, each as far below the largest score as it is. */
static void sum_up(const struct attending *job, long head, long pieces) {
    const long rows = job->a.group, h = job->a.width, size = rows * (h + 2);
    const float *parts = job->a.parts + head * pieces * size;
    for (long r = 0; r < rows; r++) {
        float *y = job->y + (head * rows + r) * h, peak = parts[r], total = 0;
        for (long p = 1; p < pieces; p++) peak = parts[p * size + r] > peak ? parts[p * size + r] : peak;
        memset(y, 0, 4 * (size_t)h);
        for (long p = 0; p < pieces; p++) {
            const float *part = parts + p * size, *values = part + 2 * rows + r * h, weight = expf(part[r] - peak);
            if (part[rows + r] == 0) continue;
            total += weight * part[rows + r];
            for (long j = 0; j < h; j++) y[j] += weight * values[j];
        }
        for (long j = 0; j < h; j++) y[j] /= total;
    }
}
int mhk_attend(const mhk_shapes *s, const float *q, const float *k, const float *v, const uint8_t *mask, float *y,
               int threads, int openmp) {
    const struct mhk_kernels *set = mhk_kernels_here();
    if (!set || s->batch < 0 || s->kv_heads < 1 || s->heads % s->kv_heads || s->time < 0 || s->slots < 1 || s->width < 1)
        return -1;
    if (mask && s->masks != 1 && s->masks != s->batch) return -1;
    const long group = s->heads / s->kv_heads * s->time, heads = s->batch * s->kv_heads;
    const long pieces = (s->slots + MHK_PIECE - 1) / MHK_PIECE, items = heads * pieces, size = group * (s->width + 2);
    if (!heads || !group) return 0;
    int skips = 1; /* a query that sees nothing weighs all slots alike */
    for (long row = 0; mask && row < s->masks * s->time; row++) skips &= !!memchr(mask + row * s->slots, 1, (size_t)s->slots);
    float here[8192], *parts = here, *more = 0;
    if (items * size > (long)(sizeof here / sizeof *here)) parts = more = malloc(4 * (size_t)(items * size));
    if (!parts) return -2;
    struct attending job = {{q, k, v, mask, parts, s->kv_heads, group, s->time, s->slots, s->width, s->masks, s->scale,
                             s->softcap, skips}, set->attention, y};
    if (threads < 1 || heads * s->slots * s->width < 65536) threads = 1;
    mhk_parallel(attended, &job, items, 1, threads, openmp);
    for (long head = 0; head < heads; head++) sum_up(&job, head, pieces);
    free(more);
    return 0;
}
int mhk_rotate(const float *x, const float *cosines, const float *sines, float *y, long batch, long heads, long time,
               long width, long tables) {
    const struct mhk_kernels *set = mhk_kernels_here();
    if (!set || width % 2 || (tables != 1 && tables != batch)) return -1;
    for (long row = 0; row < batch * heads * time; row++) {
        const long at = ((tables == 1 ? 0 : row / (heads * time) * time) + row % time) * (width / 2);
        set->attention->rotate(x + row * width, cosines + at, sines + at, y + row * width, width / 2);
    }
    return 0;
}
int mhk_write(float *buffer, const float *rows, const int32_t *start, long batch, long heads, long time, long width,
              long slots) {
    for (long b = 0; b < batch; b++)
        if (start[b] < 0 || start[b] + time > slots) return -1;
    for (long i = 0; i < batch * heads; i++)
        memcpy(buffer + (i * slots + start[i / heads]) * width, rows + i * time * width, 4 * (size_t)(time * width));
    return 0;
}
int mhk_activate(int kind, const float *x, float *y, long n) {
    const struct mhk_kernels *set = mhk_kernels_here();
    if (!set || kind < MHK_SILU || kind > MHK_GELU_TANH || n < 0) return -1;
    set->attention->activate(kind, x, y, n);
    return 0;
}
