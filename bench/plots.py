#!/usr/bin/env python3
"""Draws what bench/peers/gpu_attention.py and bench_decode measured, with gnuplot (Debian: gnuplot-nox).

    bench/plots.py --attention attention.csv --steps steps.csv docs/pictures

Of the former, attention-context.svg (time of a layer against the context of one sequence) and attention-batch.svg (tokens per second
that attention alone would allow, against the number of sequences) come into the folder; times of codes contain the product that maps
queries. Of the latter, which is what bench_decode --csv wrote, steps-batch.svg: tokens per second of whole steps against the number
of sequences.
"""

import argparse
import csv
import pathlib
import subprocess
import sys

LAYERS = 36
FULL, LEAN = "int2, four gains, half of the pairs turning", "int2, one gain"
# name in the file: (label, Okabe and Ito's colour, gnuplot's shape), as in the reports of oscar eval
SERIES = {
    "FA2 (SDPA)": ("FA2 BF16", "#e69f00", 11),
    "cuDNN (SDPA)": ("cuDNN BF16", "#d55e00", 5),
    "FA3 BF16": ("FA3 BF16", "#cc79a7", 9),
    "FA3 FP8": ("FA3 FP8", "#009e73", 13),
    "bf16": ("oscar bf16", "#56b4e9", 7),
    FULL: ("oscar int2", "#0072b2", 7),
    LEAN: ("int2, one gain", "#0072b2", 6),
}
FLOOR = ("read of int2", "#404040")
DASHES = ["", " (dashed)", " (dotted)", " (dash-dotted)"]  # gnuplot's dash types 1 to 4
STEP_SERIES = {"int2": SERIES[FULL], "bf16": SERIES["bf16"]}
TENS = ", ".join(str(digit * 10**power) for power in range(1, 6) for digit in (1, 2, 5))
OPENING = """set encoding utf8
set terminal svg size 820,460 noenhanced font 'Helvetica,Arial,sans-serif,14' background '#ffffff'
set tics out nomirror textcolor rgb '#333333'
set border 3 lc rgb '#808080'
set grid lc rgb '#e0e0e0' lt 1 lw 0.8
set key outside right top Left reverse
set offsets graph 0.03, graph 0.03, 0, 0
"""


def fail(text):
    sys.exit(f"plots.py: {text}")


def read_csv(path, columns):
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    if not rows:
        fail(f"{path}: no rows")
    missing = [name for name in columns if name not in rows[0]]
    if missing:
        fail(f"{path}: no column {missing[0]}; is it what the program wrote with --csv?")
    return rows


def read_attention(path):
    uniform = []
    for row in read_csv(path, ["gpu", "sequences", "kernel", "us", "map_us", "read_us"]):
        batch, by, context = row["sequences"].partition(" x ")
        if by:
            uniform.append(dict(row, batch=int(batch), context=int(context), whole_us=float(row["us"]) + float(row["map_us"])))
    if not uniform:
        fail(f"{path}: no row with sequences of one length, as 'SEQUENCES x TOKENS'")
    return uniform


def line(label, colour, points, style):
    """A series for gnuplot: its data and its plot."""
    return sorted(points), f"{style} lc rgb '{colour}' " + (f"title '{label}'" if label else "notitle")


def context_lines(rows):
    alone = [row for row in rows if row["batch"] == 1]
    lines = []
    for kernel, (label, colour, shape) in SERIES.items():
        points = [(row["context"] / 1000, row["whole_us"]) for row in alone if row["kernel"] == kernel]
        lines.append(line(label, colour, points, f"with linespoints pt {shape} ps 0.7 lw 1.8"))
    floor = [(row["context"] / 1000, float(row["read_us"])) for row in alone if row["kernel"] == FULL]
    return lines + [line(*FLOOR, floor, "with lines lw 1.8 dt 2")]


def batch_lines(rows):
    """Solid: the context with most batch sizes; dashed and so on: the others that have more than one."""
    batches = {}
    for row in rows:
        batches.setdefault(row["context"], set()).add(row["batch"])
    contexts = sorted((context for context in batches if len(batches[context]) > 1), key=lambda c: -len(batches[c]))
    lines = []
    for dash, context in enumerate(contexts, 1):
        here = [row for row in rows if row["context"] == context]
        for kernel, (label, colour, shape) in SERIES.items():
            points = [(row["batch"], row["batch"] / row["whole_us"] / LAYERS * 1e6) for row in here if row["kernel"] == kernel]
            lines.append(line("" if dash > 1 else label, colour, points, f"with linespoints pt {shape} ps 0.7 lw 1.8 dt {dash}"))
    return lines, contexts


def step_lines(rows):
    """Tokens are chosen on the GPU where they can be; a line for each cache and context, a dash for each context."""
    contexts = sorted({int(row["context"]) for row in rows}, reverse=True)
    lines = []
    for dash, context in enumerate(contexts, 1):
        for kv, (label, colour, shape) in STEP_SERIES.items():
            points = {}
            for row in rows:
                if row["kv"] == kv and int(row["context"]) == context:
                    step_ms = float(row["sampled_ms"]) or float(row["step_ms"])
                    points[int(row["sequences"])] = 1e3 * int(row["sequences"]) / step_ms
            style = f"with linespoints pt {shape} ps 0.7 lw 1.8 dt {dash}"
            lines.append(line("" if dash > 1 else label, colour, list(points.items()), style))
    return lines, contexts


def draw(path, settings, lines):
    lines = [each for each in lines if each[0]]
    if not lines:
        fail(f"{path}: nothing to draw")
    script = OPENING + settings
    for i, (points, _) in enumerate(lines):
        script += f"$s{i} << END\n" + "".join(f"{x:.9g} {y:.9g}\n" for x, y in points) + "END\n"
    script += "plot " + ", \\\n  ".join(f"$s{i} using 1:2 {plot}" for i, (_, plot) in enumerate(lines)) + "\n"
    try:
        done = subprocess.run(["gnuplot", "-d", "-"], input=script, text=True, capture_output=True)
    except FileNotFoundError:
        fail("pictures are drawn by gnuplot, which is not installed (Debian: gnuplot-nox)")
    if done.returncode != 0:
        fail(f"gnuplot: {done.stderr.strip()}")
    path.write_text(done.stdout, encoding="utf-8")


def draw_attention(path, folder):
    rows = read_attention(path)
    gpu = rows[0]["gpu"].replace("'", "")
    draw(folder / "attention-context.svg",
         f"set title 'Decode attention of one sequence, {gpu}'\nset xlabel 'thousand tokens in the cache'\n"
         "set ylabel 'microseconds per layer'\nset yrange [0:*]\nset xrange [0:*]\n", context_lines(rows))
    lines, contexts = batch_lines(rows)
    draw(folder / "attention-batch.svg", against_batch(f"Attention of {LAYERS} layers alone, {gpu}", contexts), lines)


def draw_steps(path, folder):
    rows = read_csv(path, ["device", "shape", "kv", "context", "sequences", "step_ms", "sampled_ms"])
    shapes = {row["shape"] for row in rows}
    if len(shapes) > 1:
        fail(f"{path}: steps of {', '.join(sorted(shapes))}; one shape is drawn")
    lines, contexts = step_lines(rows)
    draw(folder / "steps-batch.svg", against_batch(f"Whole steps, {shapes.pop()}, {rows[0]['device']}", contexts), lines)


def against_batch(title, contexts):
    text = ", ".join(str(context) + style for context, style in zip(contexts, DASHES))
    return (f"set title '{title}; context {text}'\nset xlabel 'sequences'\nset ylabel 'tokens/s'\nset logscale x 2\nset logscale y\n"
            f"set ytics ({TENS})\n")


def main():
    a = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    a.add_argument("--attention", metavar="CSV", help="what gpu_attention.py --csv wrote")
    a.add_argument("--steps", metavar="CSV", help="what bench_decode --csv wrote")
    a.add_argument("folder", type=pathlib.Path, help="where the pictures go")
    options = a.parse_args()
    if not options.attention and not options.steps:
        a.error("nothing to draw: --attention or --steps is needed")
    if options.attention:
        draw_attention(options.attention, options.folder)
    if options.steps:
        draw_steps(options.steps, options.folder)


if __name__ == "__main__":
    main()
