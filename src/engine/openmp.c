/* openmp.c - how threads of OpenMP wait. */
#include "engine/openmp.h"

#include <stdlib.h>
#include <unistd.h>

void openmp_limit_spinning(char **argv) {
  if (getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY")) return;
  if (setenv("GOMP_SPINCOUNT", "300", 1) == 0) execv("/proc/self/exe", argv); /* where that cannot be, go on as started */
}
