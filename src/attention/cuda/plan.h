/*
 * attention/cuda/plan.h - from jobs to tiles and lists of pages (decode.h). Private; plain C, needs no GPU.
 */
#ifndef OSCAR_ATTENTION_CUDA_PLAN_H
#define OSCAR_ATTENTION_CUDA_PLAN_H

#include "attention/cuda/prefill.h"
#include "cache/view.h"

/* Queries of one sequence, its last n positions. */
struct plan_job {
  const oscar_sequence *sequence;
  int n, token; /* token: row of q that holds the first position */
};

/* How much memory a plan takes at most. */
struct plan_bounds {
  size_t tiles, pages;
};
struct plan_bounds plan_bound(int group, int most_rows, int layer, const struct plan_job *jobs, int n_jobs);

struct plan_result {
  int tiles, pages;  /* how many were written */
  int rows;          /* of the largest tile */
  int64_t last_page; /* the largest number in the lists; -1: none */
  bool coded;        /* a page is read as codes */
  int64_t missing;   /* a page of a job that holds nothing to read; -1: none */
};
/* Tiles have at most `most_rows` rows; they are not yet on a line. The jobs have been checked. */
struct plan_result plan_fill(const struct cache_geometry *geometry, int group, int most_rows, int layer, int window,
                             const struct plan_job *jobs, int n_jobs, struct decode_tile *tiles, struct decode_page *pages);

/* How many rows tiles best have, of those that kernels take. */
int plan_rows(int group, int kv_heads, int blocks, int most_rows, int layer, int window, const struct plan_job *jobs, int n_jobs);

/* How many parts each of `tiles` tiles is cut into, so that `blocks` blocks at a time are soonest done with them for all KV
 * heads. pages: that the longest reads. 1: they are not cut. */
int plan_parts(int tiles, int kv_heads, int64_t pages, int blocks);
/* The tiles of plan_fill, longest first, each cut into `parts`: [tiles * parts] are written. */
void plan_cut(int tiles, int parts, const struct decode_tile *from, struct prefill_tile *to);

#endif
