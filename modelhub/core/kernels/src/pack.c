/* Into tiles: floats, rounded by least squared error, and the blocks of GGUF files, which are only put in another order. */
#include <string.h>

#include "internal.h"

static void put(int kind, const struct mhk_group *group, int row, uint8_t *codes, uint16_t *scales, uint16_t *minima) {
    codes += 4 * row;
    const uint8_t *q = (const uint8_t *)group->codes;
    if (mhk_bits(kind) == 8)
        for (int j = 0; j < MHK_GROUP; j++) codes[j / 4 * 64 + j % 4] = q[j];
    else
        for (int j = 0; j < 16; j++) codes[j / 4 * 64 + j % 4] = (uint8_t)(q[j] | q[j + 16] << 4);
    scales[row] = group->scale[0];
    if (kind == MHK_INT8H) scales[MHK_TILE + row] = group->scale[1];
    if (minima) minima[row] = group->minimum;
}

/* Runs STATEMENT, which fills `group`, for all rows and groups of a tile, and puts them where they belong. */
#define EACH_GROUP(STATEMENT)                                                                                          \
    for (long g = 0; g < k / MHK_GROUP; g++) {                                                                         \
        uint8_t *c = (uint8_t *)codes + g * mhk_code_bytes(kind);                                                      \
        uint16_t *s = scales + g * mhk_scale_count(kind), *m = mhk_has_minima(kind) ? minima + g * MHK_TILE : 0;       \
        for (int row = 0; row < MHK_TILE; row++) {                                                                     \
            struct mhk_group group = {{0}, {0, 0}, 0};                                                                     \
            if (row < count) STATEMENT;                                                                                \
            put(kind, &group, row, c, s, m);                                                                           \
        }                                                                                                              \
    }

int mhk_pack(int kind, const float *rows, long count, long k, const float *importance, void *codes, uint16_t *scales,
             uint16_t *minima) {
    const struct mhk_kernels *set = mhk_kernels_here();
    if (!set || kind < MHK_INT8 || kind >= MHK_KINDS || k % MHK_GROUP || count < 0 || count > MHK_TILE) return -1;
    float equal[MHK_GROUP];
    for (int j = 0; j < MHK_GROUP; j++) equal[j] = 1;
    int held = 1;
    EACH_GROUP(held &= set->round(kind, rows + row * k + g * MHK_GROUP, importance ? importance + g * MHK_GROUP : equal, &group))
    return held ? 0 : MHK_UNHOLDABLE;
}

/* --- blocks of GGUF files: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml --------------------- */

enum { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 };

static uint16_t half_at(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

static void nibbles(const uint8_t *packed, int8_t *codes) {
    for (int j = 0; j < 16; j++) {
        codes[j] = packed[j] & 15;
        codes[j + 16] = (int8_t)(packed[j] >> 4);
    }
}

/* The eight 6-bit scales and minima of a block of Q4_K or Q5_K: those of group g. */
static void scale_of_k(const uint8_t *block, int g, struct mhk_group *group) {
    const uint8_t *p = block + 4;
    int d = g < 4 ? p[g] & 63 : (p[g + 4] & 15) | (p[g - 4] >> 6) << 4;
    int m = g < 4 ? p[g + 4] & 63 : p[g + 4] >> 4 | (p[g] >> 6) << 4;
    group->scale[0] = mhk_half_of(mhk_float_of(half_at(block)) * (float)d);
    group->minimum = mhk_half_of(-mhk_float_of(half_at(block + 2)) * (float)m);
}

static void read_group(int type, const uint8_t *row, long g, struct mhk_group *group) {
    const uint8_t *b;
    int8_t *q = group->codes;
    switch (type) {
    case Q8_0:
        b = row + 34 * g;
        group->scale[0] = half_at(b);
        memcpy(q, b + 2, MHK_GROUP);
        for (int j = 0; j < MHK_GROUP; j++)
            if (q[j] == -128) q[j] = -127; /* no writer makes it, and some kernels have no room for it */
        return;
    case Q4_0:
        b = row + 18 * g;
        group->scale[0] = half_at(b);
        nibbles(b + 2, q);
        return;
    case Q4_1:
        b = row + 20 * g;
        group->scale[0] = half_at(b);
        group->minimum = half_at(b + 2);
        nibbles(b + 4, q);
        return;
    case Q5_0:
        b = row + 22 * g;
        group->scale[0] = half_at(b);
        nibbles(b + 6, q);
        for (int j = 0; j < MHK_GROUP; j++) q[j] = (int8_t)((q[j] | (b[2 + j / 8] >> j % 8 & 1) << 4) - 16);
        return;
    case Q5_1:
        b = row + 24 * g;
        group->scale[0] = half_at(b);
        group->minimum = half_at(b + 2);
        nibbles(b + 8, q);
        for (int j = 0; j < MHK_GROUP; j++) q[j] = (int8_t)(q[j] | (b[4 + j / 8] >> j % 8 & 1) << 4);
        return;
    case Q4_K:
        b = row + 144 * (g / 8);
        scale_of_k(b, (int)(g % 8), group);
        for (int j = 0; j < MHK_GROUP; j++) q[j] = (int8_t)(b[16 + g % 8 / 2 * 32 + j] >> g % 2 * 4 & 15);
        return;
    case Q5_K:
        b = row + 176 * (g / 8);
        scale_of_k(b, (int)(g % 8), group);
        for (int j = 0; j < MHK_GROUP; j++)
            q[j] = (int8_t)((b[48 + g % 8 / 2 * 32 + j] >> g % 2 * 4 & 15) | (b[16 + j] >> g % 8 & 1) << 4);
        return;
    default: /* Q6_K: halves of 128, in each 4 groups; low bits of groups 0 and 2, and of 1 and 3, share bytes */
        b = row + 210 * (g / 8);
        const int half = (int)(g % 8 / 4), part = (int)(g % 4);
        const uint8_t *low = b + 64 * half + 32 * (part % 2), *high = b + 128 + 32 * half;
        for (int j = 0; j < MHK_GROUP; j++)
            q[j] = (int8_t)(((low[j] >> part / 2 * 4 & 15) | (high[j] >> 2 * part & 3) << 4) - 32);
        for (int h = 0; h < 2; h++)
            group->scale[h] = mhk_half_of(mhk_float_of(half_at(b + 208)) * (float)(int8_t)b[192 + 2 * (g % 8) + h]);
    }
}

static int kind_of_type(int type) {
    switch (type) {
    case Q8_0: case Q5_0: return MHK_INT8;
    case Q4_0: return MHK_INT4;
    case Q4_1: case Q4_K: return MHK_INT4M;
    case Q5_1: case Q5_K: return MHK_INT8M;
    case Q6_K: return MHK_INT8H;
    }
    return -1;
}

int mhk_pack_gguf(int type, const uint8_t *rows, long row_bytes, long count, long k, void *codes, uint16_t *scales,
                  uint16_t *minima) {
    const int kind = kind_of_type(type);
    if (kind < 0 || count < 0 || count > MHK_TILE || k % (type >= Q4_K ? 256 : MHK_GROUP)) return -1;
    EACH_GROUP(read_group(type, rows + row * row_bytes, g, &group))
    return 0;
}
