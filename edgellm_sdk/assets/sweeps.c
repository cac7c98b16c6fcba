/* Sweeps of noise over an array of weights, each in one pass over memory. `edgellm_sdk/kit/native.py` compiles and calls
 * them; `edgellm_sdk/kit/noise.py` says what they compute, and holds the same arithmetic in torch and numpy.
 *
 * An array is a part of a tensor that begins at its element `start`. Element i of the tensor lies in block
 * b = i / BLOCK, and direction k has there the value bank[places[k * stride + b] + i % BLOCK], times a factor that
 * already holds the block's sign: factors[k * stride + b].
 *
 * A move rounds every product and every sum to float32 once: compile with -ffp-contract=off. A shift is one fused
 * multiply-add, as torch.add has it, where the machine has such an instruction. Every element is computed by itself, so
 * nothing depends on the number of threads.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0 || defined __FAST_MATH__
#error "float arithmetic is not rounded to float"
#endif

#if defined FP_FAST_FMAF || defined __FMA__ || defined __ARM_FEATURE_FMA
#define FMA(a, b, c) fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

enum { BLOCK = 1 << 18, PIECE = 1 << 9 };

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float wide(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

/* To bfloat16: the nearest, of two the even one; and up in size with the probability that keeps the mean, where zero
 * stays zero. Neither asks for NaN: one that comes of bfloat16 weights has no low bits, so nothing is carried. */
static inline uint16_t nearest(uint32_t bits) { return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); }

static inline uint16_t randomly(uint32_t bits, uint16_t random) { return (uint16_t)((bits + random) >> 16); }

#define SAME(x) (x)
#define NEAREST(x) nearest(bits_of(x))
#define ADDED(x, random) (x)
#define RANDOMLY(x, random) randomly(bits_of(x), random)

/* 1 for a weight that moves, else 0. Without a limit the compiler makes a loop that does not ask. */
#define KEPT(x) (limit < INFINITY ? (float)(fabsf(x) <= limit) : 1.0f)

/* The array in pieces, each in one block: n elements from element i of the tensor on, which is `at` of the array. */
#define FOR_EACH_PIECE                                                                                              \
    _Pragma("omp parallel for schedule(static) num_threads(threads)")                                               \
    for (int64_t p = start / PIECE; p < (start + count + PIECE - 1) / PIECE; p++)

#define THIS_PIECE                                                                                                  \
    const int64_t i = p * PIECE > start ? p * PIECE : start, at = i - start, left = count - at;                     \
    const int64_t n = PIECE - i % PIECE < left ? PIECE - i % PIECE : left;

/* Asks memory for the weights of the piece after the next: a processor by itself looks no further than its page. */
#define FETCH_AHEAD(w)                                                                                              \
    for (int64_t j = 0; j < n; j += 64 / (int64_t)sizeof *(w)) __builtin_prefetch((w) + 2 * PIECE + j);

/* out = w + factor * z where |w| <= limit; out may be w. The bank is in the weights' type. */
#define SHIFT(name, type, READ, WRITE)                                                                              \
    void name(int threads, const type *w, type *out, int64_t count, int64_t start, const type *bank,                \
              const int64_t *places, const float *factors, float limit) {                                           \
        FOR_EACH_PIECE {                                                                                            \
            THIS_PIECE                                                                                              \
            const type *z = bank + places[i / BLOCK] + i % BLOCK;                                                   \
            const float factor = factors[i / BLOCK];                                                                \
            const type *from = w + at;                                                                              \
            type *to = out + at;                                                                                    \
            FETCH_AHEAD(from)                                                                                       \
            _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {                                                   \
                const float x = READ(from[j]);                                                                      \
                to[j] = WRITE(FMA(READ(z[j]) * KEPT(x), factor, x));                                                \
            }                                                                                                       \
        }                                                                                                           \
    }

SHIFT(shift_float32, float, SAME, SAME)
SHIFT(shift_bfloat16, uint16_t, wide, NEAREST)

/* w += sum_k factor_k z_k, in the order given, where |w| <= limit. `uniform` and `random` are the bank of rounding bits
 * and the blocks' places in it. */
#define MOVE(name, type, READ, WRITE)                                                                               \
    void name(int threads, type *w, int64_t count, int64_t start, const float *bank, const int64_t *places,         \
              const float *factors, int64_t directions, int64_t stride, float limit, const uint16_t *uniform,       \
              const int64_t *random) {                                                                              \
        FOR_EACH_PIECE {                                                                                            \
            THIS_PIECE                                                                                              \
            type *to = w + at;                                                                                      \
            float total[PIECE];                                                                                     \
            FETCH_AHEAD(to)                                                                                         \
            for (int64_t k = 0; k < directions; k++) {                                                              \
                const float *z = bank + places[k * stride + i / BLOCK] + i % BLOCK;                                 \
                const float factor = factors[k * stride + i / BLOCK];                                               \
                _Pragma("omp simd") for (int64_t j = 0; j < n; j++)                                                 \
                    total[j] = k ? total[j] + z[j] * factor : z[j] * factor;                                        \
            }                                                                                                       \
            const uint16_t *u = uniform + random[i / BLOCK] + i % BLOCK;                                            \
            (void)u;                                                                                                \
            _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {                                                   \
                const float x = READ(to[j]);                                                                        \
                to[j] = WRITE(x + total[j] * KEPT(x), u[j]);                                                        \
            }                                                                                                       \
        }                                                                                                           \
    }

MOVE(move_float32, float, SAME, ADDED)
MOVE(move_bfloat16, uint16_t, wide, RANDOMLY)
