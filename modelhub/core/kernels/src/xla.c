/* The kernels as custom calls of XLA's typed FFI, in C: no C++, no link to jaxlib. c_api.h is XLA's. */
#include "mhk.h"
#include "xla_ffi_c_api.h"

static XLA_FFI_Error *failed(XLA_FFI_CallFrame *frame, const char *message) {
    XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, 0, message, XLA_FFI_Error_Code_INVALID_ARGUMENT};
    return frame->api->XLA_FFI_Error_Create(&args);
}

/* What is said to XLA, which takes no handler that is newer than it; of what is newer than 0.1 nothing is used here. */
int mhk_xla_minor = XLA_FFI_API_MINOR;
/* Whether XLA only asks which version of the FFI this is built for. */
static int asked_for_version(XLA_FFI_CallFrame *frame) {
    for (XLA_FFI_Extension_Base *e = frame->extension_start; e; e = e->next)
        if (e->type == XLA_FFI_Extension_Metadata) {
            XLA_FFI_Metadata *m = ((XLA_FFI_Metadata_Extension *)e)->metadata;
            m->api_version.major_version = XLA_FFI_API_MAJOR;
            m->api_version.minor_version = mhk_xla_minor;
            m->traits = 0;
            return 1;
        }
    return 0;
}
static const XLA_FFI_Buffer *arg(XLA_FFI_CallFrame *frame, int i) { return frame->args.args[i]; }
static const XLA_FFI_Buffer *ret(XLA_FFI_CallFrame *frame) { return frame->rets.rets[0]; }
static long count(const XLA_FFI_Buffer *b, long axes) {
    long n = 1;
    for (long i = 0; i < axes; i++) n *= b->dims[i];
    return n;
}
/* Argument `first` and those after it: codes, and for tiles scales, and minima where the kind has them. */
static mhk_matrix matrix(XLA_FFI_CallFrame *frame, int kind, int first, long n, long k) {
    mhk_matrix w = {kind, arg(frame, first)->data, 0, 0, n, k};
    if (kind >= MHK_INT8) w.scales = arg(frame, first + 1)->data;
    if (kind == MHK_INT8M || kind == MHK_INT4M) w.minima = arg(frame, first + 2)->data;
    return w;
}

/* (x (..., K) float32, matrix) -> (..., N) float32 */
static XLA_FFI_Error *linear(XLA_FFI_CallFrame *frame, int kind) {
    if (asked_for_version(frame)) return 0;
    const XLA_FFI_Buffer *x = arg(frame, 0), *y = ret(frame);
    const mhk_matrix w = matrix(frame, kind, 1, y->dims[y->rank - 1], x->dims[x->rank - 1]);
    const int bad = mhk_linear(&w, x->data, y->data, count(x, x->rank - 1), mhk_threads(), 0);
    return bad ? failed(frame, "modelhub's linear: arguments that do not fit together") : 0;
}
/* (first int32 scalar, matrix, as many values as rows int8) -> rows first ... as float32 (rows, K) */
static XLA_FFI_Error *widen(XLA_FFI_CallFrame *frame, int kind) {
    if (asked_for_version(frame)) return 0;
    const XLA_FFI_Buffer *y = ret(frame), *codes = arg(frame, 1);
    const long rows = codes->dims[0] * MHK_TILE, first = *(const int32_t *)arg(frame, 0)->data;
    const mhk_matrix w = matrix(frame, kind, 1, rows, y->dims[1]);
    const int bad = mhk_widen(&w, first, y->dims[0], y->data, mhk_threads(), 0);
    return bad ? failed(frame, "modelhub's widen: arguments that do not fit together") : 0;
}
/* (ids (...) int32, matrix) -> (..., K) float32 */
static XLA_FFI_Error *take(XLA_FFI_CallFrame *frame, int kind) {
    if (asked_for_version(frame)) return 0;
    const XLA_FFI_Buffer *y = ret(frame), *ids = arg(frame, 0), *codes = arg(frame, 1);
    const mhk_matrix w = matrix(frame, kind, 1, codes->dims[0] * MHK_TILE, y->dims[y->rank - 1]);
    const int bad = mhk_take(&w, ids->data, count(ids, ids->rank), y->data);
    return bad && bad != MHK_OUTSIDE ? failed(frame, "modelhub's take: arguments that do not fit together") : 0;
}

#define LINEAR(name, kind) \
    static XLA_FFI_Error *linear_##name(XLA_FFI_CallFrame *frame) { return linear(frame, kind); }
#define PACKED(name, kind)                                                                      \
    LINEAR(name, kind)                                                                          \
    static XLA_FFI_Error *widen_##name(XLA_FFI_CallFrame *frame) { return widen(frame, kind); } \
    static XLA_FFI_Error *take_##name(XLA_FFI_CallFrame *frame) { return take(frame, kind); }
LINEAR(float32, MHK_F32)
LINEAR(bfloat16, MHK_BF16)
LINEAR(float16, MHK_F16)
PACKED(int8, MHK_INT8)
PACKED(int8m, MHK_INT8M)
PACKED(int8h, MHK_INT8H)
PACKED(int4, MHK_INT4)
PACKED(int4m, MHK_INT4M)

#define ALL(X) \
    X(linear_float32) X(linear_bfloat16) X(linear_float16) \
    X(linear_int8) X(linear_int8m) X(linear_int8h) X(linear_int4) X(linear_int4m) \
    X(widen_int8) X(widen_int8m) X(widen_int8h) X(widen_int4) X(widen_int4m) \
    X(take_int8) X(take_int8m) X(take_int8h) X(take_int4) X(take_int4m)
#define NAME(name) #name,
#define HANDLER(name) (void *)name,
const char *const mhk_xla_names[] = {ALL(NAME) 0};
void *const mhk_xla_handlers[] = {ALL(HANDLER)};
