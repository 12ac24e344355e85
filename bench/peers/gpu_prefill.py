#!/usr/bin/env python3
"""Times attention of prompts on a GPU: ours and the strongest kernels there are, side by side.

    bench/peers/gpu_prefill.py --csv prefill.csv
    bench/peers/gpu_prefill.py --bench build/release/bench/bench_cuda_prefill --case 32768 --case '4096 on 106496'

Peers: PyTorch's scaled_dot_product_attention with FlashAttention-2 and, where the prompt is all there is, with cuDNN, and
FlashAttention-3 in BF16 and FP8 where the package fa3-fwd is installed (Hopper only). All read contiguous BF16 (FP8) caches; ours
reads pages. TFLOPS count 4 head_dim operations for every pair of a query and a position that it sees. Peers are timed by CUDA
events around a few calls, the median of several rounds, after they were checked against float64 on a few queries.
bench_cuda_prefill runs right before the peers of each case, on the same GPU.
"""

import argparse
import csv
import math
import statistics
import subprocess
import sys
import tempfile

from gpu_attention import HEAD_DIM, KV_HEADS, QUERY_HEADS, fail, note, print_table, program_path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

CASES = {"8192": (8192, 8192), "32768": (32768, 32768), "4096 on 36864": (36864, 4096), "4096 on 106496": (106496, 4096),
         "512 on 102912": (102912, 512), "64 on 102464": (102464, 64), "8 on 102408": (102408, 8)}
ROUNDS, CALLS = 7, 3
CHECKED = 8  # queries, the last ones
TOLERANCE = {"bf16": 1e-2, "fp8": 1e-1}


def sdpa(backend):
    def call(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            if q.shape[2] == k.shape[2]:
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
            return scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]),
                                                enable_gqa=True).transpose(1, 2)

    return call


def kernels():
    """[(kernel, type, call)]"""
    found = [("FA2 (SDPA)", "bf16", sdpa(SDPBackend.FLASH_ATTENTION)), ("cuDNN (SDPA)", "bf16", sdpa(SDPBackend.CUDNN_ATTENTION))]
    try:
        from fa3_fwd_interface import flash_attn_with_kvcache as forward
    except (ImportError, OSError) as error:
        note(f"FlashAttention-3 is left out: {error} (pip install fa3-fwd)")
        return found
    for dtype in ("bf16", "fp8"):
        found.append((f"FA3 {dtype.upper()}", dtype, lambda q, k, v: forward(q, k, v, causal=True)))
    return found


def tensors(tokens, queries, dtype):
    generator = torch.Generator("cuda").manual_seed(1)
    made = [torch.empty(1, n, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16).normal_(0, scale, generator=generator)
            for n, heads, scale in ((queries, QUERY_HEADS, 3.0), (tokens, KV_HEADS, 1.0), (tokens, KV_HEADS, 1.0))]
    return [x.to(torch.float8_e4m3fn) for x in made] if dtype == "fp8" else made


def error_of(out, q, k, v):
    """Relative, of the last queries, against float64."""
    n = min(CHECKED, q.shape[1])
    tokens, group = k.shape[1], QUERY_HEADS // KV_HEADS
    squares = norm = 0.0
    mask = torch.arange(tokens, device="cuda")[None, :] > torch.arange(tokens - n, tokens, device="cuda")[:, None]
    for head in range(KV_HEADS):
        keys, values = k[0, :, head].double(), v[0, :, head].double()
        for i in range(head * group, (head + 1) * group):
            scores = (q[0, -n:, i].double() @ keys.T / math.sqrt(HEAD_DIM)).masked_fill(mask, -math.inf)
            exact = torch.softmax(scores, dim=-1) @ values
            squares += (out[0, -n:, i].double() - exact).square().sum().item()
            norm += exact.square().sum().item()
    return math.sqrt(squares / norm)


def time_calls(call, *inputs):
    times = []
    for turn in range(ROUNDS + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(CALLS):
            call(*inputs)
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(begin.elapsed_time(end) / CALLS)
    return statistics.median(times)


def tflops(name, ms):
    tokens, queries = CASES[name]
    pairs = queries * (tokens - queries) + queries * (queries + 1) / 2
    return 4e-9 * pairs * QUERY_HEADS * HEAD_DIM / ms


def measure_peers(name, found):
    rows = []
    for kernel, dtype, call in found:
        inputs = tensors(*CASES[name], dtype)
        try:
            error = error_of(call(*inputs), *inputs)
            if not error <= TOLERANCE[dtype]:
                note(f"{name}, {kernel}: left out, relative error {error:.2g}")
                continue
            ms = time_calls(call, *inputs)
        except RuntimeError as problem:
            note(f"{name}, {kernel}: left out, {str(problem).splitlines()[0]}")
            continue
        rows.append({"case": name, "kernel": kernel, "ms": ms, "tflops": tflops(name, ms), "error": error})
        del inputs
        torch.cuda.empty_cache()
    return rows


def measure_ours(program, name):
    with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        done = subprocess.run([program, "--case", name, "--csv", file.name], text=True, capture_output=True)
        if done.returncode != 0:
            fail(f"'{program}' failed:\n{done.stderr[-2000:]}")
        with open(file.name, newline="", encoding="utf-8") as lines:
            return [{"case": name, "kernel": row["form"], "ms": float(row["ms"]), "tflops": float(row["tflops"]), "error": ""}
                    for row in csv.DictReader(lines)]


def main():
    a = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    a.add_argument("--bench", help="our program bench_cuda_prefill (default: from a build folder)")
    a.add_argument("--case", action="append", choices=list(CASES), help="may be repeated (default: all)")
    a.add_argument("--csv", help="also write the rows to this file")
    options = a.parse_args()
    if not torch.cuda.is_available():
        fail("PyTorch finds no CUDA GPU")
    program = program_path(options.bench, "bench_cuda_prefill")
    found = kernels()
    rows = []
    for name in options.case or CASES:
        note(f"{name} ...")
        rows += measure_ours(program, name) + measure_peers(name, found)
    print(f"{torch.cuda.get_device_name()}, {QUERY_HEADS} query and {KV_HEADS} KV heads of {HEAD_DIM}; PyTorch {torch.__version__}, "
          f"cuDNN {torch.backends.cudnn.version()}; medians of {ROUNDS}\n")
    columns = list(dict.fromkeys(row["kernel"] for row in rows))
    cells = {(row["case"], row["kernel"]): row for row in rows}
    print_table("TFLOPS (milliseconds)", ["queries on tokens", *columns],
                [[name, *(f"{cells[name, k]['tflops']:.0f} ({cells[name, k]['ms']:.2f})" if (name, k) in cells else "" for k in columns)]
                 for name in dict.fromkeys(row["case"] for row in rows)])
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
