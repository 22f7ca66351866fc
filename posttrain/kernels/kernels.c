/* The operations between matrix products, for float32 on a CPU: each reads and writes its tensors once.

   Vectors are 16 floats of the compiler's own vector extension, so one source serves AVX-512, AVX2 and NEON. Sums are
   taken in an order that is written down here and never depends on addresses, on other rows or on the number of
   threads (the gradient of a norm's weight alone is summed per thread). Functions take plain pointers; the Python side
   has checked shapes, dtypes and contiguity. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4), may_alias));
#define LANES 16
#define INLINE static inline __attribute__((always_inline))
#define CHUNK 256 /* logits whose probabilities are summed together before the double-precision running sum */

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

/* ---- root-mean-square norm, with the residual sum before it ---------------------------------------------------- */

/* sum = x + delta (delta may be null, then sum is not written), y = w · sum / rms(sum). rstd (rows) keeps 1 / rms. */
void rms_norm(const float *x, const float *delta, const float *w, float *sum, float *y, float *rstd, int64_t rows,
              int64_t width, float eps) {
#pragma omp parallel for schedule(static) if (rows * width > 8192)
    for (int64_t r = 0; r < rows; r++) {
        const float *a = x + r * width;
        float *out = y + r * width;
        v16 squares = splat(0.0f);
        if (delta) {
            const float *b = delta + r * width;
            float *s = sum + r * width;
            int64_t i = 0;
            for (; i + LANES <= width; i += LANES) {
                v16 v = load(a + i) + load(b + i);
                store(s + i, v);
                squares += v * v;
            }
            if (i < width) {
                v16 v = load_some(a + i, width - i, 0) + load_some(b + i, width - i, 0);
                store_some(s + i, v, width - i);
                squares += v * v;
            }
            a = s;
        } else {
            int64_t i = 0;
            for (; i + LANES <= width; i += LANES) squares += load(a + i) * load(a + i);
            if (i < width) {
                v16 v = load_some(a + i, width - i, 0);
                squares += v * v;
            }
        }
        float scale = 1.0f / sqrtf(total(squares) / (float)width + eps);
        if (rstd) rstd[r] = scale;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) store(out + i, load(a + i) * splat(scale) * load(w + i));
        for (; i < width; i++) out[i] = a[i] * scale * w[i];
    }
}

/* dx = d(loss)/d(sum) from dy and, if given, from the residual stream (dsum); dw (parts, width) is added to, one row
   for each of `parts` ranges of rows. */
void rms_norm_grad(const float *sum, const float *w, const float *rstd, const float *dy, const float *dsum, float *dx,
                   float *dw, int64_t rows, int64_t width, int64_t parts) {
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < parts; part++) {
        float *dwp = dw + part * width;
        for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; r++) {
            const float *a = sum + r * width, *g = dy + r * width;
            float *out = dx + r * width;
            float scale = rstd[r];
            v16 dots = splat(0.0f);
            int64_t i = 0;
            for (; i + LANES <= width; i += LANES) {
                v16 ga = load(g + i) * load(a + i);
                dots += ga * load(w + i);
                store(dwp + i, load(dwp + i) + ga * splat(scale));
            }
            if (i < width) {
                int64_t n = width - i;
                v16 ga = load_some(g + i, n, 0) * load_some(a + i, n, 0);
                dots += ga * load_some(w + i, n, 0);
                store_some(dwp + i, load_some(dwp + i, n, 0) + ga * splat(scale), n);
            }
            float back = total(dots) * scale * scale * scale / (float)width;
            for (i = 0; i + LANES <= width; i += LANES) {
                v16 v = load(g + i) * load(w + i) * splat(scale) - load(a + i) * splat(back);
                if (dsum) v += load(dsum + r * width + i);
                store(out + i, v);
            }
            for (; i < width; i++) {
                float v = g[i] * w[i] * scale - a[i] * back;
                out[i] = dsum ? v + dsum[r * width + i] : v;
            }
        }
    }
}

/* ---- rotary positions -------------------------------------------------------------------------------------------- */

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

/* in and out (rows, heads, width), cosine and sine (rows, width / 2); sign -1 turns back, which is the gradient. */
void rotary(const float *in, float *out, const float *cosine, const float *sine, int64_t rows, int64_t heads,
            int64_t width, float sign) {
    int64_t half = width / 2;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < heads; h++)
            rotate(in + (r * heads + h) * width, out + (r * heads + h) * width, cosine + r * half, sine + r * half,
                   half, sign);
}

/* ---- gated unit: silu(gate) · up --------------------------------------------------------------------------------- */

INLINE v16 sigmoid(v16 x) { return splat(1.0f) / (splat(1.0f) + exponential(splat(0.0f) - x)); }

/* gate and up have a stride between rows, so that both may be halves of one product. */
void swiglu(const float *gate, const float *up, float *out, int64_t rows, int64_t width, int64_t stride) {
#pragma omp parallel for schedule(static) if (rows * width > 8192)
    for (int64_t r = 0; r < rows; r++) {
        const float *g = gate + r * stride, *u = up + r * stride;
        float *o = out + r * width;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) store(o + i, load(g + i) * sigmoid(load(g + i)) * load(u + i));
        if (i < width) {
            v16 a = load_some(g + i, width - i, 0), b = load_some(u + i, width - i, 0);
            store_some(o + i, a * sigmoid(a) * b, width - i);
        }
    }
}

void swiglu_grad(const float *gate, const float *up, const float *dout, float *dgate, float *dup, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < size; i += LANES) {
        int64_t n = size - i < LANES ? size - i : LANES;
        v16 g, u, d;
        if (n == LANES) {
            g = load(gate + i), u = load(up + i), d = load(dout + i);
        } else {
            g = load_some(gate + i, n, 0), u = load_some(up + i, n, 0), d = load_some(dout + i, n, 0);
        }
        v16 s = sigmoid(g), one = splat(1.0f);
        v16 a = d * u * s * (one + g * (one - s)), b = d * g * s;
        if (n == LANES) {
            store(dgate + i, a);
            store(dup + i, b);
        } else {
            store_some(dgate + i, a, n);
            store_some(dup + i, b, n);
        }
    }
}

/* ---- attention of one new token per sequence --------------------------------------------------------------------- */

/* Keys lie in blocks of 16 tokens, width first, (blocks, width, 16): a query's products with 16 keys then need no sum
   across lanes. Values lie token by token, (tokens, room) with room = width rounded up to 16. */

INLINE v16 block_scores(const float *q, const float *keys, int64_t width) {
    v16 s0 = splat(0.0f), s1 = s0, s2 = s0, s3 = s0;
    int64_t d = 0;
    for (; d + 4 <= width; d += 4) {
        s0 += splat(q[d]) * load(keys + d * LANES);
        s1 += splat(q[d + 1]) * load(keys + (d + 1) * LANES);
        s2 += splat(q[d + 2]) * load(keys + (d + 2) * LANES);
        s3 += splat(q[d + 3]) * load(keys + (d + 3) * LANES);
    }
    for (; d < width; d++) s0 += splat(q[d]) * load(keys + d * LANES);
    return (s0 + s1) + (s2 + s3);
}

/* Scores of one query with `count` keys, padded lanes at -inf; returns the largest. */
INLINE v16 key_scores(const float *q, const float *keys, int64_t count, int64_t width, float *scores, v16 most) {
    for (int64_t b = 0; b * LANES < count; b++) {
        v16 s = block_scores(q, keys + b * LANES * width, width);
        for (int64_t n = count - b * LANES; n < LANES; n++) s[n] = -INFINITY;
        store(scores + b * LANES, s);
        most = larger(s, most);
    }
    return most;
}

INLINE void add_values(const float *weights, const float *values, int64_t count, int64_t room, v16 *out, const int n) {
    v16 a[8], b[8];
    for (int j = 0; j < n; j++) a[j] = out[j], b[j] = splat(0.0f);
    int64_t t = 0;
    for (; t + 2 <= count; t += 2)
        for (int j = 0; j < n; j++) {
            a[j] += splat(weights[t]) * load(values + t * room + j * LANES);
            b[j] += splat(weights[t + 1]) * load(values + (t + 1) * room + j * LANES);
        }
    if (t < count)
        for (int j = 0; j < n; j++) a[j] += splat(weights[t]) * load(values + t * room + j * LANES);
    for (int j = 0; j < n; j++) out[j] = a[j] + b[j];
}

static void weigh(const float *weights, const float *values, int64_t count, int64_t room, v16 *out) {
    switch (room / LANES) {
    case 1: add_values(weights, values, count, room, out, 1); break;
    case 2: add_values(weights, values, count, room, out, 2); break;
    case 3: add_values(weights, values, count, room, out, 3); break;
    case 4: add_values(weights, values, count, room, out, 4); break;
    case 6: add_values(weights, values, count, room, out, 6); break;
    case 8: add_values(weights, values, count, room, out, 8); break;
    default:
        for (int64_t j = 0; j < room / LANES; j++) add_values(weights, values + j * LANES, count, room, out + j, 1);
    }
}

INLINE void head_norm(float *x, const float *w, int64_t width, float eps) {
    v16 squares = splat(0.0f);
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) squares += load(x + i) * load(x + i);
    if (i < width) {
        v16 v = load_some(x + i, width - i, 0);
        squares += v * v;
    }
    float scale = 1.0f / sqrtf(total(squares) / (float)width + eps);
    for (i = 0; i < width; i++) x[i] = x[i] * scale * w[i];
}

typedef struct {
    int64_t heads, kv_heads, width, room, blocks; /* blocks of 16 tokens that a slot has */
    int64_t threads, scratch;                     /* scratch: floats of each thread */
    float scale, eps;
} Shape;

/* One decode step of one layer. qkv (rows, (heads + 2 kv_heads) width) as the product gave it; q_norm and k_norm
   (width) or null; cosine and sine (positions, width / 2). Row r is sequence `slot[r]` at `position[r]`; its first
   `shared[r]` tokens are a prompt whose keys and values of all layers lie at shared_keys[r] and shared_values[r], each
   layer laid out as a slot with just the blocks it needs. The new key and value are stored, then attended to.
   keys (slots, kv_heads, blocks, width, 16), values (slots, kv_heads, blocks 16, room), out (rows, heads width),
   scratch (threads, shape.scratch). */
void decode_attention(const float *qkv, const float *q_norm, const float *k_norm, const float *cosine,
                      const float *sine, const int64_t *slot, const int64_t *position, const int64_t *shared,
                      const int64_t *shared_keys, const int64_t *shared_values, int64_t layer, float *keys,
                      float *values, float *out, float *scratch, const int64_t *count, const Shape *shape) {
    const Shape z = *shape;
    const int64_t groups = z.heads / z.kv_heads, half = z.width / 2, wide = (z.heads + 2 * z.kv_heads) * z.width;
    const int64_t rows = *count;
    int64_t next = 0;
#pragma omp parallel num_threads(z.threads)
    {
        int64_t mine;
#pragma omp atomic capture
        mine = next++;
        float *scores = scratch + mine * z.scratch;
#pragma omp for schedule(dynamic, 2)
        for (int64_t item = 0; item < rows * z.kv_heads; item++) {
            const int64_t h = item / rows, r = item % rows; /* head by head: a group's rows share the prompt's keys */
            const int64_t at = position[r] - shared[r], shared_blocks = (shared[r] + LANES - 1) / LANES;
            const float *row = qkv + r * wide, *c = cosine + position[r] * half, *s = sine + position[r] * half;
            float *own_keys = keys + (slot[r] * z.kv_heads + h) * z.blocks * LANES * z.width;
            float *own_values = values + (slot[r] * z.kv_heads + h) * z.blocks * LANES * z.room;
            float raw[1024], turned[1024];
            memcpy(raw, row + (z.heads + h) * z.width, z.width * sizeof(float));
            if (k_norm) head_norm(raw, k_norm, z.width, z.eps);
            rotate(raw, turned, c, s, half, 1.0f);
            float *key = own_keys + (at / LANES) * LANES * z.width + at % LANES;
            for (int64_t d = 0; d < z.width; d++) key[d * LANES] = turned[d];
            memcpy(own_values + at * z.room, row + (z.heads + z.kv_heads + h) * z.width, z.width * sizeof(float));
            const int64_t before = (layer * z.kv_heads + h) * shared_blocks * LANES;
            const float *prompt_keys = (const float *)shared_keys[r] + before * z.width;
            const float *prompt_values = (const float *)shared_values[r] + before * z.room;
            for (int64_t g = 0; g < groups; g++) {
                memcpy(raw, row + (h * groups + g) * z.width, z.width * sizeof(float));
                if (q_norm) head_norm(raw, q_norm, z.width, z.eps);
                rotate(raw, turned, c, s, half, 1.0f);
                for (int64_t d = 0; d < z.width; d++) turned[d] *= z.scale;
                float *own_scores = scores + shared_blocks * LANES;
                v16 most = splat(-INFINITY);
                if (shared[r]) most = key_scores(turned, prompt_keys, shared[r], z.width, scores, most);
                most = key_scores(turned, own_keys, at + 1, z.width, own_scores, most);
                const v16 top = splat(largest(most));
                const int64_t padded = (shared_blocks + at / LANES + 1) * LANES;
                v16 mass = splat(0.0f), sums[64];
                for (int64_t i = 0; i < padded; i += LANES) {
                    v16 e = exponential(load(scores + i) - top);
                    store(scores + i, e);
                    mass += e;
                }
                for (int64_t j = 0; j < z.room / LANES; j++) sums[j] = splat(0.0f);
                if (shared[r]) weigh(scores, prompt_values, shared[r], z.room, sums);
                weigh(own_scores, own_values, at + 1, z.room, sums);
                const float inverse = 1.0f / total(mass);
                float *o = out + (r * z.heads + h * groups + g) * z.width, *flat = (float *)sums;
                for (int64_t d = 0; d < z.width; d++) o[d] = flat[d] * inverse;
            }
        }
    }
}

/* ---- from logits to tokens, and to log-probabilities ------------------------------------------------------------- */

INLINE float row_largest(const float *x, int64_t n) {
    v16 most = splat(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) most = larger(load(x + i), most);
    if (i < n) most = larger(load_some(x + i, n - i, -INFINITY), most);
    return largest(most);
}

INLINE float chunk_mass(const float *x, int64_t n, float top, float inverse_t) {
    v16 mass = splat(0.0f);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) mass += exponential((load(x + i) - splat(top)) * splat(inverse_t));
    if (i < n) mass += exponential((load_some(x + i, n - i, -INFINITY) - splat(top)) * splat(inverse_t));
    return total(mass);
}

/* One token a row at its uniform number: the first whose running probability exceeds it. temperature 0 takes the
   largest logit and reports log-probabilities at temperature 1. */
void draw(const float *logits, const double *uniform, float temperature, int64_t *tokens, float *logp, int64_t rows,
          int64_t vocab) {
    const float inverse_t = temperature > 0 ? 1.0f / temperature : 1.0f;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *x = logits + r * vocab;
        const float top = row_largest(x, vocab);
        double mass = 0;
        for (int64_t i = 0; i < vocab; i += CHUNK)
            mass += chunk_mass(x + i, vocab - i < CHUNK ? vocab - i : CHUNK, top, inverse_t);
        int64_t token = 0;
        if (temperature > 0) {
            const double wanted = uniform[r] * mass;
            double before = 0;
            int64_t first = 0, likely = -1;
            for (; first + CHUNK < vocab; first += CHUNK) {
                double here = chunk_mass(x + first, CHUNK, top, inverse_t);
                if (before + here > wanted) break;
                before += here;
            }
            token = -1;
            for (int64_t i = first; i < vocab && i < first + CHUNK; i++) {
                float p = expf((x[i] - top) * inverse_t);
                before += p;
                if (p > 0) likely = i;
                if (before > wanted) {
                    token = i;
                    break;
                }
            }
            if (token < 0) token = likely; /* rounding at the very end of the chunk */
            if (token < 0)
                for (token = vocab - 1; token > 0 && x[token] < top - 87.0f / inverse_t; token--) {}
        } else {
            while (x[token] < top) token++;
        }
        tokens[r] = token;
        logp[r] = (x[token] - top) * inverse_t - (float)log(mass);
    }
}

/* Per row of logits: logp of its target and the entropy at a temperature, and log(sum exp) for the gradient. */
void select_logp(const float *logits, const int64_t *targets, float temperature, float *logp, float *entropy,
                 float *norm, int64_t rows, int64_t vocab) {
    const float inverse_t = 1.0f / temperature;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *x = logits + r * vocab;
        const float top = row_largest(x, vocab);
        double mass = 0, moment = 0;
        for (int64_t first = 0; first < vocab; first += CHUNK) {
            const int64_t end = first + CHUNK < vocab ? first + CHUNK : vocab;
            v16 sum = splat(0.0f), product = splat(0.0f);
            for (int64_t i = first; i < end; i += LANES) {
                v16 z = ((end - i >= LANES ? load(x + i) : load_some(x + i, end - i, top - 1e4f / inverse_t)) -
                         splat(top)) * splat(inverse_t);
                v16 e = exponential(z);
                sum += e;
                product += e * z;
            }
            mass += total(sum);
            moment += total(product);
        }
        const double lse = log(mass);
        logp[r] = (float)((x[targets[r]] - top) * (double)inverse_t - lse);
        entropy[r] = (float)(lse - moment / mass);
        norm[r] = (float)lse + top * inverse_t;
    }
}

/* logits become d(loss)/d(logits), given d(loss)/d(logp) and d(loss)/d(entropy) (null for none). */
void select_logp_grad(float *logits, const int64_t *targets, float temperature, const float *norm,
                      const float *entropy, const float *dlogp, const float *dentropy, int64_t rows, int64_t vocab) {
    const float inverse_t = 1.0f / temperature;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float *x = logits + r * vocab;
        const float hit = x[targets[r]] * inverse_t - norm[r];
        const v16 g = splat(dlogp[r] * inverse_t), ge = splat(dentropy ? dentropy[r] * inverse_t : 0.0f);
        const v16 h = splat(entropy[r]);
        for (int64_t i = 0; i < vocab; i += LANES) {
            int64_t n = vocab - i < LANES ? vocab - i : LANES;
            v16 lp = (n == LANES ? load(x + i) : load_some(x + i, n, 0)) * splat(inverse_t) - splat(norm[r]);
            v16 p = exponential(lp);
            v16 d = splat(0.0f) - p * (g + ge * (lp + h));
            if (n == LANES) store(x + i, d); else store_some(x + i, d, n);
        }
        float p = expf(hit);
        float base = -p * (dlogp[r] * inverse_t + (dentropy ? dentropy[r] * inverse_t : 0.0f) * (hit + entropy[r]));
        x[targets[r]] = base + dlogp[r] * inverse_t;
    }
}
