/* response_store.c - a ring of texts: values are kept as JSON texts, so that no two threads share a value. */
#include "server/response_store.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct stored {
  char id[48];
  char *response, *items;
  size_t bytes;
};
struct response_store {
  pthread_mutex_t lock;
  struct stored *slots; /* [most], the oldest at `first` */
  int most, first, count;
  size_t most_bytes, bytes;
};

struct response_store *response_store_create(int most, size_t most_bytes) {
  struct response_store *s = calloc(1, sizeof *s);
  if (!s) return NULL;
  s->slots = calloc((size_t)most + 1, sizeof *s->slots);
  s->most = most;
  s->most_bytes = most_bytes;
  pthread_mutex_init(&s->lock, NULL);
  if (s->slots) return s;
  response_store_free(s);
  return NULL;
}

static struct stored *slot(struct response_store *s, int i) { return &s->slots[(s->first + i) % s->most]; }

static void empty(struct response_store *s, struct stored *one) {
  s->bytes -= one->bytes;
  free(one->response);
  free(one->items);
  *one = (struct stored){0};
}

void response_store_free(struct response_store *s) {
  if (!s) return;
  while (s->count > 0) empty(s, slot(s, --s->count));
  free(s->slots);
  pthread_mutex_destroy(&s->lock);
  free(s);
}

static int find(struct response_store *s, const char *id) {
  for (int i = s->count - 1; i >= 0; i--)
    if (strcmp(slot(s, i)->id, id) == 0) return i;
  return -1;
}

void response_store_put(struct response_store *s, const char *id, const json_t *response, const json_t *items) {
  struct stored one = {.response = json_dumps(response, JSON_COMPACT), .items = json_dumps(items, JSON_COMPACT)};
  snprintf(one.id, sizeof one.id, "%s", id);
  if (one.response && one.items) one.bytes = strlen(one.response) + strlen(one.items);
  pthread_mutex_lock(&s->lock);
  if (one.bytes > 0 && one.bytes <= s->most_bytes && s->most > 0) {
    while (s->count > 0 && (s->count == s->most || s->bytes + one.bytes > s->most_bytes)) {
      empty(s, slot(s, 0));
      s->first = (s->first + 1) % s->most;
      s->count--;
    }
    *slot(s, s->count++) = one;
    s->bytes += one.bytes;
    one = (struct stored){0};
  }
  pthread_mutex_unlock(&s->lock);
  free(one.response);
  free(one.items);
}

bool response_store_get(struct response_store *s, const char *id, json_t **response, json_t **items) {
  bool good = false;
  pthread_mutex_lock(&s->lock);
  const int i = find(s, id);
  if (i >= 0) {
    json_t *r = response ? json_loads(slot(s, i)->response, 0, NULL) : NULL,
           *k = items ? json_loads(slot(s, i)->items, 0, NULL) : NULL;
    good = (!response || r) && (!items || k);
    if (response) *response = r;
    if (items) *items = k;
  }
  pthread_mutex_unlock(&s->lock);
  return good;
}

bool response_store_remove(struct response_store *s, const char *id) {
  pthread_mutex_lock(&s->lock);
  const int i = find(s, id);
  if (i >= 0) {
    empty(s, slot(s, i));
    for (int k = i; k + 1 < s->count; k++) *slot(s, k) = *slot(s, k + 1);
    *slot(s, --s->count) = (struct stored){0};
  }
  pthread_mutex_unlock(&s->lock);
  return i >= 0;
}
