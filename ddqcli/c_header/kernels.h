/* Portable C99, no allocation, no library but rintf. Include this file in one source file. */
#include <math.h>
#include <stdint.h>

/* Weights of `rows` output channels, `columns` each, as (integer * scale). The indices of a row
   follow those of the row before, `bits` each, least significant bit first, without padding. */
typedef struct {
    const uint8_t *packed;     /* indices into the levels */
    const uint8_t *levels;     /* 2^bits a group of fewer than 8 bits; at 8, the index itself */
    const uint8_t *bits;       /* [groups] 1 to 8 */
    const uint8_t *zero_point; /* [groups] integer = level - zero_point */
    const float *scale;        /* [groups] */
    uint32_t rows, columns, groups; /* groups: 1, or one a row */
} ddq_tensor;

/* The quantizer of a layer's input: x becomes a code, and code - zero_point the integer. */
typedef struct {
    const uint8_t *levels; /* ascending codes; null for 0 to count - 1 */
    uint32_t count;
    int32_t zero_point;
    float scale;
} ddq_input;

typedef struct {
    uint32_t channels, height, width; /* of the input */
    uint32_t kernel_height, kernel_width, stride, padding, dilation;
    uint32_t groups; /* 1; the channels of a depthwise convolution */
} ddq_conv;

static inline uint32_t ddq_group(const ddq_tensor *w, uint32_t row)
{
    return w->groups == 1 ? 0 : row;
}

/* Unpack `columns` integers of a row, -255 to 255. */
static inline void ddq_unpack(const ddq_tensor *w, uint32_t row, int16_t *out)
{
    const uint32_t group = ddq_group(w, row), bits = w->bits[group];
    const uint8_t *levels = w->levels;
    uint32_t bit = (row - group) * w->columns * bits;
    for (uint32_t g = 0; g < group; g++) {
        bit += w->columns * w->bits[g];
        levels += w->bits[g] < 8 ? 1u << w->bits[g] : 0u;
    }
    for (uint32_t i = 0; i < w->columns; i++, bit += bits) {
        const uint32_t at = bit >> 3, shift = bit & 7;
        uint32_t index = (uint32_t)w->packed[at] >> shift;
        if (shift + bits > 8)
            index |= (uint32_t)w->packed[at + 1] << (8 - shift);
        index &= (1u << bits) - 1;
        out[i] = (int16_t)((bits < 8 ? levels[index] : index) - w->zero_point[group]);
    }
}

/* The factor from sums of a row to float: times that of the input, and plus the bias. */
static inline float ddq_scale(const ddq_tensor *w, uint32_t row)
{
    return w->scale[ddq_group(w, row)];
}

/* The value of a quantized bias, a tensor of one column. */
static inline float ddq_bias(const ddq_tensor *b, uint32_t row)
{
    int16_t integer;
    ddq_unpack(b, row, &integer);
    return (float)integer * ddq_scale(b, row);
}

/* The code of a float input: the nearest level; half-way, as ONNX (even) or the upper one. */
static inline uint8_t ddq_code(const ddq_input *q, float x)
{
    if (!q->levels) {
        float code = rintf(x / q->scale) + (float)q->zero_point;
        code = code < 0 ? 0 : code > (float)(q->count - 1) ? (float)(q->count - 1) : code;
        return (uint8_t)code;
    }
    uint32_t k = 0;
    const float steps = x / (q->scale / 2);
    while (k + 1 < q->count
           && steps >= (float)(q->levels[k] + q->levels[k + 1] - 2 * q->zero_point))
        k++;
    return q->levels[k];
}

/* Linear layer: y[rows] = sums of weight * (x - zero). `row` is memory for `columns` integers.
   32 bits hold the sum of 33,025 products. */
static inline void ddq_linear(
    const ddq_tensor *w, const uint8_t *x, int32_t zero, int16_t *row, int32_t *y)
{
    for (uint32_t k = 0; k < w->rows; k++) {
        int32_t sum = 0;
        ddq_unpack(w, k, row);
        for (uint32_t i = 0; i < w->columns; i++)
            sum += row[i] * (x[i] - zero);
        y[k] = sum;
    }
}

/* Convolution, grouped and depthwise too: x [channels][height][width], y [rows][height'][width'],
   height' = (height + 2 padding - dilation (kernel_height - 1) - 1) / stride + 1. */
static inline void ddq_conv2d(
    const ddq_tensor *w, const ddq_conv *c, const uint8_t *x, int32_t zero, int16_t *row, int32_t *y)
{
    const uint32_t depth = c->channels / c->groups, outputs = w->rows / c->groups;
    const uint32_t stride = c->stride; /* a local, or each sum might change it for the compiler */
    const uint32_t high = c->dilation * (c->kernel_height - 1) + 1;
    const uint32_t wide = c->dilation * (c->kernel_width - 1) + 1;
    const uint32_t rows = (c->height + 2 * c->padding - high) / c->stride + 1;
    const uint32_t columns = (c->width + 2 * c->padding - wide) / c->stride + 1;
    for (uint32_t k = 0; k < w->rows; k++) {
        const uint8_t *image = x + k / outputs * depth * c->height * c->width;
        const int16_t *weight = row;
        int32_t *plane = y + k * rows * columns;
        ddq_unpack(w, k, row);
        for (uint32_t i = 0; i < rows * columns; i++)
            plane[i] = 0;
        for (uint32_t d = 0; d < depth; d++)
            for (uint32_t i = 0; i < c->kernel_height; i++)
                for (uint32_t j = 0; j < c->kernel_width; j++, weight++) {
                    /* From `first` on and before `last`, this weight stands on the image. */
                    const uint32_t right = j * c->dilation, border = c->width + c->padding;
                    uint32_t first = 0, last = 0;
                    if (c->padding > right)
                        first = (c->padding - right + stride - 1) / stride;
                    if (border > right)
                        last = (border - right - 1) / stride + 1;
                    if (last > columns)
                        last = columns;
                    const uint32_t count = last > first ? last - first : 0;
                    for (uint32_t top = 0; top < rows; top++) {
                        /* Above the image, this wraps around to a large number. */
                        const uint32_t v = top * stride + i * c->dilation - c->padding;
                        if (v >= c->height || count == 0)
                            continue;
                        const uint8_t *line = image + (d * c->height + v) * c->width;
                        const uint32_t start = first * stride + right - c->padding;
                        const int32_t value = *weight;
                        int32_t *out = plane + top * columns + first;
                        for (uint32_t n = 0; n < count; n++)
                            out[n] += value * (line[start + n * stride] - zero);
                    }
                }
    }
}
