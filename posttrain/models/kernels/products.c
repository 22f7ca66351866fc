/* Products of a few rows with a weight, for decoding in float32 on a CPU. Every number of the result is one sum over
   the inner size in its written order, whatever the number of rows, of threads or the layout of the weight, so a
   sequence's bits never depend on its batch-mates. */

#include "vector.h"

#define PANEL 64   /* numbers that lie together for each step of the inner size */
#define DEPTH 1024 /* steps made at once, so that a panel's part stays in the second cache */
#define ROWS 6     /* ROWS × VECTORS sums fill the registers */
#define OUTER 16   /* rows of an unpacked weight that are computed together */

#if defined(__AVX512F__)
#define LANE 16
#define VECTORS 4
#elif defined(__AVX__)
#define LANE 8
#define VECTORS 2
#elif defined(__aarch64__)
#define LANE 4
#define VECTORS 4
#else
#define LANE 4
#define VECTORS 2
#endif
typedef float part __attribute__((vector_size(4 * LANE), aligned(4), may_alias)); /* one register */

/* a · b + c, rounded once where the processor can. Written out, because a compiler that may choose (gcc for some AMD
   processors) fuses in the code for several rows and not in that for one, and then their bits differ. */
#if defined(__AVX512F__)
#include <immintrin.h>
#define MULTIPLY_ADD(a, b, c) ((part)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#elif defined(__AVX__) && defined(__FMA__)
#include <immintrin.h>
#define MULTIPLY_ADD(a, b, c) ((part)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#elif defined(__aarch64__)
#include <arm_neon.h>
#define MULTIPLY_ADD(a, b, c) ((part)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

INLINE part read_part(const float *p) { return *(const part *)p; }
INLINE void write_part(float *p, part x) { *(part *)p = x; }

/* ---- 16 × 16 numbers turned: out[j][i] = in[i][j] ---------------------------------------------------------------- */

#ifndef __has_builtin
#define __has_builtin(name) 0
#endif
#if __has_builtin(__builtin_shufflevector)
#define EVEN_1(x, y) __builtin_shufflevector(x, y, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
#define ODD_1(x, y) __builtin_shufflevector(x, y, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)
#define EVEN_2(x, y) __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define ODD_2(x, y) __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define EVEN_4(x, y) __builtin_shufflevector(x, y, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
#define ODD_4(x, y) __builtin_shufflevector(x, y, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
#define EVEN_8(x, y) __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define ODD_8(x, y) __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
/* Rows `by` apart exchange every other group of `by` numbers. */
#define EXCHANGE(from, to, by)                           \
    for (int i = 0; i < LANES; i++)                      \
        if (!(i & by)) {                                 \
            to[i] = EVEN_##by(from[i], from[i + by]);    \
            to[i + by] = ODD_##by(from[i], from[i + by]); \
        }
INLINE void turn(const float *in, int64_t from, float *out, int64_t to) {
    v16 a[LANES], b[LANES];
    for (int i = 0; i < LANES; i++) a[i] = load(in + i * from);
    EXCHANGE(a, b, 1)
    EXCHANGE(b, a, 2)
    EXCHANGE(a, b, 4)
    EXCHANGE(b, a, 8)
    for (int i = 0; i < LANES; i++) store(out + i * to, a[i]);
}
#else
INLINE void turn(const float *in, int64_t from, float *out, int64_t to) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) out[j * to + i] = in[i * from + j];
}
#endif

/* The same for up to 16 × 16 numbers; what is missing counts as 0, and all 16 × 16 are written. */
static void turn_some(const float *in, int64_t from, int64_t rows, int64_t columns, float *out, int64_t to) {
    if (rows >= LANES && columns >= LANES) {
        turn(in, from, out, to);
        return;
    }
    float square[LANES * LANES] = {0};
    for (int64_t i = 0; i < rows && i < LANES; i++)
        memcpy(square + i * LANES, in + i * from, (columns < LANES ? columns : LANES) * sizeof(float));
    turn(square, LANES, out, to);
}

/* ---- the sums --------------------------------------------------------------------------------------------------- */

/* out[i][:] (+)= sum_k a[i][k] b[k][:] for n rows i and `vectors` registers of columns. */
INLINE void tile(const float *a, int64_t inner, const float *b, int64_t depth, float *out, int64_t wide, int more,
                 const int n, const int vectors) {
    part s[ROWS][VECTORS];
    for (int i = 0; i < n; i++)
        for (int c = 0; c < vectors; c++) s[i][c] = more ? read_part(out + i * wide + c * LANE) : (part){0};
    for (int64_t k = 0; k < depth; k++) {
        part row[VECTORS];
        for (int c = 0; c < vectors; c++) row[c] = read_part(b + k * PANEL + c * LANE);
        for (int i = 0; i < n; i++)
            for (int c = 0; c < vectors; c++) s[i][c] = MULTIPLY_ADD(a[i * inner + k] - (part){0}, row[c], s[i][c]);
    }
    for (int i = 0; i < n; i++)
        for (int c = 0; c < vectors; c++) write_part(out + i * wide + c * LANE, s[i][c]);
}

INLINE void tiles(const float *a, int64_t inner, const float *b, int64_t depth, float *out, int64_t wide, int more,
                  int64_t n, const int vectors) {
    switch (n) {
    case 1: tile(a, inner, b, depth, out, wide, more, 1, vectors); break;
    case 2: tile(a, inner, b, depth, out, wide, more, 2, vectors); break;
    case 3: tile(a, inner, b, depth, out, wide, more, 3, vectors); break;
    case 4: tile(a, inner, b, depth, out, wide, more, 4, vectors); break;
    case 5: tile(a, inner, b, depth, out, wide, more, 5, vectors); break;
    default: tile(a, inner, b, depth, out, wide, more, ROWS, vectors);
    }
}

/* out[i][j] = sum_k a[i][k] panel[k][j] for `rows` rows i, and for j below `columns` rounded up to whole registers. */
static void strip(const float *a, int64_t rows, int64_t inner, const float *panel, int64_t columns, float *out,
                  int64_t wide) {
    for (int64_t k = 0; k < inner; k += DEPTH)
        for (int64_t c = 0; c < columns;) {
            const int64_t left = (columns - c + LANE - 1) / LANE, depth = inner - k < DEPTH ? inner - k : DEPTH;
            const int64_t vectors = left < VECTORS ? 1 : VECTORS;
            int64_t r = 0;
            for (int64_t blocks = (rows + ROWS - 1) / ROWS; blocks; blocks--) {
                const int64_t n = (rows - r + blocks - 1) / blocks; /* of equal size, as far as that goes */
                const float *x = a + r * inner + k, *b = panel + k * PANEL + c;
                if (vectors == 1)
                    tiles(x, inner, b, depth, out + r * wide + c, wide, k > 0, n, 1);
                else
                    tiles(x, inner, b, depth, out + r * wide + c, wide, k > 0, n, VECTORS);
                r += n;
            }
            c += vectors * LANE;
        }
}

/* Rows first … first + PANEL − 1 of x (rows, inner) as a panel (inner, PANEL), zeros past the last. */
static void pack(const float *x, int64_t rows, int64_t inner, int64_t first, float *panel) {
    float square[LANES * LANES];
    for (int64_t k = 0; k < inner; k += LANES)
        for (int64_t i = first; i < first + PANEL; i += LANES) {
            const int64_t depth = inner - k < LANES ? inner - k : LANES, left = i < rows ? rows - i : 0;
            float *to = panel + k * PANEL + i - first;
            if (depth == LANES) {
                turn_some(x + (left ? i : 0) * inner + k, inner, left, depth, to, PANEL);
                continue;
            }
            turn_some(x + (left ? i : 0) * inner + k, inner, left, depth, square, LANES);
            for (int64_t d = 0; d < depth; d++) store(to + d * PANEL, load(square + d * LANES));
        }
}

INLINE void add_bias(const float *bias, float *out, int64_t rows, int64_t columns, int64_t wide) {
    for (int64_t r = 0; bias && r < rows; r++)
        for (int64_t j = 0; j < columns; j++) out[r * wide + j] += bias[j];
}

/* ---- what decoding calls ------------------------------------------------------------------------------------------ */

/* weight (outer, inner) → panels (outer / PANEL rounded up, inner, PANEL). */
void pack_weight(const float *weight, float *panels, int64_t outer, int64_t inner, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t p = 0; p < (outer + PANEL - 1) / PANEL; p++)
        pack(weight, outer, inner, p * PANEL, panels + p * inner * PANEL);
}

/* x (rows, inner) times a packed weight → out (rows, outer), plus bias (outer) unless null. */
void packed_product(const float *x, const float *panels, const float *bias, float *out, int64_t rows, int64_t inner,
                    int64_t outer, int64_t threads) {
    const int64_t count = (outer + PANEL - 1) / PANEL, blocks = (rows + ROWS - 1) / ROWS;
    int64_t groups = count >= 4 * threads ? 1 : (4 * threads + count - 1) / count; /* work for every thread */
    if (groups > blocks) groups = blocks;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t item = 0; item < count * groups; item++) {
        const int64_t p = item / groups, g = item % groups, left = outer - p * PANEL;
        const int64_t first = blocks * g / groups * ROWS, last = blocks * (g + 1) / groups * ROWS;
        const int64_t end = last < rows ? last : rows, columns = left < PANEL ? left : PANEL;
        const float *panel = panels + p * inner * PANEL;
        float *to = out + first * outer + p * PANEL;
        if (columns == PANEL) strip(x + first * inner, end - first, inner, panel, PANEL, to, outer);
        for (int64_t r = first; columns < PANEL && r < end; r += ROWS) {
            float edge[ROWS * PANEL];
            const int64_t n = end - r < ROWS ? end - r : ROWS;
            strip(x + r * inner, n, inner, panel, columns, edge, PANEL);
            for (int64_t i = 0; i < n; i++)
                memcpy(out + (r + i) * outer + p * PANEL, edge + i * PANEL, columns * sizeof(float));
        }
        add_bias(bias ? bias + p * PANEL : 0, to, end - first, columns, outer);
    }
}

/* The same with the weight where torch keeps it, (outer, inner): here the rows of x are packed, into scratch
   (rows / PANEL rounded up, inner, PANEL). */
void product(const float *x, const float *weight, const float *bias, float *out, float *scratch, int64_t rows,
             int64_t inner, int64_t outer, int64_t threads) {
    const int64_t panels = (rows + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; p++) pack(x, rows, inner, p * PANEL, scratch + p * inner * PANEL);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < outer; first += OUTER) {
            const int64_t n = outer - first < OUTER ? outer - first : OUTER;
            for (int64_t r = 0; r < rows; r += PANEL) {
                float turned[OUTER * PANEL], square[LANES * LANES];
                const int64_t end = r + PANEL < rows ? r + PANEL : rows;
                strip(weight + first * inner, n, inner, scratch + r * inner, end - r, turned, PANEL);
                for (int64_t i = r; i < end; i += LANES) {
                    turn_some(turned + i - r, PANEL, n, end - i, square, LANES);
                    for (int64_t j = i; j < end && j < i + LANES; j++)
                        memcpy(out + j * outer + first, square + (j - i) * LANES, n * sizeof(float));
                }
                add_bias(bias ? bias + first : 0, out + r * outer + first, end - r, n, outer);
            }
        }
    }
}
