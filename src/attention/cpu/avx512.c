/*
 * avx512.c - attention on a page with AVX-512 and VNNI: vectors of 16, byte dot products in one instruction.
 */
#include "attention/cpu/avx512_vectors.h"

#include "attention/cpu/coded_kernels.h"

const struct attention_kernels attention_kernels_avx512 = {
    .pages =
        {
            .name = "AVX-512 VNNI",
            .row_block = 1,
            .panel_bytes = panel_bytes,
            .prepared_bytes = prepared_bytes,
            .prepare_queries = prepare_queries,
            .score_exact = score_exact,
            .score_coded = score_coded,
            .score_waves = score_waves,
            .accumulate_exact = accumulate_exact,
            .accumulate_coded = accumulate_coded,
        },
    .softmax = softmax,
    .multiply_transposed = multiply_transposed,
    .multiply_add = multiply_add,
};
