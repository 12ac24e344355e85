/* file.h - whole files: mapped for reading, written so that a reader sees the old or the new one, never half of it. Private. */
#ifndef OSCAR_FILE_H
#define OSCAR_FILE_H

#include "base/base.h"
#include <stdio.h>

struct file_map {
  const uint8_t *data;
  size_t bytes;
};
/* Read-only mapping. Errors: IO with path and reason (an empty or non-regular file too). */
oscar_status file_map_open(oscar_context *context, const char *path, struct file_map *map);
void file_map_close(struct file_map *map);
/* Takes the whole pages of a stretch of the mapping out of the process; they are there again when they are read. */
void file_map_release(const struct file_map *map, const void *data, size_t bytes);

/* Atomic write: open gives a stream on a temporary file beside `path`; commit flushes, syncs, renames and syncs the folder.
 * Any error of the stream up to commit is reported by commit and leaves `path` as it was. abort removes the temporary file. */
struct file_writer {
  FILE *stream;
  char *path, *temporary;
};
oscar_status file_writer_open(oscar_context *context, const char *path, struct file_writer *writer);
oscar_status file_writer_commit(oscar_context *context, struct file_writer *writer);
void file_writer_abort(oscar_context *context, struct file_writer *writer);
/* Removes the temporary files of writers that were killed, of those whose path ends in `suffix`, from a folder, and logs each. A
 * writer locks its file for as long as it lives, so those that are being written stay, whoever writes them. */
void file_remove_abandoned(oscar_context *context, const char *folder, const char *suffix);

/* mkdir -p. */
oscar_status file_make_folders(oscar_context *context, const char *path);
/* The same for the folder that a file is in. */
oscar_status file_make_folder_of(oscar_context *context, const char *path);

#endif
