/* base/inline.h - INLINE: functions of kernels, whose arguments are constants where they are called. Private. */
#ifndef OSCAR_INLINE_H
#define OSCAR_INLINE_H

#define INLINE static inline __attribute__((always_inline))

#endif
