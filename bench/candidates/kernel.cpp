// The read path in C++, a part of a batch on one core: register tiles of vectors, the next page fetched ahead.
// Shapes: R rows, S searches, D width, H heads, E width per head, C chunk size, K chunks per row, P parts of the keys.
// D, H, E, C are fixed by the compiler's -D: D and H E multiples of 32, H of 8. Arguments are those of `kernels/loops.py`;
// whole chunks only, no masks, no overflow.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

constexpr long LANES = 8;
typedef float V __attribute__((vector_size(4 * LANES)));
typedef int VI __attribute__((vector_size(4 * LANES)));
typedef float V4 __attribute__((vector_size(16)));

struct Search {
    const float* keys;
    const long* pages;
    long token_mask, hidden, hidden_stride, num_keys, first, start, stop, num_queries, k;
};

static inline V load(const float* from) { V v; std::memcpy(&v, from, sizeof v); return v; }
static inline void store(float* to, V v) { std::memcpy(to, &v, sizeof v); }

static inline V4 half(V v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7); }

static inline V4 sums(V a, V b, V c, V d) {  // of the lanes of each
    V4 s = half(a), t = half(b), u = half(c), v = half(d);
    V4 st = __builtin_shufflevector(s, t, 0, 4, 1, 5) + __builtin_shufflevector(s, t, 2, 6, 3, 7);
    V4 uv = __builtin_shufflevector(u, v, 0, 4, 1, 5) + __builtin_shufflevector(u, v, 2, 6, 3, 7);
    return __builtin_shufflevector(st, uv, 0, 1, 4, 5) + __builtin_shufflevector(st, uv, 2, 3, 6, 7);
}

static inline V exponential(V x) {  // of x <= 0; Cephes' polynomial
    x = x < -87.0f ? V{} - 87.0f : x;
    V whole = x * 1.44269504f + 12582912.0f;  // rounds, the integer in the low bits
    V n = whole - 12582912.0f, r = x - n * 0.693359375f + n * 2.12194440e-4f;
    V p = ((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f;
    p = ((p * r + 1.6666665459e-1f) * r + 0.5f) * r * r + r + 1.0f;
    return (V)((VI)p + ((VI)whole << 23));
}

// Dot products of 4 rows of a with B rows of b, out[b * step + a]; meanwhile two rows of `ahead` are fetched.
template <int B>
static void dot_tile(const float* a, long a_step, const float* b, long dim, float* out, long step, const float* ahead) {
    V sum[4][B] = {};
    for (long d = 0; d < dim; d += LANES) {
        __builtin_prefetch(ahead + 2 * d);
        V right[B];
        for (int j = 0; j < B; j++) right[j] = load(b + j * dim + d);
        for (int i = 0; i < 4; i++) {
            V left = load(a + i * a_step + d);
            for (int j = 0; j < B; j++) sum[i][j] += left * right[j];
        }
    }
    for (int j = 0; j < B; j++) {
        V4 total = sums(sum[0][j], sum[1][j], sum[2][j], sum[3][j]);
        std::memcpy(out + j * step, &total, sizeof total);
    }
}

static float dot(const float* a, const float* b, long dim) {
    V sum[4] = {};
    for (long d = 0; d < dim; d += 4 * LANES)
        for (long v = 0; v < 4; v++) sum[v] += load(a + d + v * LANES) * load(b + d + v * LANES);
    V4 total = sums(sum[0], sum[1], sum[2], sum[3]);
    return total[0] + total[1] + total[2] + total[3];
}

// All dot products of a [n, dim] with b [m, dim], out[b * step + a]; b is read once, what follows `ahead` fetched.
static void dots(const float* a, long a_step, long n, const float* b, long m, long dim, float* out, long step, const float* ahead) {
    for (long j = 0; j < m; j += 3) {
        long columns = std::min(3L, m - j), i = 0;
        auto tile = columns == 3 ? dot_tile<3> : columns == 2 ? dot_tile<2> : dot_tile<1>;
        for (; i + 4 <= n; i += 4)
            tile(a + i * a_step, a_step, b + j * dim, dim, out + j * step + i, step, ahead + (j + (i ? 2 : 0)) * dim);
        for (; i < n; i++)
            for (long c = j; c < j + columns; c++) out[c * step + i] = dot(a + i * a_step, b + c * dim, dim);
    }
}

// Add to A rows of z, two vectors wide, the m tokens weighted by share[token * step + row].
template <int A>
static void add_tile(const float* share, long step, const float* tokens, long m, float* z, long z_step) {
    V sum[A][2];
    for (int i = 0; i < A; i++) for (int v = 0; v < 2; v++) sum[i][v] = load(z + i * z_step + v * LANES);
    for (long t = 0; t < m; t++) {
        V x[2] = {load(tokens + t * D), load(tokens + t * D + LANES)};
        for (int i = 0; i < A; i++) for (int v = 0; v < 2; v++) sum[i][v] += share[t * step + i] * x[v];
    }
    for (int i = 0; i < A; i++) for (int v = 0; v < 2; v++) store(z + i * z_step + v * LANES, sum[i][v]);
}

static void add(const float* share, long step, long n, const float* tokens, long m, float* z, long z_step) {
    for (long d = 0; d < D; d += 2 * LANES)
        for (long i = 0; i < n; i += 4) {
            auto tile = n - i >= 4 ? add_tile<4> : n - i == 3 ? add_tile<3> : n - i == 2 ? add_tile<2> : add_tile<1>;
            tile(share + i, step, tokens + d, m, z + i * z_step + d, z_step);
        }
}

static void linear(const float* x, long rows, const float* weight, const float* bias, long n, long dim, float* out) {
    std::vector<float> columns(n * rows);
    dots(x, dim, rows, weight, n, dim, columns.data(), rows, weight);
    for (long r = 0; r < rows; r++) for (long i = 0; i < n; i++) out[r * n + i] = columns[i * rows + r] + bias[i];
}

static void put(float logit, long key, float* best, long* index, long k) {
    if (!(logit > best[k - 1])) return;
    long place = k - 1;
    for (; place > 0 && best[place - 1] < logit; place--) best[place] = best[place - 1], index[place] = index[place - 1];
    best[place] = logit, index[place] = key;
}

static void softmax(const float* at, float weight, float* share, float* by_slot) {  // [C, H], all heads at once
    for (long h = 0; h < H; h += LANES) {
        V greatest = V{} - INFINITY, total = {}, e[C];
        for (long t = 0; t < C; t++) {
            e[t] = load(share + t * H + h) + load(at + t * H + h);
            greatest = greatest > e[t] ? greatest : e[t];
        }
        for (long t = 0; t < C; t++) total += e[t] = exponential(e[t] - greatest);
        for (long t = 0; t < C; t++) {
            store(share + t * H + h, e[t] * (weight / total));
            store(by_slot + t * H + h, load(by_slot + t * H + h) + e[t] * (weight / total));
        }
    }
}

extern "C" {

void fold(long rows, const float* queries, const float* summary_weight, const float* summary_bias, const float* query_weight,
          const float* query_bias, const float* key_weight, float* summary, float* heads) {
    std::vector<float> head_queries(rows * H * E), turned(rows * H * E);
    linear(queries, rows, summary_weight, summary_bias, D, D, summary);
    linear(queries, rows, query_weight, query_bias, H * E, D, head_queries.data());
    for (long r = 0; r < rows; r++) for (long e = 0; e < H * E; e++) turned[e * rows + r] = head_queries[r * H * E + e];
    std::fill(heads, heads + rows * H * D, 0.0f);
    for (long h = 0; h < H; h++) add(&turned[h * E * rows], rows, rows, key_weight + h * E * D, E, heads + h * D, H * D);
}

void project(long rows, const float* z, const float* value_weight, const float* output_weight, const float* output_bias, float* output) {
    std::vector<float> turned(H * E * rows), values(rows * H * E);
    for (long h = 0; h < H; h++) {
        const float* weight = value_weight + h * E * D;
        dots(z + h * D, H * D, rows, weight, E, D, &turned[h * E * rows], rows, weight);
    }
    for (long r = 0; r < rows; r++) for (long e = 0; e < H * E; e++) values[r * H * E + e] = turned[e * rows + r];
    linear(values.data(), rows, output_weight, output_bias, D, H * E, output);
}

// The best keys of one of P parts of each search's, into index and logit [R, P, K], which hold -1 and -inf.
void score(const Search* searches, long num_searches, const float* summary, long part, long parts, long width, long* index, float* logit) {
    constexpr long AT_ONCE = 48;
    std::vector<float> scores;
    for (const Search* s = searches; s < searches + num_searches; s++) {
        long rows = s->num_queries, end = s->num_keys * (part + 1) / parts;
        scores.resize(AT_ONCE * rows);
        for (long begin = s->num_keys * part / parts; begin < end; begin += AT_ONCE) {
            long n = std::min(AT_ONCE, end - begin);
            const float* keys = s->keys + begin * D;
            dots(summary, D, rows, keys, n, D, scores.data(), rows, keys + AT_ONCE * D);
            for (long q = 0; q < rows; q++) for (long i = 0; i < n; i++) {
                long at = (q * parts + part) * width;
                put(scores[i * rows + q], begin + i, logit + at, index + at, s->k);
            }
        }
        summary += rows * D, index += rows * parts * width, logit += rows * parts * width;
    }
}

// The chunks that the rows take, attended in and summed up into z [R, H, D], which holds zeros.
void attend(const float* contents, const Search* searches, long num_searches, long parts, long width, long* index, float* logit,
            const float* heads, const float* positions, float* z) {
    struct Visit { const float* tokens; long row; float weight; };
    std::vector<Visit> visits;
    long row = 0;
    for (const Search* s = searches; s < searches + num_searches; s++) for (long q = 0; q < s->num_queries; q++, row++) {
        float *best = logit + row * parts * width, total = 0;
        long* chosen = index + row * parts * width;
        for (long i = width; i < parts * width; i++) put(best[i], chosen[i], best, chosen, s->k);
        for (long i = 0; i < s->k; i++) total += std::exp(best[i] - best[0]);
        for (long i = 0; i < s->k; i++)
            visits.push_back({contents + s->pages[chosen[i]] * C * D, row, std::exp(best[i] - best[0]) / total});
    }
    float at[C * H], share[C * H], by_slot[C * H];
    for (size_t i = 0; i < visits.size(); i++) {
        const float *tokens = visits[i].tokens, *x = heads + visits[i].row * H * D;
        float* sum = z + visits[i].row * H * D;
        if (!i || visits[i - 1].row != visits[i].row) {
            dots(x, D, H, positions, C, D, at, H, positions);
            std::fill(by_slot, by_slot + C * H, 0.0f);
        }
        dots(x, D, H, tokens, C, D, share, H, visits[std::min(i + 1, visits.size() - 1)].tokens);
        softmax(at, visits[i].weight, share, by_slot);
        add(share, H, H, tokens, C, sum, D);
        if (i + 1 == visits.size() || visits[i + 1].row != visits[i].row) add(by_slot, H, H, positions, C, sum, D);
    }
}

}
