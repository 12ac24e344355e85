/*
 * attention/waves.h - the rotating mean's part of the scores of a coded page. Private.
 *
 * A mean that turns with RoPE (oscar/codec.h) adds to the score of a token at position t, for every pair k with frequency w_k,
 *     a_k cos(w_k t) + b_k sin(w_k t),   (a, b) = the last rows of a mapped query.
 * At the centre of the page, t = c + x, the amplitudes are (a cos wc + b sin wc, b cos wc - a sin wc), and what is left are the
 * 64 values of cos(wx) and sin(wx). Few pairs turn fast enough to need curves of their own; those of all others, |w| 31.5 <=
 * SLOW_ANGLE, are sums of the same WAVE_TERMS Chebyshev polynomials,
 *     cos(wx) = sum over even j of series_j T_j(x / 31.5),   sin(wx) the same over odd j,
 * within 2 J_16(SLOW_ANGLE) < 3e-6 of their amplitude. So 2 * 64 curves of a head become about 32.
 */
#ifndef OSCAR_ATTENTION_WAVES_H
#define OSCAR_ATTENTION_WAVES_H

#include "quant/rope.h"

#define WAVE_TERMS 16 /* the 8 even polynomials first, then the 8 odd ones */
#define SLOW_ANGLE 5.75

struct wave_basis { /* of one head's keys */
  int pairs, fast;  /* the first `fast` pairs of the codec have curves of their own */
  int curves;       /* WAVE_TERMS + 2 fast */
  float *terms; /* [slow pairs, an even number][WAVE_TERMS]: the same, even and odd terms in turn, with a row of 0 at the end */
  float *curve; /* [curves][64]: the polynomials, then the cos of every fast pair, then the sin */
};

/* Bytes of the arrays of one basis, a multiple of 64. */
size_t wave_basis_bytes(const oscar_codec_spec *spec);
/* `memory` has wave_basis_bytes. */
struct wave_basis wave_basis_make(const oscar_codec_spec *spec, void *memory);

static inline int wave_term_rows(const struct wave_basis *w) { return (w->pairs - w->fast + 1) / 2 * 2; }

#endif
