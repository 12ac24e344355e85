/*
 * file.c - mapped input and atomic output.
 *
 * A writer's temporary file lies beside its target (rename is atomic within a file system only) and carries the id of the thread,
 * which is unique in the whole system, so that two threads or programs writing the same target do not meet; the last rename wins
 * with a whole file.
 *
 * The temporary is locked (flock) while its writer lives. The lock goes with the process, however that ends, and holds across
 * containers that share a folder, which ids of threads do not.
 */
#include "base/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

oscar_status file_map_open(oscar_context *context, const char *path, struct file_map *map) {
  *map = (struct file_map){0};
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return set_error(context, OSCAR_IO, "%s: cannot be opened: %s", path, strerror(errno));
  oscar_status status = OSCAR_OK;
  struct stat info;
  void *data;
  if (fstat(fd, &info) != 0) {
    status = set_error(context, OSCAR_IO, "%s: %s", path, strerror(errno));
  } else if (!S_ISREG(info.st_mode)) {
    status = set_error(context, OSCAR_IO, "%s: not a regular file", path);
  } else if (info.st_size == 0) {
    status = set_error(context, OSCAR_FORMAT, "%s: the file is empty", path);
  } else if ((data = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0)) == MAP_FAILED) {
    status = set_error(context, OSCAR_IO, "%s: cannot be mapped: %s", path, strerror(errno));
  } else {
    *map = (struct file_map){data, (size_t)info.st_size};
  }
  close(fd);
  return status;
}

void file_map_close(struct file_map *map) {
  if (map->data) munmap((void *)(uintptr_t)map->data, map->bytes);
  *map = (struct file_map){0};
}

void file_map_release(const struct file_map *map, const void *data, size_t bytes) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE), from = (size_t)((const uint8_t *)data - map->data);
  const size_t first = round_up(from, page), end = (from + bytes) / page * page;
  if (first < end) (void)madvise((void *)(uintptr_t)(map->data + first), end - first, MADV_DONTNEED);
}

oscar_status file_writer_open(oscar_context *context, const char *path, struct file_writer *writer) {
  *writer = (struct file_writer){0};
  struct stat there; /* a rename would fail on a folder and put a file in the place of a device */
  if (stat(path, &there) == 0 && !S_ISREG(there.st_mode))
    return set_error(context, OSCAR_IO, "%s: cannot be written: it is %s", path,
                     S_ISDIR(there.st_mode) ? "a folder" : "not a regular file");
  size_t bytes = strlen(path) + 32;
  writer->path = mem_strdup(context, path);
  writer->temporary = writer->path ? mem_alloc(context, bytes, 1) : NULL;
  if (!writer->temporary) {
    file_writer_abort(context, writer);
    return OSCAR_NO_MEMORY;
  }
  snprintf(writer->temporary, bytes, "%s.%ld.tmp", path, (long)gettid());
  writer->stream = fopen(writer->temporary, "wbe");
  if (!writer->stream) {
    oscar_status status = set_error(context, OSCAR_IO, "%s: cannot be written: %s", path, strerror(errno));
    file_writer_abort(context, writer);
    return status;
  }
  (void)flock(fileno(writer->stream),
              LOCK_EX | LOCK_NB); /* not every file system can: then it is not told from an abandoned one */
  return OSCAR_OK;
}

/* A rename is durable once the folder that holds the name is synced; not every file system allows it, so failure is no error. */
static void sync_folder(char *path) {
  char *slash = strrchr(path, '/');
  if (slash) slash[slash == path] = '\0';
  int fd = open(slash ? path : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  (void)fsync(fd);
  close(fd);
}

oscar_status file_writer_commit(oscar_context *context, struct file_writer *writer) {
  bool written = fflush(writer->stream) == 0 && !ferror(writer->stream) && fsync(fileno(writer->stream)) == 0;
  int why = errno;
  const int lock = dup(fileno(writer->stream)); /* held until the file has its name */
  if (fclose(writer->stream) != 0 && written) {
    written = false;
    why = errno;
  }
  writer->stream = NULL;
  if (written && rename(writer->temporary, writer->path) != 0) {
    written = false;
    why = errno;
  }
  if (lock >= 0) close(lock);
  oscar_status status = OSCAR_OK;
  if (!written) {
    status = set_error(context, OSCAR_IO, "%s: cannot be written: %s", writer->path, strerror(why));
  } else {
    mem_free(context, writer->temporary);
    writer->temporary = NULL;
    sync_folder(writer->path);
  }
  file_writer_abort(context, writer);
  return status;
}

void file_writer_abort(oscar_context *context, struct file_writer *writer) {
  if (writer->stream) fclose(writer->stream);
  if (writer->temporary) unlink(writer->temporary);
  mem_free(context, writer->temporary);
  mem_free(context, writer->path);
  *writer = (struct file_writer){0};
}

/* "NAME<suffix>.<digits>.tmp" */
static bool is_temporary(const char *name, const char *suffix) {
  const size_t n = strlen(name), end = strlen(".tmp"), suffix_bytes = strlen(suffix);
  if (n < end || strcmp(name + n - end, ".tmp") != 0) return false;
  size_t at = n - end, digits = 0;
  for (; at > 0 && name[at - 1] >= '0' && name[at - 1] <= '9'; at--) digits++;
  if (digits == 0 || at == 0 || name[--at] != '.') return false;
  return at > suffix_bytes && memcmp(name + at - suffix_bytes, suffix, suffix_bytes) == 0;
}

void file_remove_abandoned(oscar_context *context, const char *folder, const char *suffix) {
  DIR *all = opendir(folder);
  if (!all) return;
  for (struct dirent *entry; (entry = readdir(all));) {
    char path[PATH_MAX];
    if (!is_temporary(entry->d_name, suffix)) continue;
    if ((size_t)snprintf(path, sizeof path, "%s/%s", folder, entry->d_name) >= sizeof path) continue;
    const int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0) continue;
    if (flock(fd, LOCK_EX | LOCK_NB) == 0 && unlink(path) == 0)
      log_line(context, OSCAR_LOG_WARNING, "%s: removed: whoever wrote it has not come to the end", path);
    close(fd);
  }
  closedir(all);
}

oscar_status file_make_folders(oscar_context *context, const char *path) {
  char *copy = mem_strdup(context, path);
  if (!copy) return OSCAR_NO_MEMORY;
  oscar_status status = OSCAR_OK;
  for (char *p = copy + 1; status == OSCAR_OK; p++) {
    if (*p != '/' && *p != '\0') continue;
    char end = *p;
    *p = '\0';
    if (mkdir(copy, 0777) != 0 && errno != EEXIST)
      status = set_error(context, OSCAR_IO, "%s: the folder cannot be made: %s", copy, strerror(errno));
    *p = end;
    if (!end) break;
  }
  mem_free(context, copy);
  return status;
}

oscar_status file_make_folder_of(oscar_context *context, const char *path) {
  const char *slash = strrchr(path, '/');
  if (!slash || slash == path) return OSCAR_OK;
  char *folder = mem_strdup(context, path);
  if (!folder) return OSCAR_NO_MEMORY;
  folder[slash - path] = '\0';
  oscar_status status = file_make_folders(context, folder);
  mem_free(context, folder);
  return status;
}
