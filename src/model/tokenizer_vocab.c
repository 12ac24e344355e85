/*
 * tokenizer_vocab.c - the store of tokens behind a tokenizer: pieces, the hash from bytes to ids, tries of marked tokens.
 *
 * Everything is built once from the model file and only read afterwards, so a tokenizer can be used from many threads. The hash
 * is open addressing at most half full; a slot keeps the hash so that a miss rarely touches the pieces.
 */
#include "model/tokenizer_impl.h"

#include <string.h>

oscar_status id_list_add(oscar_context *context, struct id_list *list, int32_t id) {
  if (list->count == list->capacity) {
    size_t capacity = list->capacity ? 2 * list->capacity : 64;
    int32_t *ids =
        mem_resize(context, list->ids, list->count * sizeof *ids, capacity * sizeof *ids); /* capacity < 2^31: TEXT_BYTES_MAX */
    if (!ids) return OSCAR_NO_MEMORY;
    list->ids = ids;
    list->capacity = capacity;
  }
  list->ids[list->count++] = id;
  return OSCAR_OK;
}

/* ---- pieces ---- */

/* Eight bytes at a time, multiply and fold; only spread matters, the model file is not an adversary worth more. */
static uint32_t hash_bytes(const char *text, size_t bytes) {
  uint64_t h = 0x9E3779B97F4A7C15u ^ bytes;
  while (bytes >= 8) {
    uint64_t word;
    memcpy(&word, text, 8);
    h = (h ^ word) * 0xD6E8FEB86659FD93u;
    h ^= h >> 32;
    text += 8;
    bytes -= 8;
  }
  uint64_t word = 0;
  for (size_t i = 0; i < bytes; i++) word |= (uint64_t)(uint8_t)text[i] << (8 * i);
  h = (h ^ word) * 0xD6E8FEB86659FD93u;
  return (uint32_t)(h ^ (h >> 32));
}

oscar_status vocabulary_create(oscar_context *context, int32_t size, size_t text_bytes, struct vocabulary *vocabulary) {
  uint32_t slots = 64;
  while (slots < 2 * (uint32_t)size) slots *= 2;
  *vocabulary = (struct vocabulary){.mask = slots - 1};
  vocabulary->text = mem_alloc(context, text_bytes, 1);
  vocabulary->offset = mem_zalloc(context, (size_t)size + 1, sizeof *vocabulary->offset);
  vocabulary->type = mem_zalloc(context, (size_t)size, 1);
  vocabulary->slots = mem_alloc(context, slots, sizeof *vocabulary->slots);
  if (!vocabulary->text || !vocabulary->offset || !vocabulary->type || !vocabulary->slots) {
    vocabulary_free(context, vocabulary);
    return OSCAR_NO_MEMORY;
  }
  memset(vocabulary->slots, 0xFF, slots * sizeof *vocabulary->slots);
  vocabulary->size = size;
  return OSCAR_OK;
}

void vocabulary_free(oscar_context *context, struct vocabulary *vocabulary) {
  mem_free(context, vocabulary->text);
  mem_free(context, vocabulary->offset);
  mem_free(context, vocabulary->type);
  mem_free(context, vocabulary->slots);
  *vocabulary = (struct vocabulary){0};
}

/* The slot that holds these bytes, or the free one where they would go. */
static struct vocabulary_slot *slot_of(const struct vocabulary *v, uint32_t hash, const char *text, size_t bytes) {
  for (uint32_t i = hash & v->mask;; i = (i + 1) & v->mask) {
    struct vocabulary_slot *slot = &v->slots[i];
    if (slot->id < 0) return slot;
    if (slot->hash != hash) continue;
    size_t have;
    const char *piece = vocabulary_piece(v, slot->id, &have);
    if (have == bytes && memcmp(piece, text, bytes) == 0) return slot;
  }
}

void vocabulary_index(struct vocabulary *vocabulary, int32_t id) {
  size_t bytes;
  const char *piece = vocabulary_piece(vocabulary, id, &bytes);
  uint32_t hash = hash_bytes(piece, bytes);
  struct vocabulary_slot *slot = slot_of(vocabulary, hash, piece, bytes);
  if (slot->id < 0) *slot = (struct vocabulary_slot){hash, id};
}

int32_t vocabulary_find(const struct vocabulary *vocabulary, const char *text, size_t bytes) {
  return slot_of(vocabulary, hash_bytes(text, bytes), text, bytes)->id;
}

/* ---- tries ---- */

static oscar_status trie_node_add(oscar_context *context, struct token_trie *trie, uint8_t byte, int32_t *index) {
  if (trie->count == trie->capacity) {
    int32_t capacity = 2 * trie->capacity;
    struct trie_node *nodes =
        mem_resize(context, trie->nodes, (size_t)trie->count * sizeof *nodes, (size_t)capacity * sizeof *nodes);
    if (!nodes) return OSCAR_NO_MEMORY;
    trie->nodes = nodes;
    trie->capacity = capacity;
  }
  *index = trie->count++;
  trie->nodes[*index] = (struct trie_node){.id = -1, .byte = byte};
  return OSCAR_OK;
}

static int32_t trie_child(const struct token_trie *trie, int32_t node, uint8_t byte) {
  int32_t child = trie->nodes[node].child;
  while (child && trie->nodes[child].byte != byte) child = trie->nodes[child].sibling;
  return child;
}

static oscar_status trie_add(oscar_context *context, struct token_trie *trie, const char *text, size_t bytes, int32_t id) {
  int32_t node = 1 + (uint8_t)text[0];
  for (size_t i = 1; i < bytes; i++) {
    uint8_t byte = (uint8_t)text[i];
    int32_t child = trie_child(trie, node, byte);
    if (!child) {
      oscar_status status = trie_node_add(context, trie, byte, &child);
      if (status) return status;
      trie->nodes[child].sibling = trie->nodes[node].child;
      trie->nodes[node].child = child;
    }
    node = child;
  }
  if (trie->nodes[node].id < 0) trie->nodes[node].id = id;
  return OSCAR_OK;
}

oscar_status token_trie_create(oscar_context *context, const struct vocabulary *vocabulary, unsigned types,
                               struct token_trie *trie) {
  *trie = (struct token_trie){.count = 257, .capacity = 1024};
  trie->nodes = mem_alloc(context, (size_t)trie->capacity, sizeof *trie->nodes);
  if (!trie->nodes) return OSCAR_NO_MEMORY;
  for (int i = 0; i < 257; i++) trie->nodes[i] = (struct trie_node){.id = -1};
  for (int32_t id = 0; id < vocabulary->size; id++) {
    size_t bytes;
    const char *piece = vocabulary_piece(vocabulary, id, &bytes);
    if (!(types >> vocabulary->type[id] & 1) || bytes == 0) continue;
    if (trie_add(context, trie, piece, bytes, id) != OSCAR_OK) {
      token_trie_free(context, trie);
      return OSCAR_NO_MEMORY;
    }
  }
  return OSCAR_OK;
}

void token_trie_free(oscar_context *context, struct token_trie *trie) {
  mem_free(context, trie->nodes);
  *trie = (struct token_trie){0};
}

int32_t token_trie_match(const struct token_trie *trie, const char *text, size_t left, size_t *bytes) {
  int32_t found = -1, node = 1 + (uint8_t)text[0];
  for (size_t i = 1;; i++) {
    if (trie->nodes[node].id >= 0) {
      found = trie->nodes[node].id;
      *bytes = i;
    }
    if (i >= left || !(node = trie_child(trie, node, (uint8_t)text[i]))) return found;
  }
}
