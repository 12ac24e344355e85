/*
 * oscar/oscar.h - version, status codes, and the context every object hangs on.
 *
 * liboscar keeps the key/value cache of a transformer in about 2 bits per element
 * and computes attention directly over the codes. This header has what all rooms share;
 * see codec.h, rotation.h, calib.h, cache.h and attention.h for the rest.
 *
 * Threads: a context, and every object made from it, is used by one thread at a time.
 * The library itself works with `threads` threads inside a call. Use one context per
 * thread of yours for concurrent work; objects of different contexts are independent.
 */
#ifndef OSCAR_OSCAR_H
#define OSCAR_OSCAR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define OSCAR_VERSION_MAJOR 0
#define OSCAR_VERSION_MINOR 1
#define OSCAR_VERSION_PATCH 0

#if defined(__GNUC__)
#define OSCAR_API                                  __attribute__((visibility("default")))
#define OSCAR_PRINTF(format_index, first_argument) __attribute__((format(printf, format_index, first_argument)))
#else
#define OSCAR_API
#define OSCAR_PRINTF(format_index, first_argument)
#endif

/* "0.1.0" */
OSCAR_API const char *oscar_version(void);

/* What a call came to. Everything but OSCAR_OK leaves a sentence in oscar_last_error(). */
typedef enum oscar_status {
  OSCAR_OK = 0,
  OSCAR_INVALID_ARGUMENT, /* the caller broke a stated precondition */
  OSCAR_NO_MEMORY,        /* the allocator returned NULL */
  OSCAR_NO_SPACE,         /* a cache budget is exhausted; nothing was changed */
  OSCAR_IO,               /* a file could not be opened, read or written */
  OSCAR_FORMAT,           /* an input is malformed, truncated or hostile */
  OSCAR_UNSUPPORTED,      /* an input is well formed but uses something this build cannot do */
  OSCAR_MISMATCH,         /* two inputs do not belong together (a rotation file of another model) */
  OSCAR_CANCELLED,        /* the caller asked to stop */
  OSCAR_NUMERIC           /* non-finite numbers where finite ones are required */
} oscar_status;

/* A short constant name: "ok", "no-space", ... Never NULL. */
OSCAR_API const char *oscar_status_name(oscar_status status);

typedef enum oscar_log_level { OSCAR_LOG_ERROR, OSCAR_LOG_WARNING, OSCAR_LOG_INFO, OSCAR_LOG_DEBUG } oscar_log_level;

/* Instruction-set levels of the CPU kernels. A level is usable when the CPU has all it names. */
typedef enum oscar_isa {
  OSCAR_ISA_AUTO = 0, /* the best the CPU offers */
  OSCAR_ISA_PORTABLE, /* C only */
  OSCAR_ISA_AVX2,     /* AVX2, FMA, F16C; where the CPU has it, AVX-VNNI */
  OSCAR_ISA_AVX512,   /* AVX-512 F, BW, DQ, VL and VNNI */
  OSCAR_ISA_NEON_DOT  /* ARM: NEON with the dot products of ARMv8.2 */
} oscar_isa;

/* "portable", "avx2", "avx512", "neon-dot" */
OSCAR_API const char *oscar_isa_name(oscar_isa isa);

typedef struct oscar_context_options {
  int threads;   /* 0: one per core this process may run on; with `cpus`: one per CPU of it */
  oscar_isa isa; /* AUTO, or a level to force; forcing one the CPU lacks is OSCAR_UNSUPPORTED */

  /* Receives log lines without a newline; NULL: errors and warnings go to stderr. */
  void (*log)(void *user, oscar_log_level level, const char *text);
  void *log_user;

  /* Memory. Both set or both NULL (libc). `alignment` is a power of two <= 64; returns NULL when out of memory.
   * May be called from the thread that calls the library only. */
  void *(*alloc)(void *user, size_t bytes, size_t alignment);
  void (*free)(void *user, void *pointer);
  void *alloc_user;

  /* CPUs as Linux counts them, to pin threads to: thread i runs on cpus[i] and nowhere else. They must differ, the process must
   * be allowed to run on each, and there must be at least as many as threads. NULL: the operating system places threads, which on
   * a machine that others use is best. Read by oscar_context_create only. The thread that calls the library is thread 0: it is on
   * its CPU, or among those of the others while OpenMP works, from the first call that computes until it frees the context. */
  const int *cpus;
  int n_cpus;
} oscar_context_options;

typedef struct oscar_context oscar_context;

OSCAR_API void oscar_context_options_default(oscar_context_options *options);

/* options may be NULL (defaults). Free with oscar_context_free after every object made from the context.
 * Errors: INVALID_ARGUMENT (cpus, too), UNSUPPORTED (isa), NO_MEMORY; *context is then NULL. */
OSCAR_API oscar_status oscar_context_create(const oscar_context_options *options, oscar_context **context);
OSCAR_API void oscar_context_free(oscar_context *context);

/* The text of the last error of any call made with this context; "" if none. Valid until the next failing call. */
OSCAR_API const char *oscar_last_error(const oscar_context *context);

/* What was chosen: never AUTO, never 0. */
OSCAR_API oscar_isa oscar_context_isa(const oscar_context *context);
OSCAR_API int oscar_context_threads(const oscar_context *context);

#ifdef __cplusplus
}
#endif
#endif
