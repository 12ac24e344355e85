/* engine/openmp.h - how threads of OpenMP wait, in which oneDNN works. */
#ifndef OSCAR_OPENMP_H
#define OSCAR_OPENMP_H

/*
 * For programs, before all else in main. GCC's OpenMP runtime lets threads spin for milliseconds after every product. With
 * another busy program on the machine that costs a hundredfold, and beside the threads of a team (base/team.h) half of a step
 * (docs/performance.md), so short waits spin and longer ones sleep. The runtime reads its setting before main, hence a second
 * start of the program with the same `argv`; whoever set one of its variables keeps his setting.
 */
void openmp_limit_spinning(char **argv);

#endif
