// Everything far in one cell about a centre, and the tokens kept out of it: ops/expansion/, compiled.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "choice.h"
#include "products.h"
#include "tasks.h"
#include "vectors.h"

// The least of n numbers, those that are none aside; behind the last there are larger ones to a whole vector.
static float least_of(const float* x, int64_t n) {
  Vector least = all(-NONE);
  for (int64_t i = 0; i < n; i += LANES) {
    const Vector s = load(x + i);
    least = s < least ? s : least;
  }
  float found = least[0];
  for (int e = 1; e < LANES; e++) found = least[e] < found ? least[e] : found;
  return found;
}

// The tokens that a centre keeps out of its cell: the ``open`` largest scores of all that came, of equal ones the first.
struct Kept {
  const int64_t open;
  int64_t count = 0;
  std::vector<int64_t> token;  // rising
  std::vector<float> score;    // +inf behind the last
  std::vector<int64_t> stays;
  std::vector<int32_t> order;

  Kept(int64_t most, int64_t block)
      : open(most), token(most + block), score(up_to(most + block, LANES), -NONE), stays(most + 1), order(score.size()) {}

  void clear() {
    count = 0;
    std::fill(score.begin(), score.end(), -NONE);
  }

  // Takes in n tokens behind all others. Those that are not kept, or no longer, go to ``left``, their scores to
  // ``of_left``; returns how many they are, never more than n.
  int64_t admit(const int64_t* fresh, const float* of_fresh, int64_t n, int64_t* left, float* of_left) {
    // Of those without weight no list has any, and a full list none that are no larger than its least.
    const float least = count < open ? NONE : least_of(score.data(), count);
    int64_t number = 0, all = count, next = 0;
    for (int64_t j = 0; j < n; j++) {
      if (of_fresh[j] <= least) left[number] = fresh[j], of_left[number++] = of_fresh[j];
      else token[all] = fresh[j], score[all++] = of_fresh[j];
    }
    count = all;
    if (all <= open) return number;
    count = largest(score.data(), all, open, order.data(), stays.data());
    for (int64_t j = 0; j < all; j++) {
      if (next < count && stays[next] == j) token[next] = token[j], score[next++] = score[j];
      else left[number] = token[j], of_left[number++] = score[j];
    }
    std::fill(score.begin() + count, score.begin() + all, -NONE);
    return number;
  }
};

// Everything that lies two blocks and more before a query's block: a cell about the centre that is the query's own, and the
// tokens that this centre keeps out of it, in one softmax; see farfield/ops/expansion/. Sums are in units of exp(peak),
// the largest score so far (or, where a cache had some, of their sum): nothing hangs on later tokens.
struct Expansion {
  const float *query, *key, *value;  // [batch, heads, N, D]; [batch, shared, N, D]
  const float *centres, *bias;       // [heads, number, D]; [heads]
  const int64_t* own;                // [batch, heads, N] the number of a query's centre
  const int64_t* read;               // [heads] the key head of each; null: neighbours share one
  const uint8_t* shown;              // [batch, N] tokens that count
  float *out, *lse;                  // [batch, heads, N, D], [batch, heads, N]; backward reads the latter
  const float *grad_out, *grad_lse;
  float *grad_query, *grad_key, *grad_value;  // [batch, heads, N, D], [parts, batch, heads, N, D]; 0 at first
  int64_t batch, heads, shared, length, dim, number, block, open, parts, threads;
  float scale;
};

struct Expander {
  const Expansion& c;
  const int64_t step;  // from one query's scores of tokens kept to the next one's: no power of two
  std::vector<float> held, fresh;  // of all tokens so far, and of those that join: of k v' row by row, of keys, of values
  float *const rows, *const keys, *const values;  // the parts of the former
  std::vector<float> about, score, weight, weighed, apart, made, exact, grad_exact, more;
  std::vector<const float*> row, read;
  std::vector<float*> written;
  std::vector<int64_t> asked, token, place;
  Kept kept;
  float peak, mass;
  std::vector<float> back;             // gradients of normalised sums, added up from the last unit on
  std::vector<float> level;            // of every unit: log of the sum of weights
  std::vector<int64_t> joined, until;  // what joined, unit by unit, and where each ends; what the scores were
  std::vector<float> of_joined;
  std::vector<float> shares, turns, commons, scores;  // of every query, for gradients of the sums: see ask_backward

  explicit Expander(const Expansion& call)
      : c(call), step(up_to(call.open, PANEL) + LANES), held((call.dim + 2) * call.dim), fresh(held.size()),
        rows(held.data()), keys(rows + call.dim * call.dim), values(keys + call.dim), about(call.dim),
        score(up_to(call.block, LANES)), weight(score.size()), weighed(call.block * call.dim), apart(weighed.size()),
        made(weighed.size()), kept(call.open, call.block) {
    if (!call.grad_out) return;
    back.resize(held.size() + 1), level.resize(units()), until.resize(units()), more.resize(made.size());
    joined.reserve(call.length), of_joined.reserve(call.length);
    for (auto* const x : {&shares, &turns, &commons, &scores}) x->resize(call.length);
  }

  int64_t units() const { return (c.length + c.block - 1) / c.block; }

  // Points ``row`` and ``read`` at the keys and values of tokens, repeated to whole vectors of them.
  void point(int64_t b, int64_t h, const int64_t* tokens, int64_t n) {
    const int64_t dim = c.dim, head = c.read ? c.read[h] : h / (c.heads / c.shared);
    const int64_t at = (b * c.shared + head) * c.length * dim;
    row.resize(up_to(n, LANES)), read.resize(row.size());
    for (int64_t i = 0; i < (int64_t)row.size(); i++) {
      const int64_t j = tokens[std::min(i, n - 1)] * dim;
      row[i] = c.key + at + j, read[i] = c.value + at + j;
    }
  }

  // to[k][i] = x[k] . from[i] of some rows x and whole vectors of keys or values.
  void cross(const float* x, int64_t number, const std::vector<const float*>& from, float* to) const {
    for (size_t i = 0; i < from.size(); i += LANES) dots(x, number, &from[i], c.dim, to + i, step);
  }

  // The tokens that join the sums at unit u: of the block two before it and of those kept so far.
  void find(int64_t b, int64_t h, int64_t u) {
    place.clear();
    for (int64_t j = (u - 2) * c.block; u >= 2 && j < (u - 1) * c.block; j++)
      if (c.shown[b * c.length + j]) place.push_back(j);
    sift(b, h);
  }

  // The tokens at ``place`` come to those kept: some of either join the sums, with their scores at the centre.
  void sift(int64_t b, int64_t h) {
    token.resize(c.block);
    point(b, h, place.data(), place.size());
    cross(about.data(), 1, row, weight.data());
    token.resize(kept.admit(place.data(), weight.data(), place.size(), token.data(), score.data()));
    point(b, h, token.data(), token.size());
    for (size_t i = token.size(); i < row.size(); i++) score[i] = NONE;
  }

  // Adds the tokens that were found.
  void absorb() {
    const int64_t n = token.size();
    if (!n) return;
    Vector largest = all(peak);
    for (int64_t j = 0; j < n; j += LANES) {
      const Vector s = load(&score[j]);
      largest = s > largest || s != s ? s : largest;
    }
    float most = peak;
    for (int e = 0; e < LANES; e++) most = largest[e] > most || largest[e] != largest[e] ? largest[e] : most;
    if (most == NONE) return;  // no weight at all
    if (!(most == peak)) {
      const float factor = peak == NONE ? 0.0f : std::exp(peak - most);
      for (float& x : held) x *= factor;
      mass *= factor, peak = most;
    }
    // A block's sums by themselves, then added once: sums over all tokens one by one would lose digits with the length.
    std::fill(fresh.begin(), fresh.end(), 0.0f);
    float* const of_keys = fresh.data() + c.dim * c.dim;
    float* const of_values = of_keys + c.dim;
    for (int64_t j = 0; j < n; j += LANES) put(&weight[j], exp2_of((load(&score[j]) - all(peak)) * all(LOG2E)));
    for (int64_t j = 0, dim = c.dim; j < n; j++)
      for (int64_t d = 0; d < dim; d += LANES) put(&weighed[j * dim + d], all(weight[j]) * load(row[j] + d));
    add_outer(weighed.data(), read.data(), n, fresh.data());
    mix(weight.data(), 1, 0, row.data(), n, of_keys, c.dim);
    mix(weight.data(), 1, 0, read.data(), n, of_values, c.dim);
    float whole = 0.0f;  // in the order of the sums that are divided by it: then roundings cancel
    for (int64_t j = 0; j < n; j++) whole += weight[j];
    mass += whole;
    for (size_t i = 0; i < held.size(); i++) held[i] += fresh[i];
  }

  // into[d][..] += sum over n of x[k][d] y[k][..]; all D wide.
  void add_outer(const float* x, const float* const* y, int64_t n, float* into) const {
    for (int64_t d = 0; d < c.dim; d += TALL)
      for (int64_t i = 0; i < c.dim; i += PANEL)
        column_tiles(std::min<int64_t>(TALL, c.dim - d), x + d, c.dim, y, n, n, n, into + d * c.dim, c.dim, i);
  }

  // written[k][..] += sum over d of row[k][d] matrix[d][..].
  void multiply(int64_t n, const float* matrix) const {
    for (int64_t k = 0; k < n; k += TALL)
      row_tiles<true>(std::min<int64_t>(TALL, n - k), row.data() + k, written.data() + k, 0, c.dim, matrix, c.dim, 0, c.dim,
                      nullptr);
  }

  // to[k][d] = x[k] . matrix[d] for n rows that lie one after another.
  void multiply_rows(const float* x, int64_t n, const float* matrix, float* to) const {
    const float* from[LANES];
    for (int64_t d = 0; d < c.dim; d += LANES) {
      for (int e = 0; e < LANES; e++) from[e] = matrix + (d + e) * c.dim;
      dots(x, n, from, c.dim, to + d, c.dim);
    }
  }

  // The queries of unit u whose centre this is.
  void ask(int64_t b, int64_t h, int64_t centre, int64_t u) {
    const int64_t of = (b * c.heads + h) * c.length, to = std::min(c.length, (u + 1) * c.block);
    asked.clear();
    for (int64_t i = u * c.block; i < to; i++)
      if (c.own[of + i] == centre) {
        asked.push_back(i);
        for (int64_t d = 0; d < c.dim; d += 16) __builtin_prefetch(c.query + (of + i) * c.dim + d);
      }
  }

  // What the queries asked get from the cell: out in ``made``, lse in ``c.lse``.
  void answer(int64_t b, int64_t h, int64_t centre) {
    const int64_t of = (b * c.heads + h) * c.length, n = asked.size();
    const float* const about_ = c.centres + (h * c.number + centre) * c.dim;
    if (mass == 0.0f) {
      std::fill(made.begin(), made.begin() + n * c.dim, 0.0f);
      for (const int64_t i : asked) c.lse[of + i] = NONE;
      return;
    }
    row.resize(n), written.resize(n);
    for (int64_t k = 0; k < n; k++) {
      const float* const query = c.query + (of + asked[k]) * c.dim;
      float *const x = apart.data() + k * c.dim, *const y = made.data() + k * c.dim;
      float common = 0.0f;
      for (int64_t d = 0; d < c.dim; d++) x[d] = (query[d] - about_[d]) * c.scale, common += x[d] * keys[d];
      common /= mass;
      for (int64_t d = 0; d < c.dim; d++) y[d] = (1.0f - common) * values[d];
      c.lse[of + asked[k]] = std::log(mass) + peak + common + c.bias[h];
      row[k] = x, written[k] = y;
    }
    multiply(n, rows);
    for (int64_t k = 0; k < n; k++)
      for (int64_t d = 0; d < c.dim; d++) written[k][d] /= mass;
  }

  // Copies queries that asked, times a factor.
  void copy(const float* from, int64_t of, float factor, float* to) const {
    for (size_t k = 0; k < asked.size(); k++)
      for (int64_t d = 0; d < c.dim; d++) to[k * c.dim + d] = from[(of + asked[k]) * c.dim + d] * factor;
  }

  // Adds what the centre keeps to the answers, in the same softmax, and writes them.
  void finish(int64_t b, int64_t h) {
    const int64_t of = (b * c.heads + h) * c.length, queries = asked.size(), n = kept.count;
    if (n && queries) {
      point(b, h, kept.token.data(), n);
      exact.resize(std::max<size_t>(exact.size(), queries * step));
      copy(c.query, of, c.scale, apart.data());
      cross(apart.data(), queries, row, exact.data());
      for (int64_t k = 0; k < queries; k++) {
        float *const scores = exact.data() + k * step, *const out = made.data() + k * c.dim, &lse = c.lse[of + asked[k]];
        const float cell = lse;
        for (int64_t i = n; i < up_to(n, LANES); i++) scores[i] = NONE;
        Vector most = all(cell), sum{};
        for (int64_t i = 0; i < n; i += LANES) {
          const Vector s = load(scores + i);
          most = s > most ? s : most;
        }
        float top = cell;
        for (int e = 0; e < LANES; e++) top = most[e] > top ? most[e] : top;
        const float shift = top == NONE ? 0.0f : top, shrink = std::exp(cell - shift);
        for (int64_t i = 0; i < n; i += LANES) {
          const Vector w = exp2_of((load(scores + i) - all(shift)) * all(LOG2E));
          sum += w;
          put(scores + i, w);
        }
        float total = shrink;
        for (int e = 0; e < LANES; e++) total += sum[e];
        const float over = total == 0.0f ? 0.0f : 1.0f / total;
        for (int64_t i = 0; i < n; i += LANES) put(scores + i, load(scores + i) * all(over));
        for (int64_t d = 0; d < c.dim; d++) out[d] *= shrink * over;
        lse = total == 0.0f ? NONE : std::log(total) + shift;
      }
      mix(exact.data(), queries, step, read.data(), n, made.data(), c.dim);
    }
    for (int64_t k = 0; k < queries; k++) std::copy_n(made.data() + k * c.dim, c.dim, c.out + (of + asked[k]) * c.dim);
  }

  void begin(int64_t h, int64_t centre) {
    for (int64_t d = 0; d < c.dim; d++) about[d] = c.centres[(h * c.number + centre) * c.dim + d] * c.scale;
    std::fill(held.begin(), held.end(), 0.0f);
    peak = NONE, mass = 0.0f;
    kept.clear(), joined.clear(), of_joined.clear();
  }

  void run(int64_t b, int64_t h, int64_t centre) {
    begin(h, centre);
    for (int64_t u = 0; u < units(); u++) {
      ask(b, h, centre, u);  // first, so that queries are on their way meanwhile
      find(b, h, u);
      absorb();
      answer(b, h, centre);
      finish(b, h);
    }
  }

  // Gradients of the queries asked, and of the keys and values of the tokens kept. With m the mass, M, V, K the sums of
  // k v', v and k over it, and L = log(m) + peak, the cell has
  //   out = x'M + (1 - x.K) V,  lse = L + x.K + bias.
  // With g what comes up for the output of the whole and e for its lse, a part of weight w and output o gets w g for its
  // output and w (g.o - d) for its lse, d = sum of w g.o - e. What is left for the sums of the cell stays in ``shares``,
  // ``turns``, ``commons`` and ``scores``.
  void ask_backward(int64_t b, int64_t h, int64_t centre, int64_t u, float* grad_key, float* grad_value) {
    const int64_t of = (b * c.heads + h) * c.length, queries = asked.size(), n = kept.count;
    if (!queries) return;
    const float* const about_ = c.centres + (h * c.number + centre) * c.dim;
    const float over = mass == 0.0f ? 0.0f : 1.0f / mass;
    copy(c.query, of, c.scale, apart.data()), copy(c.grad_out, of, 1.0f, weighed.data());
    if (n) {
      point(b, h, kept.token.data(), n);
      exact.resize(std::max<size_t>(exact.size(), queries * step)), grad_exact.resize(exact.size());
      cross(apart.data(), queries, row, exact.data());
      cross(weighed.data(), queries, read, grad_exact.data());
    }
    multiply_rows(weighed.data(), queries, rows, made.data());
    for (int64_t k = 0; k < queries; k++) {
      const int64_t i = asked[k];
      const float *const query = c.query + (of + i) * c.dim, *const given = weighed.data() + k * c.dim;
      const float *const moved = made.data() + k * c.dim, lse = c.lse[of + i];
      float *const s = exact.data() + k * step, *const t = grad_exact.data() + k * step;
      float common = 0.0f, along = 0.0f, whole = 0.0f, beside = 0.0f, kept_along = 0.0f;
      for (int64_t d = 0; d < c.dim; d++) {
        const float x = (query[d] - about_[d]) * c.scale;
        common += x * keys[d], along += given[d] * values[d], whole += x * moved[d];
      }
      common *= over, along *= over, whole *= over;
      // No weight is above 1, but scores of 1e5 are rounded so far that their difference can say so.
      const float less = level[u] + common + c.bias[h] - lse;
      float share = mass == 0.0f ? 0.0f : std::exp(less > 0.0f ? 0.0f : less);
      for (int64_t j = 0; j < n; j += LANES) {
        const Vector y = (load(s + j) - all(lse)) * all(LOG2E);
        put(s + j, exp2_of(y > Vector{} ? Vector{} : y));
      }
      for (int64_t j = 0; j < n; j++) beside += s[j], kept_along += s[j] * t[j];
      // Shares of exactly 1 together: gradients of what all keys have in common cancel.
      const float total = share + beside, norm = total == 0.0f ? 0.0f : 1.0f / total;
      share *= norm, beside *= norm, kept_along *= norm;
      const float inside = whole + (1.0f - common) * along, up = c.grad_lse[of + i];
      const float of_lse = share * (beside * inside - kept_along + up), delta = share * inside + kept_along - up;
      const float turn = of_lse - share * along;
      float* const grad = c.grad_query + (of + i) * c.dim;
      for (int64_t d = 0; d < c.dim; d++) grad[d] += c.scale * over * (share * moved[d] + turn * keys[d]);
      for (int64_t j = 0; j < n; j += LANES) {
        const Vector w = load(s + j) * all(norm);
        put(s + j, w);
        put(t + j, w * (load(t + j) - all(delta)));
      }
      shares[i] = share, turns[i] = turn, commons[i] = common;
      scores[i] = of_lse - share * inside - common * turn;
    }
    if (!n) return;
    std::fill(more.begin(), more.begin() + queries * c.dim, 0.0f);
    mix(grad_exact.data(), queries, step, row.data(), n, more.data(), c.dim);
    for (int64_t k = 0; k < queries; k++)
      for (int64_t d = 0; d < c.dim; d++) c.grad_query[(of + asked[k]) * c.dim + d] += c.scale * more[k * c.dim + d];
    written.resize(n);
    for (int64_t j = 0; j < n; j++) written[j] = grad_value + kept.token[j] * c.dim;
    spread(exact.data(), queries, step, weighed.data(), written.data(), n, c.dim);
    for (int64_t j = 0; j < n; j++) written[j] = grad_key + kept.token[j] * c.dim;
    spread(grad_exact.data(), queries, step, apart.data(), written.data(), n, c.dim);
  }

  // A token has the weight exp(score - L) in M, V and K. So the gradients of what later units read, each times exp(-L) of
  // its own, are all that a token needs; L only grows.
  void run_backward(int64_t b, int64_t h, int64_t centre, int64_t part) {
    begin(h, centre);
    const int64_t of = (b * c.heads + h) * c.length;
    float* const grad_key = c.grad_key + (part * c.batch * c.heads * c.length + of) * c.dim;
    float* const grad_value = c.grad_value + (part * c.batch * c.heads * c.length + of) * c.dim;
    for (int64_t u = 0; u < units(); u++) {
      ask(b, h, centre, u);
      find(b, h, u);
      joined.insert(joined.end(), token.begin(), token.end());
      of_joined.insert(of_joined.end(), score.begin(), score.begin() + token.size());
      until[u] = joined.size();
      absorb();
      level[u] = mass == 0.0f ? NONE : std::log(mass) + peak;
      ask_backward(b, h, centre, u, grad_key, grad_value);
    }
    std::fill(back.begin(), back.end(), 0.0f);
    float *const of_keys = back.data() + c.dim * c.dim, *const of_values = of_keys + c.dim, *const of_score = of_values + c.dim;
    const float* const about_ = c.centres + (h * c.number + centre) * c.dim;
    for (int64_t u = units() - 1; u >= 0 && level[u] != NONE; u--) {
      if (u + 1 < units()) {
        const float factor = std::exp(level[u] - level[u + 1]);
        for (float& x : back) x *= factor;
      }
      ask(b, h, centre, u);
      const int64_t n = asked.size();
      read.resize(n);
      for (int64_t k = 0; k < n; k++) {
        const int64_t i = asked[k];
        float *const x = apart.data() + k * c.dim, *const given = weighed.data() + k * c.dim;
        for (int64_t d = 0; d < c.dim; d++) {
          x[d] = (c.query[(of + i) * c.dim + d] - about_[d]) * c.scale;
          given[d] = shares[i] * c.grad_out[(of + i) * c.dim + d];
          of_keys[d] += turns[i] * x[d];
          of_values[d] += (1.0f - commons[i]) * given[d];
        }
        *of_score += scores[i];
        read[k] = given;
      }
      add_outer(apart.data(), read.data(), n, back.data());
      const int64_t first = u ? until[u - 1] : 0, number = until[u] - first;
      if (!number) continue;
      const int64_t* const tokens = joined.data() + first;
      point(b, h, tokens, number);
      written.resize(number);
      for (int64_t j = 0; j < number; j++) {
        std::memcpy(weighed.data() + j * c.dim, read[j], c.dim * 4);
        written[j] = made.data() + j * c.dim;
        std::copy_n(of_values, c.dim, written[j]);
      }
      multiply(number, back.data());  // made: k'G + of_values
      multiply_rows(weighed.data(), number, back.data(), apart.data());  // apart: G v
      for (int64_t j = 0; j < number; j++) {
        const float weight = std::exp(of_joined[first + j] - level[u]);
        const float* const turned = apart.data() + j * c.dim;
        float sum = *of_score;
        for (int64_t d = 0; d < c.dim; d++)
          sum += row[j][d] * (turned[d] + of_keys[d]) + read[j][d] * of_values[d];
        float *const to_key = grad_key + tokens[j] * c.dim, *const to_value = grad_value + tokens[j] * c.dim;
        for (int64_t d = 0; d < c.dim; d++) {
          to_key[d] += weight * (turned[d] + of_keys[d] + sum * about[d]);
          to_value[d] += weight * made[j * c.dim + d];
        }
      }
    }
  }
};

// Every centre of every head, or, for gradients, every part of a head's centres: those of a part add to one place.
template <class F>
static int expand(const Expansion& c, int64_t tasks, F task) {
  return guarded([&] {
    bool failed = false;
#pragma omp parallel num_threads((int)c.threads) if (c.length * c.dim * c.dim > SHORT)
    {
      std::unique_ptr<Expander> worker;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < tasks; i++) {
        try {
          if (!worker) worker = std::make_unique<Expander>(c);
          task(*worker, i);
        } catch (...) {
#pragma omp atomic write
          failed = true;
        }
      }
    }
    if (failed) throw std::bad_alloc();
  });
}

extern "C" int farfield_expand(const Expansion* expansion) {
  const Expansion& c = *expansion;
  return expand(c, c.batch * c.heads * c.number, [&](Expander& worker, int64_t i) {
    worker.run(i / c.number / c.heads, i / c.number % c.heads, i % c.number);
  });
}

extern "C" int farfield_expand_backward(const Expansion* expansion) {
  const Expansion& c = *expansion;
  return expand(c, c.batch * c.heads * c.parts, [&](Expander& worker, int64_t i) {
    const int64_t part = i % c.parts, of = i / c.parts;
    for (int64_t centre = part; centre < c.number; centre += c.parts)
      worker.run_backward(of / c.heads, of % c.heads, centre, part);
  });
}

// Blocks of tokens added to what a cache has of those before: sums, and tokens kept out of them.
struct Advance {
  const float *key, *value;            // [batch, shared, room, D], token i of the blocks in row i - ``before``
  const int64_t* read;                 // [heads] the key head of each
  const float* centres;                // [heads, number, D]
  float *of_lse, *of_key, *of_rows;    // [batch, heads, places, number], [.., D], [.., D + 1, D]: place n % places has
                                       // what is before block n
  int64_t* kept;                       // [batch, heads, places, number, open] rows, rising; negative: none
  float* scores;                       // of these
  int64_t batch, heads, shared, room, before, dim, number, block, open, sinks, first, last, places, threads;
  float scale;
};

// Where something of block n of one centre lies, in units of it.
static int64_t place_of(const Advance& a, int64_t b, int64_t h, int64_t centre, int64_t n) {
  return ((b * a.heads + h) * a.places + n % a.places) * a.number + centre;
}

// What the cache has before block n, into a worker that has begun; the other way with ``back`` set.
static void exchange(const Advance& a, Expander& w, int64_t at, bool back) {
  float *const key = a.of_key + at * a.dim, *const rows = a.of_rows + at * (a.dim + 1) * a.dim;
  float* const value = rows + a.dim * a.dim;
  int64_t* const kept = a.kept + at * a.open;
  float* const scores = a.scores + at * a.open;
  if (back) {
    const float over = w.mass == 0.0f ? 0.0f : 1.0f / w.mass;
    a.of_lse[at] = w.mass == 0.0f ? NONE : std::log(w.mass) + w.peak;
    for (int64_t i = 0; i < a.dim * a.dim; i++) rows[i] = w.rows[i] * over;
    for (int64_t d = 0; d < a.dim; d++) key[d] = w.keys[d] * over, value[d] = w.values[d] * over;
    std::fill(std::copy_n(w.kept.token.begin(), w.kept.count, kept), kept + a.open, -1);
    std::fill(std::copy_n(w.kept.score.begin(), w.kept.count, scores), scores + a.open, NONE);
    return;
  }
  if (a.of_lse[at] != NONE) {
    w.peak = a.of_lse[at], w.mass = 1.0f;
    std::copy_n(rows, a.dim * a.dim, w.rows), std::copy_n(key, a.dim, w.keys), std::copy_n(value, a.dim, w.values);
  }
  for (; w.kept.count < a.open && kept[w.kept.count] >= 0; w.kept.count++) {
    w.kept.token[w.kept.count] = kept[w.kept.count];
    w.kept.score[w.kept.count] = scores[w.kept.count];
  }
}

extern "C" int farfield_advance(const Advance* advance) {
  const Advance& a = *advance;
  Expansion c{};
  c.key = a.key, c.value = a.value, c.centres = a.centres, c.batch = a.batch, c.heads = a.heads, c.shared = a.shared;
  c.read = a.read, c.length = a.room, c.dim = a.dim, c.number = a.number, c.block = a.block, c.open = a.open, c.threads = a.threads;
  c.scale = a.scale;
  return expand(c, c.batch * c.heads * c.number, [&](Expander& worker, int64_t i) {
    const int64_t b = i / c.number / c.heads, h = i / c.number % c.heads, centre = i % c.number;
    worker.begin(h, centre);
    exchange(a, worker, place_of(a, b, h, centre, a.first), false);
    for (int64_t n = a.first; n < a.last; n++) {
      worker.place.clear();
      for (int64_t j = std::max(a.sinks, n * a.block); j < (n + 1) * a.block; j++) worker.place.push_back(j - a.before);
      worker.sift(b, h);
      worker.absorb();
      if (n + 1 > a.last - a.places) exchange(a, worker, place_of(a, b, h, centre, n + 1), true);
    }
  });
}

// A step of decoding: one query of some heads, from the sums and the tokens kept that a cache has at one of its places,
// merged into what these heads have seen already.
struct ExpansionStep {
  const float *query, *centres, *bias;             // [batch, all, D], [heads, number, D], [heads]
  const int64_t* place;                            // [heads] which of all heads each is
  const float *of_lse, *of_key, *of_rows;          // [batch, heads, places, number], [.., D], [.., D + 1, D]
  const int64_t* kept;                             // [batch, heads, places, number, open]; negative: none
  const float *keys, *values;                      // [batch, shared, room, D]
  const int64_t* read;                             // [heads] the key head of each
  float *out, *lse;                                // [batch, all, D], [batch, all]
  int64_t batch, heads, all, number, dim, places, at, open, shared, room;
  float scale;
};

struct Expanding {
  std::vector<const float*> row;
  std::vector<float> score, x;
  std::vector<const float*> value;
};

static void step_expansion(const ExpansionStep& c, int64_t b, int64_t h, Expanding& m) {
  const int64_t here = b * c.all + c.place[h];
  const float *const query = c.query + here * c.dim, *const centres = c.centres + h * c.number * c.dim;
  m.row.clear();
  for (int64_t i = 0; i < c.number; i++) m.row.push_back(centres + i * c.dim);
  products(query, m.row, c.dim, m.score);
  int64_t own = 0;
  float best = NONE;
  for (int64_t i = 0; i < c.number; i++) {
    float square = 0.0f;
    for (int64_t d = 0; d < c.dim; d++) square += centres[i * c.dim + d] * centres[i * c.dim + d];
    const float near = m.score[i] - 0.5f * square;
    if (near > best || near != near) best = near, own = i;
    if (near != near) break;
  }
  const int64_t at = ((b * c.heads + h) * c.places + c.at) * c.number + own;
  const float *const centre = centres + own * c.dim, *const key = c.of_key + at * c.dim;
  const float* const rows = c.of_rows + at * (c.dim + 1) * c.dim;
  m.x.resize(3 * c.dim);
  float *const x = m.x.data(), *const asked = x + c.dim, *const far = asked + c.dim;
  float common = 0.0f;
  for (int64_t d = 0; d < c.dim; d++) {
    x[d] = (query[d] - centre[d]) * c.scale, asked[d] = query[d] * c.scale;
    common += x[d] * key[d];
  }
  const float cell = c.of_lse[at] == NONE ? NONE : c.of_lse[at] + common + c.bias[h];
  m.row.clear(), m.value.clear();
  const int64_t from = (b * c.shared + c.read[h]) * c.room;
  for (int64_t i = 0; i < c.open; i++) {
    const int64_t token = c.kept[at * c.open + i];
    if (token >= 0) m.row.push_back(c.keys + (from + token) * c.dim), m.value.push_back(c.values + (from + token) * c.dim);
  }
  const int64_t n = m.row.size();
  if (n) products(asked, m.row, c.dim, m.score);
  float peak = cell;
  for (int64_t i = 0; i < n; i++) peak = m.score[i] > peak || m.score[i] != m.score[i] ? m.score[i] : peak;
  if (peak == NONE) return;
  float *const out = c.out + here * c.dim, total = 0.0f;
  std::fill(far, far + c.dim, 0.0f);
  if (cell != NONE) {
    const float weight = std::exp(cell - peak);
    total = weight;
    for (int64_t d = 0; d < c.dim; d++) far[d] = weight * (1.0f - common) * rows[c.dim * c.dim + d];
    for (int64_t i = 0; i < c.dim; i++)
      for (int64_t d = 0; d < c.dim; d++) far[d] += weight * x[i] * rows[i * c.dim + d];
  }
  for (int64_t i = 0; i < n; i++) {
    const float weight = std::exp(m.score[i] - peak);
    total += weight;
    for (int64_t d = 0; d < c.dim; d++) far[d] += weight * m.value[i][d];
  }
  // Into one softmax with what was there: both in units of the larger.
  const float lse = peak + std::log(total), before = c.lse[here], most = before > lse ? before : lse;
  const float old = before == NONE ? 0.0f : std::exp(before - most), fresh = std::exp(lse - most);
  for (int64_t d = 0; d < c.dim; d++) out[d] = (old * out[d] + fresh / total * far[d]) / (old + fresh);
  c.lse[here] = most + std::log(old + fresh);
}

extern "C" int farfield_step_expansions(const ExpansionStep* steps, int64_t count, int64_t threads) {
  return guarded([=] {
    struct Task {
      int64_t of, row;
    };
    std::vector<Task> tasks;
    int64_t work = 0;
    for (int64_t s = 0; s < count; s++) {
      const ExpansionStep& c = steps[s];
      work += c.batch * c.heads * (c.number + c.dim + 2 * c.open) * c.dim;
      for (int64_t row = 0; row < c.batch * c.heads; row++) tasks.push_back({s, row});
    }
    bool failed = false;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)threads) if (work > SHORT)
    for (int64_t i = 0; i < (int64_t)tasks.size(); i++) {
      try {
        Expanding memory;
        const ExpansionStep& c = steps[tasks[i].of];
        step_expansion(c, tasks[i].row / c.heads, tasks[i].row % c.heads, memory);
      } catch (...) {
#pragma omp atomic write
        failed = true;
      }
    }
    if (failed) throw std::bad_alloc();
  });
}
