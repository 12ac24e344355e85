/*
 * plan.c - which pages each tile of queries reads, in which form, and how much work that is (plan.h).
 *
 * The positions of a job are cut at pages; the queries of one page share two lists. Their rows, position after position, are cut
 * into tiles of equal size, at most so many as the kernels take.
 */
#include "attention/cuda/plan.h"

#include "attention/cuda/decode/line.h"

#include <stdlib.h>

static int64_t window_begin(int window, int64_t position) { return window > 0 && position >= window ? position - window + 1 : 0; }

struct plan_bounds plan_bound(int group, int most_rows, int layer, const struct plan_job *jobs, int n_jobs) {
  struct plan_bounds bounds = {0, 0};
  for (int i = 0; i < n_jobs; i++) {
    const int64_t end = sequence_visible(jobs[i].sequence, layer), query_pages = (jobs[i].n - 1) / PAGE_TOKENS + 2;
    bounds.tiles += (size_t)jobs[i].n * (size_t)group / (size_t)most_rows + (size_t)query_pages;
    bounds.pages += (size_t)query_pages * (size_t)(end / PAGE_TOKENS + 1);
  }
  return bounds;
}

/* The pages that queries of page T from `first` on read: the exact ones, then the others. Returns how many; *exact of the first.
 */
static int list_pages(const struct cache_geometry *g, const oscar_sequence *s, int layer, int64_t begin, int64_t query_page,
                      struct decode_page *list, int *exact) {
  int count = 0;
  for (int form = 0; form < 2; form++) {
    for (int64_t page = begin; page <= query_page; page++) {
      const struct page_units units = sequence_page_units(s, layer, page);
      const bool coded = page_reads_exact(g, page, query_page) ? units.exact == NO_UNIT : units.coded != NO_UNIT;
      if (coded != (form == 1)) continue;
      list[count++] = (struct decode_page){coded ? units.coded : units.exact, (int32_t)page};
    }
    if (form == 0) *exact = count;
  }
  return count;
}

struct plan_result plan_fill(const struct cache_geometry *g, int group, int most_rows, int layer, int window,
                             const struct plan_job *jobs, int n_jobs, struct decode_tile *tiles, struct decode_page *pages) {
  struct plan_result r = {.last_page = -1, .missing = -1};
  for (int j = 0; j < n_jobs; j++) {
    const int64_t end = sequence_visible(jobs[j].sequence, layer), begin = end - jobs[j].n;
    for (int64_t first = begin, next; first < end; first = next) {
      const int64_t page = first / PAGE_TOKENS;
      next = (page + 1) * PAGE_TOKENS < end ? (page + 1) * PAGE_TOKENS : end;
      int exact = 0;
      const int count =
          list_pages(g, jobs[j].sequence, layer, window_begin(window, first) / PAGE_TOKENS, page, pages + r.pages, &exact);
      if (count > exact) r.coded = true;
      for (int i = r.pages; i < r.pages + count && r.missing < 0; i++)
        if (pages[i].unit == NO_UNIT) r.missing = pages[i].number;
      if (page > r.last_page) r.last_page = page;
      const int rows = (int)(next - first) * group, cuts = (rows + most_rows - 1) / most_rows;
      for (int i = 0; i < cuts; i++) {
        const int from = rows * i / cuts, to = rows * (i + 1) / cuts;
        const int64_t last = first + (to - 1) / group;
        struct decode_tile tile = {.token = jobs[j].token + (int)(first - begin),
                                   .rows = to - from,
                                   .first_row = from,
                                   .exact_first = r.pages,
                                   .exact_pages = exact,
                                   .coded_first = r.pages + exact,
                                   .coded_pages = count - exact,
                                   .position = first};
        /* the queries' own page is exact and the last of the list */
        tile.exact_tiles = (exact - 1) * (PAGE_TOKENS / EXACT_TOKENS) + (int)(last % PAGE_TOKENS) / EXACT_TOKENS + 1;
        if (tile.rows > r.rows) r.rows = tile.rows;
        tiles[r.tiles++] = tile;
      }
      r.pages += count;
    }
  }
  return r;
}

int plan_rows(int group, int kv_heads, int blocks, int most_rows, int layer, int window, const struct plan_job *jobs,
              int n_jobs) {
  if (most_rows <= 8) return most_rows;
  int64_t pages[2] = {0, 0};
  for (int i = 0; i < n_jobs; i++) {
    const int64_t end = sequence_visible(jobs[i].sequence, layer), rows = (int64_t)jobs[i].n * group;
    const int64_t each = kv_heads * (end / PAGE_TOKENS + 1 - window_begin(window, end - jobs[i].n) / PAGE_TOKENS);
    for (int k = 0; k < 2; k++) pages[k] += each * ((rows + (8 << k) - 1) / (8 << k));
  }
  return line_wide_pays(pages[0], pages[1], blocks) ? most_rows : 8;
}

#define LEAST_PART_PAGES 4 /* a part of fewer costs more in what it has to do besides than it saves */
#define PART_COST        2 /* what a part has to do besides its pages, in pages */

int plan_parts(int tiles, int kv_heads, int64_t pages, int blocks) {
  int best = 1;
  double least = 0;
  for (int parts = 1; parts <= PREFILL_MOST_PARTS && (parts == 1 || pages >= (int64_t)parts * LEAST_PART_PAGES); parts++) {
    const int turns = (tiles * kv_heads * parts + blocks - 1) / blocks;
    const double time = turns * ((double)pages / parts + (parts > 1 ? PART_COST : 0));
    if (parts == 1 || time < 0.95 * least) best = parts, least = time;
  }
  return best;
}

static int longer_first(const void *x, const void *y) {
  const struct prefill_tile *a = x, *b = y;
  const int left = a->of.exact_pages + a->of.coded_pages, right = b->of.exact_pages + b->of.coded_pages;
  if (left != right) return right - left;
  return a->of.token != b->of.token ? a->of.token - b->of.token : a->of.first_row - b->of.first_row;
}

/* The part of a tile's pages, coded ones before exact ones. */
static struct prefill_tile part_of(const struct decode_tile *whole, int part, int parts, int first) {
  struct prefill_tile cut = {.of = *whole, .part = part, .parts = parts, .first = first};
  const int64_t pages = whole->coded_pages + whole->exact_pages;
  const int begin = (int)(pages * part / parts), end = (int)(pages * (part + 1) / parts);
  const int coded_begin = begin < whole->coded_pages ? begin : whole->coded_pages,
            coded_end = end < whole->coded_pages ? end : whole->coded_pages;
  cut.of.coded_first = whole->coded_first + coded_begin;
  cut.of.coded_pages = coded_end - coded_begin;
  cut.of.exact_first = whole->exact_first + begin - coded_begin;
  cut.of.exact_pages = end - begin - cut.of.coded_pages;
  return cut;
}

void plan_cut(int tiles, int parts, const struct decode_tile *from, struct prefill_tile *to) {
  for (int i = 0; i < tiles; i++) to[i] = (struct prefill_tile){.of = from[i], .parts = 1};
  qsort(to, (size_t)tiles, sizeof *to, longer_first);
  for (int i = tiles - 1; i >= 0 && parts > 1; i--) { /* from the last on, so that nothing is overwritten that is needed */
    const struct decode_tile whole = to[i].of;
    for (int part = 0; part < parts; part++) to[i * parts + part] = part_of(&whole, part, parts, i * parts);
  }
}
