/* Rounding to 4 or 8 bits by least squared error, compiled once for each instruction set as rows.c is. */
#include "vectors.h"

enum { ALL = MHK_GROUP / VL }; /* vectors of a group */

INLINE vf clipped(vf v, float low, float high) {
    vf lows = (vf){0} + low, highs = (vf){0} + high;
    v = chosen(v < lows, lows, v);
    return chosen(v > highs, highs, v);
}
INLINE vf codes_at(vf v, float low, float high) { return floats(nearest(clipped(v, low, high))); }

INLINE float largest_of(const vf *x, int count) {
    vf largest = {0};
    for (int u = 0; u < count; u++) {
        vf size = (vf)((vi)x[u] & 0x7fffffff);
        largest = chosen(size > largest, size, largest);
    }
    float found = 0;
    for (int i = 0; i < VL; i++) found = largest[i] > found ? largest[i] : found;
    return found;
}

/* The scale with the least squared error among some around the one that takes the largest value to an end of the range:
 * for each the best one for the codes that it leads to. As in ggml-quants.c's make_qx_quants. */
static float best_scale(const vf *x, const vf *w, float low, float high) {
    float values[MHK_GROUP], largest = 0;
    memcpy(values, x, sizeof values);
    for (int j = 0; j < MHK_GROUP; j++)
        if (fabsf(values[j]) > fabsf(largest)) largest = values[j];
    if (!(fabsf(largest) > 1e-30f)) return 0;
    float best = 0, most = -1;
    for (int end = 0; end < 2; end++)
        for (int step = -8; step <= 8; step++) {
            const float inverse = ((end ? high : low) + 0.1f * (float)step) / largest;
            vf with_x = {0}, with_q = {0};
            for (int u = 0; u < ALL; u++) {
                vf q = codes_at(x[u] * inverse, low, high), wq = w[u] * q;
                with_x += wq * x[u];
                with_q += wq * q;
            }
            const float sum_x = sum_of(with_x), sum_q = sum_of(with_q);
            if (sum_q > 0 && sum_x * sum_x > most * sum_q) {
                most = sum_x * sum_x / sum_q;
                best = sum_x / sum_q;
            }
        }
    return best;
}

/* The same with a minimum: codes 0 ... high. As in ggml-quants.c's make_qkx2_quants. */
static void best_range(const vf *x, const vf *w, float high, float *scale, float *minimum) {
    float values[MHK_GROUP];
    memcpy(values, x, sizeof values);
    float least = values[0], largest = values[0];
    vf all_w = {0}, all_x = {0};
    for (int j = 0; j < MHK_GROUP; j++) {
        least = values[j] < least ? values[j] : least;
        largest = values[j] > largest ? values[j] : largest;
    }
    for (int u = 0; u < ALL; u++) {
        all_w += w[u];
        all_x += w[u] * x[u];
    }
    const float sum_w = sum_of(all_w), sum_x = sum_of(all_x), span = largest - least;
    *scale = span / high;
    *minimum = least;
    if (!(span > 1e-30f)) {
        *scale = 0;
        return;
    }
    float best = INFINITY;
    for (int step = -10; step <= 10; step++) {
        const float inverse = (high + 0.2f * (float)step) / span;
        vf q[ALL], qs = {0}, qqs = {0}, xqs = {0}, off = {0};
        for (int u = 0; u < ALL; u++) {
            q[u] = codes_at((x[u] - least) * inverse, 0, high);
            vf wq = w[u] * q[u];
            qs += wq;
            qqs += wq * q[u];
            xqs += wq * x[u];
        }
        const float sum_q = sum_of(qs), sum_qq = sum_of(qqs), sum_xq = sum_of(xqs);
        const float determinant = sum_w * sum_qq - sum_q * sum_q;
        if (!(determinant > 0)) continue;
        const float s = (sum_w * sum_xq - sum_x * sum_q) / determinant;
        const float m = (sum_qq * sum_x - sum_q * sum_xq) / determinant;
        for (int u = 0; u < ALL; u++) {
            vf d = s * q[u] + m - x[u];
            off += w[u] * d * d;
        }
        const float error = sum_of(off);
        if (error < best) {
            best = error;
            *scale = s;
            *minimum = m;
        }
    }
}

int JOINED(mhk_round_, ISA)(int kind, const float *values, const float *weights, struct mhk_group *group) {
    const int minima = mhk_has_minima(kind);
    const float high = kind == MHK_INT4M ? 15 : kind == MHK_INT4 ? 7 : 127;
    const float low = minima ? 0 : kind == MHK_INT4 ? -8 : -127;
    vf x[ALL], w[ALL], finite = {0};
    memcpy(x, values, sizeof x);
    memcpy(w, weights, sizeof w);
    for (int u = 0; u < ALL; u++) finite += x[u] * 0.f;
    if (sum_of(finite) != 0) return 0;
    float scale[2] = {0, 0}, minimum = 0;
    if (minima) best_range(x, w, high, scale, &minimum);
    else if (kind == MHK_INT4) scale[0] = best_scale(x, w, low, high);
    else {
        scale[0] = largest_of(x, ALL / 2) / 127;
        scale[1] = largest_of(x + ALL / 2, ALL / 2) / 127;
        if (kind != MHK_INT8H && scale[1] > scale[0]) scale[0] = scale[1];
    }
    if (kind != MHK_INT8H) scale[1] = scale[0];
    const float most = 65504; /* of a float16 */
    if (!(fabsf(scale[0]) <= most && fabsf(scale[1]) <= most && fabsf(minimum) <= most)) return 0;
    group->minimum = mhk_half_of(minimum);
    minimum = mhk_float_of(group->minimum);
    for (int u = 0; u < ALL; u++) {
        const int h = u * VL / 16;
        group->scale[h] = mhk_half_of(scale[h]);
        const float wide = mhk_float_of(group->scale[h]), inverse = wide != 0 ? 1 / wide : 0;
        vi q = nearest(clipped((x[u] - minimum) * inverse, low, high));
        if (kind == MHK_INT4) q += 8;
        vq bytes = __builtin_convertvector(q, vq);
        memcpy(group->codes + u * VL, &bytes, VL);
    }
    return 1;
}
