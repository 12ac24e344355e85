/*
 * coders.c - the block that encoding on a GPU reads (quant/cuda/coders.h).
 *
 * One walk over the set's places lays it out; without memory it only counts. First the table of places, then each codec's arrays
 * where it stands first, last the coders that point to them.
 */
#include "quant/cuda/coders.h"

#include "quant/codec.h"

#include <string.h>

struct block {
  uint8_t *memory; /* NULL: count only */
  uintptr_t address;
  size_t bytes;
};

/* Room for an array, with its contents if `from` is not NULL. The address where it is read. */
static uintptr_t put(struct block *b, const void *from, size_t bytes) {
  size_t at = b->bytes;
  b->bytes += round_up(bytes, 64);
  if (b->memory && from) memcpy(b->memory + at, from, bytes);
  return b->address + at;
}

/* Where `put` has just left room of `bytes`; NULL when only counting. */
static void *last_put(const struct block *b, size_t bytes) {
  return b->memory ? b->memory + b->bytes - round_up(bytes, 64) : NULL;
}

static uintptr_t put_encode(struct block *b, const oscar_codec *codec, size_t columns) {
  const size_t d = (size_t)codec->spec.head_dim, m = (size_t)codec->spec.channels, bytes = d * columns * sizeof(float);
  uintptr_t address = put(b, NULL, bytes);
  float *to = last_put(b, bytes);
  for (size_t k = 0; to && k < d; k++, to += columns) {
    memcpy(to, codec->spec.encode + k * m, m * sizeof(float));
    memset(to + m, 0, (columns - m) * sizeof(float));
  }
  return address;
}

static uintptr_t put_channels(struct block *b, const oscar_codec *codec) {
  const size_t bytes = (size_t)codec->spec.channels * sizeof(struct coder_channel);
  uintptr_t address = put(b, NULL, bytes);
  struct coder_channel *to = last_put(b, bytes);
  for (int i = 0; to && i < codec->spec.channels; i++)
    to[i] = (struct coder_channel){codec->spec.steps[i],   codec->inverse_steps[i], codec->weights[i],
                                   codec->outer_levels[i], codec->levels[i],        codec->inverse_sigma[i]};
  return address;
}

static uintptr_t put_crumb_sources(struct block *b, const oscar_codec *codec) {
  const size_t bytes = (size_t)codec->crumbs * sizeof(uint16_t);
  uintptr_t address = put(b, NULL, bytes);
  uint16_t *to = last_put(b, bytes);
  for (int i = 0; to && i < codec->spec.channels; i++)
    for (int j = 0; j < codec->spec.crumbs[i]; j++) *to++ = (uint16_t)(4 * i + j);
  return address;
}

static void put_rope(struct block *b, const oscar_rope *rope, struct coder *c) {
  const size_t pairs = (size_t)rope->spec.rotary_dim / 2;
  c->rope_pairs = (int)pairs;
  c->rope_table = (const float *)put(b, rope->table, pairs * 2 * PAGE_TOKENS * sizeof(float));
  c->rope_pages = (const double *)put(b, rope->pages, pairs * 2 * ROPE_PAGE_BITS * sizeof(double));
  c->rope_centres = (const double *)put(b, rope->centres, pairs * 2 * sizeof(double));
}

/* As rows_body.h clips: in float, so that decimal ratios keep their meaning. */
static int clip_rank(const oscar_codec_spec *spec) {
  const int rank = (int)(spec->clip_ratio * (float)spec->channels), last = spec->channels - 1;
  return spec->form == OSCAR_ROW_SCALE_ZERO && rank < last ? rank : last;
}

/* All of a codec but its rope. */
static struct coder put_codec(struct block *b, const oscar_codec *codec) {
  const oscar_codec_spec *spec = &codec->spec;
  const size_t columns = round_up((size_t)spec->channels, CODER_COLUMNS), rotating = (size_t)spec->rotating_pairs;
  struct coder c = {.head_dim = spec->head_dim,
                    .channels = spec->channels,
                    .columns = (int)columns,
                    .groups = spec->groups,
                    .crumbs = codec->crumbs,
                    .rotating_pairs = spec->rotating_pairs,
                    .form = spec->form,
                    .clip_rank = clip_rank(spec)};
  c.encode = (const float *)put_encode(b, codec, columns);
  c.mean = (const float *)put(b, spec->mean, (size_t)spec->head_dim * sizeof(float));
  c.channel = (const struct coder_channel *)put_channels(b, codec);
  c.group_channel = (const int *)put(b, codec->group_channel, ((size_t)spec->groups + 1) * sizeof(int));
  c.crumb_source = (const uint16_t *)put_crumb_sources(b, codec);
  c.rotating_channel = (const int *)put(b, codec->rotating_channel, rotating * 2 * sizeof(int));
  c.rotating_pair = (const uint16_t *)put(b, spec->rotating_pair, rotating * sizeof(uint16_t));
  c.rotating_mean = (const float *)put(b, spec->rotating_mean, rotating * 2 * sizeof(float));
  return c;
}

static size_t place_count(const oscar_codec_set *set) {
  const oscar_codec_set_info *info = oscar_codec_set_describe(set);
  return (size_t)info->layers * (size_t)info->kv_heads * 2;
}

static const oscar_codec *codec_at(const oscar_codec_set *set, size_t place) {
  const size_t heads = (size_t)oscar_codec_set_describe(set)->kv_heads;
  return oscar_codec_set_get(set, (int)(place / 2 / heads), (int)(place / 2 % heads), (oscar_side)(place % 2));
}

/* The first place of the same codec, and the first whose codec has the same rope. Quadratic: a model has some hundred places. */
static size_t first_with_codec(const oscar_codec_set *set, size_t place) {
  size_t first = 0;
  while (codec_at(set, first) != codec_at(set, place)) first++;
  return first;
}

static size_t first_with_rope(const oscar_codec_set *set, size_t place) {
  size_t first = 0;
  while (codec_at(set, first)->spec.rope != codec_at(set, place)->spec.rope) first++;
  return first;
}

static size_t coder_count(const oscar_codec_set *set) {
  size_t count = 0, places = place_count(set);
  for (size_t i = 0; i < places; i++) count += first_with_codec(set, i) == i;
  return count;
}

static struct coders lay_out(const oscar_codec_set *set, struct block *b) {
  const size_t places = place_count(set), place_bytes = places * sizeof(int32_t);
  const size_t coder_bytes = coder_count(set) * sizeof(struct coder);
  struct coders out;
  out.place = (const int32_t *)put(b, NULL, place_bytes);
  int32_t *place = last_put(b, place_bytes), count = 0;
  out.coder = (const struct coder *)put(b, NULL, coder_bytes);
  struct coder *coder = last_put(b, coder_bytes), made;
  const float *gains = (const float *)put(b, log_gain_table, sizeof log_gain_table);
  const float *inverse_gains = (const float *)put(b, inverse_log_gain_table, sizeof inverse_log_gain_table);
  for (size_t i = 0; i < places; i++) {
    const size_t first = first_with_codec(set, i);
    if (first != i) {
      if (place) place[i] = place[first];
      continue;
    }
    const oscar_codec *codec = codec_at(set, i);
    made = put_codec(b, codec);
    made.gains = gains;
    made.inverse_gains = inverse_gains;
    const size_t rope = codec->spec.rope ? first_with_rope(set, i) : i;
    if (codec->spec.rope && rope == i) {
      put_rope(b, codec->spec.rope, &made);
    } else if (codec->spec.rope && coder) {
      const struct coder *with = &coder[place[rope]];
      made.rope_pairs = with->rope_pairs;
      made.rope_table = with->rope_table;
      made.rope_pages = with->rope_pages;
      made.rope_centres = with->rope_centres;
    }
    if (place) place[i] = count, coder[count] = made;
    count++;
  }
  return out;
}

size_t coders_bytes(const oscar_codec_set *set) {
  struct block b = {0};
  lay_out(set, &b);
  return b.bytes;
}

struct coders coders_fill(const oscar_codec_set *set, void *block, uintptr_t address) {
  return lay_out(set, &(struct block){block, address, 0});
}
