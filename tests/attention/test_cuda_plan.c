/*
 * What a GPU's kernels are told to do, without a GPU: tiles and lists of pages against the reading rule, and the tables of
 * turning means against the angles they stand for.
 */
#include "support.h"

#include "attention/cuda/decode/line.h"
#include "attention/cuda/decode/rope_tables.h"
#include "attention/cuda/decode/value_map.h"
#include "attention/cuda/plan.h"
#include "attention/cuda/prefill.h"

#define KV_HEADS 3
#define D        64

struct fixture {
  oscar_context *context;
  oscar_codec_set *codecs;
  oscar_cache *cache;
  const struct cache_geometry *g;
};

static struct fixture open_fixture(bool coded, int sink, int recent) {
  struct fixture f = {.context = test_context(OSCAR_ISA_PORTABLE, 1)};
  const oscar_codec_set_info info = {1, KV_HEADS, D, "test", "", ""};
  const oscar_plain_options plain = {.rotate = true, .crumbs_per_channel = 1, .clip_keys = 1, .clip_values = 1};
  if (coded) assert_ok(f.context, oscar_codec_set_create_plain(f.context, &info, &plain, &f.codecs));
  oscar_cache_options options;
  oscar_cache_options_default(&options);
  options.layers = 1, options.kv_heads = KV_HEADS, options.head_dim = D;
  options.sink_pages = sink, options.recent_pages = recent;
  options.codecs = f.codecs;
  options.budget_bytes = (size_t)64 << 20;
  assert_ok(f.context, oscar_cache_create(f.context, &options, &f.cache));
  f.g = cache_geometry_of(f.cache);
  return f;
}

static void close_fixture(struct fixture *f) {
  oscar_cache_free(f->cache);
  oscar_codec_set_free(f->codecs);
  oscar_context_free(f->context);
}

/* n tokens of nothing in particular; `open` leaves the step open. */
static void feed(const struct fixture *f, oscar_sequence *s, int n, bool open) {
  uint64_t seed = 3;
  float *x = malloc(sizeof(float) * (size_t)(n * KV_HEADS * D));
  for (int i = 0; i < n * KV_HEADS * D; i++) x[i] = test_normal(&seed);
  assert_ok(f->context, oscar_sequence_begin(s, n));
  assert_ok(f->context, oscar_sequence_write(s, 0, x, x));
  if (!open) assert_ok(f->context, oscar_sequence_commit(s));
  free(x);
}

/* The form in which a query of page T has to read a page, by the rule; codes where an exact form is gone. */
static int32_t unit_by_rule(const struct fixture *f, const oscar_sequence *s, int64_t page, int64_t T, bool *coded) {
  const struct page_units units = sequence_page_units(s, 0, page);
  *coded = !(page < f->g->sink_pages || page + f->g->recent_pages >= T) || units.exact == NO_UNIT;
  if (units.coded == NO_UNIT) *coded = false;
  return *coded ? units.coded : units.exact;
}

static void check_plan(const struct fixture *f, int group, int most_rows, int window, const struct plan_job *jobs, int n_jobs) {
  const struct plan_bounds bound = plan_bound(group, most_rows, 0, jobs, n_jobs);
  struct decode_tile *tiles = malloc(bound.tiles * sizeof *tiles);
  struct decode_page *pages = malloc(bound.pages * sizeof *pages);
  const struct plan_result r = plan_fill(f->g, group, most_rows, 0, window, jobs, n_jobs, tiles, pages);
  assert_true((size_t)r.tiles <= bound.tiles && (size_t)r.pages <= bound.pages);
  int tile = 0, largest = 0;
  int64_t last_page = -1;
  bool any_coded = false;
  for (int j = 0; j < n_jobs; j++) {
    const int64_t end = sequence_visible(jobs[j].sequence, 0);
    int row = 0; /* of the page's queries */
    for (int64_t first = end - jobs[j].n; first < end; row = 0) {
      const int64_t T = first / 64, next = (T + 1) * 64 < end ? (T + 1) * 64 : end;
      const int rows = (int)(next - first) * group;
      for (; row < rows; tile++) { /* tiles of this page's queries, in order, without a gap */
        assert_true(tile < r.tiles);
        const struct decode_tile *t = &tiles[tile];
        assert_int_equal(t->first_row, row);
        assert_in_range(t->rows, 1, most_rows);
        assert_int_equal(t->position, first);
        assert_int_equal(t->token, jobs[j].token + (int)(first - (end - jobs[j].n)));
        /* every page that a row sees is in one list, in its form */
        const int64_t begin = window && first >= window ? (first - window + 1) / 64 : 0;
        int at[2] = {t->exact_first, t->coded_first};
        for (int64_t page = begin; page <= T; page++) {
          bool coded;
          const int32_t unit = unit_by_rule(f, jobs[j].sequence, page, T, &coded);
          any_coded = any_coded || coded;
          assert_int_equal(pages[at[coded]].unit, unit);
          assert_int_equal(pages[at[coded]].number, page);
          at[coded]++;
        }
        assert_int_equal(at[0], t->exact_first + t->exact_pages);
        assert_int_equal(at[1], t->coded_first + t->coded_pages);
        /* as many tiles of 16 tokens as hold all that is seen, and no more */
        const int64_t last = first + (row + t->rows - 1) / group;
        assert_int_equal(t->exact_tiles, (t->exact_pages - 1) * 4 + (int)(last % 64) / 16 + 1);
        row += t->rows;
        if (t->rows > largest) largest = t->rows;
      }
      assert_int_equal(row, rows);
      if (T > last_page) last_page = T;
      first = next;
    }
  }
  assert_int_equal(tile, r.tiles);
  assert_int_equal(largest, r.rows);
  assert_int_equal(last_page, r.last_page);
  assert_int_equal(any_coded, r.coded);
  free(tiles);
  free(pages);
}

static void plans_follow_the_reading_rule(void **state) {
  (void)state;
  uint64_t seed = 1;
  for (int round = 0; round < 60; round++) {
    struct fixture f = open_fixture(round % 5 != 0, round % 3, round % 4);
    oscar_sequence *s[3];
    struct plan_job jobs[3];
    int token = 5;
    for (int i = 0; i < 3; i++) {
      assert_ok(f.context, oscar_sequence_create(f.cache, &s[i]));
      const int before = (int)(test_random(&seed) % 900), n = 1 + (int)(test_random(&seed) % (round % 2 ? 9 : 200));
      if (before) feed(&f, s[i], before, false);
      if (round % 7 == 3 && before > 300) { /* pages that the rule wants exact are codes */
        int64_t resume;
        assert_ok(f.context, oscar_sequence_truncate(s[i], before - 200, OSCAR_REWIND_REFILL, &resume));
      }
      feed(&f, s[i], n, true);
      jobs[i] = (struct plan_job){.sequence = s[i], .n = n, .token = token};
      token += n + i;
    }
    for (int group = 1; group <= 16; group += 1 + group / 4)
      for (int most_rows = 4; most_rows <= 128; most_rows *= most_rows < 16 ? 2 : 8)
        check_plan(&f, group, most_rows, round % 4 == 1 ? 150 : 0, jobs, 3);
    close_fixture(&f);
  }
}

/* Tiles of 16 rows are for tiles that would else be two, and for work that is long enough for every block. */
static void wide_tiles_are_for_long_work(void **state) {
  (void)state;
  assert_false(line_wide_pays(0, 0, 132));
  for (int64_t pages = 1; pages < 1 << 24; pages *= 2) {
    assert_false(line_wide_pays(pages, pages, 132)); /* no more than eight rows anyhow */
    if (pages > 1) assert_true(line_wide_pays(pages, pages / 2, 132) >= line_wide_pays(pages / 2, pages / 4, 132));
  }
  assert_true(line_wide_pays(2 << 20, 1 << 20, 132));
  assert_false(line_wide_pays(2 << 10, 1 << 10, 132));
  struct fixture f = open_fixture(true, 1, 1);
  oscar_sequence *s;
  assert_ok(f.context, oscar_sequence_create(f.cache, &s));
  feed(&f, s, 3000, false);
  feed(&f, s, 4, true);
  const struct plan_job job = {.sequence = s, .n = 4};
  assert_int_equal(plan_rows(4, KV_HEADS, 1, 16, 0, 0, &job, 1), 16);
  assert_int_equal(plan_rows(4, KV_HEADS, 1, 8, 0, 0, &job, 1), 8);    /* there is no such kernel */
  assert_int_equal(plan_rows(2, KV_HEADS, 1, 16, 0, 0, &job, 1), 8);   /* eight rows */
  assert_int_equal(plan_rows(4, KV_HEADS, 132, 16, 0, 0, &job, 1), 8); /* too short for so many blocks */
  assert_int_equal(plan_rows(4, KV_HEADS, 1, 16, 0, 64, &job, 1), 8);  /* and where a window hides most of it */
  close_fixture(&f);
}

/* Before a step's rows are written, a plan that counts them as written is the one that is made afterwards. */
static void plans_can_be_made_ahead(void **state) {
  (void)state;
  enum { N = 4 };
  uint64_t seed = 7;
  float rows[N * KV_HEADS * D];
  for (int i = 0; i < N * KV_HEADS * D; i++) rows[i] = test_normal(&seed);
  for (int round = 0; round < 40; round++) {
    struct fixture f = open_fixture(round % 5 != 0, round % 3, round % 4);
    const int window = round % 4 == 1 ? 150 : 0;
    oscar_sequence *s[N];
    struct plan_job jobs[N];
    for (int i = 0; i < N; i++) {
      /* some steps begin a page, and so demote one */
      const int before = round % 2 ? 64 * (1 + (int)(test_random(&seed) % 9)) : 1 + (int)(test_random(&seed) % 600);
      assert_ok(f.context, oscar_sequence_create(f.cache, &s[i]));
      feed(&f, s[i], before, false);
      jobs[i] = (struct plan_job){.sequence = s[i], .n = 1, .token = i};
      assert_ok(f.context, oscar_sequence_begin(s[i], 1));
      assert_int_equal(sequence_visible(s[i], 0), -1);
      assert_int_equal(sequence_visible(s[i], EVERY_LAYER), before + 1);
    }
    const struct plan_bounds bound = plan_bound(8, 8, EVERY_LAYER, jobs, N);
    struct decode_tile *tiles[2];
    struct decode_page *pages[2];
    struct plan_result r[2];
    for (int written = 0; written < 2; written++) {
      tiles[written] = malloc(bound.tiles * sizeof **tiles);
      pages[written] = malloc(bound.pages * sizeof **pages);
      if (written) assert_ok(f.context, oscar_sequences_write(s, N, 0, rows, rows));
      r[written] = plan_fill(f.g, 8, 8, written ? 0 : EVERY_LAYER, window, jobs, N, tiles[written], pages[written]);
      /* what launches are made of is the same for all steps of so many sequences */
      assert_int_equal(r[written].tiles, N);
      assert_int_equal(r[written].rows, 8);
    }
    const struct plan_bounds after = plan_bound(8, 8, 0, jobs, N);
    assert_true(after.tiles == bound.tiles && after.pages == bound.pages);
    assert_memory_equal(&r[0], &r[1], sizeof r[0]);
    assert_memory_equal(tiles[0], tiles[1], (size_t)r[0].tiles * sizeof **tiles);
    assert_memory_equal(pages[0], pages[1], (size_t)r[0].pages * sizeof **pages);
    for (int i = 0; i < 2; i++) free(tiles[i]), free(pages[i]);
    close_fixture(&f);
  }
}

/* However a tile is cut along the line, every coded page and exact tile is in one piece, and pieces of the same length have about
 * the same work, or so many parts of it from its late units on. */
static void check_places(const struct decode_tile *t, uint32_t late_share) {
  const struct line_place none = line_place_of(t, late_share, 0), all = line_place_of(t, late_share, t->reading);
  assert_true(none.coded == 0 && none.exact == 0);
  assert_true(all.coded == t->coded_pages && all.exact == t->exact_tiles);
  const double work = (double)(t->coded_pages + EXACT_WEIGHT * t->exact_tiles), late = t->reading - t->late,
               of_late = late > 0 ? late_share / 0x1p31 : 0, of_unit = (work - late * of_late) / t->late;
  struct line_place before = none;
  for (int unit = 1; unit <= t->units; unit++) {
    const struct line_place place = line_place_of(t, late_share, unit);
    assert_true(place.coded >= before.coded && place.exact >= before.exact);
    assert_true(place.coded <= t->coded_pages && place.exact <= t->exact_tiles);
    before = place;
    if (unit > t->reading) continue;
    const double share = unit < t->late ? unit * of_unit : t->late * of_unit + (unit - t->late) * of_late;
    /* a page or a tile more or less than its share */
    assert_true(fabs(place.coded + EXACT_WEIGHT * place.exact - share) <= EXACT_WEIGHT);
    assert_true(fabs(place.exact - share * t->exact_tiles / work) <= 1.001);
  }
}

/* As many blocks as there are items begin late; those of them that have something have less of the last item than its others, and
 * these not more than blocks of other items, if blocks are left over. */
static void late_blocks_have_less(void **state) {
  (void)state;
  const struct { int heads, coded, late; } cases[] = {{8, 506, 8}, {4, 506, 4}, {8, 1594, 8}, {8, 122, 0}, {2, 4000, 2}};
  for (int i = 0; i < 5; i++) {
    struct decode_tile tile = {.coded_pages = cases[i].coded, .exact_tiles = 24};
    struct decode_line line;
    assert_true(line_lay(&tile, 1, cases[i].heads, 132, &line));
    const int stretch = line.length / 132, parts = line.last_reading / stretch;
    assert_int_equal(line.last_late, (parts - cases[i].late) * stretch);
    const double full = line.last_share / 0x1p31 * stretch, late = line.late_share / 0x1p31 * stretch;
    assert_true(fabs(full - late - (cases[i].late ? fmin(LATE_WORK, full / 2) : 0)) < 1);
    const int left = parts - tile.reading / stretch;
    assert_true(full <= stretch + (left > 0 ? 0.001 : (double)LATE_WORK * cases[i].late / parts + 0.001));
  }
}

/* Warps have equal shares of what a block has, in units of work but for one, and of tiles, in one piece each. */
static void warps_have_equal_shares(void **state) {
  (void)state;
  int equal = 0;
  for (int shares = 1; shares <= 12; shares++)
    for (int coded = 0; coded < 150; coded++)
      for (int exact = 0; exact < 60; exact++) {
        if (!shares_are_equal(coded, exact, shares)) continue;
        equal++;
        const int all = coded + EXACT_WEIGHT * exact;
        struct line_place before = before_share(coded, exact, 0, shares);
        assert_true(before.coded == 0 && before.exact == 0);
        for (int share = 0; share < shares; share++) {
          const struct line_place after = before_share(coded, exact, share + 1, shares);
          const int pages = after.coded - before.coded, tiles = after.exact - before.exact;
          assert_true(pages >= 0 && tiles >= exact / shares && tiles <= (exact + shares - 1) / shares);
          assert_in_range(pages + EXACT_WEIGHT * tiles, all / shares, (all + shares - 1) / shares);
          before = after;
        }
        assert_true(before.coded == coded && before.exact == exact);
      }
  assert_true(equal > 10000);
  assert_true(shares_are_equal(33, 1, 8) && !shares_are_equal(29, 1, 8) && !shares_are_equal(1, 29, 8));
}

/* Blocks' stretches follow each other, i U / N, and every unit is found in its own. */
static void check_blocks(const struct decode_line *line, int blocks, uint64_t *seed) {
  assert_int_equal(line->blocks, line->length < blocks ? line->length : blocks);
  for (int block = 0; block <= line->blocks; block++)
    assert_int_equal(begin_on_line(line, block), (int64_t)block * line->length / line->blocks);
  for (int block = 0; block < line->blocks; block++) {
    const int begin = begin_on_line(line, block), end = begin_on_line(line, block + 1);
    assert_int_equal(block_on_line(line, begin), block);
    assert_int_equal(block_on_line(line, begin + (int)(test_random(seed) % (uint64_t)(end - begin))), block);
    assert_int_equal(block_on_line(line, end - 1), block);
  }
}

static void lines_are_cut_where_items_end(void **state) {
  (void)state;
  uint64_t seed = 11;
  int together = 0, apart = 0;
  for (int round = 0; round < 400; round++) {
    enum { MOST = 300 };
    static struct decode_tile tiles[MOST];
    const int count = 1 + (int)(test_random(&seed) % (round % 3 == 0 ? MOST : 12)), heads = 1 + (int)(test_random(&seed) % 8);
    const int blocks = round % 2 ? 132 : 1 + (int)(test_random(&seed) % 200);
    const bool alike = round % 4 < 2;
    const int64_t most = round % 5 == 4 ? 20000 : 700;
    int64_t all = 0;
    for (int i = 0; i < count; i++) {
      tiles[i] = (struct decode_tile){.coded_pages = (int)(test_random(&seed) % (uint64_t)most),
                                      .exact_tiles = 1 + (int)(test_random(&seed) % 24)};
      if (round % 7 == 0) tiles[i].coded_pages = 0;
      if (alike && i > 0) tiles[i].coded_pages = tiles[0].coded_pages, tiles[i].exact_tiles = tiles[0].exact_tiles;
      all += (int64_t)(tiles[i].coded_pages + EXACT_WEIGHT * tiles[i].exact_tiles) * heads;
    }
    struct decode_line line;
    assert_true(line_lay(tiles, count, heads, blocks, &line));
    assert_true(line.length >= line.units);
    check_blocks(&line, blocks, &seed);
    int64_t begin = 0;
    for (int i = 0; i < count; i++) { /* no gap, and units for all that is read */
      assert_int_equal(tiles[i].begin, begin);
      assert_in_range(tiles[i].reading, tiles[i].coded_pages + EXACT_WEIGHT * tiles[i].exact_tiles, tiles[i].units);
      if (i % 16 == 0) check_places(&tiles[i], line.late_share);
      begin += (int64_t)tiles[i].units * heads;
    }
    /* the last item may be longer */
    struct decode_tile last = tiles[count - 1];
    assert_int_equal(line.units - begin, line.last_reading - last.reading);
    last.units += line.last_reading - last.reading;
    last.reading = line.last_reading, last.work_share = line.last_share, last.late = line.last_late;
    check_places(&last, line.late_share);
    if (line.length % blocks != 0 || line.length == line.units + LATE_WEIGHT) {
      apart++;
      continue;
    }
    together++;
    const int stretch = line.length / blocks;
    assert_true(stretch <= all / blocks + 1 + MOST_LONGER);
    for (int i = 0; i < count; i++) assert_true(tiles[i].units % stretch == 0 || stretch % tiles[i].units == 0);
  }
  assert_true(together > 50 && apart > 50);
  /* what a GPU of 132 multiprocessors has to do for sequences of one length: 16 blocks an item, 2, and half of one */
  const struct { int tiles, coded, stretches, items; } cases[] = {{1, 507, 16, 1}, {8, 1594, 2, 1}, {32, 507, 1, 2}};
  for (int i = 0; i < 3; i++) {
    struct decode_tile tiles[32];
    struct decode_line line;
    for (int k = 0; k < cases[i].tiles; k++) tiles[k] = (struct decode_tile){.coded_pages = cases[i].coded, .exact_tiles = 24};
    assert_true(line_lay(tiles, cases[i].tiles, 8, 132, &line));
    assert_int_equal(line.length % 132, 0);
    assert_int_equal(tiles[0].units * cases[i].items, line.length / 132 * cases[i].stretches);
  }
  struct decode_tile too_long = {.coded_pages = 1 << 30, .exact_tiles = 1};
  struct decode_line line;
  assert_false(line_lay(&too_long, 1, 8, 132, &line));
}

/* The parts of a tile read its pages once each, in order, and are numbered through; longer tiles come first. */
static void cut_tiles_share_their_pages(void **state) {
  (void)state;
  uint64_t seed = 5;
  for (int round = 0; round < 200; round++) {
    enum { TILES = 7, MOST = TILES * PREFILL_MOST_PARTS };
    struct decode_tile tiles[TILES];
    struct prefill_tile cut[MOST];
    const int parts = 1 + (int)(test_random(&seed) % PREFILL_MOST_PARTS);
    for (int i = 0; i < TILES; i++)
      tiles[i] = (struct decode_tile){.token = i,
                                      .exact_first = 1000 * i,
                                      .exact_pages = 1 + (int)(test_random(&seed) % 7),
                                      .coded_first = 1000 * i + 500,
                                      .coded_pages = (int)(test_random(&seed) % 90)};
    plan_cut(TILES, parts, tiles, cut);
    int seen = 0, before = INT32_MAX;
    for (int i = 0; i < TILES; i++) {
      const struct decode_tile *whole = &tiles[cut[i * parts].of.token];
      int coded = whole->coded_first, exact = whole->exact_first;
      for (int part = 0; part < parts; part++) {
        const struct prefill_tile *t = &cut[i * parts + part];
        assert_int_equal(t->of.token, whole->token);
        assert_int_equal(t->part, part);
        assert_int_equal(t->parts, parts);
        if (parts > 1) assert_int_equal(t->first, i * parts);
        if (t->of.coded_pages > 0) assert_int_equal(t->of.coded_first, coded);
        if (t->of.exact_pages > 0) assert_int_equal(t->of.exact_first, exact);
        if (t->of.exact_pages > 0) assert_int_equal(coded + t->of.coded_pages, whole->coded_first + whole->coded_pages);
        coded += t->of.coded_pages, exact += t->of.exact_pages;
      }
      assert_int_equal(coded, whole->coded_first + whole->coded_pages);
      assert_int_equal(exact, whole->exact_first + whole->exact_pages);
      assert_true(whole->coded_pages + whole->exact_pages <= before);
      before = whole->coded_pages + whole->exact_pages;
      seen |= 1 << whole->token;
    }
    assert_int_equal(seen, (1 << TILES) - 1);
  }
  /* one tile on many blocks is cut, many tiles are not, nor is a short one */
  assert_in_range(plan_parts(1, 8, 1600, 132), 12, 17);
  assert_int_equal(plan_parts(1000, 8, 1600, 132), 1);
  assert_int_equal(plan_parts(1, 1, 3, 132), 1);
  assert_true(plan_parts(1, 1, 100000, 132) <= PREFILL_MOST_PARTS);
}

static float half_of(uint32_t word, int which) { return f16_to_f32((uint16_t)(which ? word >> 16 : word & 0xFFFF)); }

/* The even or odd curve of an input at a token of the second half of a page, the half that tables have. */
static double curve_element(const uint32_t *curves, int input, int odd, int token) {
  const int k = input % 16, row = token % 16, lane = row % 8 * 4 + k % 8 / 2;
  const uint32_t *at = curves + (((input / 16 * 2 + odd) * 2 + (token - 32) / 16) * 2 * 32 + lane) * 4 + row / 8 + k / 8 * 2;
  return (double)half_of(at[0], k % 2) + (double)half_of(at[128], k % 2);
}

/* Pairs with curves of their own: any few of the rope's, and none after them. */
static void own_curves_turn_means(void **state) {
  (void)state;
  oscar_context *context = test_context(OSCAR_ISA_PORTABLE, 1);
  for (int d = 32; d <= 256; d += 32) {
    float frequencies[128];
    uint16_t numbers[OWN_CURVES_PAIRS];
    const int count = d / 2 - 3 < OWN_CURVES_PAIRS ? d / 2 - 3 : OWN_CURVES_PAIRS - d / 32;
    for (int i = 0; i < d / 2; i++) frequencies[i] = (float)pow(d % 64 ? 1e4 : 1e6, -2.0 * i / d);
    for (int i = 0; i < count; i++) numbers[i] = (uint16_t)(2 + i * (d / 2 - 3) / count);
    oscar_rope *rope;
    assert_ok(context, oscar_rope_create(context, &(oscar_rope_spec){OSCAR_ROPE_HALVES, d, frequencies}, &rope));
    const oscar_codec_spec keys = {.rope = rope, .rotating_pairs = count, .rotating_pair = numbers};
    assert_true(has_own_curves(&keys));
    const int pairs = own_curves_pairs(&keys);
    assert_true(pairs % CURVE_STEP == 0 && pairs >= count && pairs < count + CURVE_STEP);
    uint16_t *of = malloc((size_t)pairs * sizeof *of);
    uint32_t *curves = malloc(own_curves_bytes(&keys));
    own_curves_fill(&keys, of, curves);
    for (int k = 0; k < pairs; k++) {
      assert_int_equal(of[k], k < count ? numbers[k] : 0);
      for (int token = 0; token < 64; token++) {
        const int mirrored = token < 32 ? 63 - token : token;
        const double angle = k < count ? (double)frequencies[of[k]] * (token - 31.5) : 0;
        const double cosine = k < count ? cos(angle) : 0, sine = k < count ? sin(angle) : 0;
        assert_true(fabs(curve_element(curves, k, 0, mirrored) - cosine) < 1e-6);
        assert_true(fabs((token < 32 ? -1 : 1) * curve_element(curves, k, 1, mirrored) - sine) < 1e-6);
      }
    }
    free(of), free(curves);
    oscar_rope_release(rope);
  }
  oscar_context_free(context);
}

/* Operands multiplied out: curves (as weights of one pair) times angles give the turned mean of each token. */
static void tables_turn_means(void **state) {
  (void)state;
  oscar_context *context = test_context(OSCAR_ISA_PORTABLE, 1);
  for (int d = 32; d <= 256; d += 32) {
    float frequencies[128];
    for (int i = 0; i < d / 2; i++) frequencies[i] = (float)pow(d % 64 ? 1e4 : 1e6, -2.0 * i / d);
    oscar_rope *rope;
    assert_ok(context, oscar_rope_create(context, &(oscar_rope_spec){OSCAR_ROPE_HALVES, d, frequencies}, &rope));
    oscar_status status;
    const struct rope_table_sizes sizes = rope_table_sizes_of(context, rope, &status);
    assert_int_equal(status, OSCAR_OK);
    assert_int_equal(sizes.pairs % 8, 0);
    assert_int_equal(sizes.curve_words, sizes.steps * CURVE_STEP_BYTES);
    float *series = malloc(sizes.series), *turns = malloc(sizes.turns);
    uint32_t *curves = malloc(sizes.curve_words), *angles = malloc(sizes.angles);
    assert_ok(context, rope_tables_fill(context, rope, &sizes, series, curves));
    const int64_t page = 977;
    rope_angles_fill(rope, &sizes, page, 1, angles, turns);
    double worst = 0;
    for (int pair = 0; pair < d / 2; pair++)
      for (int token = 0; token < 64; token++) {
        /* (a, b) = (1, 0): a_k cos(t w) + b_k sin(t w) */
        const uint32_t *word = angles + (pair / 8 * 4 + pair % 4) * 4 + pair % 8 / 4 * 2;
        const double cosine = half_of(word[0], 0) + half_of(word[1], 0), sine = half_of(word[0], 1) + half_of(word[1], 1);
        double sum = 0;
        const int mirrored = token < 32 ? 63 - token : token;
        for (int input = 0; input < 16 * sizes.steps; input++)
          for (int odd = 0; odd < 2; odd++) {
            double weight = 0;
            if (input < 8)
              weight = series[pair * 16 + 8 * odd + input] * (odd ? -sine : cosine);
            else if (pair < sizes.fast && input == 8 + pair)
              weight = odd ? -turns[2 * pair + 1] : turns[2 * pair];
            sum += (odd && token < 32 ? -1 : 1) * weight * curve_element(curves, input, odd, mirrored);
          }
        const double error = fabs(sum - cos((double)frequencies[pair] * (double)(page * 64 + token)));
        if (error > worst) worst = error;
      }
    assert_true(worst < 1e-5);
    free(series), free(turns), free(curves), free(angles);
    oscar_rope_release(rope);
  }
  oscar_context_free(context);
}

/* A number of a map and what fp16 lost of it, in operands of 64 rows: eight rows are 1024 bytes, and a row's 16-byte pieces lie
 * in an order that depends on the row (PTX ISA, "128-byte swizzle mode"). */
static double map_element(const uint8_t *map, int columns, int row, int column) {
  const size_t operand = (size_t)((columns + 63) / 64) * 8192;
  const uint8_t *at = map + (size_t)(row / 64) * 2 * operand + (size_t)(column / 64) * 8192 + (size_t)(row % 64 / 8) * 1024 +
                      (size_t)(row % 8) * 128 + (size_t)((column % 64 / 8 ^ row % 8) * 16 + column % 8 * 2);
  uint16_t value, rest;
  memcpy(&value, at, 2);
  memcpy(&rest, at + operand, 2);
  return (double)f16_to_f32(value) + (double)f16_to_f32(rest);
}

/* What runs bring to the places of a head: the pair of each. Places are filled once, in order, and a pair's pieces lie as those
 * of its place. */
static void find_places(const struct wave_run *run, int places, int wave_pairs, int *pair) {
  int place = 0;
  for (int i = 0; i < places; i++) {
    if (run[i].pairs > 0) assert_int_equal(run[i].to, place);
    for (int k = 0; k < run[i].pairs; k++, place++) {
      assert_in_range(place, 0, places - 1);
      pair[place] = run[i].from % wave_pairs + k;
      assert_in_range(pair[place], place == 0 ? 0 : pair[place - 1] + 1, wave_pairs - 1);
      assert_in_range(run[i].from / wave_pairs, 0, PREFILL_SHIFTS - 1);
      assert_int_equal((pair[place] + run[i].from / wave_pairs) % 4, place % 4);
    }
  }
  assert_int_equal(place, places);
}

/* Runs of many lists, of some of a rope's pairs and of all; no run could be longer. */
static void runs_bring_what_turns(void **state) {
  (void)state;
  oscar_context *context = test_context(OSCAR_ISA_PORTABLE, 1);
  uint64_t seed = 3;
  float frequencies[D / 2], zeros[D * D] = {0}, steps[D], rotating[D];
  uint8_t n[D];
  oscar_rope *rope;
  memset(n, 1, sizeof n);
  for (int i = 0; i < D; i++) steps[i] = rotating[i] = 1;
  for (int i = 0; i < D / 2; i++) frequencies[i] = (float)pow(1e5, -2.0 * i / D);
  assert_ok(context, oscar_rope_create(context, &(oscar_rope_spec){OSCAR_ROPE_HALVES, D, frequencies}, &rope));
  for (int count = 1; count <= D / 2; count++) {
    uint16_t pair[D / 2];
    for (int p = 0, taken = 0; p < D / 2; p++)
      if (test_uniform(&seed) * (D / 2 - p) < count - taken) pair[taken++] = (uint16_t)p;
    const oscar_codec_spec spec = {.head_dim = D,
                                   .channels = D,
                                   .form = OSCAR_ROW_GAIN,
                                   .groups = 1,
                                   .clip_ratio = 1,
                                   .crumbs = n,
                                   .steps = steps,
                                   .mean = zeros,
                                   .encode = zeros,
                                   .decode = zeros,
                                   .rope = rope,
                                   .rotating_pairs = count,
                                   .rotating_pair = pair,
                                   .rotating_mean = rotating};
    oscar_codec *codec;
    assert_ok(context, oscar_codec_create(context, &spec, &codec));
    const oscar_codec *codecs[1] = {codec};
    const struct prefill_table_sizes sizes = prefill_table_sizes_of(1, codecs, codecs);
    const int places = (count + 7) / 8 * 8;
    assert_int_equal(sizes.turning_pairs, places);
    uint8_t *memory = malloc(prefill_table_bytes(&sizes));
    prefill_tables_fill(1, codecs, codecs, D / 2, memory);
    const struct wave_run *run = prefill_tables_at(&sizes, memory).runs;
    int of[D / 2] = {0}, found = 0;
    find_places(run, places, D / 2, of);
    for (int k = 0; k < places; k++) found += found < count && of[k] == pair[found];
    assert_int_equal(found, count);
    for (int i = 1; i < places && run[i].pairs > 0; i++)
      assert_true(run[i].from % (D / 2) > run[i - 1].from % (D / 2) + run[i - 1].pairs);
    if (count == D / 2) assert_int_equal(run[0].pairs, D / 2);
    free(memory);
    oscar_codec_release(codec);
  }
  oscar_rope_release(rope);
  oscar_context_free(context);
}

/* The tables that prompts need, against the map of a codec and the angles of its mean, for every number of crumbs. */
static void prefill_tables_hold_maps(void **state) {
  (void)state;
  oscar_context *context = test_context(OSCAR_ISA_PORTABLE, 1);
  uint64_t seed = 11;
  for (int crumbs = 16; crumbs <= 128; crumbs += 16) {
    enum { PAIRS = 11, TURNING = 16 }; /* whole steps */
    uint8_t n[D];
    static const uint16_t pair[PAIRS] = {1, 2, 3, 5, 8, 9, 14, 15, 20, 29, 31};
    float steps[D], mean[D], rotating[2 * PAIRS], matrix[D * D], frequencies[D / 2];
    for (int i = 0; i < D; i++) n[i] = (uint8_t)(crumbs <= D ? i < crumbs : 1 + (i % 8 < (crumbs - D) / 8));
    for (int i = 0; i < D; i++) steps[i] = .5f + (float)test_uniform(&seed), mean[i] = test_normal(&seed);
    for (int i = 0; i < D * D; i++) matrix[i] = .01f * test_normal(&seed);
    for (int i = 0; i < D / 2; i++) frequencies[i] = (float)pow(1e5, -2.0 * i / D);
    for (int i = 0; i < PAIRS; i++) rotating[2 * i] = test_normal(&seed), rotating[2 * i + 1] = 1;
    oscar_rope *rope;
    assert_ok(context, oscar_rope_create(context, &(oscar_rope_spec){OSCAR_ROPE_HALVES, D, frequencies}, &rope));
    const oscar_codec_spec spec = {.head_dim = D,
                                   .channels = D,
                                   .form = OSCAR_ROW_GAIN,
                                   .groups = 1,
                                   .clip_ratio = 1,
                                   .crumbs = n,
                                   .steps = steps,
                                   .mean = mean,
                                   .encode = matrix,
                                   .decode = matrix,
                                   .rope = rope,
                                   .rotating_pairs = PAIRS,
                                   .rotating_pair = pair,
                                   .rotating_mean = rotating};
    oscar_codec *codec;
    assert_ok(context, oscar_codec_create(context, &spec, &codec));
    const oscar_codec *codecs[2] = {codec, codec};
    const struct prefill_table_sizes sizes = prefill_table_sizes_of(2, codecs, codecs);
    assert_int_equal(sizes.turning_pairs, TURNING);
    assert_int_equal(sizes.key_columns, crumbs + 2 * TURNING);
    uint8_t *memory = malloc(prefill_table_bytes(&sizes));
    prefill_tables_fill(2, codecs, codecs, D / 2, memory);
    const struct prefill_tables tables = prefill_tables_at(&sizes, memory);
    /* of the second head */
    const uint8_t *keys = (const uint8_t *)tables.keys + sizes.keys / 2,
                  *values = (const uint8_t *)tables.values + sizes.values / 2;
    const float *scales = tables.scales + 2, *key_means = tables.key_means + D, *value_means = tables.value_means + D;
    bool taken[D * 2 + 32] = {false};
    for (int c = 0; c < crumbs; c++) {
      const int column = prefill_key_column(crumbs / 16, c);
      assert_in_range(column, 0, crumbs - 1);
      assert_false(taken[column]);
      taken[column] = true;
      for (int i = 0; i < D; i++) {
        const double expected = (double)codec->map[c * D + i];
        assert_true(fabs(map_element(keys, D, column, i) * (double)scales[0] - expected) < 1e-6 * (double)scales[0]);
        assert_true(fabs(map_element(values, D, c, i) * (double)scales[1] - expected) < 1e-6 * (double)scales[1]);
      }
    }
    for (int i = 0; i < D; i++) {
      assert_true(fabs((double)key_means[i] - (double)mean[i]) < 1e-6);
      assert_true(value_means[i] == codec->map[(crumbs + 1) * D + i]);
    }
    for (int row = sizes.key_columns; row < (sizes.key_columns + 63) / 64 * 64; row++) /* queries have zeros there */
      for (int i = 0; i < D; i++) assert_true(map_element(keys, D, row, i) == 0);
    int places[TURNING];
    find_places(tables.runs + TURNING, TURNING, D / 2, places);
    bool turns[D / 2] = {false};
    for (int k = 0; k < TURNING; k++) {
      int of = 0;
      while (of < PAIRS && pair[of] != places[k]) of++;
      if (of < PAIRS) turns[places[k]] = true;
      for (int i = 0; i < D; i++)
        for (int part = 0; part < 2; part++) {
          const double amplitude = map_element(keys, D, crumbs + 2 * k + part, i) * (double)scales[0];
          const double expected = of < PAIRS ? (double)codec->map[(crumbs + 2 + of + part * PAIRS) * D + i] : 0;
          assert_true(fabs(amplitude - expected) < 1e-5);
        }
    }
    for (int i = 0; i < PAIRS; i++) assert_true(turns[pair[i]]);
    free(memory);
    oscar_codec_release(codec);
    oscar_rope_release(rope);
  }
  oscar_context_free(context);
}

/* Products with the operands of the map of values are those with the map, whatever its groups. */
static void value_maps_bring_sums_back(void **state) {
  (void)state;
  uint64_t seed = 3;
  const struct { int head_dim, crumbs, groups; } cases[] = {{64, 16, 1}, {64, 64, 4}, {96, 80, 2}, {128, 128, 4}, {128, 512, 1}};
  for (int i = 0; i < 5; i++) {
    const int d = cases[i].head_dim, crumbs = cases[i].crumbs, groups = cases[i].groups, steps = value_map_steps(crumbs);
    const int rows = crumbs + groups + 1;
    float *map = malloc((size_t)(rows * d) * sizeof *map), *inputs = calloc((size_t)steps * 16, sizeof *inputs);
    uint32_t *words = malloc((size_t)value_map_words(d, crumbs) * sizeof *words);
    for (int k = 0; k < rows * d; k++) map[k] = ldexpf(test_normal(&seed), (int)(test_random(&seed) % 8) - 4);
    for (int k = 0; k < crumbs; k++) inputs[k] = test_normal(&seed);
    for (int k = 0; k < VALUE_MAP_GROUPS + 1; k++) inputs[crumbs + k] = test_normal(&seed); /* some are nobody's */
    value_map_fill(map, d, crumbs, groups, words);
    for (int channel = 0; channel < d; channel++) {
      double expected = 0, size = 0, sum = 0;
      for (int row = 0; row < rows; row++) {
        const int input = row == rows - 1 ? crumbs + VALUE_MAP_GROUPS : row;
        expected += (double)map[row * d + channel] * (double)inputs[input];
        size += fabs((double)map[row * d + channel] * (double)inputs[input]);
      }
      for (int input = 0; input < steps * 16; input++) {
        const int step = input / 16, lane = channel % 8 * 4 + input % 16 / 4, word = channel % 16 / 8 + input % 4 / 2 * 2;
        const uint32_t *of = words + ((size_t)(channel / 16 * steps + step) * 2 * 32 + (size_t)lane) * 4 + word;
        for (int part = 0; part < 2; part++)
          sum += (double)bf16_to_f32((uint16_t)(of[part * 128] >> 16 * (input % 2))) * (double)inputs[input];
      }
      assert_true(fabs(sum - expected) <= size * 0x1p-17);
    }
    free(map), free(inputs), free(words);
  }
}

/* Columns of tokens are a permutation under which the words of values (quant/device_form.h) hold eight neighbours. */
static void token_columns_are_those_of_values(void **state) {
  (void)state;
  for (int token = 0; token < 64; token++) {
    const int column = prefill_token_column(token);
    const struct crumb_place place = place_of_value_crumb(token, 3);
    assert_int_equal(place.word % 64, (3 * 4 + column / 16) * 2 + column % 16 / 8);
    assert_int_equal(place.shift, column % 8 / 2 * 4 + column % 2 * 16);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(plans_follow_the_reading_rule),
      cmocka_unit_test(wide_tiles_are_for_long_work),
      cmocka_unit_test(plans_can_be_made_ahead),
      cmocka_unit_test(lines_are_cut_where_items_end),
      cmocka_unit_test(late_blocks_have_less),
      cmocka_unit_test(warps_have_equal_shares),
      cmocka_unit_test(cut_tiles_share_their_pages),
      cmocka_unit_test(tables_turn_means),
      cmocka_unit_test(own_curves_turn_means),
      cmocka_unit_test(prefill_tables_hold_maps),
      cmocka_unit_test(runs_bring_what_turns),
      cmocka_unit_test(value_maps_bring_sums_back),
      cmocka_unit_test(token_columns_are_those_of_values),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
