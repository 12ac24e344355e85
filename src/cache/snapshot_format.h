/*
 * cache/snapshot_format.h - the bytes of a snapshot file (docs/formats.md), and what writing and reading share. Private.
 *
 *   header | forms | text | ids | page table | pages
 *
 * A page's record begins with what lies there as it is: the low bytes of BF16 numbers, which do not compress, and the crumbs of
 * keys, which hardly do. Zstandard frames follow. An exact page has one, of the high bytes (sign and most of the exponent: 3 bits
 * of information instead of 8); a coded one has two, of the crumbs of values and of row metadata, since symbols of one frame
 * share their codes. A level that only codes symbols is enough; matches are rare.
 */
#ifndef OSCAR_CACHE_SNAPSHOT_FORMAT_H
#define OSCAR_CACHE_SNAPSHOT_FORMAT_H

#include "cache/state.h"
#include <oscar/snapshot.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the structures below are the file's bytes");

#define SNAPSHOT_MAGIC      "\x89OSCARKV"
#define SNAPSHOT_VERSION    2
#define SNAPSHOT_BYTE_ORDER 0x01020304u

struct snapshot_header {
  char magic[8];
  uint32_t version, byte_order;
  uint32_t layers, kv_heads, head_dim, sink_pages, recent_pages, page_tokens;
  int64_t tokens, ids, text_bytes, saved_at;
  int64_t refilled_from; /* pages */
  int64_t cold_tokens;   /* INT64_MAX: all */
  uint64_t file_bytes;
  uint8_t codecs[16]; /* zeros without codecs */
  char model[64], recipe[64];
  uint64_t sections; /* checksum of forms, text, ids and page table, as they lie in the file */
  uint64_t checksum; /* of the header up to here */
};
_Static_assert(sizeof(struct snapshot_header) == 256, "no padding");

struct snapshot_form { /* of a layer's side */
  uint32_t crumbs;     /* 0: no codecs */
  uint32_t groups, meta_values, rotating_pairs;
};

struct snapshot_page {
  uint32_t coded; /* 0 or 1 */
  uint32_t zero;
  uint64_t bytes, checksum; /* of the record */
};

/* XXH3, 64 bits: damage is found at the speed of memory. */
uint64_t snapshot_checksum(const void *data, size_t bytes);
/* XXH3, 128 bits, of all that decides what codes mean. */
void snapshot_codecs_fingerprint(const oscar_codec_set *codecs, uint8_t out[16]);

static inline int64_t snapshot_pages(const struct snapshot_header *h) { return pages_of(h->tokens); }
static inline size_t snapshot_forms_bytes(const struct snapshot_header *h) {
  return (size_t)h->layers * 2 * sizeof(struct snapshot_form);
}

/* ---- a page <-> its record (snapshot_page.c) ---- */

struct record_shape {
  int rows;
  size_t raw_bytes;
  size_t frame_bytes[2]; /* before compression; the second: 0 if there is one frame */
};
static inline size_t record_unpacked_bytes(const struct record_shape *r) { return r->frame_bytes[0] + r->frame_bytes[1]; }
struct snapshot_shape { /* what follows from header and forms */
  int layers, kv_heads, head_dim;
  const struct snapshot_form *forms; /* [layers][2] */
};
struct record_shape record_shape_of(const struct snapshot_shape *shape, bool coded, int rows);
/* The most that its frames can take. */
size_t record_frames_bound(const struct record_shape *record);
/* Bytes of the canonical rows of the largest side. */
size_t snapshot_rows_bytes(const struct snapshot_shape *shape);
static inline int rows_of_page(int64_t tokens, int64_t page) { return (int)min64(PAGE_TOKENS, tokens - page * PAGE_TOKENS); }

/* Where a page is in memory: memory + page_layer_offset of each layer. */
struct page_place {
  const oscar_cache *cache;
  bool coded;
  int32_t page;     /* in the cache's memory; */
  uint8_t *staging; /* unless this is set: a copy of that, layer after layer */
};

/* The page's n rows <-> what its record holds, as record_shape_of says: `frames`, one after the other before compression, and
 * `raw`. rows: scratch of snapshot_rows_bytes. */
void page_split(const struct snapshot_shape *shape, const struct page_place *place, int n, uint8_t *rows, uint8_t *raw,
                uint8_t *frames);
void page_join(const struct snapshot_shape *shape, const struct page_place *place, int n, uint8_t *rows, const uint8_t *raw,
               const uint8_t *frames);
/* Bytes of a page in a staging copy, and of the largest. */
size_t page_copy_bytes(const oscar_cache *cache, bool coded);
size_t page_staging_bytes(const oscar_cache *cache);
/* The cache's page -> its staging copy; and to a GPU. */
oscar_status page_copy(const struct page_place *place);
oscar_status page_upload(const struct page_place *place);

/* ---- writing (snapshot_write.c) ---- */
struct file_writer;
/* An oscar_snapshot_write into the file_writer that `user` is. */
bool snapshot_write_file(void *user, uint64_t offset, const void *data, size_t bytes);

/* ---- reading (snapshot_read.c) ---- */
/* As oscar_snapshot_open, of bytes that stay valid. `name` is for errors. */
oscar_status snapshot_parse(oscar_context *context, const char *name, const uint8_t *data, size_t bytes,
                            oscar_snapshot **snapshot);

#endif
