/*
 * torch_zip.c - the archive around a rotation file: a zip as torch.save writes it.
 *
 * One folder holds data.pkl, data/<key> for every storage and, from PyTorch 2.1 on, byteorder. Entries are stored, not
 * compressed, so that nothing can be larger than the file; anything else is refused. libzip verifies the checksum of what is
 * read.
 */
#include "rotation/torch_file.h"
#include "base/file.h"

#include <stdio.h>
#include <string.h>
#include <zip.h>

#define MAX_PICKLE_BYTES (1u << 20) /* a hundred layers take 60 KB */
#define MAX_ENTRIES      (1 << 20)
#define MAX_NAME         512

struct archive {
  oscar_context *context;
  zip_t *zip;
  char root[MAX_NAME]; /* the folder, with its slash */
  size_t bytes;        /* of the whole file */
};

static oscar_status zip_failure(oscar_context *context, zip_error_t *error, const char *what) {
  oscar_status status = zip_error_code_zip(error) == ZIP_ER_MEMORY ? OSCAR_NO_MEMORY : OSCAR_FORMAT;
  return set_error(context, status, "%s: %s", what, zip_error_strerror(error));
}

static oscar_status open_archive(struct archive *a, const uint8_t *bytes, size_t n) {
  zip_error_t error;
  zip_error_init(&error);
  oscar_status status = OSCAR_OK;
  zip_source_t *source = zip_source_buffer_create(bytes, n, 0, &error);
  a->zip = source ? zip_open_from_source(source, ZIP_RDONLY, &error) : NULL;
  if (!a->zip) {
    status = zip_failure(a->context, &error, "not a zip archive as PyTorch 1.6 or later writes it");
    zip_source_free(source);
  }
  a->bytes = n;
  zip_error_fini(&error);
  return status;
}

/* The entry's index once it is known to be stored as it is and of `bytes` bytes (any size up to `limit` if *bytes is 0). */
static oscar_status find_entry(struct archive *a, const char *name, size_t *bytes, size_t limit, zip_uint64_t *index) {
  zip_stat_t info;
  zip_stat_init(&info);
  zip_int64_t at = zip_name_locate(a->zip, name, 0);
  *index = at < 0 ? 0 : (zip_uint64_t)at;
  if (at < 0) return set_error(a->context, OSCAR_FORMAT, "%s is not in the archive", name);
  const zip_uint64_t needed = ZIP_STAT_SIZE | ZIP_STAT_COMP_METHOD | ZIP_STAT_ENCRYPTION_METHOD;
  if (zip_stat_index(a->zip, *index, 0, &info) != 0 || (info.valid & needed) != needed)
    return zip_failure(a->context, zip_get_error(a->zip), name);
  if (info.comp_method != ZIP_CM_STORE || info.encryption_method != ZIP_EM_NONE)
    return set_error(a->context, OSCAR_UNSUPPORTED, "%s is compressed or encrypted; files of this kind are neither", name);
  if (info.size > limit || info.size > a->bytes)
    return set_error(a->context, OSCAR_FORMAT, "%s has %llu bytes, more than is possible", name, (unsigned long long)info.size);
  if (*bytes && info.size != *bytes)
    return set_error(a->context, OSCAR_FORMAT, "%s has %llu bytes where %zu are needed", name, (unsigned long long)info.size,
                     *bytes);
  *bytes = (size_t)info.size;
  return OSCAR_OK;
}

static oscar_status read_entry(struct archive *a, const char *name, zip_uint64_t index, void *to, size_t bytes) {
  zip_file_t *file = zip_fopen_index(a->zip, index, 0);
  if (!file) return zip_failure(a->context, zip_get_error(a->zip), name);
  uint8_t beyond;
  zip_int64_t got = bytes ? zip_fread(file, to, bytes) : 0;
  if (got == (zip_int64_t)bytes && zip_fread(file, &beyond, 1) != 0) got = -1; /* the end is where the checksum is compared */
  oscar_status status = OSCAR_OK;
  if (got < 0)
    status = zip_failure(a->context, zip_file_get_error(file), name);
  else if (got != (zip_int64_t)bytes)
    status = set_error(a->context, OSCAR_FORMAT, "%s ends after %lld of %zu bytes", name, (long long)got, bytes);
  zip_fclose(file);
  return status;
}

/* The folder that holds data.pkl. */
static oscar_status find_root(struct archive *a) {
  zip_int64_t entries = zip_get_num_entries(a->zip, 0);
  if (entries > MAX_ENTRIES) return set_error(a->context, OSCAR_FORMAT, "%lld entries in the archive", (long long)entries);
  for (zip_int64_t i = 0; i < entries; i++) {
    const char *name = zip_get_name(a->zip, (zip_uint64_t)i, ZIP_FL_ENC_RAW), *slash = name ? strchr(name, '/') : NULL;
    if (!slash || strcmp(slash, "/data.pkl") != 0 || slash - name > MAX_NAME - 128) continue;
    snprintf(a->root, sizeof a->root, "%.*s/", (int)(slash - name), name);
    return OSCAR_OK;
  }
  return set_error(a->context, OSCAR_FORMAT, "no <folder>/data.pkl in the archive: not written by torch.save");
}

static oscar_status check_byte_order(struct archive *a) {
  char name[MAX_NAME + 64], order[6] = "";
  snprintf(name, sizeof name, "%sbyteorder", a->root);
  if (zip_name_locate(a->zip, name, 0) < 0) return OSCAR_OK; /* older files have none and are little-endian */
  size_t bytes = 0;
  zip_uint64_t index;
  oscar_status status = find_entry(a, name, &bytes, sizeof order, &index);
  if (status == OSCAR_OK) status = read_entry(a, name, index, order, bytes);
  if (status == OSCAR_OK && (bytes != 6 || memcmp(order, "little", 6) != 0))
    status = set_error(a->context, OSCAR_UNSUPPORTED, "%s: only little-endian files are read", name);
  return status;
}

/* ---- storages ---- */

static oscar_status storage_entry(struct archive *a, const char *key, uint32_t n, char name[MAX_NAME + 64]) {
  for (uint32_t i = 0; i < n; i++)
    if (key[i] < '0' || key[i] > '9' || n > 20) return set_error(a->context, OSCAR_FORMAT, "a storage key is no number");
  snprintf(name, MAX_NAME + 64, "%sdata/%.*s", a->root, (int)n, key);
  return OSCAR_OK;
}

static oscar_status check_storage(void *user, const char *key, uint32_t n, size_t bytes) {
  struct archive *a = user;
  char name[MAX_NAME + 64];
  zip_uint64_t index;
  oscar_status status = storage_entry(a, key, n, name);
  if (status == OSCAR_OK && bytes == 0) status = set_error(a->context, OSCAR_FORMAT, "%s is to have no bytes", name);
  return status == OSCAR_OK ? find_entry(a, name, &bytes, SIZE_MAX, &index) : status;
}

static oscar_status read_storage(void *user, const char *key, uint32_t n, void *to, size_t bytes) {
  struct archive *a = user;
  char name[MAX_NAME + 64];
  zip_uint64_t index;
  oscar_status status = storage_entry(a, key, n, name);
  if (status == OSCAR_OK) status = find_entry(a, name, &bytes, SIZE_MAX, &index);
  return status == OSCAR_OK ? read_entry(a, name, index, to, bytes) : status;
}

/* ---- the file ---- */

oscar_status rotation_from_memory(oscar_context *context, const uint8_t *bytes, size_t n, oscar_rotation_file **file) {
  *file = NULL;
  struct archive a = {.context = context};
  uint8_t *pickle = NULL;
  char name[MAX_NAME + 64];
  size_t pickle_bytes = 0;
  zip_uint64_t index = 0;
  oscar_status status = open_archive(&a, bytes, n);
  if (status == OSCAR_OK) status = find_root(&a);
  if (status == OSCAR_OK) status = check_byte_order(&a);
  if (status != OSCAR_OK) goto out;
  snprintf(name, sizeof name, "%sdata.pkl", a.root);
  status = find_entry(&a, name, &pickle_bytes, MAX_PICKLE_BYTES, &index);
  if (status != OSCAR_OK) goto out;
  pickle = mem_alloc(context, pickle_bytes, 1);
  status = pickle ? read_entry(&a, name, index, pickle, pickle_bytes) : OSCAR_NO_MEMORY;
  struct storage_source source = {read_storage, check_storage, &a};
  if (status == OSCAR_OK) status = rotation_from_pickle(context, pickle, pickle_bytes, &source, file);
out:
  mem_free(context, pickle);
  if (a.zip) zip_discard(a.zip);
  return status;
}

oscar_status oscar_rotation_file_read(oscar_context *context, const char *path, oscar_rotation_file **file) {
  *file = NULL;
  struct file_map map;
  oscar_status status = file_map_open(context, path, &map);
  if (status != OSCAR_OK) return status;
  status = rotation_from_memory(context, map.data, map.bytes, file);
  file_map_close(&map);
  return status == OSCAR_OK ? status : prefix_error(context, status, "%s", path);
}
