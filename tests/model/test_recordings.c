/*
 * Which steps are run directly, recorded and replayed, with a backend that only counts.
 */
#include "support.h"

#include "model/recordings.h"

struct backend_recording {
  int moves; /* of memory, when it was made */
};

static int moves, alive;

static bool holds(const struct backend *be, const struct backend_recording *recording) {
  (void)be;
  return recording->moves == moves;
}
static void drop(struct backend *be, struct backend_recording *recording) {
  (void)be;
  alive--;
  free(recording);
}
static const struct backend_ops ops = {.recording_holds = holds, .recording_free = drop};
static struct backend counting = {.ops = &ops};

/* What the runner does. */
static enum step_way run(struct recordings *r, int kind) {
  struct kept_recording *kept;
  const enum step_way way = recordings_choose(r, &counting, kind, &kept);
  assert_int_equal(kept->kind, kind);
  if (way == STEP_RECORD) {
    assert_null(kept->recording);
    kept->recording = malloc(sizeof *kept->recording);
    kept->recording->moves = moves;
    alive++;
  }
  if (way == STEP_REPLAY) assert_int_equal(kept->recording->moves, moves);
  return way;
}

static void the_second_step_is_recorded(void **state) {
  (void)state;
  struct recordings r = {0};
  for (int kind = 1; kind <= 3; kind++) {
    assert_int_equal(run(&r, kind), STEP_DIRECT);
    assert_int_equal(run(&r, kind), STEP_RECORD);
    for (int i = 0; i < 5; i++) assert_int_equal(run(&r, kind), STEP_REPLAY);
  }
  assert_int_equal(run(&r, 1), STEP_REPLAY); /* others in between change nothing */
  assert_int_equal(alive, 3);
  recordings_free(&r, &counting);
  assert_int_equal(alive, 0);
}

static void what_does_not_hold_is_recorded_again(void **state) {
  (void)state;
  struct recordings r = {0};
  for (int i = 0; i < 3; i++) run(&r, 2), run(&r, 7);
  moves++;
  assert_int_equal(run(&r, 2), STEP_RECORD);
  assert_int_equal(run(&r, 2), STEP_REPLAY);
  moves++;
  moves++;
  assert_int_equal(run(&r, 7), STEP_RECORD);
  assert_int_equal(run(&r, 7), STEP_REPLAY);
  assert_int_equal(run(&r, 2), STEP_RECORD);
  assert_int_equal(alive, 2);
  recordings_free(&r, &counting);
  assert_int_equal(alive, 0);
}

/* A step that could not be recorded leaves its place empty, and the next one tries again. */
static void a_failure_is_no_recording(void **state) {
  (void)state;
  struct recordings r = {0};
  struct kept_recording *kept;
  run(&r, 4);
  assert_int_equal(recordings_choose(&r, &counting, 4, &kept), STEP_RECORD);
  assert_int_equal(run(&r, 4), STEP_RECORD);
  recordings_free(&r, &counting);
}

static void the_least_recently_used_goes(void **state) {
  (void)state;
  struct recordings r = {0};
  for (int kind = 1; kind <= KEPT_RECORDINGS; kind++)
    for (int i = 0; i < 3; i++) run(&r, kind);
  assert_int_equal(run(&r, 1), STEP_REPLAY);
  assert_int_equal(run(&r, 1000), STEP_DIRECT); /* takes the place of 2 */
  assert_int_equal(run(&r, 1), STEP_REPLAY);
  assert_int_equal(run(&r, 3), STEP_REPLAY);
  assert_int_equal(alive, KEPT_RECORDINGS - 1);
  assert_int_equal(run(&r, 2), STEP_DIRECT);
  assert_int_equal(run(&r, 1000), STEP_RECORD);
  assert_int_equal(run(&r, 4), STEP_DIRECT); /* 2 took its place */
  recordings_free(&r, &counting);
  assert_int_equal(alive, 0);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_second_step_is_recorded),
      cmocka_unit_test(what_does_not_hold_is_recorded_again),
      cmocka_unit_test(a_failure_is_no_recording),
      cmocka_unit_test(the_least_recently_used_goes),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
