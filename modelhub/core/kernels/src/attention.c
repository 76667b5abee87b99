/* One instruction set's attention of few queries, rotary embeddings and activations; compiled as rows.c is. */
#include "vectors.h"

enum { PIECE = MHK_PIECE };

/* e^x to 2 units in the last place (Moshier's Cephes, expf); 0 below -87.3; NaN stays NaN. */
INLINE vf exponential(vf x) {
    const vf least = (vf){0} - 87.33f, most = (vf){0} + 88.f;
    vf at = chosen(x < least, least, x);
    at = chosen(at > most, most, at);
    const vi n = nearest(at * 1.44269504f);
    const vf r = at - floats(n) * 0.693359375f + floats(n) * 2.12194440e-4f;
    vf p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    return chosen(x < least, (vf){0}, p * (vf)((n + 127) << 23));
}
INLINE vf sigmoid(vf x) { return 1.f / (1.f + exponential(-x)); }

INLINE vf gelu(vf x) { /* the tanh form: (1 + tanh(u)) / 2 is the sigmoid of 2u */
    return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
}
static void activate(int kind, const float *x, float *y, long n) {
    for (long j = 0; j < n; j += VL) {
        vf v = {0};
        const long some = n - j < VL ? n - j : VL;
        memcpy(&v, x + j, 4 * (size_t)some);
        v = kind == MHK_SILU ? v * sigmoid(v) : gelu(v);
        memcpy(y + j, &v, 4 * (size_t)some);
    }
}

static void rotate(const float *x, const float *cosines, const float *sines, float *y, long half) {
    long j = 0;
    for (; j + VL <= half; j += VL) {
        vf left = floats_at(x + j), right = floats_at(x + half + j), c = floats_at(cosines + j), s = floats_at(sines + j);
        *(vf_any *)(y + j) = left * c - right * s;
        *(vf_any *)(y + half + j) = right * c + left * s;
    }
    for (; j < half; j++) {
        float left = x[j], right = x[half + j];
        y[j] = left * cosines[j] - right * sines[j];
        y[half + j] = right * cosines[j] + left * sines[j];
    }
}

/* --- attention ---------------------------------------------------------------------------------------------------- */

/* Products of R queries with S keys. */
INLINE void scores(const float *q, const float *k, float *out, long h, const int S, const int R) {
    vf sums[4][2] = {{{0}}};
    long j = 0;
    for (; j + VL <= h; j += VL) {
        vf keys[2];
        for (int s = 0; s < S; s++) keys[s] = floats_at(k + s * h + j);
        for (int r = 0; r < R; r++)
            for (int s = 0; s < S; s++) sums[r][s] += floats_at(q + r * h + j) * keys[s];
    }
    for (int r = 0; r < R; r++)
        for (int s = 0; s < S; s++) {
            float sum = sum_of(sums[r][s]);
            for (long rest = j; rest < h; rest++) sum += q[r * h + rest] * k[s * h + rest];
            out[r * PIECE + s] = sum;
        }
}
/* y += the values of S slots, each times a query's weight for it, for R queries. */
INLINE void add_values(const float *weights, const float *v, float *y, long h, const int S, const int R) {
    vf w[4][2];
    for (int s = 0; s < S; s++)
        for (int r = 0; r < R; r++) w[s][r] = (vf){0} + weights[r * PIECE + s];
    long j = 0;
    for (; j + VL <= h; j += VL) {
        vf sums[2];
        for (int r = 0; r < R; r++) sums[r] = floats_at(y + r * h + j);
        for (int s = 0; s < S; s++)
            for (int r = 0; r < R; r++) sums[r] += w[s][r] * floats_at(v + s * h + j);
        for (int r = 0; r < R; r++) *(vf_any *)(y + r * h + j) = sums[r];
    }
    for (; j < h; j++)
        for (int r = 0; r < R; r++)
            for (int s = 0; s < S; s++) y[r * h + j] += weights[r * PIECE + s] * v[s * h + j];
}

/* R queries of one key head over slots first ... last - 1: their largest score, the sum of the weights, and the weighted
 * values, all relative to that score. mask: of the first query's time; row: which query of the group it is. */
INLINE void block(const struct mhk_attention *a, const float *q, const float *k, const float *v, const uint8_t *mask,
                  long row, long first, long last, float *peak, float *total, float *y, const int R) {
    _Alignas(64) float s[4 * PIECE];
    const long h = a->width, count = last - first, padded = (count + VL - 1) / VL * VL;
    long i = 0;
    for (; i + 2 <= count; i += 2) scores(q, k + (first + i) * h, s + i, h, 2, R);
    for (; i < count; i++) scores(q, k + (first + i) * h, s + i, h, 1, R);
    for (int r = 0; r < R; r++) {
        float *of = s + r * PIECE;
        const uint8_t *seen = mask ? mask + (row + r) % a->time * a->slots + first : 0;
        for (i = count; i < padded; i++) of[i] = -INFINITY;
        vf largest = (vf){0} - 1e30f, sum = {0};
        for (i = 0; i < padded; i += VL) {
            vf x = floats_at(of + i) * a->scale;
            if (a->softcap != 0) { /* tanh(u) = 1 - 2 / (e^2u + 1) */
                const vf u = x * (1 / a->softcap);
                x = (1.f - 2.f / (exponential(2.f * u) + 1.f)) * a->softcap;
            }
            if (seen) {
                const long some = count - i < VL ? count - i : VL;
                vq yes = {0};
                memcpy(&yes, seen + i, (size_t)some);
                x = chosen(__builtin_convertvector(yes != 0, vi), x, (vf){0} - 1e30f);
            }
            if (i + VL > count) /* beyond the end */
                for (long lane = count - i; lane < VL; lane++) x[lane] = -INFINITY;
            largest = chosen(x > largest, x, largest);
            *(vf_any *)(of + i) = x;
        }
        float most = -1e30f;
        for (int lane = 0; lane < VL; lane++) most = largest[lane] > most ? largest[lane] : most;
        for (i = 0; i < padded; i += VL) {
            vf weight = exponential(floats_at(of + i) - most);
            sum += weight;
            *(vf_any *)(of + i) = weight;
        }
        peak[r] = most;
        total[r] = sum_of(sum);
    }
    memset(y, 0, 4 * (size_t)(R * h));
    for (int r = 0; r < R; r += 2) {
        for (i = 0; i + 4 <= count; i += 4)
            add_values(s + r * PIECE + i, v + (first + i) * h, y + r * h, h, 4, R == 1 ? 1 : 2);
        for (; i < count; i++) add_values(s + r * PIECE + i, v + (first + i) * h, y + r * h, h, 1, R == 1 ? 1 : 2);
    }
}

/* One piece of the slots of one key head of one row of the batch: item counts pieces, then heads, then rows. */
static void attend(const struct mhk_attention *a, long item) {
    const long pieces = (a->slots + PIECE - 1) / PIECE, piece = item % pieces, head = item / pieces;
    const long b = head / a->kv_heads, h = a->width, rows = a->group;
    const uint8_t *mask = a->mask ? a->mask + (a->masks == 1 ? 0 : b) * a->time * a->slots : 0;
    long first = piece * PIECE, last = first + PIECE < a->slots ? first + PIECE : a->slots;
    float *peaks = a->parts + item * rows * (h + 2), *totals = peaks + rows, *y = totals + rows;
    if (mask && a->skips) { /* slots that no query sees */
        int seen = 0;
        for (; first < last && !seen; first += !seen)
            for (long t = 0; t < a->time; t++) seen |= mask[t * a->slots + first];
        for (seen = 0; first < last && !seen; last -= !seen)
            for (long t = 0; t < a->time; t++) seen |= mask[t * a->slots + last - 1];
    }
    if (first == last) {
        for (long r = 0; r < rows; r++) peaks[r] = -1e30f, totals[r] = 0;
        memset(y, 0, 4 * (size_t)(rows * h));
        return;
    }
    const float *q = a->q + head * rows * h, *k = a->k + head * a->slots * h, *v = a->v + head * a->slots * h;
    long r = 0;
    for (; r + 4 <= rows; r += 4) block(a, q + r * h, k, v, mask, r, first, last, peaks + r, totals + r, y + r * h, 4);
    for (; r + 2 <= rows; r += 2) block(a, q + r * h, k, v, mask, r, first, last, peaks + r, totals + r, y + r * h, 2);
    for (; r < rows; r++) block(a, q + r * h, k, v, mask, r, first, last, peaks + r, totals + r, y + r * h, 1);
}

const struct mhk_attention_kernels JOINED(mhk_attention_, ISA) = {attend, rotate, activate};
