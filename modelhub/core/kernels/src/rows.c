/* One instruction set's products. Compiled once for each, with its flags and -DISA=<name>. Nothing is read past the end of
 * any array. */
#include "vectors.h"

/* --- intrinsics --------------------------------------------------------------------------------------------------- */

/* dot4, dot8: each of a's 32-bit lanes plus four products of bytes, x signed; w is 0 to 15 in dot4, -127 to 127 in dot8.
 * BIAS: dot8 counts each w as so much more than it is, since the instruction takes unsigned ones. */
#if defined(__AVX512VNNI__)
#define BIAS 128
INLINE vi dot4(vi a, vb w, vi x) { return (vi)_mm512_dpbusd_epi32((__m512i)a, (__m512i)w, (__m512i)x); }
INLINE vi dot8(vi a, vb w, vi x) { return dot4(a, w ^ 0x80, x); }
#elif defined(__AVXVNNI__)
#define BIAS 128
INLINE vi dot4(vi a, vb w, vi x) { return (vi)_mm256_dpbusd_avx_epi32((__m256i)a, (__m256i)w, (__m256i)x); }
INLINE vi dot8(vi a, vb w, vi x) { return dot4(a, w ^ 0x80, x); }
#elif defined(__SSSE3__)
#define BIAS 0
/* Products of bytes come in pairs, in 16 bits: eight pairs of dot4's fit into them, one of dot8's. */
#define PAIRS16
#if VB == 64
typedef __m512i vi_raw;
#define M(name) _mm512_##name
INLINE __m512i signed_by(__m512i x, __m512i w) {
    return _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
}
INLINE vi_raw magnitude(vi_raw w) { return _mm512_abs_epi8(w); }
#elif VB == 32
typedef __m256i vi_raw;
#define M(name) _mm256_##name
INLINE __m256i signed_by(__m256i x, __m256i w) { return _mm256_sign_epi8(x, w); }
INLINE vi_raw magnitude(vi_raw w) { return _mm256_abs_epi8(w); }
#else
typedef __m128i vi_raw;
#define M(name) _mm_##name
INLINE __m128i signed_by(__m128i x, __m128i w) { return _mm_sign_epi8(x, w); }
INLINE vi_raw magnitude(vi_raw w) { return _mm_abs_epi8(w); }
#endif
INLINE vi_raw pairs(vb w, vi x) { return M(maddubs_epi16)((vi_raw)w, (vi_raw)x); }
INLINE vi_raw plus16(vi_raw a, vi_raw b) { return M(add_epi16)(a, b); }
INLINE vi widened(vi_raw pairs16) { return (vi)M(madd_epi16)(pairs16, M(set1_epi16)(1)); }
INLINE vi dot8(vi a, vb w, vi x) {
    return a + widened(pairs((vb)magnitude((vi_raw)w), (vi)signed_by((vi_raw)x, (vi_raw)w)));
}
#elif defined(__ARM_FEATURE_DOTPROD)
#define BIAS 0
INLINE vi dot8(vi a, vb w, vi x) { return (vi)vdotq_s32((int32x4_t)a, (int8x16_t)w, (int8x16_t)x); }
#define dot4 dot8
#elif defined(__ARM_NEON)
#define BIAS 0
INLINE vi dot8(vi a, vb w, vi x) {
    int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)w), vget_low_s8((int8x16_t)x));
    int16x8_t high = vmull_high_s8((int8x16_t)w, (int8x16_t)x);
    return a + (vi)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
}
#define dot4 dot8
#endif

INLINE float half(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, digits = h & 1023, bits;
    float f;
    if (exponent == 0) {
        f = (float)digits * 0x1p-24f;
        return sign ? -f : f;
    }
    bits = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (digits << 13);
    memcpy(&f, &bits, 4);
    return f;
#endif
}

INLINE vf halves(const uint16_t *p) {
#if VB == 64
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
#elif VB == 32
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p));
#elif defined(__ARM_NEON)
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
    return (vf){half(p[0]), half(p[1]), half(p[2]), half(p[3])};
#endif
}

INLINE vf brain_floats(const uint16_t *p) { /* compilers make slow code of the conversion */
#if VB == 64
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
#elif VB == 32
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16);
#elif defined(__SSSE3__)
    return (vf)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const void *)p));
#else
    return (vf)(__builtin_convertvector((vh)*(const vh_any *)p, vu) << 16);
#endif
}

INLINE int32_t four_at(const int8_t *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return v;
}
INLINE float float_of(float v) { return v; }
INLINE float brain_float(uint16_t v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* --- float weights, row-major ------------------------------------------------------------------------------------- */

enum { AHEAD = 4096 }; /* bytes that are asked for in advance */

/* NAME_block: I outputs of R rows of x, whose sums stay in registers. */
#define FLOATS(NAME, T, LOAD, ONE)                                                                                     \
    INLINE void NAME##_block(const T *w, const float *x, float *y, long n, long k, const int I, const int R) {         \
        enum { LINE = 64 / sizeof(T) / VL }; /* vectors that use up a cache line of weights */                         \
        vf sums[4][4] = {{{0}}};                                                                                       \
        long j = 0;                                                                                                    \
        for (; j + LINE * VL <= k; j += LINE * VL) {                                                                   \
            for (int i = 0; i < I; i++) __builtin_prefetch(w + i * k + j + AHEAD / sizeof(T));                         \
            for (int u = 0; u < LINE; u++) {                                                                           \
                vf xs[4];                                                                                              \
                for (int r = 0; r < R; r++) xs[r] = floats_at(x + r * k + j + u * VL);                                 \
                for (int i = 0; i < I; i++) {                                                                          \
                    vf ws = LOAD(w + i * k + j + u * VL);                                                              \
                    for (int r = 0; r < R; r++) sums[i][r] += ws * xs[r];                                              \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        for (int i = 0; i < I; i++)                                                                                    \
            for (int r = 0; r < R; r++) {                                                                              \
                float sum = sum_of(sums[i][r]);                                                                        \
                for (long rest = j; rest < k; rest++) sum += ONE(w[i * k + rest]) * x[r * k + rest];                   \
                y[r * n + i] = sum;                                                                                    \
            }                                                                                                          \
    }                                                                                                                  \
    INLINE long NAME##_rows(const struct mhk_job *job, long i, long r, const int I, const int R) {                     \
        const long n = job->w->n, k = job->w->k;                                                                       \
        for (; r + R <= job->rows; r += R)                                                                             \
            NAME##_block((const T *)job->w->codes + i * k, job->x + r * k, job->y + r * n + i, n, k, I, R);            \
        return r;                                                                                                      \
    }                                                                                                                  \
    static void NAME(const struct mhk_job *job, long first, long last) {                                               \
        enum { FOUR = REGISTERS == 32 ? 4 : 2 }; /* outputs at once for four rows */                                   \
        for (long i = first; i < last; i += 4) {                                                                       \
            if (i + 4 > last) {                                                                                        \
                for (; i < last; i++) NAME##_rows(job, i, NAME##_rows(job, i, 0, 1, 4), 1, 1);                         \
                return;                                                                                                \
            }                                                                                                          \
            long r = 0;                                                                                                \
            for (int part = 0; part < 4; part += FOUR) r = NAME##_rows(job, i + part, 0, FOUR, 4);                     \
            NAME##_rows(job, i, NAME##_rows(job, i, r, 4, 2), 4, 1);                                                   \
        }                                                                                                              \
    }

FLOATS(float32, float, floats_at, float_of)
FLOATS(bfloat16, uint16_t, brain_floats, brain_float)
FLOATS(float16, uint16_t, halves, half)

/* --- quantised weights in tiles ----------------------------------------------------------------------------------- */

enum { PARTS = MHK_TILE / VL }; /* vectors of a tile's 16 rows */

/* The products of R rows of x with the VL rows that start at VL * part of a tile. */
INLINE void tile(const struct mhk_job *job, long t, long r0, const int R, const int KIND, int part) {
    const long groups = job->w->k / MHK_GROUP, k = job->w->k, n = job->w->n;
    const int BITS = mhk_bits(KIND), MIN = mhk_has_minima(KIND), HALF = KIND == MHK_INT8H;
    const long code_bytes = mhk_code_bytes(KIND), scale_count = mhk_scale_count(KIND);
    const uint8_t *codes = (const uint8_t *)job->w->codes + t * groups * code_bytes;
    const uint16_t *scales = job->w->scales + t * groups * scale_count + part * VL;
    const uint16_t *minima = MIN ? job->w->minima + t * groups * MHK_TILE + part * VL : 0;
    const int more = BITS == 8 ? BIAS : MIN ? 0 : 8; /* what codes are taken for, beyond what they mean */
    vf total[8] = {{0}};
    for (long g = 0; g < groups; g++, codes += code_bytes, scales += scale_count) {
        const int8_t *q = job->q + r0 * k + g * MHK_GROUP;
        const int32_t *sums = job->sums + (r0 * groups + g) * 2;
        const float *xscales = job->scales + r0 * groups + g;
        if (R == 1 && part == 0)
            for (long o = 0; o < code_bytes; o += 64) __builtin_prefetch(codes + AHEAD * 3 / 4 + o);
        vi dots[2][8];
        for (int r = 0; r < R; r++)
            for (int h = 0; h < 2; h++)
                dots[h][r] = splat(-more * (HALF ? sums[2 * r * groups + h] : h ? 0 : sums[2 * r * groups] + sums[2 * r * groups + 1]));
        const uint8_t *c = codes + part * VB;
        if (BITS == 8) {
            for (int v = 0; v < 8; v++) {
                vb w = *(const vb_any *)(c + 64 * v);
                const int h = HALF && v >= 4;
                for (int r = 0; r < R; r++) dots[h][r] = dot8(dots[h][r], w, splat(four_at(q + r * k + 4 * v)));
            }
        } else {
            const vb low = (vb){0} + 15;
#ifdef PAIRS16
            vi_raw pairs16[8];
#endif
            for (int v = 0; v < 4; v++) {
                vb w = *(const vb_any *)(c + 64 * v), lo = w & low, hi = (vb)((vu)w >> 4) & low;
                for (int r = 0; r < R; r++) {
                    vi xlo = splat(four_at(q + r * k + 4 * v)), xhi = splat(four_at(q + r * k + 4 * v + 16));
#ifdef PAIRS16
                    vi_raw both = plus16(pairs(lo, xlo), pairs(hi, xhi));
                    pairs16[r] = v ? plus16(pairs16[r], both) : both;
#else
                    dots[0][r] = dot4(dot4(dots[0][r], lo, xlo), hi, xhi);
#endif
                }
            }
#ifdef PAIRS16
            for (int r = 0; r < R; r++) dots[0][r] += widened(pairs16[r]);
#endif
        }
        vf scale = halves(scales);
        for (int r = 0; r < R; r++) total[r] += floats(dots[0][r]) * (scale * xscales[r * groups]);
        if (HALF) {
            scale = halves(scales + MHK_TILE);
            for (int r = 0; r < R; r++) total[r] += floats(dots[1][r]) * (scale * xscales[r * groups]);
        }
        if (MIN) {
            vf minimum = halves(minima + g * MHK_TILE);
            for (int r = 0; r < R; r++)
                total[r] += minimum * (xscales[r * groups] * (float)(sums[2 * r * groups] + sums[2 * r * groups + 1]));
        }
    }
    const long i = t * MHK_TILE + part * VL;
    for (int r = 0; r < R; r++) {
        float *y = job->y + (r0 + r) * n + i;
        if (i + VL <= n) *(vf_any *)y = total[r];
        else
            for (int lane = 0; i + lane < n; lane++) y[lane] = total[r][lane];
    }
}

#define TILES(NAME, KIND)                                                                                              \
    static void NAME(const struct mhk_job *job, long first, long last) {                                               \
        for (long t = first / MHK_TILE; t * MHK_TILE < last; t++) {                                                    \
            long r = 0;                                                                                                \
            for (; REGISTERS == 32 && VB == 64 && KIND != MHK_INT8H && r + 8 <= job->rows; r += 8)                     \
                for (int part = 0; part < PARTS; part++) tile(job, t, r, 8, KIND, part);                               \
            for (; r + 4 <= job->rows; r += 4)                                                                         \
                for (int part = 0; part < PARTS; part++) tile(job, t, r, 4, KIND, part);                               \
            for (; r + 2 <= job->rows; r += 2)                                                                         \
                for (int part = 0; part < PARTS; part++) tile(job, t, r, 2, KIND, part);                               \
            for (; r < job->rows; r++)                                                                                 \
                for (int part = 0; part < PARTS; part++) tile(job, t, r, 1, KIND, part);                               \
        }                                                                                                              \
    }

TILES(int8, MHK_INT8)
TILES(int8m, MHK_INT8M)
TILES(int8h, MHK_INT8H)
TILES(int4, MHK_INT4)
TILES(int4m, MHK_INT4M)

/* x in int8, groups of 32 with a scale each, to nearest. Where x is not finite its scale is NaN, and so is the product. */
static void quantise(const float *x, int8_t *q, float *scales, int32_t *sums, long k) {
    enum { HALF = 16 / VL };
    for (long g = 0; g < k / MHK_GROUP; g++, x += MHK_GROUP, q += MHK_GROUP) {
        vf xs[2 * HALF], largest = {0}, finite = {0};
        for (int u = 0; u < 2 * HALF; u++) {
            xs[u] = floats_at(x + u * VL);
            finite += xs[u] * 0.f;
            vf size = (vf)((vi)xs[u] & 0x7fffffff);
            largest = chosen(size > largest, size, largest);
        }
        float peak = 0;
        for (int i = 0; i < VL; i++) peak = largest[i] > peak ? largest[i] : peak;
        const float inverse = peak > 1e-30f ? 127 / peak : 0; /* below that there is nothing to speak of */
        scales[g] = (inverse ? peak / 127 : 0) + sum_of(finite);
        if (scales[g] != scales[g]) { /* no integers for these */
            memset(q, 0, MHK_GROUP);
            sums[2 * g] = sums[2 * g + 1] = 0;
            continue;
        }
        for (int h = 0; h < 2; h++) {
            vi sum = {0};
            for (int u = 0; u < HALF; u++) {
                vi rounded = nearest(xs[h * HALF + u] * inverse);
                vq bytes = __builtin_convertvector(rounded, vq);
                memcpy(q + h * 16 + u * VL, &bytes, VL);
                sum += rounded;
            }
            int32_t total = 0;
            for (int i = 0; i < VL; i++) total += sum[i];
            sums[2 * g + h] = total;
        }
    }
}

/* One row of quantised weights as floats. */
static void widen(const mhk_matrix *w, long row, float *out) {
    const long groups = w->k / MHK_GROUP, t = row / MHK_TILE, i = row % MHK_TILE;
    const long code_bytes = mhk_code_bytes(w->kind), scale_count = mhk_scale_count(w->kind);
    const uint8_t *codes = (const uint8_t *)w->codes + t * groups * code_bytes + 4 * i;
    const uint16_t *scales = w->scales + t * groups * scale_count + i;
    const uint16_t *minima = mhk_has_minima(w->kind) ? w->minima + t * groups * MHK_TILE + i : 0;
    const int zero = w->kind == MHK_INT4 ? 8 : 0;
    for (long g = 0; g < groups; g++, codes += code_bytes, scales += scale_count, out += MHK_GROUP) {
        float scale[2] = {half(scales[0]), half(scales[w->kind == MHK_INT8H ? MHK_TILE : 0])};
        float minimum = minima ? half(minima[g * MHK_TILE]) : 0;
        int32_t q[MHK_GROUP];
        if (mhk_bits(w->kind) == 8) {
            for (int j = 0; j < MHK_GROUP; j++) q[j] = (int8_t)codes[j / 4 * 64 + j % 4];
        } else {
            for (int j = 0; j < 16; j++) {
                q[j] = (codes[j / 4 * 64 + j % 4] & 15) - zero;
                q[j + 16] = (codes[j / 4 * 64 + j % 4] >> 4) - zero;
            }
        }
        for (int j = 0; j < MHK_GROUP; j++) out[j] = scale[j / 16] * (float)q[j] + minimum;
    }
}

static void rms_norm(const float *x, const float *w, float *y, long n, float eps, float offset) {
    vf squares = {0};
    long j = 0;
    for (; j + VL <= n; j += VL) squares += floats_at(x + j) * floats_at(x + j);
    float sum = sum_of(squares);
    for (; j < n; j++) sum += x[j] * x[j];
    const float scale = 1 / sqrtf(sum / (float)n + eps);
    for (j = 0; j + VL <= n; j += VL) *(vf_any *)(y + j) = floats_at(x + j) * scale * (floats_at(w + j) + offset);
    for (; j < n; j++) y[j] = x[j] * scale * (w[j] + offset);
}

int JOINED(mhk_round_, ISA)(int kind, const float *x, const float *w, struct mhk_group *group); /* round.c */
extern const struct mhk_attention_kernels JOINED(mhk_attention_, ISA); /* attention.c */
const struct mhk_kernels JOINED(mhk_, ISA) = {
    {float32, bfloat16, float16, int8, int8m, int8h, int4, int4m}, quantise, widen, rms_norm,
    JOINED(mhk_round_, ISA), &JOINED(mhk_attention_, ISA)};
