/* kv_list.c - see kv_list.h. A rotation file holds one recipe: it is used for that entry, the others come from the user's cache
 * folder. */
#include "cli/kv_list.h"

#include <oscar/rotation.h>

#include <stdlib.h>
#include <string.h>

static const char *kv_name(const void *list, int i) {
  (void)list;
  int count;
  const struct kv_type *types = kv_type_list(&count);
  return i < count ? types[i].name : NULL;
}

static int unknown_type(const char *command, const char *name) {
  const char *near = nearest_name(name, kv_name, NULL);
  if (near) return wrong_use("%s: there is no KV type '%s'; did you mean '%s'?", command, name, near);
  return wrong_use("%s: there is no KV type '%s' ('oscar %s --help' lists them)", command, name, command);
}

int kv_list_parse(const char *command, const char *text, struct kv_list *list) {
  *list = (struct kv_list){.text = strdup(text)};
  if (!list->text) return failed("out of memory");
  char *rest = NULL;
  for (char *entry = strtok_r(list->text, ",", &rest); entry; entry = strtok_r(NULL, ",", &rest)) {
    if (list->count == KV_LIST_ROOM) return wrong_use("%s: more than %d KV types", command, KV_LIST_ROOM);
    const int i = list->count++;
    size_t length = strcspn(entry, "=");
    snprintf(list->type[i], sizeof list->type[i], "%.*s", (int)(length < 23 ? length : 23), entry);
    list->names[i] = entry;
    if (!kv_type_find(list->type[i])) return unknown_type(command, list->type[i]);
    if (entry[length] != '=') continue;
    list->files[i] = entry + length + 1;
    if (kv_type_find(list->type[i])->kind != KV_FITTED) return wrong_use("%s: KV type %s takes no file", command, list->type[i]);
  }
  return list->count ? EXIT_DONE : wrong_use("%s: --kv needs at least one KV type", command);
}

int kv_list_check_runnable(const char *command, const struct kv_list *list) {
  for (int i = 0; i < list->count; i++)
    if (kv_type_find(list->type[i])->kind == KV_EVALUATION)
      return wrong_use("%s: KV type %s is for comparison in 'oscar eval' only: here it is computed but not stored", command,
                       list->names[i]);
  return EXIT_DONE;
}

/* The recipe a file was made with, so that it goes to the right entry. */
static oscar_status file_recipe(oscar_context *context, const char *path, char *recipe, size_t room) {
  oscar_codec_set *set = NULL;
  oscar_status status = oscar_codec_set_load(context, path, &set);
  if (status != OSCAR_OK) return status;
  snprintf(recipe, room, "%s", oscar_codec_set_describe(set)->recipe);
  oscar_codec_set_free(set);
  return OSCAR_OK;
}

oscar_status kv_list_obtain(struct kv_list *list, struct model *model, const char *rotation_file,
                            const struct progress *progress) {
  oscar_context *context = model_context(model);
  char recipe[64] = "";
  oscar_status status = rotation_file ? file_recipe(context, rotation_file, recipe, sizeof recipe) : OSCAR_OK;
  bool used = !rotation_file;
  const char *types[KV_LIST_ROOM], *files[KV_LIST_ROOM];
  oscar_codec_set *sets[KV_LIST_ROOM];
  int entry[KV_LIST_ROOM], count = 0; /* entries that have a set */
  for (int i = 0; i < list->count; i++) {
    if (kv_type_find(list->type[i])->kind == KV_EVALUATION) continue;
    const bool from_file = rotation_file && !list->files[i] && strcmp(recipe, list->type[i]) == 0;
    used = used || from_file;
    types[count] = list->type[i];
    files[count] = from_file ? rotation_file : list->files[i];
    entry[count++] = i;
  }
  if (status == OSCAR_OK) status = codec_sets_obtain(model, count, types, files, progress, sets);
  for (int i = 0; i < count && status == OSCAR_OK; i++) list->sets[entry[i]] = sets[i];
  if (status == OSCAR_OK && !used)
    return set_error(context, OSCAR_MISMATCH, "%s: the file was fitted for KV type %s, which is not in the list", rotation_file,
                     recipe);
  return status;
}

void kv_list_free(struct kv_list *list) {
  for (int i = 0; i < list->count; i++) oscar_codec_set_free(list->sets[i]);
  free(list->text);
  *list = (struct kv_list){0};
}
