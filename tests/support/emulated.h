/* Stands in for processors that are not at hand; included before a source of the kernels (gcc -include).
 *
 * EMULATED=512 or 256: the vectors of AVX512 or AVX, and EMULATED_VNNI their products of bytes, in plain C by SIMDe
 * (https://github.com/simd-everywhere/simde), so that rows.c takes the branch that is for such a processor.
 * PROCESSOR_OF_THE_ENVIRONMENT: what the processor says of itself is in $EMULATED_PROCESSOR (dispatch.c).
 */
#if defined(EMULATED)
#define SIMDE_ENABLE_NATIVE_ALIASES
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#pragma GCC diagnostic pop

#if EMULATED == 512
#define __AVX512F__ 1
/* What SIMDe 0.7.4 lacks, or has under a name with the wrong parameters. */
static inline __m512i emulated_two(__m256i low, __m256i high) {
    __m512i both;
    memcpy(&both, &low, 32);
    memcpy((char *)&both + 32, &high, 32);
    return both;
}
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps(h) emulated_cvtph_ps(h)
static inline __m512 emulated_cvtph_ps(__m256i h) {
    return (__m512)emulated_two((__m256i)_mm256_cvtph_ps(_mm256_castsi256_si128(h)),
                                (__m256i)_mm256_cvtph_ps(_mm256_extracti128_si256(h, 1)));
}
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32(v) emulated_cvtepu16_epi32(v)
static inline __m512i emulated_cvtepu16_epi32(__m256i v) {
    return emulated_two(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)),
                        _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1)));
}
#if defined(EMULATED_VNNI)
#define __AVX512VNNI__ 1
#endif
#elif defined(EMULATED_VNNI)
#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32(a, w, x) simde_mm256_dpbusd_epi32(a, w, x)
#endif
#endif

#if defined(PROCESSOR_OF_THE_ENVIRONMENT)
#include <stdlib.h>
/* "leaf.subleaf.register.bit" of those that are set, with a blank after each, then "saved=" and what xgetbv gives. */
#define MHK_PROCESSOR
#include <stdio.h>
#include <string.h>
static int processor_has(unsigned leaf, unsigned subleaf, int reg, int bit) {
    const char *said = getenv("EMULATED_PROCESSOR");
    char name[64];
    snprintf(name, sizeof name, "%u.%u.%d.%d ", leaf, subleaf, reg, bit);
    return !said || strstr(said, name) != 0;
}
static unsigned processor_saves(void) {
    const char *said = getenv("EMULATED_PROCESSOR");
    return said ? (unsigned)strtoul(strstr(said, "saved=") + 6, 0, 16) : 0xffffffff;
}
#endif
