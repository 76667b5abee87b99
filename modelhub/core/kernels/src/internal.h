/* What the sources share among themselves. */
#include <string.h>

#include "mhk.h"

typedef void (*mhk_range)(void *job, long first, long last);

/* One product. q, scales, sums: x in int8, groups of 32: values, what one is worth, and the sum of each half group. */
struct mhk_job {
    const mhk_matrix *w;
    const float *x;
    float *y;
    int8_t *q;
    float *scales;
    int32_t *sums;
    long rows;
    void (*linear)(const struct mhk_job *, long first, long last); /* outputs first ... last - 1, whole tiles */
    void (*quantise)(const float *x, int8_t *q, float *scales, int32_t *sums, long k);
};

/* A group of one row: codes, as they are stored, a scale and a minimum; INT8H: a scale for each half. */
struct mhk_group {
    int8_t codes[MHK_GROUP];
    uint16_t scale[2], minimum;
};

/* Attention of few queries. A piece of MHK_PIECE slots of one key head is an item of work, which leaves in `parts`, for
 * each of the head's queries: its largest score, the sum of the weights relative to it, and the values so weighted. */
enum { MHK_PIECE = 256 };
struct mhk_attention {
    const float *q, *k, *v;
    const uint8_t *mask;
    float *parts;
    long kv_heads, group, time, slots, width, masks; /* group: queries of a key head; masks: 1, or one for each row */
    float scale, softcap;
    int skips; /* slots that no query sees are left out */
};
struct mhk_attention_kernels {
    void (*attend)(const struct mhk_attention *, long item);
    void (*rotate)(const float *x, const float *cosines, const float *sines, float *y, long half);
    void (*activate)(int kind, const float *x, float *y, long n);
};

/* What one instruction set has; linear by kind. round: x (32) with weights w of the errors; 0 where it cannot hold x. */
struct mhk_kernels {
    void (*linear[MHK_KINDS])(const struct mhk_job *, long, long);
    void (*quantise)(const float *, int8_t *, float *, int32_t *, long);
    void (*widen)(const mhk_matrix *w, long row, float *out);
    void (*rms_norm)(const float *x, const float *w, float *y, long n, float eps, float offset);
    int (*round)(int kind, const float *x, const float *w, struct mhk_group *group);
    const struct mhk_attention_kernels *attention;
};
extern const struct mhk_kernels mhk_sse, mhk_avx2, mhk_avxvnni, mhk_avx512, mhk_avx512vnni, mhk_neon, mhk_dotprod;

const struct mhk_kernels *mhk_kernels_here(void); /* those for this processor, or 0 */
void mhk_parallel(mhk_range fn, void *job, long n, long step, int threads, int openmp);

static inline int mhk_bits(int kind) { return kind >= MHK_INT4 ? 4 : 8; }
static inline int mhk_has_minima(int kind) { return kind == MHK_INT8M || kind == MHK_INT4M; }
static inline long mhk_code_bytes(int kind) { return MHK_TILE * MHK_GROUP * mhk_bits(kind) / 8; } /* of one group */
static inline long mhk_scale_count(int kind) { return kind == MHK_INT8H ? 2 * MHK_TILE : MHK_TILE; }

static inline uint16_t mhk_half_of(float f) { /* to nearest, ties to even; what is too large becomes the largest */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits >= 0x477ff000) return sign | (bits > 0x7f800000 ? 0x7e00 : 0x7bff);
    if (bits < 0x38800000) { /* below the smallest normal one: by the float's own rounding */
        float shifted;
        memcpy(&shifted, &bits, 4);
        shifted += 0.5f;
        memcpy(&bits, &shifted, 4);
        return sign | (uint16_t)(bits - 0x3f000000);
    }
    bits += 0xfff + (bits >> 13 & 1);
    return sign | (uint16_t)((bits - 0x38000000) >> 13);
}
static inline float mhk_float_of(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, digits = h & 1023, bits;
    float f;
    if (!exponent) {
        f = (float)digits * 0x1p-24f;
        return sign ? -f : f;
    }
    bits = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (digits << 13);
    memcpy(&f, &bits, 4);
    return f;
}
