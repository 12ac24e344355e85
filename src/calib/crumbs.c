/*
 * crumbs.c - how many crumbs each channel gets, and where they lie.
 *
 * Crumbs go one by one to where they save most (reverse water-filling). A row's groups are equal runs of blocks of 16 crumbs and
 * no channel may lie across a border, so that kernels see the same borders in all heads; channels are therefore put into an order
 * that fills each group exactly, the richest first.
 */
#include "calib/crumbs.h"

void crumbs_allocate(int channels, const double *variance, int crumbs, int least, uint8_t *n) {
  for (int i = 0; i < channels; i++) n[i] = (uint8_t)least;
  for (int left = crumbs - channels * least; left > 0; left--) {
    int best = -1;
    double most = -1;
    for (int i = 0; i < channels; i++) {
      if (n[i] == MOST_CRUMBS) continue;
      double saved = variance[i] * (double)(codec_gaussian_error(n[i]) - codec_gaussian_error(n[i] + 1));
      if (saved > most) {
        most = saved;
        best = i;
      }
    }
    if (best < 0) return; /* every channel has all it can */
    n[best]++;
  }
}

/* How many channels of each number of crumbs a group takes, so that every group is filled exactly: the richest first, going back
 * where the rest cannot be. */
static bool fill_groups(int crumbs, int groups, int group, const int left[MOST_CRUMBS + 1], int (*taken)[MOST_CRUMBS + 1]) {
  if (group == groups) return true;
  int room = group_begin(crumbs, groups, group + 1) - group_begin(crumbs, groups, group), *t = taken[group];
  for (t[4] = left[4] < room / 4 ? left[4] : room / 4; t[4] >= 0; t[4]--) {
    int room3 = room - 4 * t[4];
    for (t[3] = left[3] < room3 / 3 ? left[3] : room3 / 3; t[3] >= 0; t[3]--) {
      int room2 = room3 - 3 * t[3];
      for (t[2] = left[2] < room2 / 2 ? left[2] : room2 / 2; t[2] >= 0; t[2]--) {
        t[1] = room2 - 2 * t[2];
        if (t[1] > left[1]) break;
        const int rest[MOST_CRUMBS + 1] = {0, left[1] - t[1], left[2] - t[2], left[3] - t[3], left[4] - t[4]};
        if (fill_groups(crumbs, groups, group + 1, rest, taken)) return true;
      }
    }
  }
  return false;
}

/* Puts channels into an order in which none lies across a border between groups: order[k] is the channel at place k. */
static bool arrange(int channels, const uint8_t *n, int crumbs, int groups, int *order) {
  int counts[MOST_CRUMBS + 1] = {0}, next[MOST_CRUMBS + 1] = {0}, placed = 0;
  int taken[OSCAR_MAX_LOG_GAINS][MOST_CRUMBS + 1];
  for (int i = 0; i < channels; i++) counts[n[i]]++;
  if (!fill_groups(crumbs, groups, 0, counts, taken)) return false;
  for (int group = 0; group < groups; group++)
    for (int size = MOST_CRUMBS; size > 0; size--)
      for (int k = 0; k < taken[group][size]; k++) {
        while (n[next[size]] != size) next[size]++;
        order[placed++] = next[size]++;
      }
  return true;
}

/* One crumb from the last of the richest channels to the first of the poorest; false if all are about equal. */
static bool narrow(int channels, uint8_t *n) {
  int from = 0, to = 0;
  for (int i = 1; i < channels; i++) {
    if (n[i] >= n[from]) from = i;
    if (n[i] < n[to]) to = i;
  }
  if (n[from] - n[to] < 2) return false;
  n[from]--;
  n[to]++;
  return true;
}

oscar_status crumbs_arrange(oscar_context *context, int channels, uint8_t *n, int crumbs, int groups, int *order) {
  while (!arrange(channels, n, crumbs, groups, order))
    if (!narrow(channels, n)) break;
  for (int pairs = 0; pairs <= channels / 2; pairs++) {
    if (arrange(channels, n, crumbs, groups, order)) return OSCAR_OK;
    if (n[pairs] == MOST_CRUMBS || n[channels - 1 - pairs] == 0) continue;
    n[pairs]++;
    n[channels - 1 - pairs]--;
  }
  return set_error(context, OSCAR_UNSUPPORTED, "fit: %d crumbs over %d channels cannot be cut into %d groups", crumbs, channels,
                   groups);
}
