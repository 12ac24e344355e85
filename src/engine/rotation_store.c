/*
 * rotation_store.c - where codec sets come from: built from nothing, a file the user names, or the user's cache folder, which is
 * filled on first use.
 *
 * A fit runs a text through the model, which takes a minute or so; it is done once per model, for all fitted KV types together,
 * and stored under the model's fingerprint. Files appear whole or not at all (written beside and renamed), so two programs that
 * fit the same model at once both end with the same files. A stored file that cannot be used is reported and replaced; a file the
 * user named is never replaced: what is wrong with it is an error.
 */
#include "engine/calibrate.h"

#include "base/file.h"
#include "base/user_folder.h"

#include <errno.h>
#include <limits.h>
#include <oscar/rotation.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
  MAX_FITTED = 24,
  FIRST_USE_TOKENS = 8192 /* of the shipped text: somebody is waiting, and the rest improves little (docs/calibration.md) */
};

oscar_status rotation_cache_path(oscar_context *context, const char *fingerprint, const char *kv, char *path, size_t bytes) {
  char folder[PATH_MAX];
  oscar_status status = user_folder(context, USER_CACHE, folder, sizeof folder);
  if (status != OSCAR_OK) return status;
  int n = snprintf(path, bytes, "%s/rotations/%s-%s.safetensors", folder, fingerprint, kv);
  if (n < 0 || (size_t)n >= bytes)
    return set_error(context, OSCAR_IO, "the path of a rotation in the cache folder is longer than %zu bytes", bytes - 1);
  return OSCAR_OK;
}

/* ---- sets that need no data ---- */

static oscar_status build_plain(const struct model *model, const char *kv, oscar_codec_set **set) {
  static const struct {
    const char *kv;
    oscar_plain_options options;
  } plain[] = {
      {"int8", {false, 4, 0, 1.0f, 1.0f}},
      {"int2-hadamard", {true, 1, 0, 0.96f, 0.92f}}, /* the published clips serve a data-free rotation as well */
      {"int2-plain", {false, 1, 0, 1.0f, 1.0f}},
  };
  oscar_context *context = model_context(model);
  const struct model_geometry *g = model_geometry_of(model);
  const oscar_codec_set_info info = {g->layers, g->kv_heads, g->head_dim, kv, "", ""};
  for (size_t i = 0; i < ARRAY_LENGTH(plain); i++)
    if (strcmp(plain[i].kv, kv) == 0) return oscar_codec_set_create_plain(context, &info, &plain[i].options, set);
  return set_error(context, OSCAR_INVALID_ARGUMENT, "KV type \"%s\" has no codec that needs no data", kv);
}

/* ---- checking a file ---- */

static oscar_status check_geometry(const struct model *model, const char *path, const oscar_codec_set_info *info) {
  const struct model_geometry *g = model_geometry_of(model);
  if (info->layers == g->layers && info->kv_heads == g->kv_heads && info->head_dim == g->head_dim) return OSCAR_OK;
  return set_error(
      model_context(model), OSCAR_MISMATCH,
      "%s: fitted to a model of %d layers, %d KV heads and head_dim %d; %s has %d layers, %d KV heads and head_dim %d", path,
      info->layers, info->kv_heads, info->head_dim, g->name, g->layers, g->kv_heads, g->head_dim);
}

static oscar_status check_fingerprint(const struct model *model, const char *path, const oscar_codec_set_info *info) {
  if (info->fingerprint[0] == '\0' || strcmp(info->fingerprint, model_fingerprint(model)) == 0) return OSCAR_OK;
  return set_error(model_context(model), OSCAR_MISMATCH,
                   "%s: fitted to another model of the same shape: its fingerprint is %.16s..., that of %s is %.16s...", path,
                   info->fingerprint, model_geometry_of(model)->name, model_fingerprint(model));
}

/* A recipe of a name of its own (an imported file) is taken as it is; the name of another KV type is a mistake. */
static oscar_status check_recipe(const struct model *model, const char *path, const char *kv, const oscar_codec_set_info *info) {
  if (strcmp(info->recipe, kv) == 0 || !kv_type_find(info->recipe)) return OSCAR_OK;
  return set_error(model_context(model), OSCAR_MISMATCH, "%s: holds codecs of KV type %s, but %s was asked for", path,
                   info->recipe, kv);
}

static oscar_status load_checked(struct model *model, const char *path, const char *kv, oscar_codec_set **set) {
  oscar_context *context = model_context(model);
  oscar_codec_set *loaded = NULL;
  oscar_status status = oscar_codec_set_load(context, path, &loaded);
  if (status != OSCAR_OK) return status;
  const oscar_codec_set_info *info = oscar_codec_set_describe(loaded);
  status = check_geometry(model, path, info);
  if (status == OSCAR_OK) status = check_fingerprint(model, path, info);
  if (status == OSCAR_OK) status = check_recipe(model, path, kv, info);
  if (status == OSCAR_OK && (status = oscar_codec_set_check(loaded)) != OSCAR_OK) prefix_error(context, status, "%s", path);
  if (status == OSCAR_OK)
    *set = loaded;
  else
    oscar_codec_set_free(loaded);
  return status;
}

/* ---- the user's cache folder ---- */

static bool exists(const char *path) {
  struct stat info;
  return stat(path, &info) == 0;
}

/* *set stays NULL if there is nothing that can be used; only running out of memory is an error. */
static oscar_status load_stored(struct model *model, const char *path, const char *kv, oscar_codec_set **set) {
  oscar_context *context = model_context(model);
  if (!exists(path)) return OSCAR_OK;
  oscar_status status = load_checked(model, path, kv, set);
  if (status == OSCAR_NO_MEMORY) return status;
  if (status != OSCAR_OK) {
    log_line(context, OSCAR_LOG_WARNING, "a stored rotation cannot be used and is fitted again: %s", oscar_last_error(context));
  } else if (!calibrate_is_current(kv, oscar_codec_set_describe(*set))) {
    log_line(context, OSCAR_LOG_INFO, "%s: fitted with other settings than this program's; it is fitted again", path);
    oscar_codec_set_free(*set);
    *set = NULL;
  }
  return OSCAR_OK;
}

static bool is_stored(struct model *model, const char *kv) {
  char path[PATH_MAX];
  return rotation_cache_path(model_context(model), model_fingerprint(model), kv, path, sizeof path) == OSCAR_OK && exists(path);
}

static oscar_status store_one(struct model *model, const char *kv, const oscar_codec_set *set) {
  oscar_context *context = model_context(model);
  char path[PATH_MAX];
  oscar_status status = rotation_cache_path(context, model_fingerprint(model), kv, path, sizeof path);
  if (status == OSCAR_OK) status = file_make_folder_of(context, path);
  return status == OSCAR_OK ? oscar_codec_set_save(set, path) : status;
}

static bool is_among(const char *name, int count, const char *const *names) {
  for (int i = 0; i < count; i++)
    if (strcmp(names[i], name) == 0) return true;
  return false;
}

/* What one pass over the text makes: the wanted types and, when one of them is a usual one, all usual ones. */
struct fits {
  int wanted, count; /* the first `wanted` were asked for */
  const char *names[MAX_FITTED];
  oscar_codec_set *sets[MAX_FITTED];
};

static void choose_fits(const struct model *model, int wanted, const char *const *kv, struct fits *fits) {
  int all;
  const struct kv_type *types = kv_type_list(&all);
  bool usual = false;
  *fits = (struct fits){.wanted = wanted};
  for (int i = 0; i < wanted; i++) {
    fits->names[fits->count++] = kv[i];
    usual = usual || !strchr(kv[i], '@');
  }
  /* flat codes need a Hadamard matrix of the head's order: a model without one may still have graded codes */
  usual = usual && oscar_hadamard_exists(model_geometry_of(model)->head_dim);
  for (int i = 0; usual && i < all && fits->count < MAX_FITTED; i++)
    if (types[i].kind == KV_FITTED && !is_among(types[i].name, fits->count, fits->names))
      fits->names[fits->count++] = types[i].name;
}

/* The wanted types replace what is stored of them, which could not be used. Files of the other types are left alone where there
 * are any: they may be fits to a text of the user's own. */
static void store_all(struct model *model, const struct fits *fits) {
  oscar_context *context = model_context(model);
  for (int i = 0; i < fits->count; i++) {
    if (i >= fits->wanted && is_stored(model, fits->names[i])) continue;
    if (store_one(model, fits->names[i], fits->sets[i]) == OSCAR_OK) continue;
    log_line(context, OSCAR_LOG_WARNING, "the fitted rotations are used for this run but could not be stored: %s",
             oscar_last_error(context));
    return; /* the next would fail for the same reason: one line is enough */
  }
}

/* A fit takes minutes: whether it can be kept is found out before. */
static oscar_status check_store(oscar_context *context, const char *path) {
  char folder[PATH_MAX];
  snprintf(folder, sizeof folder, "%s", path);
  *strrchr(folder, '/') = '\0';
  oscar_status status = file_make_folders(context, folder);
  if (status == OSCAR_OK && access(folder, W_OK) != 0) status = set_error(context, OSCAR_IO, "%s: %s", folder, strerror(errno));
  if (status != OSCAR_OK)
    prefix_error(
        context, status,
        "fitted codecs cannot be kept in the cache folder (set XDG_CACHE_HOME, or use 'oscar calibrate -o FILE' and --rotation)");
  return status;
}

/* Fits the wanted types and what comes along, and stores all. The sets are the caller's. */
static oscar_status fit_and_store(struct model *model, int wanted, const char *const *kv,
                                  const struct calibrate_options *calibration, const struct progress *progress,
                                  struct fits *fits) {
  choose_fits(model, wanted, kv, fits);
  log_line(model_context(model), OSCAR_LOG_INFO, "fitting rotations to %s; this is done once per model",
           model_geometry_of(model)->name);
  oscar_status status = calibrate_model(model, calibration, progress, fits->count, fits->names, fits->sets);
  if (status == OSCAR_OK) store_all(model, fits);
  return status;
}

/* One set without a fit. *to_fit: there is none yet, and it has to be fitted. */
static oscar_status find_set(struct model *model, const char *kv, const char *rotation_file, oscar_codec_set **set,
                             bool *to_fit) {
  oscar_context *context = model_context(model);
  oscar_status status = kv_type_check(context, kv);
  if (status != OSCAR_OK) return status;
  const enum kv_kind kind = kv_type_find(kv)->kind;
  if (rotation_file && kind != KV_FITTED)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "%s: KV type %s takes no rotation file", rotation_file, kv);
  if (kind == KV_EXACT) return OSCAR_OK;
  if (kind == KV_PLAIN) return build_plain(model, kv, set);
  if (rotation_file) return load_checked(model, rotation_file, kv, set);
  char path[PATH_MAX];
  status = rotation_cache_path(context, model_fingerprint(model), kv, path, sizeof path);
  if (status == OSCAR_OK) status = load_stored(model, path, kv, set);
  *to_fit = status == OSCAR_OK && !*set;
  return status;
}

/* Fits what is missing, and hands each set to the first that asked for its type. */
static oscar_status fit_missing(struct model *model, int missing, const char *const *names, int count, const char *const *kv,
                                const struct calibrate_options *calibration, const struct progress *progress,
                                oscar_codec_set **sets) {
  oscar_context *context = model_context(model);
  char path[PATH_MAX];
  struct fits fits;
  oscar_status status = rotation_cache_path(context, model_fingerprint(model), names[0], path, sizeof path);
  if (status == OSCAR_OK) status = check_store(context, path);
  if (status == OSCAR_OK) status = fit_and_store(model, missing, names, calibration, progress, &fits);
  if (status != OSCAR_OK) return status;
  for (int k = 0; k < fits.count; k++) {
    for (int i = 0; i < count && fits.sets[k]; i++) {
      if (sets[i] || strcmp(kv[i], fits.names[k]) != 0) continue;
      sets[i] = fits.sets[k];
      fits.sets[k] = NULL;
    }
    oscar_codec_set_free(fits.sets[k]);
  }
  return OSCAR_OK;
}

oscar_status codec_sets_obtain_with(struct model *model, int count, const char *const *kv, const char *const *rotation_files,
                                    const struct calibrate_options *calibration, const struct progress *progress,
                                    oscar_codec_set **sets) {
  const char *missing[MAX_FITTED];
  int n = 0;
  oscar_status status = OSCAR_OK;
  for (int i = 0; i < count; i++) sets[i] = NULL;
  for (int i = 0; i < count && status == OSCAR_OK; i++) {
    bool to_fit = false;
    status = find_set(model, kv[i], rotation_files ? rotation_files[i] : NULL, &sets[i], &to_fit);
    if (!to_fit) continue;
    if (n == MAX_FITTED || is_among(kv[i], n, missing))
      status = set_error(model_context(model), OSCAR_INVALID_ARGUMENT,
                         "KV type %s is to be fitted twice, or after %d others; name it once, and fewer of them", kv[i], n);
    else
      missing[n++] = kv[i];
  }
  if (status == OSCAR_OK && n > 0) status = fit_missing(model, n, missing, count, kv, calibration, progress, sets);
  for (int i = 0; i < count && status != OSCAR_OK; i++) {
    oscar_codec_set_free(sets[i]);
    sets[i] = NULL;
  }
  return status;
}

oscar_status codec_sets_obtain(struct model *model, int count, const char *const *kv, const char *const *rotation_files,
                               const struct progress *progress, oscar_codec_set **sets) {
  struct calibrate_options calibration;
  calibrate_options_default(&calibration);
  calibration.max_tokens = FIRST_USE_TOKENS;
  return codec_sets_obtain_with(model, count, kv, rotation_files, &calibration, progress, sets);
}

oscar_status codec_set_obtain(struct model *model, const char *kv, const char *rotation_file, const struct progress *progress,
                              oscar_codec_set **set) {
  return codec_sets_obtain(model, 1, &kv, &rotation_file, progress, set);
}
