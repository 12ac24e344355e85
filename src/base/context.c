/*
 * context.c - the context: effective options, the last error, logging.
 *
 * Every object keeps a pointer to its context; errors are recorded there as whole sentences, so that a caller can show them as
 * they are. Recording never allocates and never fails.
 */
#include "base/team.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define STRING_(x) #x
#define STRING(x)  STRING_(x)

const char *oscar_version(void) {
  return STRING(OSCAR_VERSION_MAJOR) "." STRING(OSCAR_VERSION_MINOR) "." STRING(OSCAR_VERSION_PATCH);
}

const char *oscar_status_name(oscar_status status) {
  static const char *const names[] = {"ok",     "invalid-argument", "no-memory", "no-space",  "io",
                                      "format", "unsupported",      "mismatch",  "cancelled", "numeric"};
  return (unsigned)status < ARRAY_LENGTH(names) ? names[status] : "unknown-status";
}

const char *oscar_isa_name(oscar_isa isa) {
  static const char *const names[] = {"auto", "portable", "avx2", "avx512", "neon-dot"};
  return (unsigned)isa < ARRAY_LENGTH(names) ? names[isa] : "unknown";
}

void oscar_context_options_default(oscar_context_options *options) { *options = (oscar_context_options){0}; }

static void *libc_alloc(void *user, size_t bytes, size_t alignment) {
  (void)user;
  return aligned_alloc(alignment, round_up(bytes ? bytes : 1, alignment));
}

static void libc_free(void *user, void *pointer) {
  (void)user;
  free(pointer);
}

static void log_to_stderr(void *user, oscar_log_level level, const char *text) {
  (void)user;
  if (level <= OSCAR_LOG_WARNING) fprintf(stderr, "%s: %s\n", level == OSCAR_LOG_ERROR ? "error" : "warning", text);
}

/* Cuts the features down to a level, so that kernels chosen by feature respect a forced level too. */
static void limit_to_isa(struct cpu_features *cpu, oscar_isa isa) {
  if (isa != OSCAR_ISA_AVX512) {
    cpu->avx512 = cpu->avx512_bf16 = cpu->avx512_vbmi = cpu->wide_bf16 = false;
    cpu->amx_bf16 = cpu->amx_int8 = false;
  }
  if (isa != OSCAR_ISA_NEON_DOT) cpu->neon_dot = false;
  if (isa == OSCAR_ISA_PORTABLE) *cpu = (struct cpu_features){0};
}

/* Whether each thread can have a CPU of its own. */
static bool cpus_fit(const oscar_context_options *o) {
  if (!o->cpus) return o->n_cpus == 0;
  if (o->n_cpus < 1 || o->threads > o->n_cpus) return false;
  for (int i = 0; i < o->n_cpus; i++) {
    if (!cpu_is_allowed(o->cpus[i])) return false;
    for (int j = 0; j < i; j++)
      if (o->cpus[i] == o->cpus[j]) return false;
  }
  return true;
}

oscar_status oscar_context_create(const oscar_context_options *options, oscar_context **context) {
  if (!context) return OSCAR_INVALID_ARGUMENT;
  *context = NULL;
  oscar_context_options o;
  if (options)
    o = *options;
  else
    oscar_context_options_default(&o);
  if (o.threads < 0 || (unsigned)o.isa > OSCAR_ISA_NEON_DOT || !o.alloc != !o.free || !cpus_fit(&o))
    return OSCAR_INVALID_ARGUMENT;
  if (!o.alloc) {
    o.alloc = libc_alloc;
    o.free = libc_free;
  }
  if (!o.log) o.log = log_to_stderr;
  if (o.threads == 0) o.threads = o.cpus ? o.n_cpus : cpu_cores();

  struct cpu_features cpu;
  cpu_detect(&cpu);
  static const oscar_isa best_first[] = {OSCAR_ISA_AVX512, OSCAR_ISA_AVX2, OSCAR_ISA_NEON_DOT, OSCAR_ISA_PORTABLE};
  for (int i = 0; o.isa == OSCAR_ISA_AUTO; i++)
    if (cpu_has(&cpu, best_first[i])) o.isa = best_first[i];
  if (!cpu_has(&cpu, o.isa)) return OSCAR_UNSUPPORTED;
  limit_to_isa(&cpu, o.isa);

  const size_t own = round_up(sizeof(oscar_context), 64);
  oscar_context *c = o.alloc(o.alloc_user, own + team_bytes(o.threads), 64);
  if (!c) return OSCAR_NO_MEMORY;
  *c = (oscar_context){.options = o, .cpu = cpu, .team = team_make(o.threads, o.cpus, (uint8_t *)c + own)};
  c->options.cpus = NULL; /* the caller's; the team has its own */
  *context = c;
  return OSCAR_OK;
}

void oscar_context_free(oscar_context *context) {
  if (!context) return;
  team_stop(context->team);
  context->options.free(context->options.alloc_user, context);
}

const char *oscar_last_error(const oscar_context *context) { return context ? context->error : ""; }
oscar_isa oscar_context_isa(const oscar_context *context) { return context->options.isa; }
int oscar_context_threads(const oscar_context *context) { return context->options.threads; }

oscar_status set_error(oscar_context *context, oscar_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(context->error, sizeof context->error, format, arguments);
  va_end(arguments);
  return status;
}

oscar_status prefix_error(oscar_context *context, oscar_status status, const char *format, ...) {
  char tail[sizeof context->error];
  memcpy(tail, context->error, sizeof tail);
  va_list arguments;
  va_start(arguments, format);
  int n = vsnprintf(context->error, sizeof context->error, format, arguments);
  va_end(arguments);
  if (n >= 0 && (size_t)n + 3 < sizeof context->error) {
    size_t room = sizeof context->error - (size_t)n;
    snprintf(context->error + n, room, ": %.*s", (int)(room - 3), tail);
  }
  return status;
}

void log_line(const oscar_context *context, oscar_log_level level, const char *format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  context->options.log(context->options.log_user, level, text);
}

int64_t time_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
