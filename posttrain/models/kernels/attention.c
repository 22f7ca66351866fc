/* Attention for float32 on a CPU: one new token of many sequences (decoding), and whole rows with their gradient
   (training). As in kernels.c, every sum has a written order; each row's is its own. */

#include "vector.h"

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

/* Part of a sequence that was computed before: the number of its tokens and where their keys and values of all layers
   lie, each layer laid out as a slot with just the blocks it needs. */
typedef struct {
    int64_t count;
    const float *keys, *values;
} Part;

/* One decode step of one layer. qkv (rows, (heads + 2 kv_heads) width) as the product gave it; q_norm and k_norm
   (width) or null; cosine and sine (positions, width / 2). Row r is sequence `slot[r]` at `position[r]`; its first
   `shared[r]` tokens lie in `parts[r]` parts at tables[r], which other rows may read too. The new key and value are
   stored, then attended to. keys (slots, kv_heads, blocks, width, 16), values (slots, kv_heads, blocks 16, room),
   out (rows, heads width), scratch (threads, shape.scratch). */
void decode_attention(const float *qkv, const float *q_norm, const float *k_norm, const float *cosine,
                      const float *sine, const int64_t *slot, const int64_t *position, const int64_t *shared,
                      const int64_t *parts, const int64_t *tables, int64_t layer, float *keys, float *values,
                      float *out, float *scratch, int64_t rows, const Shape *shape) {
    const Shape z = *shape;
    const int64_t groups = z.heads / z.kv_heads, half = z.width / 2, wide = (z.heads + 2 * z.kv_heads) * z.width;
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
            const int64_t at = position[r] - shared[r], head = layer * z.kv_heads + h;
            const Part *part = (const Part *)tables[r], *end = part + parts[r];
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
            for (int64_t g = 0; g < groups; g++) {
                memcpy(raw, row + (h * groups + g) * z.width, z.width * sizeof(float));
                if (q_norm) head_norm(raw, q_norm, z.width, z.eps);
                rotate(raw, turned, c, s, half, 1.0f);
                for (int64_t d = 0; d < z.width; d++) turned[d] *= z.scale;
                float *own_scores = scores;
                v16 most = splat(-INFINITY);
                for (const Part *p = part; p < end; p++) {
                    const int64_t padded = (p->count + LANES - 1) / LANES * LANES;
                    most = key_scores(turned, p->keys + head * padded * z.width, p->count, z.width, own_scores, most);
                    own_scores += padded;
                }
                most = key_scores(turned, own_keys, at + 1, z.width, own_scores, most);
                const v16 top = splat(largest(most));
                const int64_t padded = own_scores - scores + (at / LANES + 1) * LANES;
                v16 mass = splat(0.0f), sums[64];
                for (int64_t i = 0; i < padded; i += LANES) {
                    v16 e = exponential(load(scores + i) - top);
                    store(scores + i, e);
                    mass += e;
                }
                for (int64_t j = 0; j < z.room / LANES; j++) sums[j] = splat(0.0f);
                const float *weights = scores;
                for (const Part *p = part; p < end; p++) {
                    const int64_t padded = (p->count + LANES - 1) / LANES * LANES;
                    weigh(weights, p->values + head * padded * z.room, p->count, z.room, sums);
                    weights += padded;
                }
                weigh(own_scores, own_values, at + 1, z.room, sums);
                const float inverse = 1.0f / total(mass);
                float *o = out + (r * z.heads + h * groups + g) * z.width, *flat = (float *)sums;
                for (int64_t d = 0; d < z.width; d++) o[d] = flat[d] * inverse;
            }
        }
    }
}

/* ---- attention of whole rows, and its gradient ------------------------------------------------------------------- */

/* Tokens lie end to end; query (M, heads, width), key and value (M, kv_heads, width). A run is one row, or a shared
   beginning followed by the rows that continue it: each of those sees the beginning and its own past. One run and one
   key head are computed by one thread, from copies in which a token's numbers are padded to `room`, a multiple of 16,
   and a row's tokens to a multiple of 16. Probabilities are computed again in the backward pass from the log of their
   sum (Dao et al., arXiv 2205.14135). */

#define TILE 16 /* queries computed together */

/* scores[i][16 b + lane] = sum_d x[i][d] turned[b][d][lane] for 4 rows i and `blocks` blocks. */
INLINE void four_scores(const float *x, int64_t room, const float *turned, int64_t width, int64_t blocks,
                        float *scores, int64_t wide) {
    int64_t b = 0;
    for (; b + 2 <= blocks; b += 2) {
        const float *k0 = turned + b * LANES * width, *k1 = k0 + LANES * width;
        v16 s[4][2];
        for (int i = 0; i < 4; i++) s[i][0] = s[i][1] = splat(0.0f);
        for (int64_t d = 0; d < width; d++) {
            v16 a = load(k0 + d * LANES), c = load(k1 + d * LANES);
            for (int i = 0; i < 4; i++) {
                s[i][0] += splat(x[i * room + d]) * a;
                s[i][1] += splat(x[i * room + d]) * c;
            }
        }
        for (int i = 0; i < 4; i++) {
            store(scores + i * wide + b * LANES, s[i][0]);
            store(scores + i * wide + (b + 1) * LANES, s[i][1]);
        }
    }
    if (b < blocks) {
        const float *k0 = turned + b * LANES * width;
        v16 s[4];
        for (int i = 0; i < 4; i++) s[i] = splat(0.0f);
        for (int64_t d = 0; d < width; d++)
            for (int i = 0; i < 4; i++) s[i] += splat(x[i * room + d]) * load(k0 + d * LANES);
        for (int i = 0; i < 4; i++) store(scores + i * wide + b * LANES, s[i]);
    }
}

/* out[i][:] (+)= sum_j weights[i wi + j wj] rows[j][:] for 4 rows i and n vectors of columns. */
INLINE void four_sums(const float *weights, int64_t wi, int64_t wj, const float *rows, int64_t count, int64_t room,
                      float *out, int add, const int n) {
    v16 s[4][4];
    for (int i = 0; i < 4; i++)
        for (int c = 0; c < n; c++) s[i][c] = add ? load(out + i * room + c * LANES) : splat(0.0f);
    for (int64_t j = 0; j < count; j++)
        for (int i = 0; i < 4; i++) {
            const v16 w = splat(weights[i * wi + j * wj]);
            for (int c = 0; c < n; c++) s[i][c] += w * load(rows + j * room + c * LANES);
        }
    for (int i = 0; i < 4; i++)
        for (int c = 0; c < n; c++) store(out + i * room + c * LANES, s[i][c]);
}

static void sums(const float *weights, int64_t wi, int64_t wj, const float *rows, int64_t count, int64_t room,
                 float *out, int add) {
    int64_t c = 0;
    for (; c + 4 * LANES <= room; c += 4 * LANES) four_sums(weights, wi, wj, rows + c, count, room, out + c, add, 4);
    switch ((room - c) / LANES) {
    case 1: four_sums(weights, wi, wj, rows + c, count, room, out + c, add, 1); break;
    case 2: four_sums(weights, wi, wj, rows + c, count, room, out + c, add, 2); break;
    case 3: four_sums(weights, wi, wj, rows + c, count, room, out + c, add, 3); break;
    }
}

/* `count` tokens of one head, `stride` floats apart, to padded rows and, if wanted, to blocks of 16 turned rows. */
static void pack(const float *x, int64_t stride, int64_t count, int64_t width, int64_t room, float *rows,
                 float *turned) {
    const int64_t padded = (count + LANES - 1) / LANES * LANES;
    for (int64_t t = 0; t < padded; t++) {
        if (rows) {
            memset(rows + t * room, 0, room * sizeof(float));
            if (t < count) memcpy(rows + t * room, x + t * stride, width * sizeof(float));
        }
        if (turned)
            for (int64_t d = 0; d < width; d++)
                turned[(t / LANES * width + d) * LANES + t % LANES] = t < count ? x[t * stride + d] : 0.0f;
    }
}

/* Padded rows back to `count` tokens of one head. */
static void unpack(const float *rows, int64_t room, int64_t count, int64_t width, float *x, int64_t stride) {
    for (int64_t t = 0; t < count; t++) memcpy(x + t * stride, rows + t * room, width * sizeof(float));
}

typedef struct {
    int64_t heads, kv_heads, width, room;
    int64_t runs, threads, scratch; /* scratch: floats of each thread */
    int64_t keys;                   /* most keys a row of a run sees, each part padded to 16 */
    float scale;
} Rows;

/* A tile of queries against what they see: probabilities in `p` (TILE, keys), from scores or from kept norms. */
static void probabilities(const float *q, const Rows *z, const float *turned, int64_t context, int64_t first,
                          int64_t queries, float *p, float *norms, int64_t stride, int kept) {
    const int64_t before = (context + LANES - 1) / LANES * LANES;
    const int64_t seen = before + (first + queries + LANES - 1) / LANES * LANES;
    for (int64_t i = 0; i < queries; i += 4)
        four_scores(q + i * z->room, z->room, turned, z->width, seen / LANES, p + i * z->keys, z->keys);
    for (int64_t i = 0; i < (queries + 3) / 4 * 4; i++) {
        float *row = p + i * z->keys;
        if (i >= queries) {
            memset(row, 0, seen * sizeof(float));
            continue;
        }
        for (int64_t j = context; j < before; j++) row[j] = -INFINITY;
        for (int64_t j = before + first + i + 1; j < seen; j++) row[j] = -INFINITY;
        const v16 scale = splat(z->scale);
        float norm = kept ? norms[i * stride] : 0.0f, inverse = 1.0f;
        if (!kept) {
            v16 most = splat(-INFINITY), mass = splat(0.0f);
            for (int64_t j = 0; j < seen; j += LANES) most = larger(load(row + j), most);
            norm = largest(most) * z->scale;
            for (int64_t j = 0; j < seen; j += LANES) {
                v16 e = exponential(load(row + j) * scale - splat(norm));
                store(row + j, e);
                mass += e;
            }
            norms[i * stride] = norm + logf(total(mass));
            inverse = 1.0f / total(mass);
            for (int64_t j = 0; j < seen; j += LANES) store(row + j, load(row + j) * splat(inverse));
        } else {
            for (int64_t j = 0; j < seen; j += LANES)
                store(row + j, exponential(load(row + j) * scale - splat(norm)));
        }
    }
}

/* rows (n, 2): first token and one past the last of each row; runs (runs + 1): the first row of each run, whose first
   row, where there are more, is the beginning that the others continue. norms (M, heads) are written. */
void attention(const float *query, const float *key, const float *value, float *out, float *norms, const int64_t *rows,
               const int64_t *runs, float *scratch, const Rows *shape) {
    const Rows z = *shape;
    const int64_t groups = z.heads / z.kv_heads, qs = z.heads * z.width, ks = z.kv_heads * z.width;
    int64_t next = 0;
#pragma omp parallel num_threads(z.threads)
    {
        int64_t mine;
#pragma omp atomic capture
        mine = next++;
        float *turned = scratch + mine * z.scratch, *values = turned + z.keys * z.width;
        float *p = values + z.keys * z.room, *q = p + TILE * z.keys, *o = q + TILE * z.room;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < z.runs * z.kv_heads; item++) {
            const int64_t run = item / z.kv_heads, h = item % z.kv_heads;
            int64_t context = 0;
            for (int64_t r = runs[run]; r < runs[run + 1]; r++) {
                const int64_t start = rows[2 * r], count = rows[2 * r + 1] - start;
                const int64_t before = (context + LANES - 1) / LANES * LANES;
                pack(key + start * ks + h * z.width, ks, count, z.width, z.room, NULL, turned + before * z.width);
                pack(value + start * ks + h * z.width, ks, count, z.width, z.room, values + before * z.room, NULL);
                for (int64_t g = h * groups; g < (h + 1) * groups; g++)
                    for (int64_t t = 0; t < count; t += TILE) {
                        const int64_t n = count - t < TILE ? count - t : TILE, at = start + t;
                        pack(query + at * qs + g * z.width, qs, n, z.width, z.room, q, NULL);
                        probabilities(q, &z, turned, context, t, n, p, norms + at * z.heads + g, z.heads, 0);
                        for (int64_t i = 0; i < n; i += 4)
                            sums(p + i * z.keys, z.keys, 1, values, before + t + n, z.room, o + i * z.room, 0);
                        unpack(o, z.room, n, z.width, out + at * qs + g * z.width, qs);
                    }
                if (r == runs[run] && runs[run + 1] - r > 1) context = count;
            }
        }
    }
}

/* Gradients of query, key and value, all written whole, from `grad` of the output. */
void attention_grad(const float *query, const float *key, const float *value, const float *out, float *norms,
                    const float *grad, float *dquery, float *dkey, float *dvalue, const int64_t *rows,
                    const int64_t *runs, float *scratch, const Rows *shape) {
    const Rows z = *shape;
    const int64_t groups = z.heads / z.kv_heads, qs = z.heads * z.width, ks = z.kv_heads * z.width;
    int64_t next = 0;
#pragma omp parallel num_threads(z.threads)
    {
        int64_t mine;
#pragma omp atomic capture
        mine = next++;
        float *tk = scratch + mine * z.scratch, *tv = tk + z.keys * z.width, *keys = tv + z.keys * z.width;
        float *dk = keys + z.keys * z.room, *dv = dk + z.keys * z.room, *p = dv + z.keys * z.room;
        float *ds = p + TILE * z.keys, *q = ds + TILE * z.keys, *g_out = q + TILE * z.room, *dq = g_out + TILE * z.room;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < z.runs * z.kv_heads; item++) {
            const int64_t run = item / z.kv_heads, h = item % z.kv_heads, first_row = runs[run];
            int64_t context = 0;
            for (int64_t r = first_row; r < runs[run + 1]; r++) {
                const int64_t start = rows[2 * r], count = rows[2 * r + 1] - start;
                const int64_t before = (context + LANES - 1) / LANES * LANES;
                const int64_t padded = (count + LANES - 1) / LANES * LANES;
                const float *k = key + start * ks + h * z.width, *v = value + start * ks + h * z.width;
                pack(k, ks, count, z.width, z.room, keys + before * z.room, tk + before * z.width);
                pack(v, ks, count, z.width, z.room, NULL, tv + before * z.width);
                memset(dk + before * z.room, 0, padded * z.room * sizeof(float));
                memset(dv + before * z.room, 0, padded * z.room * sizeof(float));
                for (int64_t g = h * groups; g < (h + 1) * groups; g++)
                    for (int64_t t = 0; t < count; t += TILE) {
                        const int64_t n = count - t < TILE ? count - t : TILE, at = start + t;
                        const int64_t seen = before + (t + n + LANES - 1) / LANES * LANES;
                        pack(query + at * qs + g * z.width, qs, n, z.width, z.room, q, NULL);
                        pack(grad + at * qs + g * z.width, qs, n, z.width, z.room, g_out, NULL);
                        probabilities(q, &z, tk, context, t, n, p, norms + at * z.heads + g, z.heads, 1);
                        for (int64_t i = 0; i < n; i += 4)
                            four_scores(g_out + i * z.room, z.room, tv, z.width, seen / LANES, ds + i * z.keys, z.keys);
                        for (int64_t i = 0; i < (n + 3) / 4 * 4; i++) {
                            float back = 0.0f;
                            if (i < n) {
                                const float *o = out + (at + i) * qs + g * z.width;
                                v16 dot = splat(0.0f);
                                int64_t d = 0;
                                for (; d + LANES <= z.width; d += LANES) dot += load(o + d) * load(g_out + i * z.room + d);
                                if (d < z.width)
                                    dot += load_some(o + d, z.width - d, 0) * load(g_out + i * z.room + d);
                                back = total(dot);
                            }
                            for (int64_t j = 0; j < seen; j += LANES) {
                                float *s = ds + i * z.keys + j;
                                store(s, load(p + i * z.keys + j) * (load(s) - splat(back)) * splat(z.scale));
                            }
                        }
                        for (int64_t i = 0; i < n; i += 4)
                            sums(ds + i * z.keys, z.keys, 1, keys, before + t + n, z.room, dq + i * z.room, 0);
                        unpack(dq, z.room, n, z.width, dquery + at * qs + g * z.width, qs);
                        for (int64_t j = 0; j < seen; j += 4) {
                            sums(ds + j, 1, z.keys, q, n, z.room, dk + j * z.room, 1);
                            sums(p + j, 1, z.keys, g_out, n, z.room, dv + j * z.room, 1);
                        }
                    }
                if (r > first_row || runs[run + 1] - r == 1) {
                    unpack(dk + before * z.room, z.room, count, z.width, dkey + start * ks + h * z.width, ks);
                    unpack(dv + before * z.room, z.room, count, z.width, dvalue + start * ks + h * z.width, ks);
                }
                if (r == first_row && runs[run + 1] - r > 1) context = count;
            }
            if (context) {
                const int64_t start = rows[2 * first_row];
                unpack(dk, z.room, context, z.width, dkey + start * ks + h * z.width, ks);
                unpack(dv, z.room, context, z.width, dvalue + start * ks + h * z.width, ks);
            }
        }
    }
}
