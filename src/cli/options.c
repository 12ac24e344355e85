/* options.c - the tables of the shared option groups. Names follow llama.cpp where it has them, so that its users feel at home.
 */
#include "cli/options.h"

#include "engine/speculate.h"

#define ENGINE(field) offsetof(struct engine_options, field)

static const char *kv_name(int i) {
  int count;
  const struct kv_type *types = kv_type_list(&count);
  return i < count ? types[i].name : NULL;
}

static const struct option_spec model_options[] = {
    {"model", 'm', OPTION_TEXT, ENGINE(model_path), "NAME|FILE", .help = "a fetched model ('oscar fetch --list') or a GGUF file",
     .default_text = ""},
    {"threads", 't', OPTION_INT, ENGINE(threads), "N", .help = "threads", 0, 4096, .default_text = "one per core"},
    {"cpus", 0, OPTION_CPUS, ENGINE(cpus), "LIST",
     .help =
         "pins each thread to a CPU of its own: the first to the first of the list, and so on; -t is as long as the list then",
     .default_text = "not pinned"},
    {"device", 0, OPTION_TEXT, ENGINE(device), "NAME", .help = "what the model runs on: cpu, cuda, or cuda:N for GPU N"},
    {"weights", 0, OPTION_TEXT, ENGINE(weights), "TYPE",
     .help = "what a GPU keeps weights as: bf16, or fp8, which is half of that and coarser (embedding and output stay in bf16)",
     .choice = device_weights, .default_text = "bf16"},
};

/* What the cache is made of, then how large it is; window_group is the second half. */
static const struct option_spec cache_options[] = {
    {"kv", 0, OPTION_TEXT, ENGINE(kv), "TYPE",
     .help = "form of the cache: bf16, int8, int4, int2, int2-centred, int2-oscar, int2-hadamard, int2-plain", .choice = kv_name},
    {"bits", 0, OPTION_FLOAT, ENGINE(bits), "B",
     .help = "bits of the codes of int2 per element, keys and values of all layers on average", KV_LEAST_BITS, KV_MOST_BITS,
     .default_text = "2"},
    {"rotation", 0, OPTION_TEXT, ENGINE(rotation_file), "FILE", .help = "fitted codecs from 'oscar calibrate'",
     .default_text = "the user's cache folder, fitted on first use"},
    {"kv-memory", 0, OPTION_SIZE, ENGINE(kv_memory_bytes), "SIZE", .help = "bytes for the whole cache (512M, 4G)",
     .default_text = "what --ctx needs"},
    {"ctx", 'c', OPTION_INT64, ENGINE(context), "N", .help = "tokens the cache has room for", 1, 1 << 30,
     .default_text = "what the model was trained for"},
    {"sink", 0, OPTION_INT, ENGINE(sink_tokens), "N", .help = "first tokens that stay exact", 0, 1 << 30, OSCAR_PAGE_TOKENS,
     .default_text = "64"},
    {"recent", 0, OPTION_INT, ENGINE(recent_tokens), "N", .help = "latest tokens that stay exact", 0, 1 << 30, OSCAR_PAGE_TOKENS,
     .default_text = "256"},
    {"chunk", 0, OPTION_INT, ENGINE(chunk), "N", .help = "prompt tokens per forward pass", 1, 8192,
     .default_text = "512, on a GPU 2048"},
};
enum { FIRST_WINDOW_OPTION = 4 };

#define SAMPLER(field) offsetof(struct sampler_options, field)
static const struct option_spec sampling_options[] = {
    {"temp", 0, OPTION_FLOAT, SAMPLER(temperature), "X", .help = "temperature; 0: the most likely token always", 0, 100},
    {"top-k", 0, OPTION_INT, SAMPLER(top_k), "N", .help = "only the N most likely tokens; 0: all", 0, 1 << 30},
    {"top-p", 0, OPTION_FLOAT, SAMPLER(top_p), "X", .help = "the most likely tokens that sum to X; 1: all", 0, 1},
    {"min-p", 0, OPTION_FLOAT, SAMPLER(min_p), "X", .help = "tokens at least X times as likely as the first; 0: all", 0, 1},
    {"repeat-penalty", 0, OPTION_FLOAT, SAMPLER(repeat_penalty), "X",
     .help = "makes tokens that came before less likely: logits above 0 are divided by X, others multiplied; 1: no change", 0.01,
     100},
    {"presence-penalty", 0, OPTION_FLOAT, SAMPLER(presence_penalty), "X",
     .help = "subtracted from the logits of tokens that came before", -1000, 1000},
    {"frequency-penalty", 0, OPTION_FLOAT, SAMPLER(frequency_penalty), "X",
     .help = "subtracted from logits for every time that a token came before", -1000, 1000},
    {"penalty-window", 0, OPTION_INT, SAMPLER(penalty_window), "N",
     .help = "how many tokens before count for these penalties, the prompt's too; -1: all", -1, 1 << 30},
    {"seed", 's', OPTION_UINT64, SAMPLER(seed), "N", .help = "the same seed gives the same text"},
    /* not of a sampler_options alone: */
    {"logit-bias", 0, OPTION_TEXT, offsetof(struct sampling_arguments, logit_bias), "LIST",
     .help = "TOKEN=BIAS, by commas: added to the logits of tokens, each a number or a text in quotes that is one token "
             "(\"42=5,' Paris'=-100\"); -100 forbids it",
     .default_text = "none"},
};
_Static_assert(offsetof(struct sampling_arguments, options) == 0, "one table serves both groups");

static const char *speculation_name(int i) {
  static const char *const names[] = {"lookup", "draft", "off"};
  return (size_t)i < ARRAY_LENGTH(names) ? names[i] : NULL;
}

static const struct option_spec speculation_options[] = {
    {"speculate", 0, OPTION_TEXT, offsetof(struct speculation_arguments, how), "HOW",
     .help = "guesses the next tokens, which changes the speed and not the text: lookup (by what the text says elsewhere), draft "
             "(by a smaller model) or off",
     .choice = speculation_name, .default_text = "off; draft with --draft-model"},
    {"draft-model", 0, OPTION_TEXT, offsetof(struct speculation_arguments, draft_model), "NAME|FILE",
     .help = "the smaller model, of the same vocabulary", .default_text = ""},
    {"guesses", 0, OPTION_INT, offsetof(struct speculation_arguments, guesses), "N", .help = "most tokens guessed at a time", 1,
     MOST_GUESSES, .default_text = "8"},
};

static const struct option_spec text_options[] = {
    {"prompt", 'p', OPTION_TEXT, offsetof(struct text_arguments, prompt), "TEXT", .help = "the prompt"},
    {"file", 'f', OPTION_TEXT, offsetof(struct text_arguments, file), "FILE",
     .help = "the prompt from a file; '-': standard input"},
    {"n-predict", 'n', OPTION_INT, offsetof(struct text_arguments, tokens), "N", .help = "most tokens to generate", 0, 1 << 30},
};

static const struct option_spec form_options[] = {
    {"grammar", 0, OPTION_TEXT, offsetof(struct form_arguments, grammar), "FILE",
     .help = "the text keeps to a grammar (GBNF, docs/grammars.md)"},
    {"json-schema", 0, OPTION_TEXT, offsetof(struct form_arguments, json_schema), "FILE",
     .help = "the text is JSON that fits a JSON Schema"},
};

static const struct option_spec output_options[] = {
    {"json", 0, OPTION_FLAG, offsetof(struct output_arguments, json), NULL, .help = "the result as one JSON object on stdout"},
};

struct option_group model_group(struct engine_options *options) {
  return (struct option_group){"Model", model_options, (int)ARRAY_LENGTH(model_options), options};
}

struct option_group cache_group(struct engine_options *options) {
  return (struct option_group){"Cache", cache_options, (int)ARRAY_LENGTH(cache_options), options};
}

struct option_group window_group(struct engine_options *options) {
  return (struct option_group){"Size", cache_options + FIRST_WINDOW_OPTION,
                               (int)ARRAY_LENGTH(cache_options) - FIRST_WINDOW_OPTION, options};
}

struct option_group sampling_group(struct sampler_options *options) {
  return (struct option_group){"Sampling", sampling_options, (int)ARRAY_LENGTH(sampling_options) - 1, options};
}

struct option_group biased_sampling_group(struct sampling_arguments *arguments) {
  return (struct option_group){"Sampling", sampling_options, (int)ARRAY_LENGTH(sampling_options), arguments};
}

struct option_group speculation_group(struct speculation_arguments *arguments) {
  *arguments = (struct speculation_arguments){0};
  return (struct option_group){"Speculation", speculation_options, (int)ARRAY_LENGTH(speculation_options), arguments};
}

struct option_group text_group(struct text_arguments *arguments) {
  return (struct option_group){"Text", text_options, (int)ARRAY_LENGTH(text_options), arguments};
}

struct option_group form_group(struct form_arguments *arguments) {
  return (struct option_group){"Form", form_options, (int)ARRAY_LENGTH(form_options), arguments};
}

struct option_group output_group(struct output_arguments *arguments) {
  return (struct option_group){"Output", output_options, (int)ARRAY_LENGTH(output_options), arguments};
}
