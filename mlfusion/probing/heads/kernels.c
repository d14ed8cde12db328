/* AVX-512 BF16 kernels for the parts of a training step of attentive heads that a library for large matrices does badly.
 *
 * There are two kinds. Products of few tokens and many heads: they are short, there is one for every image, and their result
 * is larger than any cache. And passes over all weights: each weight is read once for everything that is computed from it,
 * since memory is the limit.
 *
 * Factors of products are bfloat16, summed in float32. The order of summation does not depend on the number of
 * configurations, so that a configuration gets the same numbers in every population. All matrices are dense, the last axis
 * is contiguous, its length a multiple of 32. Functions return 0, or -1 if there was no memory.
 */

#include <stdint.h>
#include <stdlib.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#define FAST __attribute__((target("fma,avx512f,avx512bw,avx512vl,avx512bf16")))
#define INNER FAST static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

enum {
    LANES = 16,   /* float32 numbers in a register, or pairs of bfloat16 */
    ROWS = 6,     /* rows of a product that stay in registers, VECTORS for each: 24 of the 32 registers */
    VECTORS = 4,
    PANEL = VECTORS * LANES,
    TILE = 24,    /* images whose gradients are computed before they are used; for GROUP heads they fit a core's cache */
    GROUP = 12,
    SIDE = 4,     /* rows of either matrix whose scalar products are summed together */
    BLOCKED = 16, /* rows that stay in the innermost cache while other rows pass */
};

int mlfusion_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

static void *allocate(long bytes) { return aligned_alloc(64, (bytes + 127) / 64 * 64); }

static long round_up(long number, long step) { return (number + step - 1) / step * step; }

INNER __m512i interleave(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

/* Two rows of bfloat16 → one row of pairs. `odd` may be NULL, for zeros. */
INNER void pair(const uint16_t *even, const uint16_t *odd, uint32_t *pairs, long length) {
    for (long i = 0; i < length; i += LANES) {
        __mmask16 mask = length - i >= LANES ? 0xffff : (__mmask16)((1u << (length - i)) - 1);
        __m256i other = odd ? _mm256_maskz_loadu_epi16(mask, odd + i) : _mm256_setzero_si256();
        _mm512_mask_storeu_epi32(pairs + i, mask, interleave(_mm256_maskz_loadu_epi16(mask, even + i), other));
    }
}

/* Two rows of float32, rounded to the nearest bfloat16 → one row of pairs. `odd` may be NULL, for zeros. */
INNER void pair_floats(const float *even, const float *odd, uint32_t *pairs, long length) {
    for (long i = 0; i < length; i += LANES) {
        __mmask16 mask = length - i >= LANES ? 0xffff : (__mmask16)((1u << (length - i)) - 1);
        __m512 other = odd ? _mm512_maskz_loadu_ps(mask, odd + i) : _mm512_setzero_ps();
        __m256i low = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, even + i));
        _mm512_mask_storeu_epi32(pairs + i, mask, interleave(low, (__m256i)_mm512_cvtneps_pbh(other)));
    }
}

/* A matrix [rows, width] → panels of PANEL columns (the last may be half as wide), each [depth, columns] of pairs of rows,
 * depth = rows / 2 rounded up: what a product reads of the matrix lies together. */
INNER void pack_panels(const uint16_t *matrix, uint32_t *out, long rows, long width) {
    long depth = (rows + 1) / 2;
    for (long k = 0; k < depth; k++) {
        const uint16_t *even = matrix + 2 * k * width, *odd = 2 * k + 1 < rows ? even + width : NULL;
        for (long column = 0; column < width; column += PANEL) {
            long columns = width - column < PANEL ? width - column : PANEL;
            pair(even + column, odd ? odd + column : NULL, out + column * depth + k * columns, columns);
        }
    }
}

/* The product of up to ROWS rows, given as columns of pairs [depth, step], with a panel of `vectors` x LANES columns. With
 * `streaming` the result is written past the caches, which saves reading the memory first: for results that are used so late
 * that the caches would not hold them any more. */
INNER void product(
    const uint32_t *pairs, long step, const uint32_t *panel, long depth, uint16_t *out, long out_step, long rows, const int vectors,
    const int streaming
) {
    __m512 sums[ROWS][VECTORS];
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_setzero_ps();
    for (long k = 0; k < depth; k++) {
        __m512bh columns[VECTORS];
        UNROLL for (int v = 0; v < vectors; v++)
            columns[v] = (__m512bh)_mm512_loadu_si512(panel + (k * vectors + v) * LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
            __m512bh one = (__m512bh)_mm512_set1_epi32((int)pairs[k * step + r]);
            UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], one, columns[v]);
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++) if (r < rows) {
        UNROLL for (int v = 0; v < vectors; v += 2) {
            __m512i sum = (__m512i)_mm512_cvtne2ps_pbh(sums[r][v + 1], sums[r][v]);
            if (streaming) _mm512_stream_si512((void *)(out + r * out_step + v * LANES), sum);
            else _mm512_storeu_si512(out + r * out_step + v * LANES, sum);
        }
    }
}

/* The same product with the panel that begins at `column`, among all panels of a matrix of `width` columns. */
INNER void panel_product(
    const uint32_t *pairs, long step, const uint32_t *panels, long depth, uint16_t *out, long out_step, long rows, long column,
    long width, const int streaming
) {
    const uint32_t *panel = panels + column * depth;
    if (width - column >= PANEL)
        product(pairs, step, panel, depth, out + column, out_step, rows, VECTORS, streaming);
    else
        product(pairs, step, panel, depth, out + column, out_step, rows, VECTORS / 2, streaming);
}

/* out[h, b] = sum over t of weights[b, t, h] * x[b, t], for images first <= b < last of `images`.
 *
 * x [images, tokens, width] and out [heads, images, width] bfloat16, weights [images, tokens, heads] float32. */
FAST int mlfusion_averages(
    const uint16_t *x, const float *weights, uint16_t *out, long first, long last, long images, long tokens, long heads, long width
) {
    long depth = (tokens + 1) / 2, step = round_up(heads, ROWS);
    uint32_t *panel = allocate(depth * width * 4), *pairs = allocate(depth * step * 4);
    if (!panel || !pairs) { free(panel); free(pairs); return -1; }
    for (long b = first; b < last; b++) {
        pack_panels(x + b * tokens * width, panel, tokens, width);
        for (long k = 0; k < depth; k++) {
            const float *even = weights + (b * tokens + 2 * k) * heads;
            pair_floats(even, 2 * k + 1 < tokens ? even + heads : NULL, pairs + k * step, heads);
        }
        for (long h = 0; h < heads; h += ROWS) for (long column = 0; column < width; column += PANEL)
            panel_product(
                pairs + h, step, panel, depth, out + (h * images + b) * width, images * width, heads - h, column, width, 1);
    }
    _mm_sfence();
    free(panel); free(pairs);
    return 0;
}

/* The sums over the lanes of each of sixteen registers, in order. */
INNER __m512 lane_sums(const __m512 *v) {
    __m512 two[8], four[4], eight[2];
    UNROLL for (int i = 0; i < 8; i++)
        two[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    UNROLL for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
        four[i] = _mm512_add_ps(
            _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    UNROLL for (int i = 0; i < 2; i++)
        eight[i] = _mm512_add_ps(
            _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x44), _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88), _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
}

/* Scalar products of SIDE rows with SIDE others. SIDE rows from `next` on, if not NULL, are prefetched. */
INNER __m512 dots(const uint16_t *const *rows, const uint16_t *const *others, long width, const uint16_t *next) {
    __m512 sums[SIDE * SIDE];
    UNROLL for (int i = 0; i < SIDE * SIDE; i++) sums[i] = _mm512_setzero_ps();
    for (long d = 0; d < width; d += 2 * LANES) {
        __m512bh parts[SIDE];
        UNROLL for (int j = 0; j < SIDE; j++) parts[j] = (__m512bh)_mm512_loadu_si512(others[j] + d);
        UNROLL for (int i = 0; i < SIDE; i++) {
            __m512bh one = (__m512bh)_mm512_loadu_si512(rows[i] + d);
            UNROLL for (int j = 0; j < SIDE; j++) sums[i * SIDE + j] = _mm512_dpbf16_ps(sums[i * SIDE + j], one, parts[j]);
        }
        if (next) UNROLL for (int i = 0; i < SIDE; i++) _mm_prefetch((const char *)(next + i * width + d), _MM_HINT_T0);
    }
    return lane_sums(sums);
}

/* Pointers to SIDE rows from `start` on; past `count` the last row is repeated, and its results must not be stored. */
INNER void row_pointers(const uint16_t **rows, const uint16_t *matrix, long start, long count, long width) {
    for (int i = 0; i < SIDE; i++) rows[i] = matrix + (start + i < count ? start + i : count - 1) * width;
}

INNER void split_rows(__m128 *quarters, __m512 sums) {
    quarters[0] = _mm512_extractf32x4_ps(sums, 0);
    quarters[1] = _mm512_extractf32x4_ps(sums, 1);
    quarters[2] = _mm512_extractf32x4_ps(sums, 2);
    quarters[3] = _mm512_extractf32x4_ps(sums, 3);
}

INNER __mmask8 tail_mask(long left) { return left < SIDE ? (__mmask8)((1u << left) - 1) : 0xf; }

/* exp(x) for x <= 0, exact to a last place or two: 2^n for the nearest n, times the power series of the remainder. */
INNER __m512 exponential(__m512 x) {
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    /* The logarithm of 2 in two parts; the product of n and the first part is exact. */
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x));
    __m512 sum = _mm512_set1_ps(1.0f / 5040);
    const float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    UNROLL for (int i = 0; i < 7; i++) sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(sum, n);
}

/* out[b, t, h] = softmax over t of x[b, t] . folded[h], for images first <= b < last.
 *
 * x [images, tokens, width] and folded [heads, width] bfloat16, out [images, tokens, heads] float32. */
FAST int mlfusion_softmax(
    const uint16_t *x, const uint16_t *folded, float *out, long first, long last, long tokens, long heads, long width
) {
    const uint16_t *rows[SIDE], *others[SIDE];
    for (long b = first; b < last; b++) {
        float *scores = out + b * tokens * heads;
        for (long h = 0; h < heads; h += SIDE) for (long t = 0; t < tokens; t += SIDE) {
            __m128 quarters[SIDE];
            row_pointers(rows, x + b * tokens * width, t, tokens, width);
            row_pointers(others, folded, h, heads, width);
            split_rows(quarters, dots(rows, others, width, NULL));
            UNROLL for (int j = 0; j < SIDE; j++) if (t + j < tokens)
                _mm_mask_storeu_ps(scores + (t + j) * heads + h, tail_mask(heads - h), quarters[j]);
        }
        for (long h = 0; h < heads; h += LANES) {
            __mmask16 mask = heads - h >= LANES ? 0xffff : (__mmask16)((1u << (heads - h)) - 1);
            __m512 largest = _mm512_maskz_loadu_ps(mask, scores + h), sum = _mm512_setzero_ps();
            for (long t = 1; t < tokens; t++)
                largest = _mm512_max_ps(largest, _mm512_maskz_loadu_ps(mask, scores + t * heads + h));
            for (long t = 0; t < tokens; t++) {
                __m512 e = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + t * heads + h), largest));
                sum = _mm512_add_ps(sum, e);
                _mm512_mask_storeu_ps(scores + t * heads + h, mask, e);
            }
            __m512 factor = _mm512_div_ps(_mm512_set1_ps(1), sum);
            for (long t = 0; t < tokens; t++)
                _mm512_mask_storeu_ps(
                    scores + t * heads + h, mask, _mm512_mul_ps(factor, _mm512_maskz_loadu_ps(mask, scores + t * heads + h)));
        }
    }
    return 0;
}

/* out[h, i, b] = projections[h, i] . averages[h, b] + bias[h, i] * (1 + excess[h, b]), for heads first <= h < last.
 *
 * projections [heads, inner, width], averages [heads, images, width] and out [heads, inner, images] bfloat16, bias [heads,
 * inner] and excess [heads, images] float32; excess may be NULL, for zeros. */
FAST int mlfusion_values(
    const uint16_t *projections, const uint16_t *averages, const float *bias, const float *excess, uint16_t *out, long first,
    long last, long images, long inner, long width
) {
    const uint16_t *rows[SIDE], *others[SIDE];
    for (long h = first; h < last; h++)
    for (long start = 0; start < inner; start += BLOCKED) for (long b = 0; b < images; b += SIDE) {
        __mmask8 mask = tail_mask(images - b);
        __m128 one = _mm_set1_ps(1), factor = excess ? _mm_add_ps(one, _mm_maskz_loadu_ps(mask, excess + h * images + b)) : one;
        row_pointers(others, averages + h * images * width, b, images, width);
        for (long i = start; i < start + BLOCKED && i < inner; i += SIDE) {
            __m128 quarters[SIDE];
            row_pointers(rows, projections + h * inner * width, i, inner, width);
            split_rows(quarters, dots(rows, others, width, i > start ? NULL : others[0] + SIDE * width));
            UNROLL for (int j = 0; j < SIDE; j++) if (i + j < inner) {
                __m128 value = _mm_fmadd_ps(_mm_set1_ps(bias[h * inner + i + j]), factor, quarters[j]);
                _mm_mask_storeu_epi16(out + (h * inner + i + j) * images + b, mask, (__m128i)_mm_cvtneps_pbh(value));
            }
        }
    }
    return 0;
}

/* out[b, t, h] = x[b, t] . (grad_values[h, :, b] projections[h]), for images first <= b < last of `images`: the gradient by
 * the attention weights, by way of the gradient by the averages, which is rounded to bfloat16 and exists for a tile only.
 *
 * x [images, tokens, width] and grad_values [heads, inner, images] bfloat16, projections [heads, inner, width] as
 * mlfusion_fold_norm packs them, out [images, tokens, heads] float32. */
FAST int mlfusion_attention_gradients(
    const uint16_t *x, const uint16_t *grad_values, const uint32_t *packed, float *out, long first, long last, long images,
    long tokens, long heads, long width, long inner
) {
    long depth = (inner + 1) / 2, step = round_up(TILE, LANES);
    uint32_t *pairs = allocate(depth * step * 4);
    uint16_t *grad_averages = allocate(TILE * GROUP * width * 2);
    if (!pairs || !grad_averages) { free(pairs); free(grad_averages); return -1; }
    for (long start = first; start < last; start += TILE) {
        long tile = last - start < TILE ? last - start : TILE;
        for (long first_head = 0; first_head < heads; first_head += GROUP) {
            long group = heads - first_head < GROUP ? heads - first_head : GROUP;
            for (long h = 0; h < group; h++) {
                for (long k = 0; k < depth; k++) {
                    const uint16_t *even = grad_values + ((first_head + h) * inner + 2 * k) * images + start;
                    pair(even, 2 * k + 1 < inner ? even + images : NULL, pairs + k * step, tile);
                }
                const uint32_t *panels = packed + (first_head + h) * depth * width;
                for (long column = 0; column < width; column += PANEL) for (long i = 0; i < tile; i += ROWS)
                    panel_product(
                        pairs + i, step, panels, depth, grad_averages + (i * GROUP + h) * width, GROUP * width, tile - i, column,
                        width, 0);
            }
            for (long i = 0; i < tile; i++) {
                const uint16_t *rows[SIDE], *others[SIDE];
                for (long t = 0; t < tokens; t += SIDE) for (long h = 0; h < group; h += SIDE) {
                    __m128 quarters[SIDE];
                    row_pointers(rows, x + (start + i) * tokens * width, t, tokens, width);
                    row_pointers(others, grad_averages + i * GROUP * width, h, group, width);
                    split_rows(quarters, dots(rows, others, width, h ? NULL : rows[0] + SIDE * width));
                    UNROLL for (int j = 0; j < SIDE; j++) if (t + j < tokens)
                        _mm_mask_storeu_ps(
                            out + ((start + i) * tokens + t + j) * heads + first_head + h, tail_mask(group - h), quarters[j]);
                }
            }
        }
    }
    free(pairs); free(grad_averages);
    return 0;
}

/* For groups first <= g < last of `share` rows [width] float32, where `scales` groups have a vector of scale and one of shift
 * in common: the rows times scale, in bfloat16 (out); the same as panels of pairs, for mlfusion_attention_gradients (packed);
 * and the product of each row with shift (bias). */
FAST int mlfusion_fold_norm(
    const float *rows, const float *scale, const float *shift, uint16_t *out, uint32_t *packed, float *bias, long first,
    long last, long share, long width, long scales
) {
    long depth = (share + 1) / 2;
    for (long g = first; g < last; g++) {
        const float *group_scale = scale + g / scales * width, *group_shift = shift + g / scales * width;
        for (long k = 0; k < depth; k++) {
            long row = g * share + 2 * k;
            int has_odd = 2 * k + 1 < share;
            const float *even = rows + row * width;
            __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
            for (long c = 0; c < width; c += LANES) {
                __m512 s = _mm512_loadu_ps(group_scale + c), t = _mm512_loadu_ps(group_shift + c);
                __m512 a = _mm512_loadu_ps(even + c), b = has_odd ? _mm512_loadu_ps(even + width + c) : _mm512_setzero_ps();
                low = _mm512_fmadd_ps(a, t, low);
                high = _mm512_fmadd_ps(b, t, high);
                __m256i p = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(a, s)), q = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(b, s));
                _mm256_storeu_si256((__m256i *)(out + row * width + c), p);
                if (has_odd) _mm256_storeu_si256((__m256i *)(out + (row + 1) * width + c), q);
                long panel = c / PANEL * PANEL, columns = width - panel < PANEL ? width - panel : PANEL;
                _mm512_storeu_si512(packed + g * depth * width + panel * depth + k * columns + c - panel, interleave(p, q));
            }
            bias[row] = _mm512_reduce_add_ps(low);
            if (has_odd) bias[row + 1] = _mm512_reduce_add_ps(high);
        }
    }
    return 0;
}

/* out[r] = rows[r] . vectors[r / share]. */
FAST int mlfusion_row_products(
    const float *rows, const float *vectors, float *out, long first, long last, long share, long width
) {
    for (long g = first; g < last; g++) for (long r = g * share; r < (g + 1) * share; r++) {
        __m512 one = _mm512_setzero_ps(), other = _mm512_setzero_ps();
        for (long c = 0; c < width; c += 2 * LANES) {
            const float *a = rows + r * width + c, *b = vectors + g * width + c;
            one = _mm512_fmadd_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b), one);
            other = _mm512_fmadd_ps(_mm512_loadu_ps(a + LANES), _mm512_loadu_ps(b + LANES), other);
        }
        out[r] = _mm512_reduce_add_ps(_mm512_add_ps(one, other));
    }
    return 0;
}

INNER __m512 to_float(const uint16_t *bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)bf16)), 16));
}

/* out[g] = sum over its rows r of factors[r] * rows[r]; and product[g] = sum of other[r] * rows[r], number by number, unless
 * product is NULL. */
FAST int mlfusion_row_sums(
    const float *rows, const float *factors, const uint16_t *other, float *out, float *product, long first, long last,
    long share, long width
) {
    for (long g = first; g < last; g++) {
        float *sum = out + g * width, *group_product = product ? product + g * width : NULL;
        for (long c = 0; c < width; c += LANES) {
            _mm512_storeu_ps(sum + c, _mm512_setzero_ps());
            if (group_product) _mm512_storeu_ps(group_product + c, _mm512_setzero_ps());
        }
        for (long start = g * share; start < (g + 1) * share; start += SIDE) {
            __m512 f[SIDE];
            long row[SIDE];
            for (int i = 0; i < SIDE; i++) { /* Past the end: the first row again, times 0. */
                int inside = start + i < (g + 1) * share;
                row[i] = (inside ? start + i : start) * width;
                f[i] = _mm512_set1_ps(inside ? factors[start + i] : 0);
            }
            long count = (g + 1) * share - start;
            for (long c = 0; c < width; c += LANES) {
                __m512 x[SIDE], total = _mm512_loadu_ps(sum + c);
                UNROLL for (int i = 0; i < SIDE; i++)
                    total = _mm512_fmadd_ps(x[i] = _mm512_loadu_ps(rows + row[i] + c), f[i], total);
                _mm512_storeu_ps(sum + c, total);
                if (!group_product) continue;
                total = _mm512_loadu_ps(group_product + c);
                UNROLL for (int i = 0; i < SIDE; i++)
                    if (i < count) total = _mm512_fmadd_ps(x[i], to_float(other + row[i] + c), total);
                _mm512_storeu_ps(group_product + c, total);
            }
        }
    }
    return 0;
}

/* Numbers of a row of a factored gradient, dense * scale + left * right; each part may be missing (NULL). */
INNER __m512 gradient(const uint16_t *dense, const float *scale, __m512 left, const float *right, long c) {
    __m512 value = dense ? to_float(dense + c) : _mm512_setzero_ps();
    if (dense && scale) value = _mm512_mul_ps(value, _mm512_loadu_ps(scale + c));
    return right ? _mm512_fmadd_ps(left, _mm512_loadu_ps(right + c), value) : value;
}

/* out[k] = sum of squares of the factored gradient [count, width] of configuration k, first <= k < last; `share` rows after
 * one another have a vector of right in common. */
FAST int mlfusion_squares(
    const uint16_t *dense, const float *scale, const float *left, const float *right, double *out, long first, long last,
    long count, long share, long width
) {
    for (long k = first; k < last; k++) {
        out[k] = 0;
        for (long r = k * count; r < (k + 1) * count; r++) {
            __m512 sum = _mm512_setzero_ps(), l = _mm512_set1_ps(right ? left[r] : 0);
            const uint16_t *n = dense ? dense + r * width : NULL;
            const float *s = scale ? scale + k * width : NULL, *common = right ? right + r / share * width : NULL;
            for (long c = 0; c < width; c += LANES) {
                __m512 g = gradient(n, s, l, common, c);
                sum = _mm512_fmadd_ps(g, g, sum);
            }
            out[k] += _mm512_reduce_add_ps(sum);
        }
    }
    return 0;
}

/* A step of AdamW (arXiv 1711.05101) on rows first <= r < last of weights with their moments, with a factored gradient.
 *
 * A configuration has `count` rows and two numbers in `rates`: the learning rate over the bias correction of the first
 * moment, and 1 - rate * weight_decay. `constants` are beta1, beta2, eps and the root of the bias correction of the second
 * moment. */
FAST int mlfusion_adamw(
    float *weights, float *moment, float *square, const uint16_t *dense, const float *scale, const float *left,
    const float *right, const float *rates, const float *constants, long first, long last, long count, long share, long width
) {
    __m512 b1 = _mm512_set1_ps(1 - constants[0]), b2 = _mm512_set1_ps(constants[1]), c2 = _mm512_set1_ps(1 - constants[1]);
    __m512 eps = _mm512_set1_ps(constants[2]), root = _mm512_set1_ps(1 / constants[3]);
    for (long r = first; r < last; r++) {
        long k = r / count;
        __m512 rate = _mm512_set1_ps(-rates[2 * k]), decay = _mm512_set1_ps(rates[2 * k + 1]);
        __m512 l = _mm512_set1_ps(right ? left[r] : 0);
        const uint16_t *n = dense ? dense + r * width : NULL;
        const float *s = scale ? scale + k * width : NULL, *common = right ? right + r / share * width : NULL;
        float *w = weights + r * width, *m = moment + r * width, *v = square + r * width;
        for (long c = 0; c < width; c += LANES) {
            __m512 g = gradient(n, s, l, common, c), old = _mm512_loadu_ps(m + c);
            __m512 mean = _mm512_fmadd_ps(b1, _mm512_sub_ps(g, old), old);
            __m512 variance = _mm512_fmadd_ps(b2, _mm512_loadu_ps(v + c), _mm512_mul_ps(c2, _mm512_mul_ps(g, g)));
            __m512 step = _mm512_div_ps(mean, _mm512_fmadd_ps(_mm512_sqrt_ps(variance), root, eps));
            _mm512_storeu_ps(m + c, mean);
            _mm512_storeu_ps(v + c, variance);
            _mm512_storeu_ps(w + c, _mm512_fmadd_ps(rate, step, _mm512_mul_ps(decay, _mm512_loadu_ps(w + c))));
        }
    }
    return 0;
}

#else

int mlfusion_supported(void) { return 0; }

#endif
