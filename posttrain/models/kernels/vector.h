/* Vectors of 16 floats in the compiler's own extension, and what both source files do with them. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4), may_alias));
#define LANES 16
#define INLINE static inline __attribute__((always_inline))

INLINE v16 splat(float x) { return (v16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE v16 load(const float *p) { return *(const v16 *)p; }
INLINE void store(float *p, v16 x) { *(v16 *)p = x; }
INLINE v16 pick(i16 mask, v16 yes, v16 no) { return (v16)((mask & (i16)yes) | (~mask & (i16)no)); }
INLINE v16 larger(v16 a, v16 b) { return pick(a > b, a, b); }

INLINE v16 load_some(const float *p, int64_t n, float rest) {
    v16 x = splat(rest);
    memcpy(&x, p, n * sizeof(float));
    return x;
}
INLINE void store_some(float *p, v16 x, int64_t n) { memcpy(p, &x, n * sizeof(float)); }

INLINE float total(v16 x) {
    float s[8];
    for (int i = 0; i < 8; i++) s[i] = x[i] + x[i + 8];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}
INLINE float largest(v16 x) {
    float m = x[0];
    for (int i = 1; i < LANES; i++) m = x[i] > m ? x[i] : m;
    return m;
}

/* exp to about 1 unit in the last place: 2^n · e^r with r in ±ln2/2 and a polynomial of degree 6; 0 below -87.3. */
INLINE v16 exponential(v16 x) {
    const v16 low = splat(-87.33f), high = splat(88.37f), magic = splat(12582912.0f);
    i16 tiny = x < low;
    x = pick(x > high, high, pick(tiny, low, x));
    v16 n = (x * splat(1.44269504088896341f) + magic) - magic;
    v16 r = (x - n * splat(0.693145751953125f)) - n * splat(1.42860682030941723212e-6f);
    v16 p = splat(1.3888889e-3f);
    p = p * r + splat(8.3333333e-3f);
    p = p * r + splat(4.1666667e-2f);
    p = p * r + splat(1.6666667e-1f);
    p = p * r + splat(0.5f);
    p = p * r + splat(1.0f);
    p = p * r + splat(1.0f);
    i16 shift = (i16)(n + magic) << 23;
    v16 y = (v16)((i16)p + shift);
    return pick(tiny, splat(0.0f), y);
}

/* One head's pairs (i, half + i) turned by their angles; sign -1 turns back. */
INLINE void rotate(const float *in, float *out, const float *cosine, const float *sine, int64_t half, float sign) {
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        v16 a = load(in + i), b = load(in + half + i), c = load(cosine + i), s = load(sine + i) * splat(sign);
        store(out + i, a * c - b * s);
        store(out + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float a = in[i], b = in[half + i], s = sine[i] * sign;
        out[i] = a * cosine[i] - b * s;
        out[half + i] = b * cosine[i] + a * s;
    }
}
