/* What a step of attentive probes does that a library for large matrices does badly, by AVX-512 BF16.
 *
 * Two kinds. Products between few tokens and many heads: short, one for every image, and what they make is larger than any
 * cache. And what is done with every weight: read once for all that is wanted of it, since memory is the limit.
 *
 * Products are of bfloat16, summed in float32, each number in an order of its own that does not depend on how many
 * configurations there are: they are the same in every population. All matrices are dense, the last axis contiguous, its
 * length a multiple of 32; where memory is wanted, what is returned is 0, or -1 if there is none.
 */

#include <stdint.h>
#include <stdlib.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#define FAST __attribute__((target("fma,avx512f,avx512bw,avx512vl,avx512bf16")))
#define INNER FAST static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

enum {
    LANES = 16,  /* float32 in a register; as many pairs of bfloat16 */
    ROWS = 6,    /* of a product, kept in registers with VECTORS of their columns: 24 of the 32 that there are */
    VECTORS = 4,
    PANEL = VECTORS * LANES,
    TILE = 24,   /* images whose gradients are made before they are used: of GROUP heads these fit a core's cache */
    GROUP = 12,
    SIDE = 4,    /* rows of either matrix whose scalar products are summed together */
    KEPT = 16,   /* rows that the innermost cache keeps while others pass */
};

int mlfusion_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

static void *room(long bytes) { return aligned_alloc(64, (bytes + 127) / 64 * 64); }

static long up(long number, long step) { return (number + step - 1) / step * step; }

INNER __m512i joined(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

/* Two rows of bfloat16 of a `length`, of which `odd` may be missing, as one of pairs. */
INNER void pair(const uint16_t *even, const uint16_t *odd, uint32_t *pairs, long length) {
    for (long i = 0; i < length; i += LANES) {
        __mmask16 held = length - i >= LANES ? 0xffff : (__mmask16)((1u << (length - i)) - 1);
        __m256i other = odd ? _mm256_maskz_loadu_epi16(held, odd + i) : _mm256_setzero_si256();
        _mm512_mask_storeu_epi32(pairs + i, held, joined(_mm256_maskz_loadu_epi16(held, even + i), other));
    }
}

/* Likewise of float32, rounded to the nearest. */
INNER void pair_floats(const float *even, const float *odd, uint32_t *pairs, long length) {
    for (long i = 0; i < length; i += LANES) {
        __mmask16 held = length - i >= LANES ? 0xffff : (__mmask16)((1u << (length - i)) - 1);
        __m512 other = odd ? _mm512_maskz_loadu_ps(held, odd + i) : _mm512_setzero_ps();
        __m256i low = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(held, even + i));
        _mm512_mask_storeu_epi32(pairs + i, held, joined(low, (__m256i)_mm512_cvtneps_pbh(other)));
    }
}

/* [depth * 2, width], the last row missing if `rows` is odd, as panels of PANEL columns (the last may be half as wide), each
 * [depth, columns] of pairs: what a product reads of it lies together. */
INNER void panels(const uint16_t *matrix, uint32_t *out, long rows, long width) {
    long depth = (rows + 1) / 2;
    for (long k = 0; k < depth; k++) {
        const uint16_t *even = matrix + 2 * k * width, *odd = 2 * k + 1 < rows ? even + width : NULL;
        for (long column = 0; column < width; column += PANEL) {
            long columns = width - column < PANEL ? width - column : PANEL;
            pair(even + column, odd ? odd + column : NULL, out + column * depth + k * columns, columns);
        }
    }
}

/* Up to ROWS rows, given as the columns of pairs [depth, step], by a panel of `vectors` x LANES columns. What is `far`, wanted
 * only when the caches will have forgotten it, is written past them, which saves reading what was there. */
INNER void product(
    const uint32_t *pairs, long step, const uint32_t *panel, long depth, uint16_t *out, long out_step, long rows, const int vectors,
    const int far
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
            __m512i made = (__m512i)_mm512_cvtne2ps_pbh(sums[r][v + 1], sums[r][v]);
            if (far) _mm512_stream_si512((void *)(out + r * out_step + v * LANES), made);
            else _mm512_storeu_si512(out + r * out_step + v * LANES, made);
        }
    }
}

/* Likewise by the panel of the columns that begin at `column`, of all panels of a matrix of a `width`; the last may be half one. */
INNER void block(
    const uint32_t *pairs, long step, const uint32_t *panels, long depth, uint16_t *out, long out_step, long rows, long column,
    long width, const int far
) {
    const uint32_t *panel = panels + column * depth;
    if (width - column >= PANEL)
        product(pairs, step, panel, depth, out + column, out_step, rows, VECTORS, far);
    else
        product(pairs, step, panel, depth, out + column, out_step, rows, VECTORS / 2, far);
}

/* out[h, b] = sum over t of weights[b, t, h] x[b, t], for images first <= b < last of `images`.
 *
 * x [images, tokens, width] and out [heads, images, width] bfloat16, weights [images, tokens, heads] float32. */
FAST int mlfusion_averages(
    const uint16_t *x, const float *weights, uint16_t *out, long first, long last, long images, long tokens, long heads, long width
) {
    long depth = (tokens + 1) / 2, step = up(heads, ROWS);
    uint32_t *panel = room(depth * width * 4), *pairs = room(depth * step * 4);
    if (!panel || !pairs) { free(panel); free(pairs); return -1; }
    for (long b = first; b < last; b++) {
        panels(x + b * tokens * width, panel, tokens, width);
        for (long k = 0; k < depth; k++) {
            const float *even = weights + (b * tokens + 2 * k) * heads;
            pair_floats(even, 2 * k + 1 < tokens ? even + heads : NULL, pairs + k * step, heads);
        }
        for (long h = 0; h < heads; h += ROWS) for (long column = 0; column < width; column += PANEL)
            block(pairs + h, step, panel, depth, out + (h * images + b) * width, images * width, heads - h, column, width, 1);
    }
    _mm_sfence();
    free(panel); free(pairs);
    return 0;
}

/* The sixteen sums over the lanes of sixteen registers, in order. */
INNER __m512 summed(const __m512 *v) {
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

/* Scalar products of SIDE rows of `width` with SIDE others; SIDE rows that are wanted `soon`, if not NULL, are fetched. */
INNER __m512 dots(const uint16_t *const *rows, const uint16_t *const *others, long width, const uint16_t *soon) {
    __m512 sums[SIDE * SIDE];
    UNROLL for (int i = 0; i < SIDE * SIDE; i++) sums[i] = _mm512_setzero_ps();
    for (long d = 0; d < width; d += 2 * LANES) {
        __m512bh parts[SIDE];
        UNROLL for (int j = 0; j < SIDE; j++) parts[j] = (__m512bh)_mm512_loadu_si512(others[j] + d);
        UNROLL for (int i = 0; i < SIDE; i++) {
            __m512bh one = (__m512bh)_mm512_loadu_si512(rows[i] + d);
            UNROLL for (int j = 0; j < SIDE; j++) sums[i * SIDE + j] = _mm512_dpbf16_ps(sums[i * SIDE + j], one, parts[j]);
        }
        if (soon) UNROLL for (int i = 0; i < SIDE; i++) _mm_prefetch((const char *)(soon + i * width + d), _MM_HINT_T0);
    }
    return summed(sums);
}

/* SIDE rows from `start` on; past `count` the last is taken again, and what comes of it must not be kept. */
INNER void some(const uint16_t **rows, const uint16_t *matrix, long start, long count, long width) {
    for (int i = 0; i < SIDE; i++) rows[i] = matrix + (start + i < count ? start + i : count - 1) * width;
}

INNER void quartered(__m128 *quarters, __m512 sums) {
    quarters[0] = _mm512_extractf32x4_ps(sums, 0);
    quarters[1] = _mm512_extractf32x4_ps(sums, 1);
    quarters[2] = _mm512_extractf32x4_ps(sums, 2);
    quarters[3] = _mm512_extractf32x4_ps(sums, 3);
}

INNER __mmask8 few(long left) { return left < SIDE ? (__mmask8)((1u << left) - 1) : 0xf; }

/* Of numbers of at most 0, to a last place or two: 2^n of the nearest n, by the series of the rest. */
INNER __m512 exponential(__m512 x) {
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    /* The logarithm of 2 in two parts, of which the first times n is exact. */
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x));
    __m512 sum = _mm512_set1_ps(1.0f / 5040);
    const float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    UNROLL for (int i = 0; i < 7; i++) sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(sum, n);
}

/* out[b, t, h] = the softmax over t of x[b, t] . folded[h], for images first <= b < last.
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
            some(rows, x + b * tokens * width, t, tokens, width);
            some(others, folded, h, heads, width);
            quartered(quarters, dots(rows, others, width, NULL));
            UNROLL for (int j = 0; j < SIDE; j++) if (t + j < tokens)
                _mm_mask_storeu_ps(scores + (t + j) * heads + h, few(heads - h), quarters[j]);
        }
        for (long h = 0; h < heads; h += LANES) {
            __mmask16 held = heads - h >= LANES ? 0xffff : (__mmask16)((1u << (heads - h)) - 1);
            __m512 most = _mm512_maskz_loadu_ps(held, scores + h), sum = _mm512_setzero_ps();
            for (long t = 1; t < tokens; t++) most = _mm512_max_ps(most, _mm512_maskz_loadu_ps(held, scores + t * heads + h));
            for (long t = 0; t < tokens; t++) {
                __m512 made = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(held, scores + t * heads + h), most));
                sum = _mm512_add_ps(sum, made);
                _mm512_mask_storeu_ps(scores + t * heads + h, held, made);
            }
            __m512 by = _mm512_div_ps(_mm512_set1_ps(1), sum);
            for (long t = 0; t < tokens; t++)
                _mm512_mask_storeu_ps(
                    scores + t * heads + h, held, _mm512_mul_ps(by, _mm512_maskz_loadu_ps(held, scores + t * heads + h)));
        }
    }
    return 0;
}

/* out[h, i, b] = projections[h, i] . averages[h, b] + constant[h, i] (1 + gained[h, b]), for heads first <= h < last.
 *
 * projections [heads, inner, width], averages [heads, images, width], out [heads, inner, images] bfloat16, constant [heads,
 * inner], gained [heads, images] float32, which may be missing. */
FAST int mlfusion_values(
    const uint16_t *projections, const uint16_t *averages, const float *constant, const float *gained, uint16_t *out, long first,
    long last, long images, long inner, long width
) {
    const uint16_t *rows[SIDE], *others[SIDE];
    for (long h = first; h < last; h++) for (long block = 0; block < inner; block += KEPT) for (long b = 0; b < images; b += SIDE) {
        __mmask8 held = few(images - b);
        __m128 one = _mm_set1_ps(1), more = gained ? _mm_add_ps(one, _mm_maskz_loadu_ps(held, gained + h * images + b)) : one;
        some(others, averages + h * images * width, b, images, width);
        for (long i = block; i < block + KEPT && i < inner; i += SIDE) {
            __m128 quarters[SIDE];
            some(rows, projections + h * inner * width, i, inner, width);
            quartered(quarters, dots(rows, others, width, i > block ? NULL : others[0] + SIDE * width));
            UNROLL for (int j = 0; j < SIDE; j++) if (i + j < inner) {
                __m128 made = _mm_fmadd_ps(_mm_set1_ps(constant[h * inner + i + j]), more, quarters[j]);
                _mm_mask_storeu_epi16(out + (h * inner + i + j) * images + b, held, (__m128i)_mm_cvtneps_pbh(made));
            }
        }
    }
    return 0;
}

/* out[b, t, h] = x[b, t] . (given[h, :, b] projections[h]), for images first <= b < last of `images`: the gradient by the
 * attention weights, by way of the averages' own, which is rounded and never kept.
 *
 * x [images, tokens, width], given [heads, inner, images] bfloat16, projections [heads, inner, width] as mlfusion_narrow
 * packs them, out [images, tokens, heads] float32. */
FAST int mlfusion_slopes(
    const uint16_t *x, const uint16_t *given, const uint32_t *packed, float *out, long first, long last, long images,
    long tokens, long heads, long width, long inner
) {
    long depth = (inner + 1) / 2, step = up(TILE, LANES);
    uint32_t *pairs = room(depth * step * 4);
    uint16_t *back = room(TILE * GROUP * width * 2);
    if (!pairs || !back) { free(pairs); free(back); return -1; }
    for (long start = first; start < last; start += TILE) {
        long tile = last - start < TILE ? last - start : TILE;
        for (long lead = 0; lead < heads; lead += GROUP) {
            long group = heads - lead < GROUP ? heads - lead : GROUP;
            for (long h = 0; h < group; h++) {
                for (long k = 0; k < depth; k++) {
                    const uint16_t *even = given + ((lead + h) * inner + 2 * k) * images + start;
                    pair(even, 2 * k + 1 < inner ? even + images : NULL, pairs + k * step, tile);
                }
                const uint32_t *panels = packed + (lead + h) * depth * width;
                for (long column = 0; column < width; column += PANEL) for (long i = 0; i < tile; i += ROWS)
                    block(pairs + i, step, panels, depth, back + (i * GROUP + h) * width, GROUP * width, tile - i, column, width, 0);
            }
            for (long i = 0; i < tile; i++) {
                const uint16_t *rows[SIDE], *others[SIDE];
                for (long t = 0; t < tokens; t += SIDE) for (long h = 0; h < group; h += SIDE) {
                    __m128 quarters[SIDE];
                    some(rows, x + (start + i) * tokens * width, t, tokens, width);
                    some(others, back + i * GROUP * width, h, group, width);
                    quartered(quarters, dots(rows, others, width, h ? NULL : rows[0] + SIDE * width));
                    UNROLL for (int j = 0; j < SIDE; j++) if (t + j < tokens)
                        _mm_mask_storeu_ps(out + ((start + i) * tokens + t + j) * heads + lead + h, few(group - h), quarters[j]);
                }
            }
        }
    }
    free(pairs); free(back);
    return 0;
}

/* Of groups first <= g < last of `share` rows [width] float32, `scales` groups a vector of scale and one of shift: the rows
 * times scale, in bfloat16; the same as panels of pairs, for mlfusion_slopes; and each row's product with shift. */
FAST int mlfusion_narrow(
    const float *rows, const float *scale, const float *shift, uint16_t *out, uint32_t *packed, float *constant, long first,
    long last, long share, long width, long scales
) {
    long depth = (share + 1) / 2;
    for (long g = first; g < last; g++) {
        const float *by = scale + g / scales * width, *to = shift + g / scales * width;
        for (long k = 0; k < depth; k++) {
            long row = g * share + 2 * k;
            int two = 2 * k + 1 < share;
            const float *even = rows + row * width;
            __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
            for (long c = 0; c < width; c += LANES) {
                __m512 s = _mm512_loadu_ps(by + c), t = _mm512_loadu_ps(to + c);
                __m512 a = _mm512_loadu_ps(even + c), b = two ? _mm512_loadu_ps(even + width + c) : _mm512_setzero_ps();
                low = _mm512_fmadd_ps(a, t, low);
                high = _mm512_fmadd_ps(b, t, high);
                __m256i p = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(a, s)), q = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(b, s));
                _mm256_storeu_si256((__m256i *)(out + row * width + c), p);
                if (two) _mm256_storeu_si256((__m256i *)(out + (row + 1) * width + c), q);
                long panel = c / PANEL * PANEL, columns = width - panel < PANEL ? width - panel : PANEL;
                _mm512_storeu_si512(packed + g * depth * width + panel * depth + k * columns + c - panel, joined(p, q));
            }
            constant[row] = _mm512_reduce_add_ps(low);
            if (two) constant[row + 1] = _mm512_reduce_add_ps(high);
        }
    }
    return 0;
}

/* out[r] = rows[r] . vectors[r / share]. */
FAST int mlfusion_rows(const float *rows, const float *vectors, float *out, long first, long last, long share, long width) {
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

INNER __m512 wide(const uint16_t *narrow) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)narrow)), 16));
}

/* out[g] = sum over its rows r of factors[r] rows[r]; and by[g] = that of narrow[r] rows[r], number by number, if asked. */
FAST int mlfusion_columns(
    const float *rows, const float *factors, const uint16_t *narrow, float *out, float *by, long first, long last, long share,
    long width
) {
    for (long g = first; g < last; g++) {
        float *sum = out + g * width, *product = by ? by + g * width : NULL;
        for (long c = 0; c < width; c += LANES) {
            _mm512_storeu_ps(sum + c, _mm512_setzero_ps());
            if (product) _mm512_storeu_ps(product + c, _mm512_setzero_ps());
        }
        for (long start = g * share; start < (g + 1) * share; start += SIDE) {
            __m512 f[SIDE];
            long row[SIDE];
            for (int i = 0; i < SIDE; i++) { /* Past the end the first again, by nothing. */
                int held = start + i < (g + 1) * share;
                row[i] = (held ? start + i : start) * width;
                f[i] = _mm512_set1_ps(held ? factors[start + i] : 0);
            }
            long held = (g + 1) * share - start;
            for (long c = 0; c < width; c += LANES) {
                __m512 x[SIDE], made = _mm512_loadu_ps(sum + c);
                UNROLL for (int i = 0; i < SIDE; i++) made = _mm512_fmadd_ps(x[i] = _mm512_loadu_ps(rows + row[i] + c), f[i], made);
                _mm512_storeu_ps(sum + c, made);
                if (!product) continue;
                made = _mm512_loadu_ps(product + c);
                UNROLL for (int i = 0; i < SIDE; i++) if (i < held) made = _mm512_fmadd_ps(x[i], wide(narrow + row[i] + c), made);
                _mm512_storeu_ps(product + c, made);
            }
        }
    }
    return 0;
}

/* A row of a gradient that is kept as what it is made of: narrow * scale + left * right, where each part may be missing. */
INNER __m512 gradient(const uint16_t *narrow, const float *scale, __m512 left, const float *right, long c) {
    __m512 made = narrow ? wide(narrow + c) : _mm512_setzero_ps();
    if (narrow && scale) made = _mm512_mul_ps(made, _mm512_loadu_ps(scale + c));
    return right ? _mm512_fmadd_ps(left, _mm512_loadu_ps(right + c), made) : made;
}

/* out[k] = the sum of squares of such a gradient [count, width] of each k, first <= k < last; `share` rows after one another
 * have a vector of right in common. */
FAST int mlfusion_squares(
    const uint16_t *narrow, const float *scale, const float *left, const float *right, double *out, long first, long last,
    long count, long share, long width
) {
    for (long k = first; k < last; k++) {
        out[k] = 0;
        for (long r = k * count; r < (k + 1) * count; r++) {
            __m512 sum = _mm512_setzero_ps(), l = _mm512_set1_ps(right ? left[r] : 0);
            const uint16_t *n = narrow ? narrow + r * width : NULL;
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

/* A step of AdamW (arXiv 1711.05101) on rows first <= r < last of weights with their moments, by such a gradient.
 *
 * `rates` are two numbers of each k, whose are `count` rows: the learning rate by the first moment's bias, and what a weight
 * keeps, 1 - rate * weight_decay. `how` is beta1, beta2, eps and the root of the second moment's bias. */
FAST int mlfusion_adamw(
    float *weights, float *moment, float *square, const uint16_t *narrow, const float *scale, const float *left,
    const float *right, const float *rates, const float *how, long first, long last, long count, long share, long width
) {
    __m512 b1 = _mm512_set1_ps(1 - how[0]), b2 = _mm512_set1_ps(how[1]), c2 = _mm512_set1_ps(1 - how[1]);
    __m512 least = _mm512_set1_ps(how[2]), root = _mm512_set1_ps(1 / how[3]);
    for (long r = first; r < last; r++) {
        long k = r / count;
        __m512 by = _mm512_set1_ps(-rates[2 * k]), kept = _mm512_set1_ps(rates[2 * k + 1]), l = _mm512_set1_ps(right ? left[r] : 0);
        const uint16_t *n = narrow ? narrow + r * width : NULL;
        const float *s = scale ? scale + k * width : NULL, *common = right ? right + r / share * width : NULL;
        float *w = weights + r * width, *m = moment + r * width, *v = square + r * width;
        for (long c = 0; c < width; c += LANES) {
            __m512 g = gradient(n, s, l, common, c), old = _mm512_loadu_ps(m + c);
            __m512 mean = _mm512_fmadd_ps(b1, _mm512_sub_ps(g, old), old);
            __m512 spread = _mm512_fmadd_ps(b2, _mm512_loadu_ps(v + c), _mm512_mul_ps(c2, _mm512_mul_ps(g, g)));
            __m512 step = _mm512_div_ps(mean, _mm512_fmadd_ps(_mm512_sqrt_ps(spread), root, least));
            _mm512_storeu_ps(m + c, mean);
            _mm512_storeu_ps(v + c, spread);
            _mm512_storeu_ps(w + c, _mm512_fmadd_ps(by, step, _mm512_mul_ps(kept, _mm512_loadu_ps(w + c))));
        }
    }
    return 0;
}

#else

int mlfusion_supported(void) { return 0; }

#endif
