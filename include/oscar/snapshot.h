/*
 * oscar/snapshot.h - a sequence in a file, and back.
 *
 * A snapshot holds a sequence's pages in canonical form, codes as codes and exact pages as BF16, its token ids, and a text of the
 * caller's. Restored into a cache of the same geometry, windows and codecs it is the same sequence bit for bit: attention over
 * it, later steps and the pages that these demote are those of the sequence that was saved. Where a cache keeps its pages (host
 * memory, a GPU's) does not matter. docs/formats.md describes the file byte by byte.
 *
 * Everything in a file is covered by a checksum and validated before a cache is changed; an error names the file, what was found
 * and what was expected. Checksums find damage; they are no protection against somebody who writes a false file on purpose (such
 * a file is still never a danger to memory, but may hold any numbers).
 */
#ifndef OSCAR_SNAPSHOT_H
#define OSCAR_SNAPSHOT_H

#include <oscar/cache.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct oscar_snapshot oscar_snapshot;

/* What is saved beside the pages. All is copied into the file. */
typedef struct oscar_snapshot_contents {
  const char *model;  /* fingerprint of the model that made the sequence, at most 64 bytes; NULL or "": not told */
  const int32_t *ids; /* [n_ids] token ids */
  int64_t n_ids;      /* at least the sequence's length; more: tokens that were chosen but not run yet */
  const void *text;   /* of the caller's, any bytes; may be NULL */
  size_t text_bytes;
} oscar_snapshot_contents;

/* Written to a temporary file beside `path`, synced and renamed: there is the old file or the whole new one, and of several
 * writers the last wins. Not between begin and commit. Errors: INVALID_ARGUMENT, UNSUPPORTED (a cache with a page filter), IO,
 * NO_MEMORY: nothing is left behind. */
OSCAR_API oscar_status oscar_sequence_save(const oscar_sequence *sequence, const oscar_snapshot_contents *contents,
                                           const char *path);

/* The same bytes, to whoever wants them: data [bytes] belong at `offset` of the file. They come in order and without gaps, and at
 * the end those from 0 to the pages once more, now right. Returns false if it cannot take them, with the reason in errno
 * (ENOMEM: NO_MEMORY, others: IO). Called on the caller's thread while others of the context make what comes next: it must not
 * use the context. */
typedef bool oscar_snapshot_write(void *user, uint64_t offset, const void *data, size_t bytes);
OSCAR_API oscar_status oscar_sequence_save_to(const oscar_sequence *sequence, const oscar_snapshot_contents *contents,
                                              oscar_snapshot_write *write, void *user);

/* What a file of the sequence as it is now would hold, copied into memory: another thread can write it with a context of its own
 * while the sequence goes on, or when it is gone. The cache must outlive it. Errors: as oscar_sequence_save but for IO. */
typedef struct oscar_capture oscar_capture;
OSCAR_API oscar_status oscar_sequence_capture(const oscar_sequence *sequence, const oscar_snapshot_contents *contents,
                                              oscar_capture **capture);
/* Memory that it takes; and that one of this sequence would take. */
OSCAR_API size_t oscar_capture_bytes(const oscar_capture *capture);
OSCAR_API size_t oscar_sequence_capture_bytes(const oscar_sequence *sequence, const oscar_snapshot_contents *contents);
/* As oscar_sequence_save would have; `context` gets the errors (IO, NO_MEMORY). */
OSCAR_API oscar_status oscar_capture_save(const oscar_capture *capture, oscar_context *context, const char *path);
OSCAR_API void oscar_capture_free(oscar_capture *capture); /* on the thread of the cache's context */

typedef struct oscar_snapshot_info {
  int layers, kv_heads, head_dim, sink_pages, recent_pages;
  int64_t tokens; /* length of the sequence */
  int64_t exact_pages, coded_pages;
  const char *model;  /* "" if not told */
  const char *recipe; /* of the codec set; "bf16" without */
  const char *codecs; /* fingerprint of the codec set, 32 hexadecimal digits; "" without */
  const int32_t *ids; /* [n_ids] */
  int64_t n_ids;
  const char *text; /* [text_bytes], and a zero byte after them */
  size_t text_bytes;
  int64_t saved_at; /* seconds since 1970 */
  size_t file_bytes;
} oscar_snapshot_info;

/* Whether a file begins as a snapshot does, of any version, damaged or not: enough to tell it from a file that is something else.
 * Errors: IO (it cannot be read). */
OSCAR_API oscar_status oscar_snapshot_is_one(oscar_context *context, const char *path, bool *is);
/* Opens a file and validates everything but the pages. Errors: IO, FORMAT, UNSUPPORTED (another version), NO_MEMORY. */
OSCAR_API oscar_status oscar_snapshot_open(oscar_context *context, const char *path, oscar_snapshot **snapshot);
/* The bytes of one, aligned to 8, which stay the caller's and must last until it is closed. `name` is for errors. */
OSCAR_API oscar_status oscar_snapshot_open_bytes(oscar_context *context, const char *name, const void *data, size_t bytes,
                                                 oscar_snapshot **snapshot);
OSCAR_API void oscar_snapshot_close(oscar_snapshot *snapshot);
/* Valid until the snapshot is closed. */
OSCAR_API const oscar_snapshot_info *oscar_snapshot_describe(const oscar_snapshot *snapshot);
/* Validates the pages, too. FORMAT names the first that is damaged. */
OSCAR_API oscar_status oscar_snapshot_check(const oscar_snapshot *snapshot);

/* A new sequence of `cache`, which must be of the snapshot's context. `model`: fingerprint of the model that will go on with it,
 * compared with the file's where both are told; NULL: not compared.
 * Errors: MISMATCH (another model, geometry, windows, codecs), FORMAT, NO_SPACE, NO_MEMORY: the cache holds what it held. */
OSCAR_API oscar_status oscar_snapshot_restore(const oscar_snapshot *snapshot, oscar_cache *cache, const char *model,
                                              oscar_sequence **sequence);

/* The same sequence with another text: into bytes, and into a file (which may be the one that is open). No page is looked at but
 * to copy it. Errors: as oscar_sequence_save. */
OSCAR_API oscar_status oscar_snapshot_copy_to(const oscar_snapshot *snapshot, const void *text, size_t text_bytes,
                                              oscar_snapshot_write *write, void *user);
OSCAR_API oscar_status oscar_snapshot_copy(const oscar_snapshot *snapshot, const void *text, size_t text_bytes, const char *path);

#ifdef __cplusplus
}
#endif
#endif
