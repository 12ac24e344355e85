/*
 * automaton.c - runs a grammar's program over bytes, and remembers everything it found out.
 *
 * Calls make a tree of frames (where to go on, inside of which frame), of which equal ones are one, so that a place is a pair of
 * numbers and a situation a sorted list of pairs. Both are found again by hashing. The next situation is stored by class of byte
 * once it was computed: on text that the automaton has seen it is a table look-up, whatever the grammar. A call at the end of a
 * rule leaves no frame, so lists do not pile them up.
 *
 * Which tokens fit is found by a walk over the tree of spellings. Where that takes long, as inside strings, most of the answer
 * does not depend on the frames below the innermost common one: the walk is then made once with a frame instead of those below
 * which nothing is known, and remembered; spellings that leave it (a closing quote and what follows) are walked with the real
 * frames each time. The idea of telling tokens apart by whether they leave the rule is XGrammar's (Dong and others,
 * arXiv 2411.15100).
 *
 * A count is a copy of code for every repetition, and each would be a situation with a walk of its own. A token takes a byte at
 * least for each, so where more copies follow than the longest token has bytes, it does not matter how many: the walk is made for
 * the last such copy.
 *
 * Memory is bounded: past a limit, all is forgotten but what is in use; a single step or walk that would take more is refused.
 */
#include "engine/grammar/automaton.h"

#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

enum {
  ROOT = 0,   /* the frame of the grammar itself: when it is left, the text may end */
  BOTTOM = 1, /* the frame below which nothing is known */
  UNKNOWN = -1,
  MOST_PLACES = 1 << 13,  /* of a situation */
  MOST_VISITS = 1 << 18,  /* of instructions, for one step */
  WORTH_KEEPING = 1 << 11 /* nodes that a walk has to visit for its result to be remembered */
};
#define TIDY_BYTES ((size_t)64 << 20)  /* from here on, forget at the next occasion */
#define MOST_BYTES ((size_t)384 << 20) /* and here at once, with an error */

struct frame {
  int32_t return_to, below, depth;
};
struct place {
  int32_t at, frame; /* an instruction that takes a byte */
};
struct walk_result { /* of a situation whose lowest frame is ROOT or BOTTOM */
  uint64_t *allowed;
  int32_t *leaving; /* nodes of the token tree where BOTTOM was left: what begins so is decided elsewhere */
  size_t n_leaving, room;
};
struct situation {
  size_t first_place;
  int32_t n_places;
  bool accepts, leaves; /* ROOT or BOTTOM was left on the way here */
  int32_t cut;          /* the same for a walk (compute_cut); UNKNOWN: not yet asked for */
  struct walk_result *walk;
};
struct index { /* open addressing; -1 is free */
  int32_t *slots;
  size_t mask, used;
};

struct memory { /* all that is forgotten together */
  struct frame *frames;
  size_t n_frames, frame_room;
  struct place *places;
  size_t n_places, place_room;
  struct situation *situations;
  size_t n_situations, situation_room;
  int32_t *next; /* [n_situations][n_classes] */
  size_t next_room;
  struct index frame_index, situation_index;
  size_t walk_bytes;
};

struct automaton {
  struct automaton *other; /* of the same grammar, for another table */
  const struct grammar *grammar;
  const struct token_table *table;
  uint64_t serial;
  oscar_status status;
  struct memory m;
  struct situation_holder held; /* head of a ring */
  /* ---- work of one step ---- */
  struct place *found, *waiting;
  size_t n_found, found_room, n_waiting, waiting_room;
  bool accepts, leaves;
  uint64_t *visited; /* open addressing of places, with the number of the step */
  uint32_t *visited_step;
  size_t visited_mask, n_visited;
  uint32_t step;
  /* ---- of a walk ---- */
  int32_t *path; /* [most_bytes + 1] situations by depth */
};

/* ---- small things ---- */

static int32_t fail(struct automaton *a, oscar_status status) {
  if (a->status == OSCAR_OK) a->status = status;
  return -1;
}

oscar_status automaton_status(struct automaton *a) {
  const oscar_status status = a->status;
  a->status = OSCAR_OK;
  return status;
}

static size_t bytes_held(const struct automaton *a) {
  const struct memory *m = &a->m;
  return m->frame_room * sizeof *m->frames + m->place_room * sizeof *m->places + m->situation_room * sizeof *m->situations +
         m->next_room * sizeof *m->next + (m->frame_index.mask + m->situation_index.mask) * sizeof(int32_t) + m->walk_bytes;
}

/* Doubles the slots when they are half full. The caller puts everything in again where this says so. */
static bool index_grow(struct index *index, bool *grown) {
  *grown = !index->slots || 2 * (index->used + 1) > index->mask;
  if (!*grown) return true;
  const size_t size = index->slots ? 2 * (index->mask + 1) : 64;
  int32_t *slots = malloc(size * sizeof *slots);
  if (!slots) return false;
  memset(slots, 0xFF, size * sizeof *slots);
  free(index->slots);
  *index = (struct index){slots, size - 1, 0};
  return true;
}

static void index_put(struct index *index, uint64_t hash, int32_t value) {
  size_t i = hash & index->mask;
  while (index->slots[i] >= 0) i = (i + 1) & index->mask;
  index->slots[i] = value;
  index->used++;
}

/* ---- frames ---- */

static uint64_t frame_hash(int32_t return_to, int32_t below) {
  const int32_t pair[2] = {return_to, below};
  return XXH3_64bits(pair, sizeof pair);
}

static int32_t frame_of(struct automaton *a, int32_t return_to, int32_t below) {
  struct memory *m = &a->m;
  bool grown;
  if (!index_grow(&m->frame_index, &grown)) return fail(a, OSCAR_NO_MEMORY);
  for (size_t i = BOTTOM + 1; grown && i < m->n_frames; i++)
    index_put(&m->frame_index, frame_hash(m->frames[i].return_to, m->frames[i].below), (int32_t)i);
  const uint64_t hash = frame_hash(return_to, below);
  for (size_t i = hash & m->frame_index.mask; m->frame_index.slots[i] >= 0; i = (i + 1) & m->frame_index.mask) {
    const struct frame *f = &m->frames[m->frame_index.slots[i]];
    if (f->return_to == return_to && f->below == below) return m->frame_index.slots[i];
  }
  if (!room_for((void **)&m->frames, &m->frame_room, m->n_frames, sizeof *m->frames)) return fail(a, OSCAR_NO_MEMORY);
  m->frames[m->n_frames] = (struct frame){return_to, below, m->frames[below].depth + 1};
  index_put(&m->frame_index, hash, (int32_t)m->n_frames);
  return (int32_t)m->n_frames++;
}

/* ---- situations ---- */

static uint64_t situation_hash(const struct place *places, size_t n, bool accepts, bool leaves) {
  return XXH3_64bits_withSeed(places, n * sizeof *places, (uint64_t)accepts << 1 | leaves);
}

static int32_t situation_of(struct automaton *a, const struct place *places, size_t n, bool accepts, bool leaves) {
  struct memory *m = &a->m;
  bool grown;
  if (!index_grow(&m->situation_index, &grown)) return fail(a, OSCAR_NO_MEMORY);
  for (size_t i = 0; grown && i < m->n_situations; i++) {
    const struct situation *s = &m->situations[i];
    index_put(&m->situation_index, situation_hash(m->places + s->first_place, (size_t)s->n_places, s->accepts, s->leaves),
              (int32_t)i);
  }
  const uint64_t hash = situation_hash(places, n, accepts, leaves);
  for (size_t i = hash & m->situation_index.mask; m->situation_index.slots[i] >= 0; i = (i + 1) & m->situation_index.mask) {
    const struct situation *s = &m->situations[m->situation_index.slots[i]];
    if ((size_t)s->n_places == n && s->accepts == accepts && s->leaves == leaves &&
        (n == 0 || memcmp(m->places + s->first_place, places, n * sizeof *places) == 0))
      return m->situation_index.slots[i];
  }
  const size_t classes = (size_t)a->grammar->n_classes;
  if (bytes_held(a) > MOST_BYTES) return fail(a, OSCAR_NO_SPACE);
  if (!room_for((void **)&m->places, &m->place_room, m->n_places + n, sizeof *m->places) ||
      !room_for((void **)&m->situations, &m->situation_room, m->n_situations, sizeof *m->situations) ||
      !room_for((void **)&m->next, &m->next_room, (m->n_situations + 1) * classes, sizeof *m->next))
    return fail(a, OSCAR_NO_MEMORY);
  if (n) memcpy(m->places + m->n_places, places, n * sizeof *places);
  m->situations[m->n_situations] = (struct situation){
      .first_place = m->n_places, .n_places = (int32_t)n, .accepts = accepts, .leaves = leaves, .cut = UNKNOWN};
  m->n_places += n;
  for (size_t c = 0; c < classes; c++) m->next[m->n_situations * classes + c] = n ? UNKNOWN : DEAD;
  index_put(&m->situation_index, hash, (int32_t)m->n_situations);
  return (int32_t)m->n_situations++;
}

/* ---- following the program up to the instructions that take a byte ---- */

/* Whether a place was not yet visited in this step. */
static bool visit(struct automaton *a, int32_t at, int32_t frame) {
  if (2 * (a->n_visited + 1) > a->visited_mask) {
    const size_t size = a->visited ? 2 * (a->visited_mask + 1) : 256;
    uint64_t *visited = malloc(size * sizeof *visited);
    uint32_t *stamps = calloc(size, sizeof *stamps);
    if (!visited || !stamps) {
      free(visited);
      free(stamps);
      return fail(a, OSCAR_NO_MEMORY), false;
    }
    const size_t old_size = a->visited ? a->visited_mask + 1 : 0;
    for (size_t i = 0; i < old_size; i++) {
      if (a->visited_step[i] != a->step) continue;
      size_t k = XXH3_64bits(&a->visited[i], sizeof a->visited[i]) & (size - 1);
      while (stamps[k] == a->step) k = (k + 1) & (size - 1);
      visited[k] = a->visited[i];
      stamps[k] = a->step;
    }
    free(a->visited);
    free(a->visited_step);
    a->visited = visited;
    a->visited_step = stamps;
    a->visited_mask = size - 1;
  }
  const uint64_t key = (uint64_t)(uint32_t)at << 32 | (uint32_t)frame;
  size_t i = XXH3_64bits(&key, sizeof key) & a->visited_mask;
  for (; a->visited_step[i] == a->step; i = (i + 1) & a->visited_mask)
    if (a->visited[i] == key) return false;
  a->visited[i] = key;
  a->visited_step[i] = a->step;
  if (++a->n_visited > MOST_VISITS) fail(a, OSCAR_UNSUPPORTED);
  return true;
}

static void begin_step(struct automaton *a) {
  a->n_found = a->n_waiting = a->n_visited = 0;
  a->accepts = a->leaves = false;
  if (++a->step == 0) { /* stamps of 2^32 steps ago would count */
    if (a->visited_step) memset(a->visited_step, 0, (a->visited_mask + 1) * sizeof *a->visited_step);
    a->step = 1;
  }
}

static void wait_for(struct automaton *a, int32_t at, int32_t frame) {
  if (frame < 0 || !a->grammar->code[at].useful || !visit(a, at, frame)) return;
  if (room_for((void **)&a->waiting, &a->waiting_room, a->n_waiting, sizeof *a->waiting))
    a->waiting[a->n_waiting++] = (struct place){at, frame};
  else
    fail(a, OSCAR_NO_MEMORY);
}

/* The end of a rule: on behind the call. */
static void leave_frame(struct automaton *a, int32_t frame) {
  const struct frame *f = &a->m.frames[frame];
  if (frame == ROOT)
    a->accepts = true;
  else if (frame == BOTTOM)
    a->leaves = true;
  else
    wait_for(a, f->return_to, f->below);
}

static void follow(struct automaton *a) {
  const struct instruction *code = a->grammar->code;
  while (a->n_waiting > 0 && a->status == OSCAR_OK) {
    const struct place p = a->waiting[--a->n_waiting];
    const struct instruction *in = &code[p.at];
    switch ((enum instruction_kind)in->kind) {
    case BYTE_IN:
      if (a->n_found >= MOST_PLACES) fail(a, OSCAR_UNSUPPORTED);
      if (!room_for((void **)&a->found, &a->found_room, a->n_found, sizeof *a->found)) fail(a, OSCAR_NO_MEMORY);
      if (a->status == OSCAR_OK) a->found[a->n_found++] = p;
      break;
    case SPLIT:
      wait_for(a, in->next, p.frame);
      wait_for(a, in->other, p.frame);
      break;
    case CALL_RULE: /* what is called last in a rule returns to where the rule does */
      wait_for(a, in->other, code[in->next].kind == RETURN ? p.frame : frame_of(a, in->next, p.frame));
      break;
    case RETURN:
      leave_frame(a, p.frame);
      break;
    }
  }
}

static int by_place(const void *x, const void *y) {
  const struct place *a = x, *b = y;
  if (a->at != b->at) return a->at < b->at ? -1 : 1;
  return (a->frame > b->frame) - (a->frame < b->frame);
}

static int32_t end_step(struct automaton *a) {
  follow(a);
  if (a->status != OSCAR_OK) return -1;
  if (a->n_found > 1) qsort(a->found, a->n_found, sizeof *a->found, by_place);
  return situation_of(a, a->found, a->n_found, a->accepts, a->leaves);
}

static int32_t compute_step(struct automaton *a, int32_t situation, int class) {
  const struct grammar *g = a->grammar;
  begin_step(a);
  for (int32_t i = 0; i < a->m.situations[situation].n_places; i++) {
    const struct place p = a->m.places[a->m.situations[situation].first_place + (size_t)i];
    if (g->set_has[g->code[p.at].set * g->n_classes + class]) wait_for(a, g->code[p.at].next, p.frame);
  }
  const int32_t next = end_step(a);
  if (next >= 0) a->m.next[(size_t)situation * (size_t)g->n_classes + (size_t) class] = next;
  return next;
}

int32_t automaton_step(struct automaton *a, int32_t situation, uint8_t byte) {
  const int class = a->grammar->class_of[byte];
  const int32_t known = a->m.next[(size_t)situation * (size_t)a->grammar->n_classes + (size_t) class];
  return known != UNKNOWN ? known : compute_step(a, situation, class);
}

int32_t automaton_steps(struct automaton *a, int32_t situation, const char *text, size_t bytes) {
  for (size_t i = 0; i < bytes && situation > DEAD; i++) situation = automaton_step(a, situation, (uint8_t)text[i]);
  return situation;
}

int32_t automaton_begin(struct automaton *a) {
  begin_step(a);
  wait_for(a, a->grammar->start, ROOT);
  return end_step(a);
}

bool automaton_accepts(const struct automaton *a, int32_t situation) { return a->m.situations[situation].accepts; }
bool automaton_goes_on(const struct automaton *a, int32_t situation) { return a->m.situations[situation].n_places > 0; }

/* ---- what walks do not depend on: the frames that all places share, and how much is left of long repetitions ---- */

static int32_t common_frame(const struct automaton *a, int32_t x, int32_t y) {
  const struct frame *frames = a->m.frames;
  while (x != y) {
    if (frames[x].depth >= frames[y].depth)
      x = frames[x].below;
    else
      y = frames[y].below;
    if (x < 0 || y < 0) return ROOT;
  }
  return x;
}

/* That the instruction is in; NULL: none. */
static const struct stretch *stretch_at(const struct grammar *g, int32_t at) {
  int low = 0, high = g->n_stretches;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (g->stretches[middle].first <= at)
      low = middle + 1;
    else
      high = middle;
  }
  const struct stretch *s = low > 0 ? &g->stretches[low - 1] : NULL;
  return s && (at - s->first) / s->stride < s->copies ? s : NULL;
}

/* The instruction, or its like in the last copy of a stretch that no token can get to the end of. */
static int32_t shift(const struct automaton *a, int32_t at) {
  const struct stretch *s = stretch_at(a->grammar, at);
  if (!s) return at;
  const int32_t copy = (at - s->first) / s->stride, enough = a->table->most_bytes;
  return copy > enough ? at - (copy - enough) * s->stride : at;
}

/* The same frame on `onto` instead of `on`. */
static int32_t move_frame(struct automaton *a, int32_t frame, int32_t on, int32_t onto) {
  size_t n = a->n_waiting = 0;
  for (; frame != on; frame = a->m.frames[frame].below) {
    if (!room_for((void **)&a->waiting, &a->waiting_room, n, sizeof *a->waiting)) return fail(a, OSCAR_NO_MEMORY);
    a->waiting[n++] = (struct place){shift(a, a->m.frames[frame].return_to), frame};
  }
  int32_t moved = onto;
  while (n > 0 && moved >= 0) moved = frame_of(a, a->waiting[--n].at, moved);
  return moved;
}

static int32_t compute_cut(struct automaton *a, int32_t situation) {
  const struct situation s = a->m.situations[situation];
  int32_t common = s.n_places ? a->m.places[s.first_place].frame : ROOT;
  for (int32_t i = 1; i < s.n_places; i++) common = common_frame(a, common, a->m.places[s.first_place + (size_t)i].frame);
  /* Inside of one of many copies, what leaves it is another copy: that is no matter of what is below. */
  while (common != ROOT && common != BOTTOM && stretch_at(a->grammar, a->m.frames[common].return_to))
    common = a->m.frames[common].below;
  const bool lowest = common == ROOT || common == BOTTOM;
  if (!room_for((void **)&a->found, &a->found_room, (size_t)s.n_places, sizeof *a->found)) return fail(a, OSCAR_NO_MEMORY);
  for (int32_t i = 0; i < s.n_places; i++) {
    const struct place p = a->m.places[s.first_place + (size_t)i];
    const int32_t moved = move_frame(a, p.frame, common, lowest ? common : BOTTOM);
    if (moved < 0) return -1;
    a->found[i] = (struct place){shift(a, p.at), moved};
  }
  if (s.n_places > 1) qsort(a->found, (size_t)s.n_places, sizeof *a->found, by_place);
  size_t n = 0;
  for (int32_t i = 0; i < s.n_places; i++)
    if (n == 0 || by_place(&a->found[n - 1], &a->found[i]) != 0) a->found[n++] = a->found[i];
  return situation_of(a, a->found, n, lowest && s.accepts, lowest && s.leaves);
}

/* ---- walks over the spellings ---- */

static void mark_tokens(const struct token_table *t, int32_t node, uint64_t *allowed) {
  for (int32_t k = t->first_token[node]; k < t->first_token[node + 1]; k++) {
    const int32_t id = t->order[k];
    allowed[id / 64] |= (uint64_t)1 << id % 64;
  }
}

/* What begins with the spelling of `top`, whose situation is in path. Nodes that leave BOTTOM go into `leaving`, with all that
 * begins with them, where they are asked for. Returns how many nodes it looked at, -1 after an error. */
static int64_t walk(struct automaton *a, int32_t top, uint64_t *allowed, struct walk_result *leaving) {
  const struct token_table *t = a->table;
  int64_t visits = 0;
  for (int32_t node = top + 1; node < t->end[top]; visits++) {
    const int32_t situation = automaton_step(a, a->path[t->depth[node] - 1], t->byte[node]);
    if (situation < 0) return -1;
    if (situation == DEAD) {
      node = t->end[node];
      continue;
    }
    a->path[t->depth[node]] = situation;
    mark_tokens(t, node, allowed);
    if (leaving && a->m.situations[situation].leaves && t->end[node] > node + 1) {
      if (!room_for((void **)&leaving->leaving, &leaving->room, leaving->n_leaving, sizeof *leaving->leaving))
        return fail(a, OSCAR_NO_MEMORY);
      leaving->leaving[leaving->n_leaving++] = node;
      node = t->end[node];
      continue;
    }
    node++;
  }
  return visits;
}

static size_t mask_words(const struct automaton *a) { return ((size_t)a->table->vocab + 63) / 64; }

static void walk_free(struct walk_result *w) {
  if (!w) return;
  free(w->allowed);
  free(w->leaving);
  free(w);
}

/* The walk from a situation without what is below, remembered if it was long. `own`: the caller frees it. */
static struct walk_result *walk_of(struct automaton *a, int32_t cut, bool *own) {
  *own = false;
  if (a->m.situations[cut].walk) return a->m.situations[cut].walk;
  struct walk_result *w = calloc(1, sizeof *w);
  if (w) w->allowed = calloc(mask_words(a) + 1, sizeof *w->allowed);
  if (!w || !w->allowed) {
    walk_free(w);
    fail(a, OSCAR_NO_MEMORY);
    return NULL;
  }
  a->path[0] = cut;
  const int64_t visits = walk(a, 0, w->allowed, w);
  if (visits < 0) {
    walk_free(w);
    return NULL;
  }
  *own = visits < WORTH_KEEPING;
  if (!*own) {
    a->m.situations[cut].walk = w;
    a->m.walk_bytes += mask_words(a) * sizeof *w->allowed + w->room * sizeof *w->leaving + sizeof *w;
  }
  return w;
}

/* What begins with one spelling, decided with all frames. */
static bool walk_leaving(struct automaton *a, int32_t situation, int32_t node, uint64_t *allowed) {
  const struct token_table *t = a->table;
  const char *text = t->text + t->offset[t->order[t->first_token[node]]];
  const int depth = t->depth[node];
  a->path[0] = situation;
  for (int d = 0; d < depth && a->path[d] > DEAD; d++)
    a->path[d + 1] = situation = automaton_step(a, a->path[d], (uint8_t)text[d]);
  if (situation < 0) return false;
  return situation == DEAD || walk(a, node, allowed, NULL) >= 0;
}

oscar_status automaton_allowed(struct automaton *a, int32_t situation, uint64_t *allowed) {
  if (a->m.situations[situation].cut == UNKNOWN) {
    const int32_t computed = compute_cut(a, situation);
    if (computed < 0) return automaton_status(a);
    a->m.situations[situation].cut = computed;
  }
  bool own;
  struct walk_result *w = walk_of(a, a->m.situations[situation].cut, &own);
  if (!w) return automaton_status(a);
  memcpy(allowed, w->allowed, mask_words(a) * sizeof *allowed);
  for (size_t i = 0; i < w->n_leaving && walk_leaving(a, situation, w->leaving[i], allowed); i++) continue;
  if (own) walk_free(w);
  return automaton_status(a);
}

/* ---- life ---- */

static void memory_free(struct memory *m) {
  for (size_t i = 0; i < m->n_situations; i++) walk_free(m->situations[i].walk);
  free(m->frames);
  free(m->places);
  free(m->situations);
  free(m->next);
  free(m->frame_index.slots);
  free(m->situation_index.slots);
  *m = (struct memory){0};
}

/* The two lowest frames, and the situation DEAD. */
static bool memory_begin(struct automaton *a) {
  struct memory *m = &a->m;
  if (!room_for((void **)&m->frames, &m->frame_room, 2, sizeof *m->frames)) return false;
  m->frames[ROOT] = (struct frame){-1, -1, 0};
  m->frames[BOTTOM] = (struct frame){-1, -1, 0};
  m->n_frames = 2;
  return situation_of(a, NULL, 0, false, false) == DEAD;
}

/* A frame of the memory that is left, in the new one. */
static int32_t carry_frame(struct automaton *a, const struct memory *old, int32_t frame) {
  size_t n = a->n_waiting = 0;
  for (; frame != ROOT; frame = old->frames[frame].below) {
    if (!room_for((void **)&a->waiting, &a->waiting_room, n, sizeof *a->waiting)) return fail(a, OSCAR_NO_MEMORY);
    a->waiting[n++] = (struct place){old->frames[frame].return_to, frame};
  }
  int32_t carried = ROOT;
  while (n > 0 && carried >= 0) carried = frame_of(a, a->waiting[--n].at, carried);
  return carried;
}

static int32_t carry_situation(struct automaton *a, const struct memory *old, int32_t situation) {
  const struct situation s = old->situations[situation];
  if (!room_for((void **)&a->found, &a->found_room, (size_t)s.n_places, sizeof *a->found)) return fail(a, OSCAR_NO_MEMORY);
  for (int32_t i = 0; i < s.n_places; i++) {
    const struct place p = old->places[s.first_place + (size_t)i];
    const int32_t frame = carry_frame(a, old, p.frame);
    if (frame < 0) return -1;
    a->found[i] = (struct place){p.at, frame};
  }
  if (s.n_places > 1) qsort(a->found, (size_t)s.n_places, sizeof *a->found, by_place);
  return situation_of(a, a->found, (size_t)s.n_places, s.accepts, s.leaves);
}

oscar_status automaton_tidy(struct automaton *a) {
  if (bytes_held(a) < TIDY_BYTES) return OSCAR_OK;
  struct memory old = a->m;
  a->m = (struct memory){0};
  bool good = memory_begin(a);
  /* Twice: numbers change only when all have one. */
  for (struct situation_holder *h = a->held.next; good && h != &a->held; h = h->next)
    good = carry_situation(a, &old, h->situation) >= 0;
  for (struct situation_holder *h = a->held.next; good && h != &a->held; h = h->next)
    h->situation = carry_situation(a, &old, h->situation);
  if (good) {
    memory_free(&old);
    return OSCAR_OK;
  }
  memory_free(&a->m);
  a->m = old;
  return automaton_status(a);
}

void automaton_hold(struct automaton *a, struct situation_holder *holder) {
  holder->previous = &a->held;
  holder->next = a->held.next;
  holder->next->previous = a->held.next = holder;
}

void automaton_release(struct automaton *a, struct situation_holder *holder) {
  (void)a;
  holder->previous->next = holder->next;
  holder->next->previous = holder->previous;
}

static void automaton_free(struct automaton *a) {
  memory_free(&a->m);
  free(a->found);
  free(a->waiting);
  free(a->visited);
  free(a->visited_step);
  free(a->path);
  free(a);
}

void automata_free(struct automaton *automata) {
  while (automata) {
    struct automaton *other = automata->other;
    automaton_free(automata);
    automata = other;
  }
}

struct automaton *automaton_of(const struct grammar *grammar, const struct token_table *table) {
  struct automaton *a = grammar->cache->automata;
  while (a && a->serial != table->serial) a = a->other;
  if (a) return a;
  a = calloc(1, sizeof *a);
  if (!a) return NULL;
  *a = (struct automaton){.grammar = grammar, .table = table, .serial = table->serial};
  a->held.next = a->held.previous = &a->held;
  a->path = malloc(((size_t)table->most_bytes + 1) * sizeof *a->path);
  if (!a->path || !memory_begin(a)) {
    automaton_free(a);
    return NULL;
  }
  a->other = grammar->cache->automata;
  grammar->cache->automata = a;
  return a;
}
