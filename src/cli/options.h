/* cli/options.h - groups of options that commands share; each fills a struct that the caller has set to its defaults. Private. */
#ifndef OSCAR_CLI_OPTIONS_H
#define OSCAR_CLI_OPTIONS_H

#include "cli/args.h"
#include "engine/engine.h"

/* -m, -t, --cpus, --device, --weights: model_path (as given; model_locate turns it into a file), threads and where they run,
 * device, what it keeps weights as */
struct option_group model_group(struct engine_options *options);
/* --kv, --rotation, --kv-memory, and what window_group has */
struct option_group cache_group(struct engine_options *options);
/* -c, --sink, --recent, --chunk */
struct option_group window_group(struct engine_options *options);
/* --temp, --top-k, --top-p, --min-p, --repeat-penalty, --presence-penalty, --frequency-penalty, --penalty-window, --seed */
struct option_group sampling_group(struct sampler_options *options);

struct sampling_arguments {
  struct sampler_options options;
  const char *logit_bias; /* for bias_read (cli/bias.h); NULL: none */
};
/* The same, and --logit-bias */
struct option_group biased_sampling_group(struct sampling_arguments *arguments);

struct speculation_arguments {
  const char *how, *draft_model; /* NULL: not given; draft_model as -m, see speculation_resolve */
  int guesses;                   /* 0: not given */
};
/* --speculate, --draft-model, --guesses; none is given yet */
struct option_group speculation_group(struct speculation_arguments *arguments);

struct text_arguments {
  const char *prompt, *file; /* NULL: not given */
  int tokens;                /* most tokens to generate */
};
/* -p, -f, -n */
struct option_group text_group(struct text_arguments *arguments);

struct form_arguments {
  const char *grammar, *json_schema; /* files; NULL: not given */
};
/* --grammar, --json-schema */
struct option_group form_group(struct form_arguments *arguments);

struct output_arguments {
  bool json;
};
/* --json */
struct option_group output_group(struct output_arguments *arguments);

#endif
