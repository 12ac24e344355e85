/* base.h - what every room uses: errors, logging, memory, CPU features, time, half floats. Private. */
#ifndef OSCAR_BASE_H
#define OSCAR_BASE_H

#include <oscar/oscar.h>
#include <stdarg.h>

struct cpu_features {
  bool avx2, fma, f16c, avx_vnni;
  bool avx512; /* F, BW, DQ, VL and VNNI together */
  bool avx512_bf16, avx512_vbmi;
  bool amx_bf16, amx_int8; /* only where the operating system lets this process use them */
  bool neon_dot;           /* ARM */
  bool wide_bf16;          /* AVX512-BF16 does twice the operations of float a cycle: AMD's, not Intel's */
};

struct oscar_context {
  oscar_context_options options; /* threads and isa resolved */
  struct cpu_features cpu;       /* what the CPU has, cut down to the chosen isa */
  struct team *team;             /* base/team.h */
  char error[1024];
};

/* Whether this CPU has all that a level names; PORTABLE always. */
bool cpu_has(const struct cpu_features *cpu, oscar_isa isa);

/* Records the sentence and returns `status`. The sentence names what was wrong, where, and what was expected. */
oscar_status set_error(oscar_context *context, oscar_status status, const char *format, ...) OSCAR_PRINTF(3, 4);
/* Puts "prefix: " before the recorded sentence; returns `status`. */
oscar_status prefix_error(oscar_context *context, oscar_status status, const char *format, ...) OSCAR_PRINTF(3, 4);
void log_line(const oscar_context *context, oscar_log_level level, const char *format, ...) OSCAR_PRINTF(3, 4);

/* Memory, 64-byte aligned. A NULL return has set the error; 0 bytes gives a valid pointer. Overflow of count * size is out of
 * memory. */
void *mem_alloc(oscar_context *context, size_t count, size_t size);
void *mem_zalloc(oscar_context *context, size_t count, size_t size);
/* Contents up to min(old, new) are kept; on failure the old block stays valid. */
void *mem_resize(oscar_context *context, void *old, size_t old_bytes, size_t new_bytes);
void mem_free(oscar_context *context, void *pointer);
/* Before memory is touched that will be read from start to end again and again: fewer translations of addresses. A hint. */
void mem_advise_large_pages(void *pointer, size_t bytes);
/* The most of this process that was in memory at once, since the kernel began to count anew (false: it cannot); 0 where it does
 * not tell. Whoever watches the process from outside sees the new count, too. */
bool mem_peak_restart(void);
size_t mem_peak_bytes(void);
char *mem_strdup(oscar_context *context, const char *text);

void cpu_detect(struct cpu_features *features);
int cpu_available(void); /* CPUs this process may run on */
int cpu_cores(void);     /* cores that these belong to: CPUs that share one share its arithmetic */
/* The same of the CPUs 0 .. count - 1 that are allowed, as Linux tells under `folder` (/sys/devices/system/cpu); of what it does
 * not tell, each is a core. */
int cpu_count_cores(const char *folder, const bool *allowed, int count);

/* Some of the CPUs, in the order in which threads get them. */
enum { CPU_LIST_ROOM = 1024 }; /* of a cpu_set_t */
struct cpu_list {
  int count;
  int cpu[CPU_LIST_ROOM];
};
bool cpu_is_allowed(int cpu);                          /* whether this process may run on it */
const char *cpu_allowed_text(char *text, size_t room); /* all that it may run on, as in "0-3,6"; returns `text` */

int64_t time_ns(void); /* monotonic */

/* IEEE half and bfloat16 bits <-> float, round to nearest even; NaN stays NaN. */
uint16_t f32_to_f16(float x);
float f16_to_f32(uint16_t h);
uint16_t f32_to_bf16(float x);
static inline float bf16_to_f32(uint16_t h) {
  union {
    uint32_t u;
    float f;
  } v = {.u = (uint32_t)h << 16};
  return v.f;
}

#define PAGE_TOKENS     64
#define ARRAY_LENGTH(a) (sizeof(a) / sizeof((a)[0]))
static inline size_t round_up(size_t x, size_t to) { return (x + to - 1) / to * to; }

#endif
