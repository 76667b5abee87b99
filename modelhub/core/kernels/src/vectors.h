/* Vectors of one instruction set, by GCC's and Clang's extensions; what is compiled once for each set includes this. */
#include <math.h>
#include <string.h>

#include "internal.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define VB 64 /* bytes of a vector */
#elif defined(__AVX2__)
#include <immintrin.h>
#define VB 32
#else
#define VB 16
#if defined(__SSSE3__)
#include <smmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif
#endif
#if VB == 64 || defined(__ARM_NEON)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif
enum { VL = VB / 4 }; /* floats of a vector */

typedef float vf __attribute__((vector_size(VB)));
typedef int32_t vi __attribute__((vector_size(VB)));
typedef uint32_t vu __attribute__((vector_size(VB)));
typedef uint8_t vb __attribute__((vector_size(VB)));
typedef uint16_t vh __attribute__((vector_size(VB / 2)));
typedef int8_t vq __attribute__((vector_size(VL)));
typedef vf vf_any __attribute__((aligned(4), may_alias));
typedef vb vb_any __attribute__((aligned(1), may_alias));
typedef vh vh_any __attribute__((aligned(2), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define JOINED_(a, b) a##b
#define JOINED(a, b) JOINED_(a, b)

INLINE float sum_of(vf v) { /* a tree, so that it hardly rounds */
    float lanes[VL];
    memcpy(lanes, &v, sizeof v);
    for (int width = VL / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}
INLINE vi splat(int32_t v) { return (vi){0} + v; }
INLINE vf floats(vi v) { return __builtin_convertvector(v, vf); }
INLINE vf floats_at(const float *p) { return *(const vf_any *)p; }
INLINE vf chosen(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
/* The nearest integers of floats below 2^22 in size: 1.5 * 2^23 more than it is, a float's last bits are the integer. */
INLINE vi nearest(vf v) { return (vi)(v + 12582912.f) - 0x4B400000; }
