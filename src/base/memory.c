/* memory.c - allocation through the context's allocator; every failure is recorded, none aborts. */
#include "base/base.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

void *mem_alloc(oscar_context *context, size_t count, size_t size) {
  size_t bytes;
  void *pointer = NULL;
  if (!__builtin_mul_overflow(count, size, &bytes) && bytes <= PTRDIFF_MAX)
    pointer = context->options.alloc(context->options.alloc_user, bytes ? bytes : 1, 64);
  if (!pointer) set_error(context, OSCAR_NO_MEMORY, "out of memory: %zu x %zu bytes could not be allocated", count, size);
  return pointer;
}

void *mem_zalloc(oscar_context *context, size_t count, size_t size) {
  void *pointer = mem_alloc(context, count, size);
  if (pointer) memset(pointer, 0, count * size);
  return pointer;
}

void *mem_resize(oscar_context *context, void *old, size_t old_bytes, size_t new_bytes) {
  void *pointer = mem_alloc(context, 1, new_bytes);
  if (!pointer) return NULL;
  if (old) {
    memcpy(pointer, old, old_bytes < new_bytes ? old_bytes : new_bytes);
    mem_free(context, old);
  }
  return pointer;
}

void mem_free(oscar_context *context, void *pointer) {
  if (pointer) context->options.free(context->options.alloc_user, pointer);
}

void mem_advise_large_pages(void *pointer, size_t bytes) {
#if defined(__linux__)
  const uintptr_t page = 4096, begin = round_up((uintptr_t)pointer, page), end = ((uintptr_t)pointer + bytes) / page * page;
  if (end > begin) (void)madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
  (void)pointer, (void)bytes;
#endif
}

/* proc(5): 5 sets VmHWM to what is in memory now. */
bool mem_peak_restart(void) {
  FILE *file = fopen("/proc/self/clear_refs", "we");
  if (!file) return false;
  bool written = fputs("5", file) >= 0;
  return fclose(file) == 0 && written;
}

size_t mem_peak_bytes(void) {
  FILE *file = fopen("/proc/self/status", "re");
  if (!file) return 0;
  char line[256];
  unsigned long long kibibytes = 0;
  while (fgets(line, sizeof line, file))
    if (strncmp(line, "VmHWM:", 6) == 0) kibibytes = strtoull(line + 6, NULL, 10);
  fclose(file);
  return (size_t)kibibytes * 1024;
}

char *mem_strdup(oscar_context *context, const char *text) {
  size_t bytes = strlen(text) + 1;
  char *copy = mem_alloc(context, bytes, 1);
  if (copy) memcpy(copy, text, bytes);
  return copy;
}
