/* line.c - how long tiles are on the line of work (line.h). */
#include "attention/cuda/decode/line.h"

static int64_t work_of(const struct decode_tile *tile) {
  return (int64_t)tile->coded_pages + (int64_t)EXACT_WEIGHT * tile->exact_tiles;
}

/* Blocks that are needed where none has more than `most` units of work, and each has something of one item only. */
static int64_t blocks_needed(const struct decode_tile *tiles, int count, int kv_heads, int64_t most) {
  int64_t blocks = 0;
  for (int i = 0; i < count; i++) blocks += (work_of(&tiles[i]) + most - 1) / most;
  return blocks * kv_heads;
}

/* The least work of a stretch, at least `least`, with which each item is a whole number of them. */
static int64_t least_stretch(const struct decode_tile *tiles, int count, int kv_heads, int blocks, int64_t least,
                             int64_t longest) {
  int64_t low = least, high = longest;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (blocks_needed(tiles, count, kv_heads, middle) <= blocks)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

/* decode_tile.work_share, where so many units have the work of a KV head. */
static uint32_t work_share(const struct decode_tile *tile, int64_t reading) {
  return (uint32_t)((work_of(tile) << 31) / reading);
}

/* reading: units of the line that have the work of a KV head, of `units`. */
static void lay_tile(struct decode_tile *tile, int64_t begin, int64_t reading, int64_t units) {
  tile->begin = (int32_t)begin;
  tile->reading = (int32_t)reading;
  tile->units = (int32_t)units;
  tile->work_share = work_share(tile, reading);
  tile->exact_share = (uint32_t)(((int64_t)tile->exact_tiles << 32) / work_of(tile));
  tile->late = tile->reading;
}

/* Shares of the last item, of which so many blocks have a stretch each, and the last `late` of them begin late. */
static void lay_last(const struct decode_tile *tile, int64_t stretch, int64_t blocks, int64_t late, struct decode_line *line) {
  const int64_t work = work_of(tile), half = work / (2 * blocks - late), less = half < LATE_WORK ? half : LATE_WORK;
  line->last_share = (uint32_t)(((work + late * less) << 31) / (blocks * stretch));
  line->last_late = (int32_t)((blocks - late) * stretch);
  line->late_share = line->last_share - (uint32_t)((less << 31) / stretch);
}

bool line_lay(struct decode_tile *tiles, int count, int kv_heads, int blocks, struct decode_line *line) {
  int64_t all = 0, longest = 1;
  for (int i = 0; i < count; i++) {
    const int64_t work = work_of(&tiles[i]);
    all += work * kv_heads;
    if (work > longest) longest = work;
  }
  const int64_t items = (int64_t)count * kv_heads, mean = (all + blocks - 1) / blocks,
                items_each = items > blocks ? (items + blocks - 1) / blocks : 1;
  const int64_t least = longest >= LEAST_PARTS * LEAST_STRETCH && mean < LEAST_STRETCH ? LEAST_STRETCH : mean > 0 ? mean : 1;
  const int64_t stretch = items > blocks ? items_each * longest : least_stretch(tiles, count, kv_heads, blocks, least, longest);
  const bool ends_together = items > 0 && stretch <= mean + MOST_LONGER;
  if (all + items * ITEM_WEIGHT > INT32_MAX / 2 || stretch > INT32_MAX / 2 / blocks) return false;
  int64_t begin = 0;
  for (int i = 0; i < count; i++) {
    const int64_t work = work_of(&tiles[i]);
    int64_t reading = work, units = work + ITEM_WEIGHT;
    if (ends_together) units = reading = items > blocks ? longest : (work + stretch - 1) / stretch * stretch;
    lay_tile(&tiles[i], begin, reading, units);
    begin += units * kv_heads;
  }
  *line = (struct decode_line){.units = (int32_t)begin, .length = (int32_t)(begin + LATE_WEIGHT)};
  if (ends_together) line->length = (int32_t)(stretch * blocks);
  line->blocks = line->length < blocks ? line->length : blocks;
  line->stretch = line->length / line->blocks, line->over = line->length % line->blocks;
  if (count == 0) return true;
  const struct decode_tile *last = &tiles[count - 1];
  int64_t parts = 0, late = 0; /* of the last item, where it is a number of stretches */
  line->last_reading = last->reading;
  if (ends_together && items <= blocks) {
    parts = last->reading / stretch;
    const int64_t left = (line->length - line->units) / stretch, more = parts + left > MOST_PARTS ? MOST_PARTS - parts : left;
    if (more > 0) parts += more, line->last_reading += (int32_t)(more * stretch), line->units += (int32_t)(more * stretch);
    late = line->units / stretch + items - blocks;
  }
  line->last_share = line->late_share = work_share(last, line->last_reading);
  line->last_late = line->last_reading;
  if (late > 0 && late < parts) lay_last(last, stretch, parts, late, line);
  return true;
}

/* On an H100, for heads of 128: how much longer 16 rows take than 8 to read a page, in percent, and what they have to do besides
 * at the end of a stretch, in pages of 8. */
#define WIDE_PAGE_PERCENT 140
#define WIDE_END_COST     45

bool line_wide_pays(int64_t pages_of_8, int64_t pages_of_16, int blocks) {
  return pages_of_16 * WIDE_PAGE_PERCENT + (int64_t)blocks * WIDE_END_COST * 100 < pages_of_8 * 100;
}
