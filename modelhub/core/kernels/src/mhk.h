/* Products with few rows, y[R,N] = x[R,K] . W[N,K]^T, of float and of quantised weights; see ../__init__.py. */
#ifndef MHK_H
#define MHK_H
#include <stdint.h>

#define MHK_ABI 3 /* raised with every change of what is below; ../__init__.py checks it */

/* Floats are row-major. Quantised weights are in tiles of 16 rows and groups of 32 columns, (N + 15) / 16 x K / 32 of
 * them, the groups of a tile one after the other:
 *   codes   8 bits: [8][16 rows][4 columns], signed; 4 bits: [4][16 rows][4 columns], the low halves columns 0 to 15 of
 *           the group, the high ones 16 to 31, and 8 more than what they mean unless there are minima
 *   scales  [16 rows] float16; INT8H: [2][16 rows], one for each 16 columns
 *   minima  [16 rows] float16 (the kinds in M): a weight is scale * code + minimum
 */
enum { MHK_F32, MHK_BF16, MHK_F16, MHK_INT8, MHK_INT8M, MHK_INT8H, MHK_INT4, MHK_INT4M, MHK_KINDS };
enum { MHK_TILE = 16, MHK_GROUP = 32, MHK_TOGETHER = 8 };

typedef struct {
    int kind;
    const void *codes;
    const uint16_t *scales, *minima;
    long n, k;
} mhk_matrix;

/* All return 0, or one of these: arguments that do not fit together, no memory, ids for which there was no row, weights
 * that the kind cannot hold (not finite, or beyond what float16 scales reach). threads: at most so many;
 * openmp: those of the OpenMP in the process, if mhk_use_openmp was given one, in place of the own pool. */
enum { MHK_MISFIT = -1, MHK_NO_MEMORY = -2, MHK_OUTSIDE = 1, MHK_UNHOLDABLE = -3 };
int mhk_linear(const mhk_matrix *w, const float *x, float *y, long rows, int threads, int openmp);
/* The same of `count` matrices of the same k, at most MHK_TOGETHER, each with its own y. */
int mhk_linears(const mhk_matrix *w, long count, const float *x, float *const *y, long rows, int threads, int openmp);
int mhk_widen(const mhk_matrix *w, long first, long count, float *out, int threads, int openmp); /* rows as floats */
int mhk_take(const mhk_matrix *w, const int32_t *ids, long count, float *out); /* outside: the nearest row */

/* y = x / rms(x) * (w + offset) for each of `rows` rows of n, as Backend.rms_norm has it. */
int mhk_rms_norm(const float *x, const float *w, float *y, long rows, long n, float eps, float offset);

/* Attention of the queries q (batch, heads, time, width) to k and v (batch, kv_heads, slots, width), as Backend.attention
 * has it. mask (masks, time, slots), masks 1 or batch, 0 where a query may not look, or null; softcap 0: none. */
typedef struct {
    long batch, heads, kv_heads, time, slots, width, masks;
    float scale, softcap;
} mhk_shapes;
int mhk_attend(const mhk_shapes *s, const float *q, const float *k, const float *v, const uint8_t *mask, float *y,
               int threads, int openmp);
/* Rotary embedding of x (batch, heads, time, width) with cosines and sines (1 or batch, time, width / 2). */
int mhk_rotate(const float *x, const float *cosines, const float *sines, float *y, long batch, long heads, long time,
               long width, long tables);
/* new (batch, heads, time, width) into buffer (batch, heads, slots, width), from slot start[row] on. */
int mhk_write(float *buffer, const float *rows, const int32_t *start, long batch, long heads, long time, long width,
              long slots);
enum { MHK_SILU, MHK_GELU_TANH };
int mhk_activate(int kind, const float *x, float *y, long n);

/* Packs `count` rows of floats, at most 16, into one tile: codes, scales and minima by least squared error. */
int mhk_pack(int kind, const float *rows, long count, long k, const float *importance, void *codes, uint16_t *scales,
             uint16_t *minima);
/* The same of blocks of a GGUF file, `row_bytes` apart; nothing is rounded but scales and minima, to float16. */
int mhk_pack_gguf(int type, const uint8_t *rows, long row_bytes, long count, long k, void *codes, uint16_t *scales,
                  uint16_t *minima);

const char *mhk_isa(void);          /* the instruction set in use; "" on processors below all that there are */
int mhk_set_isa(const char *name);  /* -1: not on this processor */
int mhk_threads(void);              /* what XLA and TensorFlow use */
void mhk_set_threads(int threads);
void mhk_use_openmp(void *gomp_parallel);
#endif
