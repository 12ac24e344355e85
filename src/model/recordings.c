/* recordings.c - which step is run directly, recorded or replayed (model/recordings.h). */
#include "model/recordings.h"

static void forget(struct kept_recording *kept, struct backend *be) {
  if (kept->recording) be->ops->recording_free(be, kept->recording);
  kept->recording = NULL;
}

/* The one of the kind, else the one that goes. */
static struct kept_recording *find(struct recordings *r, int kind) {
  struct kept_recording *oldest = &r->kept[0];
  for (int i = 0; i < KEPT_RECORDINGS; i++) {
    if (r->kept[i].kind == kind) return &r->kept[i];
    if (r->kept[i].used < oldest->used) oldest = &r->kept[i];
  }
  return oldest;
}

enum step_way recordings_choose(struct recordings *r, struct backend *be, int kind, struct kept_recording **out) {
  struct kept_recording *kept = *out = find(r, kind);
  kept->used = ++r->steps;
  if (kept->kind != kind) {
    forget(kept, be);
    kept->kind = kind;
    return STEP_DIRECT;
  }
  if (kept->recording && be->ops->recording_holds(be, kept->recording)) return STEP_REPLAY;
  forget(kept, be);
  return STEP_RECORD;
}

void recordings_free(struct recordings *r, struct backend *be) {
  for (int i = 0; i < KEPT_RECORDINGS; i++) forget(&r->kept[i], be);
}
