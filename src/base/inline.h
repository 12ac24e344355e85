/*
 * base/inline.h - INLINE: functions of kernels, whose arguments are constants where they are called. Private.
 *
 * What a sanitizer adds to every access of an unrolled kernel makes it minutes of compilation; there, compilers may do as they
 * like.
 */
#ifndef OSCAR_INLINE_H
#define OSCAR_INLINE_H

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(undefined_behavior_sanitizer)
#define INLINE static inline
#endif
#endif
#ifndef INLINE
#define INLINE static inline __attribute__((always_inline))
#endif

#endif
