/* cpu.c - what this CPU can do, and how many of them this process may use. */
#include "base/base.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif

/* XCR0: which register states the operating system saves (Intel SDM volume 1, 13.3). */
static uint64_t saved_states(void) {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

static bool made_by_amd(void) {
  unsigned most, name[3];
  return __get_cpuid(0, &most, &name[0], &name[2], &name[1]) && memcmp(name, "AuthenticAMD", sizeof name) == 0;
}

/* Linux gives the state of tiles (XTILEDATA, 18) to processes that ask for it; asking twice is fine. */
static bool may_use_tiles(void) {
#if defined(__linux__)
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
  return true;
#endif
}

void cpu_detect(struct cpu_features *f) {
  *f = (struct cpu_features){0};
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return;
  bool osxsave = c >> 27 & 1;
  bool fma = c >> 12 & 1, f16c = c >> 29 & 1;
  if (!osxsave) return;
  uint64_t saved = saved_states();
  bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xE6) == 0xE6, tiles = (saved & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
  unsigned leaf7_1 = 0, ignored;
  if (a >= 1) __get_cpuid_count(7, 1, &leaf7_1, &ignored, &ignored, &ignored);
  if (ymm) {
    f->avx2 = b >> 5 & 1;
    f->fma = fma;
    f->f16c = f16c;
    f->avx_vnni = leaf7_1 >> 4 & 1;
  }
  if (zmm) {
    bool foundation = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1, vnni = c >> 11 & 1;
    f->avx512 = foundation && dq && bw && vl && vnni;
    f->avx512_bf16 = f->avx512 && (leaf7_1 >> 5 & 1);
    f->avx512_vbmi = f->avx512 && (c >> 1 & 1);
    f->wide_bf16 = f->avx512_bf16 && made_by_amd();
  }
  if (tiles && (d >> 24 & 1) && may_use_tiles()) {
    f->amx_bf16 = d >> 22 & 1;
    f->amx_int8 = d >> 25 & 1;
  }
}
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>

void cpu_detect(struct cpu_features *f) { *f = (struct cpu_features){.neon_dot = getauxval(AT_HWCAP) & HWCAP_ASIMDDP}; }
#else
void cpu_detect(struct cpu_features *f) { *f = (struct cpu_features){0}; }
#endif

bool cpu_has(const struct cpu_features *cpu, oscar_isa isa) {
  bool avx2 = cpu->avx2 && cpu->fma && cpu->f16c;
  switch (isa) {
  case OSCAR_ISA_AVX2:
    return avx2;
  case OSCAR_ISA_AVX512:
    return avx2 && cpu->avx512;
  case OSCAR_ISA_NEON_DOT:
    return cpu->neon_dot;
  case OSCAR_ISA_AUTO:
  case OSCAR_ISA_PORTABLE:
    break;
  }
  return true;
}

int cpu_available(void) {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  long n = sysconf(_SC_NPROCESSORS_ONLN);
  return n > 0 ? (int)n : 1;
}

bool cpu_is_allowed(int cpu) {
  cpu_set_t set;
  if (cpu < 0 || cpu >= CPU_SETSIZE) return false;
  return sched_getaffinity(0, sizeof set, &set) == 0 && CPU_ISSET((size_t)cpu, &set);
}

const char *cpu_allowed_text(char *text, size_t room) {
  size_t used = 0;
  text[0] = '\0';
  for (int first = 0, last; first < CPU_SETSIZE && used < room; first = last + 1) {
    for (last = first; cpu_is_allowed(first) && cpu_is_allowed(last + 1);) last++;
    if (!cpu_is_allowed(first)) continue;
    const char *comma = used ? "," : "";
    if (last > first)
      used += (size_t)snprintf(text + used, room - used, "%s%d-%d", comma, first, last);
    else
      used += (size_t)snprintf(text + used, room - used, "%s%d", comma, first);
  }
  return text;
}

/* Whether a list of CPUs, "0,8" or "4-5", has one below `cpu` that may be used. */
static bool has_earlier(const char *list, const bool *allowed, int cpu) {
  for (char *end; *list; list = *end == ',' ? end + 1 : end) {
    long first = strtol(list, &end, 10), last = first;
    if (end == list) return false;
    if (*end == '-') last = strtol(end + 1, &end, 10);
    for (long i = first < 0 ? 0 : first; i <= last && i < cpu; i++)
      if (allowed[i]) return true;
    if (*end != ',') return false;
  }
  return false;
}

int cpu_count_cores(const char *folder, const bool *allowed, int count) {
  int cores = 0;
  for (int cpu = 0; cpu < count; cpu++) {
    char path[4200], list[256] = "";
    if (!allowed[cpu]) continue;
    snprintf(path, sizeof path, "%s/cpu%d/topology/thread_siblings_list", folder, cpu);
    FILE *file = fopen(path, "re");
    if (file && !fgets(list, sizeof list, file)) list[0] = '\0';
    if (file) fclose(file);
    cores += !has_earlier(list, allowed, cpu);
  }
  return cores;
}

int cpu_cores(void) {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return cpu_available();
  bool allowed[CPU_SETSIZE];
  for (int i = 0; i < CPU_SETSIZE; i++) allowed[i] = CPU_ISSET((size_t)i, &set);
  int cores = cpu_count_cores("/sys/devices/system/cpu", allowed, CPU_SETSIZE);
  return cores > 0 ? cores : 1;
}
