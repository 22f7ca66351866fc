/* The operations between matrix products, for float32 on a CPU: each reads and writes its tensors once.

   Vectors are 16 floats of the compiler's own vector extension, so one source serves AVX-512, AVX2 and NEON. Sums are
   taken in an order that is written down here and never depends on addresses, on other rows or on the number of
   threads (the gradient of a norm's weight alone is summed per thread). Functions take plain pointers; the Python side
   has checked shapes, dtypes and contiguity. */

#include "vector.h"

#define CHUNK 256 /* logits whose probabilities are summed together before the double-precision running sum */

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
