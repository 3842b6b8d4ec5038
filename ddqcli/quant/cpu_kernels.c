/* The kernels of `operators.py` for a CPU: one pass over memory forward, and one backward.

   Those of learned levels take G groups of values, one after another: group g begins at starts[g]
   and ends at starts[g + 1]. Values are float32, or bfloat16 if `half` is set; the arithmetic is
   float32, and sums are float64. Each block of values has its own sums, and these are added in the
   order of the blocks: any number of threads gives the same bytes.

   `cpu_launch.py` compiles this file, and defines BLOCK, the values that one thread takes at a time,
   and CELLS, the entries of a table and also the most bins of one. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define CHUNK 512 /* values whose results between two steps stay in the nearest cache */
#define LANES 8   /* sums that alternate, since an addition waits for the one before */

/* ---- values in memory, and as float32 */

static const float *load(const void *from, int half, int64_t at, int n, float *buffer)
{
    if (!half)
        return (const float *)from + at;
    const uint16_t *x = (const uint16_t *)from + at;
    for (int i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)x[i] << 16;
        memcpy(buffer + i, &bits, sizeof bits);
    }
    return buffer;
}

/* Round half to even, as torch does. */
static void store(void *to, int half, int64_t at, int n, const float *values)
{
    if (!half) {
        memcpy((float *)to + at, values, n * sizeof *values);
        return;
    }
    uint16_t *out = (uint16_t *)to + at;
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof bits);
        uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        out[i] = values[i] == values[i] ? rounded : 0x7fc0;
    }
}

static int at_most(int64_t left, int most)
{
    return left < most ? (int)left : most;
}

/* ---- learned levels */

/* grid.grid_cells; 0 for NaN. */
static void find_cells(const float *x, int n, float half_step, float zero_cell, int32_t *cell)
{
    for (int i = 0; i < n; i++) {
        float c = floorf(x[i] / half_step) + zero_cell;
        c = c > 0.0f ? c : 0.0f;
        cell[i] = (int32_t)(c < CELLS - 1.0f ? c : CELLS - 1.0f);
    }
}

/* Look-ups are not vectorized: a processor gathers no faster than it loads. */
#if defined(__GNUC__) && !defined(__clang__)
#define ONE_BY_ONE __attribute__((noinline, optimize("no-tree-vectorize")))
#else
#define ONE_BY_ONE
#endif

ONE_BY_ONE static void look_up(const float *table, const int32_t *cell, int n, float *out)
{
    for (int i = 0; i < n; i++)
        out[i] = table[cell[i]];
}

/* The nearest level of each x, by tables [G, 512]; NaN where it is not finite. */
void quantize(const void *x, void *out, int64_t half, const int64_t *starts, int64_t groups,
              int64_t longest, const float *nearest, const float *half_step,
              const float *zero_cell, int64_t threads)
{
    int64_t blocks = (longest + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t job = 0; job < groups * blocks; job++) {
        int64_t g = job / blocks, at = starts[g] + job % blocks * BLOCK;
        int64_t end = at + at_most(starts[g + 1] - at, BLOCK);
        const float *table = nearest + g * CELLS;
        float buffer[CHUNK], result[CHUNK];
        int32_t cell[CHUNK];
        for (; at < end; at += CHUNK) {
            int n = at_most(end - at, CHUNK);
            const float *values = load(x, half, at, n, buffer);
            find_cells(values, n, half_step[g], zero_cell[g], cell);
            look_up(table, cell, n, result);
            for (int i = 0; i < n; i++)
                result[i] = values[i] - values[i] == 0.0f ? result[i] : NAN;
            store(out, half, at, n, result);
        }
    }
}

/* grad where x lies between the outer ones of values [G, n], 0 elsewhere. */
void straight_through(const void *grad, const void *x, void *out, int64_t half,
                      const int64_t *starts, int64_t groups, int64_t longest, int64_t n_levels,
                      const float *values, int64_t threads)
{
    int64_t blocks = (longest + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t job = 0; job < groups * blocks; job++) {
        int64_t g = job / blocks, at = starts[g] + job % blocks * BLOCK;
        int64_t end = at + at_most(starts[g + 1] - at, BLOCK);
        float low = values[g * n_levels], high = values[(g + 1) * n_levels - 1];
        float x_buffer[CHUNK], grad_buffer[CHUNK], result[CHUNK];
        for (; at < end; at += CHUNK) {
            int n = at_most(end - at, CHUNK);
            const float *v = load(x, half, at, n, x_buffer);
            const float *d = load(grad, half, at, n, grad_buffer);
            for (int i = 0; i < n; i++)
                result[i] = (v[i] >= low) & (v[i] <= high) ? d[i] : 0.0f;
            store(out, half, at, n, result);
        }
    }
}

typedef struct {
    double term, residual, grad; /* see `level_gradients` */
} sums;

typedef struct {
    float nearest; /* level */
    int32_t bin;
} entry;

ONE_BY_ONE static void look_up_both(const entry *table, const int32_t *cell, int n, entry *out)
{
    for (int i = 0; i < n; i++)
        out[i] = table[cell[i]];
}

/* Add all rows to the first, in their order. */
static void add_rows(sums *first, int64_t rows, int64_t bins)
{
    for (int64_t row = 1; row < rows; row++)
        for (int64_t b = 0; b < bins; b++) {
            first[b].term += first[row * bins + b].term;
            first[b].residual += first[row * bins + b].residual;
            first[b].grad += first[row * bins + b].grad;
        }
}

/* Gradients of the levels of one group, from its sums by bin. */
static void finish_levels(const sums *by_bin, int64_t n, const float *values, float correction,
                          float *grad_values, float *grad_for_gates)
{
    for (int64_t k = 0; k < n; k++) {
        const sums *down = by_bin + 2 * k, *up = down + 1; /* rounded up to level k, and down */
        double below = down->term, above = up->term, width;
        if (k == 0)
            below = -below;
        else if ((width = values[k] - values[k - 1]) > 0)
            below = (below + down[-1].term) / width;
        else
            below = 0;
        if (k < n - 1)
            above = (width = values[k + 1] - values[k]) > 0 ? (above + up[1].term) / width : 0;
        double corrected = correction * (down->residual + up->residual);
        grad_values[k] = (float)(above - below + corrected);
        if (grad_for_gates)
            grad_for_gates[k] = (float)(corrected + down->grad + up->grad);
    }
}

/* Gradients of x, of values [G, n] and, unless it is NULL, of the values for the gates [G, n].

   `fake_quantize.py` has the formulas. For each bin of `CellTables.bin` three terms are summed:
   grad * (x - x_q), or grad beyond the outer levels; x_q - x; and grad. `partial` takes them for
   each block of each group. */
void level_gradients(const void *grad, const void *x, void *grad_x, int64_t half,
                     const int64_t *starts, int64_t groups, int64_t longest, int64_t n_levels,
                     const float *values, const float *nearest, const float *bin,
                     const float *half_step, const float *zero_cell, const float *correction,
                     sums *partial, float *grad_values, float *grad_for_gates, int64_t threads)
{
    int64_t blocks = (longest + BLOCK - 1) / BLOCK, bins = 2 * n_levels;
    int lanes = longest > 4 * bins ? LANES : 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t job = 0; job < groups * blocks; job++) {
        int64_t g = job / blocks, at = starts[g] + job % blocks * BLOCK;
        int64_t end = at + at_most(starts[g + 1] - at, BLOCK);
        float low = values[g * n_levels], high = values[(g + 1) * n_levels - 1];
        float x_buffer[CHUNK], grad_buffer[CHUNK], result[CHUNK], residual[CHUNK], term[CHUNK];
        int32_t cell[CHUNK];
        entry table[CELLS], found[CHUNK];
        sums by_lane[LANES * CELLS];
        for (int i = 0; i < CELLS; i++) {
            table[i].nearest = nearest[g * CELLS + i];
            table[i].bin = (int32_t)bin[g * CELLS + i];
        }
        memset(by_lane, 0, lanes * bins * sizeof *by_lane);
        for (; at < end; at += CHUNK) {
            int n = at_most(end - at, CHUNK);
            const float *v = load(x, half, at, n, x_buffer);
            const float *d = load(grad, half, at, n, grad_buffer);
            find_cells(v, n, half_step[g], zero_cell[g], cell);
            look_up_both(table, cell, n, found);
            for (int i = 0; i < n; i++) {
                int inside = (v[i] >= low) & (v[i] <= high);
                residual[i] = found[i].nearest - v[i];
                term[i] = (inside ? -residual[i] : 1.0f) * d[i];
                cell[i] = found[i].bin + (i & (lanes - 1)) * (int32_t)bins;
                result[i] = inside ? d[i] : 0.0f;
            }
            for (int i = 0; i < n; i++) {
                sums *sum = by_lane + cell[i];
                sum->term += term[i];
                if (correction)
                    sum->residual += residual[i];
                if (grad_for_gates)
                    sum->grad += d[i];
            }
            store(grad_x, half, at, n, result);
        }
        add_rows(by_lane, lanes, bins);
        memcpy(partial + job * bins, by_lane, bins * sizeof *by_lane);
    }
    for (int64_t g = 0; g < groups; g++) {
        sums *total = partial + g * blocks * bins;
        add_rows(total, blocks, bins);
        finish_levels(total, n_levels, values + g * n_levels, correction ? correction[g] : 0,
                      grad_values + g * n_levels,
                      grad_for_gates ? grad_for_gates + g * n_levels : NULL);
    }
}

/* ---- a uniform step */

/* x [M] rounded to codes low..high times scale; NaN where it is not finite. */
void uniform_quantize(const void *x, void *out, int64_t half, int64_t size, float scale, float low,
                      float high, int64_t threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < size; start += CHUNK) {
        float buffer[CHUNK], result[CHUNK];
        int n = at_most(size - start, CHUNK);
        const float *values = load(x, half, start, n, buffer);
        for (int i = 0; i < n; i++) {
            float code = rintf(values[i] / scale);
            code = code > low ? code : low;
            code = (code < high ? code : high) + 0.0f; /* 0 for -0 */
            result[i] = values[i] - values[i] == 0.0f ? code * scale : NAN;
        }
        store(out, half, start, n, result);
    }
}

/* Gradients of x [M] and, as LSQ's, of scale. `partial` takes a sum for each block. */
void uniform_gradients(const void *grad, const void *x, void *grad_x, int64_t half, int64_t size,
                       float scale, float low, float high, double *partial, float *grad_scale,
                       int64_t threads)
{
    int64_t blocks = (size + BLOCK - 1) / BLOCK;
    double total = 0;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        float x_buffer[CHUNK], grad_buffer[CHUNK], result[CHUNK], term[CHUNK];
        double sum[LANES] = {0};
        int64_t at = block * BLOCK, end = at + at_most(size - at, BLOCK);
        for (; at < end; at += CHUNK) {
            int n = at_most(end - at, CHUNK);
            const float *v = load(x, half, at, n, x_buffer);
            const float *d = load(grad, half, at, n, grad_buffer);
            for (int i = 0; i < n; i++) {
                float steps = v[i] / scale, code = rintf(steps);
                int inside = (steps >= low) & (steps <= high);
                code = code < low ? low : code; /* NaN stays NaN, for all to see */
                code = code > high ? high : code;
                result[i] = inside ? d[i] : 0.0f;
                term[i] = d[i] * (code - (inside ? steps : 0.0f));
            }
            for (int i = n; i % LANES; i++)
                term[i] = 0.0f;
            for (int i = 0; i < n; i += LANES)
                for (int lane = 0; lane < LANES; lane++)
                    sum[lane] += term[i + lane];
            store(grad_x, half, at, n, result);
        }
        partial[block] = 0;
        for (int lane = 0; lane < LANES; lane++)
            partial[block] += sum[lane];
    }
    for (int64_t block = 0; block < blocks; block++)
        total += partial[block];
    *grad_scale = (float)total;
}
