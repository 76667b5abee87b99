/* The kernels as custom calls in the XLA programs of TensorFlow, which has an older calling convention than JAX's: one
 * function for all, told by its text which one, "linear|widen|take kind rows n k". */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "mhk.h"

void mhk_tf_call(void *out, const void **in, const char *text, size_t length, void *status) {
    (void)status; /* shapes are checked where the program is made */
    char copy[96], *at = copy;
    if (length >= sizeof copy) return;
    memcpy(copy, text, length);
    copy[length] = 0;
    const char what = *at;
    long numbers[4]; /* kind, rows, n, k */
    at = strchr(at, ' ');
    for (int i = 0; i < 4 && at; i++) numbers[i] = strtol(at, &at, 10);
    if (!at) return;
    mhk_matrix w = {(int)numbers[0], in[1], 0, 0, numbers[2], numbers[3]};
    if (w.kind >= MHK_INT8) w.scales = in[2];
    if (w.kind == MHK_INT8M || w.kind == MHK_INT4M) w.minima = in[3];
    if (what == 'l') mhk_linear(&w, in[0], out, numbers[1], mhk_threads(), 0);
    else if (what == 'w') mhk_widen(&w, *(const int32_t *)in[0], numbers[1], out, mhk_threads(), 0);
    else mhk_take(&w, in[0], numbers[1], out);
}
