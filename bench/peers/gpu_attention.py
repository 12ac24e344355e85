#!/usr/bin/env python3
"""Times decode attention on a GPU: ours and the strongest kernels there are, side by side.

    bench/peers/gpu_attention.py --csv attention.csv --json attention.json
    bench/peers/gpu_attention.py --bench build/release/bench/bench_cuda_attention --case '1 x 102400' --case '8 x 32768'

Peers: PyTorch's scaled_dot_product_attention with FlashAttention-2 and with cuDNN, and FlashAttention-3 in BF16 and FP8 where the
package fa3-fwd is installed (pip install fa3-fwd; Hopper only). Each is one query token per sequence over contiguous caches, which
spares peers the page tables that ours reads. As in bench_cuda_attention, layers have buffers of their own and follow each other in
a CUDA graph; times are of one layer: a replay over the number of layers, the median of several. Caches that do not fit are timed
with fewer layers. Of each peer the fastest of several ways to call it counts: orders of the cache in memory, grouped queries as the
kernel's own business or as rows of one head, numbers of splits. Every way is first checked against a definition in float64.

bench_cuda_attention runs right before the peers of each case, on the same GPU. Where ours is set against a peer, its time has
the product that maps queries into the space of codes (`map`) in it, which peers do not need. Shares are of the fastest plain read
of the run.
"""

import argparse
import csv
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention
except ImportError as missing:
    sys.exit(f"gpu_attention.py: needs PyTorch with CUDA, 2.5 or later: {missing}")

QUERY_HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 8, 128, 36
CASES = [(1, 29952), (1, 32768), (1, 59968), (1, 102400), (1, 131072), (8, 32768), (8, 102400), (32, 32768)]
OURS_ALONE = ["64 ragged"]
OUR_FORMS = "half-turning,four,one,bf16"  # the first is what fits have
REPLAYS = 11
SPLITS = [0, 2, 4, 8, 16, 32]  # 0: FlashAttention-3 chooses
# Relative errors beyond which a kernel computes something else: BF16 outputs are good to 2^-9, probabilities in FP8 to 2^-4.
TOLERANCE = {"bf16": 1e-2, "fp8": 1e-1}
PROGRAMS = ["build/cuda", "build/release", "build"]


def fail(text):
    sys.exit(f"gpu_attention.py: {text}")


def note(text):
    print(text, file=sys.stderr, flush=True)


def case_name(case):
    return f"{case[0]} x {case[1]}"


# ---- ways to call the peers: q [batch][query heads][head_dim], k and v as the order says, out [batch][query heads][head_dim] ----


def sdpa(backend, order, rows):
    """rows: the queries of a KV head are rows of one head, for a kernel that knows nothing of groups."""

    def call(q, k, v):
        batch = q.shape[0]
        if order == "tokens first":
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        q = q.view(batch, KV_HEADS, -1, HEAD_DIM) if rows else q.view(batch, QUERY_HEADS, 1, HEAD_DIM)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, enable_gqa=not rows).reshape(batch, QUERY_HEADS, HEAD_DIM)

    return call


def fa3(forward, order, splits):
    def call(q, k, v):
        batch = q.shape[0]
        if order == "heads first":
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        return forward(q.view(batch, 1, QUERY_HEADS, HEAD_DIM), k, v, num_splits=splits).view(batch, QUERY_HEADS, HEAD_DIM)

    return call


def ways():
    """[(kernel, type, way, order, call)]"""
    found = []
    for kernel, backend in (("FA2 (SDPA)", SDPBackend.FLASH_ATTENTION), ("cuDNN (SDPA)", SDPBackend.CUDNN_ATTENTION)):
        for order in ("heads first", "tokens first"):
            for rows in (False, True):
                way = f"{order}, {'groups as rows' if rows else 'enable_gqa'}"
                found.append((kernel, "bf16", way, order, sdpa(backend, order, rows)))
    try:
        from fa3_fwd_interface import flash_attn_with_kvcache as forward
    except (ImportError, OSError) as error:
        note(f"FlashAttention-3 is left out: {error} (pip install fa3-fwd)")
        return found
    for dtype in ("bf16", "fp8"):
        for order in ("heads first", "tokens first"):
            for splits in SPLITS:
                way = f"{order}, {splits or 'its own number of'} splits"
                found.append((f"FA3 {dtype.upper()}", dtype, way, order, fa3(forward, order, splits)))
    return found


# ---- buffers ----


def bytes_of(case, dtype):
    return 2 * case[0] * case[1] * KV_HEADS * HEAD_DIM * (2 if dtype == "bf16" else 1)


def random_tensor(count, dtype, generator, scale=1.0):
    x = torch.empty(count, device="cuda", dtype=torch.bfloat16).normal_(0, scale, generator=generator)
    return x.to(torch.float8_e4m3fn) if dtype == "fp8" else x


def make_layers(case, dtype, most=LAYERS):
    """[(q, k, v)], flat k and v; as many as fit beside the temporary ones."""
    free, _ = torch.cuda.mem_get_info()
    layers = max(1, min(most, int((0.9 * free - bytes_of(case, "bf16")) / bytes_of(case, dtype))))
    generator = torch.Generator("cuda").manual_seed(1)
    cache = case[0] * case[1] * KV_HEADS * HEAD_DIM
    # Queries three times as long as unit ones: weights then differ as much as in a model, and errors show.
    return [(random_tensor(case[0] * QUERY_HEADS * HEAD_DIM, dtype, generator, 3.0).view(case[0], QUERY_HEADS, HEAD_DIM),
             random_tensor(cache, dtype, generator), random_tensor(cache, dtype, generator)) for _ in range(layers)]


def shaped(case, order, layer):
    q, k, v = layer
    shape = (case[0], KV_HEADS, case[1], HEAD_DIM) if order == "heads first" else (case[0], case[1], KV_HEADS, HEAD_DIM)
    return q, k.view(shape), v.view(shape)


# ---- checks and times ----


def definition(order, q, k, v):
    if order == "tokens first":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    q = q.double().view(q.shape[0], KV_HEADS, -1, HEAD_DIM)
    weights = torch.softmax(q @ k.double().transpose(2, 3) / math.sqrt(HEAD_DIM), dim=-1)
    return (weights @ v.double()).reshape(q.shape[0], QUERY_HEADS, HEAD_DIM)


def check(found):
    """Those that compute attention, with their relative errors: {(kernel, way): error}."""
    case, errors = CASES[0], {}
    for dtype in ("bf16", "fp8"):
        its_ways = [way for way in found if way[1] == dtype]
        if not its_ways:
            continue
        layer = make_layers(case, dtype, 1)[0]
        for kernel, _, way, order, call in its_ways:
            q, k, v = shaped(case, order, layer)
            try:
                out = call(q, k, v).double()
            except RuntimeError as error:
                note(f"{kernel}, {way}: left out, {str(error).splitlines()[0]}")
                continue
            exact = definition(order, q, k, v)
            error = ((out - exact).norm() / exact.norm()).item()
            if not error <= TOLERANCE[dtype]:
                note(f"{kernel}, {way}: left out, relative error {error:.2g} against float64 (expected: {TOLERANCE[dtype]:g} at most)")
                continue
            errors[(kernel, way)] = error
        del layer, q, k, v
        torch.cuda.empty_cache()
    return errors


def time_graph(call, layers):
    """Median of replays over the number of layers, in microseconds."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(*layers[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            call(*layer)
    times = []
    for turn in range(REPLAYS + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(begin.elapsed_time(end) * 1e3 / len(layers))
    return statistics.median(times)


def measure_peers(case, found, errors):
    """A row for each kernel: the fastest way."""
    best = {}
    for dtype in ("bf16", "fp8"):
        mine = [way for way in found if way[1] == dtype and (way[0], way[2]) in errors]
        layers = make_layers(case, dtype) if mine else []
        for kernel, _, way, order, call in mine:
            try:
                us = time_graph(call, [shaped(case, order, layer) for layer in layers])
            except RuntimeError as error:  # splits need memory
                note(f"{case_name(case)}, {kernel}, {way}: left out, {str(error).splitlines()[0]}")
                continue
            row = {"sequences": case_name(case), "kernel": kernel, "way": way, "layers": len(layers), "bytes": bytes_of(case, dtype),
                   "us": us, "map_us": 0.0, "read_us": "", "error": errors[(kernel, way)]}
            if kernel not in best or us < best[kernel]["us"]:
                best[kernel] = row
        del layers
        torch.cuda.empty_cache()
    return list(best.values())


def measure_ours(program, name):
    with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        done = subprocess.run([program, "--layers", str(LAYERS), "--forms", OUR_FORMS, "--case", name, "--csv", file.name], text=True, capture_output=True)
        if done.returncode != 0:
            fail(f"'{program}' failed:\n{done.stderr[-2000:]}")
        with open(file.name, newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    return [{"sequences": name, "kernel": row["form"], "way": "oscar", "layers": "", "bytes": int(row["bytes"]),
             "us": float(row["attention_us"]), "map_us": float(row["map_us"]), "read_us": float(row["read_us"]), "error": ""}
            for row in rows]


# ---- tables ----


def cells_of(rows, name):
    return {row["kernel"]: row for row in rows if row["sequences"] == name}


def whole(cell):
    return cell["us"] + cell["map_us"]


def times_as_fast(cells, peers, forms):
    """The time of the fastest peer over those of ours, with their maps; empty without peers."""
    times = [cells[kernel]["us"] for kernel in peers if kernel in cells]
    return ", ".join(f"{min(times) / whole(cells[form]):.2f}" for form in forms) if times else ""


def print_table(title, heads, lines):
    print(f"{title}\n\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for line in lines:
        print(f"| {' | '.join(line)} |")
    print()


def print_tables(rows):
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    ours = [kernel for kernel in kernels if any(row["way"] == "oscar" for row in rows if row["kernel"] == kernel)]
    peers = [kernel for kernel in kernels if kernel not in ours]
    codes = [kernel for kernel in ours if kernel.startswith("int2")]
    names = {name: cells_of(rows, name) for name in dict.fromkeys(row["sequences"] for row in rows)}
    print_table("Microseconds of a layer (share of the read ceiling); `map` comes on top of int2", ["sequences", *peers, *ours, "map"],
                [[name, *(f"{cells[k]['us']:.1f} ({cells[k]['share']:.0%})" if k in cells else "" for k in peers + ours),
                  f"{cells[codes[0]]['map_us']:.1f}"] for name, cells in names.items()])
    fp8 = [kernel for kernel in peers if "FP8" in kernel]
    bf16 = [kernel for kernel in peers if kernel not in fp8]
    print_table(f"Over the floor (without the map) and as fast as the best peer (with it); in this order: {'; '.join(ours)}",
                ["sequences", "floor of codes, µs", "over the floor", "times as fast as the best BF16", "as the best FP8"],
                [[name, f"{cells[codes[0]]['read_us']:.1f}", ", ".join(f"{cells[k]['us'] / cells[k]['read_us']:.2f}" for k in ours),
                  times_as_fast(cells, bf16, codes), times_as_fast(cells, fp8, codes)] for name, cells in names.items()])
    lines = []
    for kernel in peers:
        used = {}
        for row in rows:
            if row["kernel"] == kernel:
                used.setdefault(row["way"], []).append(row)
        text = "; ".join(f"{way} ({', '.join(row['sequences'] for row in those)})" for way, those in used.items())
        lines.append([kernel, text, f"{max(row['error'] for those in used.values() for row in those):.1e}"])
    if lines:
        print_table("The ways that were fastest, and their relative errors", ["kernel", "way (sequences)", "error"], lines)


def program_path(given, name="bench_cuda_attention"):
    if given:
        places = [pathlib.Path(given)]
    else:
        root = pathlib.Path(__file__).resolve().parents[2]
        places = [root / folder / "bench" / name for folder in PROGRAMS]
        places += sorted(root.glob(f"build/*/bench/{name}"))
    for place in places:
        if os.access(place, os.X_OK):
            return str(place.resolve())
    return fail(f"no program {name}: build it, or say where it is with --bench")


def arguments():
    a = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    a.add_argument("--bench", help="our program bench_cuda_attention (default: from a build folder)")
    a.add_argument("--case", action="append", help="'SEQUENCES x TOKENS'; may be repeated (default: all)")
    a.add_argument("--csv", help="also write the rows to this file")
    a.add_argument("--json", help="the same as JSON")
    return a.parse_args()


def write(rows, options):
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def main():
    options = arguments()
    if not torch.cuda.is_available():
        fail("PyTorch finds no CUDA GPU")
    program = program_path(options.bench)
    cases = [case for case in CASES if not options.case or case_name(case) in options.case]
    alone = [name for name in OURS_ALONE if not options.case or name in options.case]
    if not cases and not alone:
        fail(f"no such case; there are {', '.join([case_name(case) for case in CASES] + OURS_ALONE)}")
    gpu = torch.cuda.get_device_name()
    found = ways()
    errors = check(found)
    rows = []
    for case in cases:
        note(f"{case_name(case)} ...")
        rows += measure_ours(program, case_name(case)) + measure_peers(case, found, errors)
    for name in alone:
        rows += measure_ours(program, name)
    ceiling = max(row["bytes"] / row["read_us"] for row in rows if row["read_us"])
    for row in rows:
        row["share"] = row["bytes"] / row["us"] / ceiling
        row["gpu"] = gpu
    print(f"{gpu}, {QUERY_HEADS} query and {KV_HEADS} KV heads of {HEAD_DIM}; read ceiling {ceiling / 1e3:.0f} GB/s; PyTorch "
          f"{torch.__version__}, cuDNN {torch.backends.cudnn.version()}; medians of {REPLAYS}\n")
    print_tables(rows)
    write(rows, options)


if __name__ == "__main__":
    main()
