/*
 * codec_set.c - which codec serves which (layer, KV head, side) of a model.
 *
 * A table of references. A codec may stand in many places; it lives as long as the last of them. The set owns its strings.
 */
#include "quant/codec.h"

#include <string.h>

#define MAX_PLACES (1 << 24) /* 2^24 pointers: far beyond any model, small enough that sizes cannot overflow */

struct oscar_codec_set {
  oscar_context *context;
  oscar_codec_set_info info; /* strings owned */
  char *recipe, *fingerprint, *provenance;
  oscar_codec **codecs; /* [layers][kv_heads][2] */
};

static size_t places(const oscar_codec_set_info *info) { return (size_t)info->layers * (size_t)info->kv_heads * 2; }

static oscar_status check_info(oscar_context *context, const oscar_codec_set_info *info) {
  if (info->layers < 1 || info->kv_heads < 1 || info->layers > MAX_PLACES / 2 / info->kv_heads)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "codec set: %d layers of %d KV heads", info->layers, info->kv_heads);
  if (info->head_dim < 16 || info->head_dim > OSCAR_MAX_HEAD_DIM || info->head_dim % 16)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "codec set: head_dim %d is not a multiple of 16 from 16 to %d",
                     info->head_dim, OSCAR_MAX_HEAD_DIM);
  if (!info->recipe || !*info->recipe || strlen(info->recipe) > 63)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "codec set: the recipe's name is not 1 to 63 bytes long");
  return OSCAR_OK;
}

oscar_status oscar_codec_set_create(oscar_context *context, const oscar_codec_set_info *info, oscar_codec_set **set) {
  *set = NULL;
  oscar_status status = check_info(context, info);
  if (status != OSCAR_OK) return status;
  oscar_codec_set *s = mem_zalloc(context, 1, sizeof *s);
  if (!s) return OSCAR_NO_MEMORY;
  s->context = context;
  s->info = *info;
  s->recipe = mem_strdup(context, info->recipe);
  s->fingerprint = s->recipe ? mem_strdup(context, info->fingerprint ? info->fingerprint : "") : NULL;
  s->provenance = s->fingerprint ? mem_strdup(context, info->provenance ? info->provenance : "") : NULL;
  s->codecs = s->provenance ? mem_zalloc(context, places(info), sizeof(oscar_codec *)) : NULL;
  if (!s->codecs) {
    oscar_codec_set_free(s);
    return OSCAR_NO_MEMORY;
  }
  s->info.recipe = s->recipe;
  s->info.fingerprint = s->fingerprint;
  s->info.provenance = s->provenance;
  *set = s;
  return OSCAR_OK;
}

void oscar_codec_set_free(oscar_codec_set *set) {
  if (!set) return;
  for (size_t i = 0; set->codecs && i < places(&set->info); i++) oscar_codec_release(set->codecs[i]);
  oscar_context *context = set->context;
  mem_free(context, set->codecs);
  mem_free(context, set->recipe);
  mem_free(context, set->fingerprint);
  mem_free(context, set->provenance);
  mem_free(context, set);
}

/* The place of a codec in the table, or NULL if there is none. */
static oscar_codec **place(const oscar_codec_set *set, int layer, int kv_head, oscar_side side) {
  const oscar_codec_set_info *info = &set->info;
  if (layer < 0 || layer >= info->layers || kv_head < 0 || kv_head >= info->kv_heads) return NULL;
  if (side != OSCAR_KEYS && side != OSCAR_VALUES) return NULL;
  return &set->codecs[((size_t)layer * (size_t)info->kv_heads + (size_t)kv_head) * 2 + (size_t)side];
}

oscar_status oscar_codec_set_assign(oscar_codec_set *set, int layer, int kv_head, oscar_side side, oscar_codec *codec) {
  const oscar_codec_set_info *info = &set->info;
  oscar_codec **to = place(set, layer, kv_head, side);
  if (!to)
    return set_error(set->context, OSCAR_INVALID_ARGUMENT, "codec set: no layer %d, KV head %d, side %d (it has %d layers of %d)",
                     layer, kv_head, (int)side, info->layers, info->kv_heads);
  if (!codec) return set_error(set->context, OSCAR_INVALID_ARGUMENT, "codec set: the codec to assign is NULL");
  if (codec->spec.head_dim != info->head_dim)
    return set_error(set->context, OSCAR_INVALID_ARGUMENT, "codec set: a codec of head_dim %d in a set of head_dim %d",
                     codec->spec.head_dim, info->head_dim);
  oscar_codec_retain(codec); /* first: it may be the one that is replaced */
  oscar_codec_release(*to);
  *to = codec;
  return OSCAR_OK;
}

const oscar_codec *oscar_codec_set_get(const oscar_codec_set *set, int layer, int kv_head, oscar_side side) {
  oscar_codec **at = place(set, layer, kv_head, side);
  return at ? *at : NULL;
}

oscar_context *codec_set_context(const oscar_codec_set *set) { return set->context; }

const oscar_codec_set_info *oscar_codec_set_describe(const oscar_codec_set *set) { return &set->info; }

static oscar_status check_layer_side(const oscar_codec_set *set, int layer, oscar_side side) {
  const char *name = side == OSCAR_KEYS ? "keys" : "values";
  const oscar_codec *first = oscar_codec_set_get(set, layer, 0, side);
  for (int head = 0; head < set->info.kv_heads; head++) {
    const oscar_codec *codec = oscar_codec_set_get(set, layer, head, side);
    if (!codec)
      return set_error(set->context, OSCAR_INVALID_ARGUMENT, "codec set: layer %d, KV head %d, %s: no codec is assigned", layer,
                       head, name);
    if (side == OSCAR_VALUES && codec->spec.rope)
      return set_error(set->context, OSCAR_INVALID_ARGUMENT, "codec set: layer %d, KV head %d: values with a rotating mean",
                       layer, head);
    if (codec->spec.rotating_pairs != first->spec.rotating_pairs || !rope_equal(codec->spec.rope, first->spec.rope))
      return set_error(set->context, OSCAR_INVALID_ARGUMENT,
                       "codec set: layer %d, keys: KV head %d has %d rotating pairs, head 0 has %d, or they turn differently",
                       layer, head, codec->spec.rotating_pairs, first->spec.rotating_pairs);
    if (codec->crumbs != first->crumbs || codec->spec.form != first->spec.form || codec->spec.groups != first->spec.groups)
      return set_error(set->context, OSCAR_INVALID_ARGUMENT,
                       "codec set: layer %d, %s: KV head %d has %d crumbs, form %d, %d groups, but head 0 has %d, %d, %d", layer,
                       name, head, codec->crumbs, (int)codec->spec.form, codec->spec.groups, first->crumbs, (int)first->spec.form,
                       first->spec.groups);
  }
  return OSCAR_OK;
}

oscar_status oscar_codec_set_check(const oscar_codec_set *set) {
  for (int layer = 0; layer < set->info.layers; layer++) {
    oscar_status status = check_layer_side(set, layer, OSCAR_KEYS);
    if (status == OSCAR_OK) status = check_layer_side(set, layer, OSCAR_VALUES);
    if (status != OSCAR_OK) return status;
  }
  return OSCAR_OK;
}
