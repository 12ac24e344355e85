/*
 * tokenizer_merge.c - byte pair merging in O(n log n).
 *
 * The symbols form a doubly linked list over an array; a heap holds the pairs that can merge, ordered by priority and then by
 * place, which is the order in which repeated scans "merge the best pair, leftmost first" would find them. A merge leaves old
 * heap entries of its neighbours behind; such an entry is known by the length of the pair, which only grows.
 *
 * Room: n symbols start with at most n-1 entries and each of at most n-1 merges takes one out and puts two in.
 */
#include "model/tokenizer_impl.h"

oscar_status merge_begin(oscar_context *context, struct merge_work *work, size_t symbols) {
  work->count = work->heap_count = 0;
  if (symbols <= work->capacity) return OSCAR_OK;
  merge_free(context, work);
  size_t capacity = symbols < 256 ? 256 : symbols;
  work->symbols = mem_alloc(context, capacity, sizeof *work->symbols);
  work->heap = mem_alloc(context, 2 * capacity, sizeof *work->heap);
  if (!work->symbols || !work->heap) {
    merge_free(context, work);
    return OSCAR_NO_MEMORY;
  }
  work->capacity = capacity;
  return OSCAR_OK;
}

void merge_free(oscar_context *context, struct merge_work *work) {
  mem_free(context, work->symbols);
  mem_free(context, work->heap);
  *work = (struct merge_work){0};
}

void merge_add(struct merge_work *work, size_t start, size_t bytes, int32_t id, bool frozen) {
  int32_t index = (int32_t)work->count++;
  work->symbols[index] = (struct merge_symbol){
      .start = (uint32_t)start, .bytes = (uint32_t)bytes, .id = id, .previous = index - 1, .next = -1, .frozen = frozen};
  if (index > 0) work->symbols[index - 1].next = index;
}

static void heap_push(struct merge_work *work, struct merge_candidate entry) {
  size_t i = work->heap_count++;
  while (i > 0 && work->heap[(i - 1) / 2].order > entry.order) {
    work->heap[i] = work->heap[(i - 1) / 2];
    i = (i - 1) / 2;
  }
  work->heap[i] = entry;
}

static struct merge_candidate heap_pop(struct merge_work *work) {
  struct merge_candidate *heap = work->heap, top = heap[0], last = heap[--work->heap_count];
  size_t i = 0, count = work->heap_count;
  for (;;) {
    size_t child = 2 * i + 1;
    if (child >= count) break;
    if (child + 1 < count && heap[child + 1].order < heap[child].order) child++;
    if (heap[child].order >= last.order) break;
    heap[i] = heap[child];
    i = child;
  }
  heap[i] = last;
  return top;
}

static void consider(struct merge_work *work, int32_t left, const char *text, merge_rule *rule, const void *rules) {
  if (left < 0 || work->symbols[left].next < 0) return;
  const struct merge_symbol *l = &work->symbols[left], *r = &work->symbols[l->next];
  uint32_t priority;
  int32_t id;
  if (l->frozen || r->frozen || !rule(rules, text, l, r, &priority, &id)) return;
  heap_push(work, (struct merge_candidate){(uint64_t)priority << 32 | (uint32_t)left, l->bytes + r->bytes, id});
}

void merge_run(struct merge_work *work, const char *text, merge_rule *rule, const void *rules) {
  for (size_t i = 0; i < work->count; i++) consider(work, (int32_t)i, text, rule, rules);
  while (work->heap_count > 0) {
    struct merge_candidate top = heap_pop(work);
    int32_t left = (int32_t)(uint32_t)top.order;
    struct merge_symbol *l = &work->symbols[left];
    if (l->bytes == 0 || l->next < 0) continue;
    struct merge_symbol *r = &work->symbols[l->next];
    if (l->bytes + r->bytes != top.bytes) continue;
    l->bytes = top.bytes;
    l->id = top.id;
    l->next = r->next;
    r->bytes = 0;
    if (l->next >= 0) work->symbols[l->next].previous = left;
    consider(work, l->previous, text, rule, rules);
    consider(work, left, text, rule, rules);
  }
}
