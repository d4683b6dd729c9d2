// Decoding with opened cells, a step of all heads of a layer: ops/opened/heads.py, compiled.
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

// A step of decoding. Every row of [batch, heads] reads, in one softmax: sinks and near field, and the tokens of the pages
// that its leader opens, by a choice among the cells of one level and then among the pages under those.
struct Step {
  const float *query, *queries;                         // [batch, heads, D]; [batch, heads, ring, D], the last ones
  const float *keys, *values;                           // [batch, shared, room, D]
  int64_t* chosen;                                      // [batch, heads, width]: run + 1 of the last choice, its pages, -1
  const float* const* banks;                            // [batch, of, bank_room, D or 2 D] what is scored
  const int64_t *bank_of, *bank_room;
  const int64_t* table;                                 // [heads, HEAD]
  float *out, *lse;                                     // [batch, heads, D], [batch, heads]
  int64_t batch, heads, shared, dim, ring, room, width, at, block, sinks, threads;
  float scale;
};

// What a row of the table says. A bank of -1: the keys themselves. An OPEN of -1: every token is seen.
enum { KEY_HEAD, CELL_BANK, CELL_ROW, PAGE_BANK, PAGE_ROW, CELL, PAGE, BEAM, OPEN, SHARE, BEAM_SHARE, RECENT, BOUNDS, COUNT,
       HEAD };

struct StepMemory {
  std::vector<const float*> row, value;
  std::vector<float> asked, leader, score, weight;
  std::vector<int64_t> number, chosen;
  std::vector<int32_t> order;
};

// Leaves the ``count`` largest of the cells m.number of a bank in m.chosen, by the scores that a prefill gives them.
static void choose_cells(const Step& c, int64_t b, const int64_t* t, int64_t bank, int64_t of, int64_t tokens,
                         int64_t count, StepMemory& m) {
  const int64_t n = m.number.size(), wide = t[BOUNDS] && bank >= 0 ? 2 * c.dim : c.dim;
  const float* const from = bank < 0 ? c.keys + (b * c.shared + t[KEY_HEAD]) * c.room * c.dim
                                     : c.banks[bank] + (b * c.bank_of[bank] + of) * c.bank_room[bank] * wide;
  m.leader.resize(wide);
  for (int64_t d = 0; d < c.dim; d++) {
    const float x = m.asked[d] * c.scale;
    m.leader[d] = wide > c.dim && x < 0.0f ? 0.0f : x;
    if (wide > c.dim) m.leader[c.dim + d] = x > 0.0f ? 0.0f : x;
  }
  m.row.clear();
  for (const int64_t i : m.number) m.row.push_back(from + i * wide);
  products(m.leader.data(), m.row, wide, m.score);
  for (int64_t i = 0; i < n; i++) {
    const int64_t left = tokens - std::max<int64_t>(0, std::min(tokens, c.sinks - m.number[i] * tokens));
    m.score[i] = left > 0 ? m.score[i] + (t[COUNT] ? std::log((float)left) : 0.0f) : NONE;
  }
  m.order.resize(up_to(n, LANES));
  m.chosen.resize(std::min(n, count));
  m.chosen.resize(largest(m.score.data(), n, count, m.order.data(), m.chosen.data()));
  for (int64_t& i : m.chosen) i = m.number[i];
}

// Who chooses for the present run of ``share`` queries: its first one, averaged with those before it.
static void lead(const Step& c, int64_t b, int64_t h, int64_t share, StepMemory& m) {
  const float* const ring = c.queries + (b * c.heads + h) * c.ring * c.dim;
  const int64_t first = c.at / share * share, before = std::min(c.table[h * HEAD + RECENT], first);
  m.asked.assign(c.dim, 0.0f);
  for (int64_t i = first - before; i < first; i++)
    for (int64_t d = 0; d < c.dim; d++) m.asked[d] += ring[i % c.ring * c.dim + d];
  for (int64_t d = 0; d < c.dim; d++) {
    const float own = ring[first % c.ring * c.dim + d];
    m.asked[d] = before ? own + (m.asked[d] / (float)before - own) * 0.5f : own;
  }
}

static void choose_pages(const Step& c, int64_t b, int64_t h, StepMemory& m) {
  const int64_t* const t = c.table + h * HEAD;
  const int64_t visible = std::max<int64_t>(0, c.at / c.block - 1) * c.block, per = t[CELL] / t[PAGE];
  int64_t *const kept = c.chosen + (b * c.heads + h) * c.width, run = c.at / t[SHARE];
  if (c.at % t[SHARE] && kept[0] == run + 1) {  // the first of a run always chooses: it may have been taken back
    m.chosen.assign(kept + 1, std::find_if(kept + 1, kept + 1 + t[OPEN], [](int64_t i) { return i < 0; }));
    return;
  }
  lead(c, b, h, per > 1 ? t[BEAM_SHARE] : t[SHARE], m);
  m.number.clear();
  for (int64_t i = 0; i < visible / t[CELL]; i++) m.number.push_back(i);
  choose_cells(c, b, t, t[CELL_BANK], t[CELL_ROW], t[CELL], per > 1 ? t[BEAM] : t[OPEN], m);
  if (per > 1) {
    m.number.clear();
    for (const int64_t cell : m.chosen)
      for (int64_t i = 0; i < per; i++) m.number.push_back(cell * per + i);
    if (t[BEAM_SHARE] != t[SHARE]) lead(c, b, h, t[SHARE], m);
    choose_cells(c, b, t, t[PAGE_BANK], t[PAGE_ROW], t[PAGE], t[OPEN], m);
  }
  kept[0] = run + 1;
  std::fill(std::copy(m.chosen.begin(), m.chosen.end(), kept + 1), kept + 1 + t[OPEN], -1);
}

static void step_row(const Step& c, int64_t b, int64_t h, StepMemory& m) {
  const int64_t* const t = c.table + h * HEAD;
  const int64_t start = t[OPEN] < 0 ? 0 : std::max<int64_t>(0, c.at / c.block - 1) * c.block;
  const int64_t of = b * c.shared + t[KEY_HEAD];
  const float *const query = c.query + (b * c.heads + h) * c.dim, *const key = c.keys + of * c.room * c.dim;
  const float* const value = c.values + of * c.room * c.dim;
  const float factor = c.scale * LOG2E;
  m.row.clear(), m.value.clear(), m.chosen.clear();
  if (t[OPEN] > 0) choose_pages(c, b, h, m);
  m.row.clear();
  const auto see = [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) m.row.push_back(key + i * c.dim), m.value.push_back(value + i * c.dim);
  };
  see(0, std::min(c.sinks, start));
  for (const int64_t page : m.chosen) see(std::max(c.sinks, page * t[PAGE]), (page + 1) * t[PAGE]);
  see(start, c.at + 1);
  const int64_t n = m.row.size();
  products(query, m.row, c.dim, m.weight);
  for (int64_t i = 0; i < n; i++) m.weight[i] *= factor;
  std::fill(m.weight.begin() + n, m.weight.end(), NONE);
  float most = NONE, total = 0.0f;
  for (const float s : m.weight) most = s > most || s != s ? s : most;
  for (int64_t i = 0; i < n; i += LANES) put(&m.weight[i], exp2_of(load(&m.weight[i]) - most));
  for (int64_t i = 0; i < n; i++) total += m.weight[i];
  float* const out = c.out + (b * c.heads + h) * c.dim;
  std::memset(out, 0, c.dim * 4);
  for (int64_t i = 0; i < n; i++) {
    const float w = m.weight[i];
    for (int64_t d = 0; d < c.dim; d++) out[d] += w * m.value[i][d];
  }
  for (int64_t d = 0; d < c.dim; d++) out[d] /= total;
  c.lse[b * c.heads + h] = (std::log2(total) + most) / LOG2E;
}

extern "C" int farfield_step(const Step* step) {
  return guarded([=] {
    const Step& c = *step;
    bool failed = false;
    int64_t keys = 0;
    std::vector<int64_t> order;  // those that see everything first: they take longest
    for (const bool exact : {true, false})
      for (int64_t h = 0; h < c.heads; h++)
        if ((c.table[h * HEAD + OPEN] < 0) == exact) order.push_back(h), keys += exact ? c.at : 4 * c.block;
#pragma omp parallel num_threads((int)c.threads) if (c.batch * keys * c.dim > SHORT)
    {
      StepMemory memory;
#pragma omp for schedule(dynamic, 1)
      for (int64_t row = 0; row < c.batch * c.heads; row++) {
        try {
          step_row(c, row % c.batch, order[row / c.batch], memory);
        } catch (...) {
#pragma omp atomic write
          failed = true;
        }
      }
    }
    if (failed) throw std::bad_alloc();
  });
}
