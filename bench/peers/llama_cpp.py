#!/usr/bin/env python3
"""Measures oscar and llama.cpp side by side: prompt and decode speed at depths of history.

    bench/peers/llama_cpp.py -m smollm2-135m -m qwen2.5-coder-0.5b --depths 0,8192
    bench/peers/llama_cpp.py -m smollm2-135m --depths 0 --prompt 8000 --decode 0 --no-warmup    # a whole long prompt

llama.cpp is built once, from the source package of llama-cpp-python on PyPI, into the folder given by --work: the stock build for
this CPU and, on CPUs with AVX512-FP16, a second one without it, "fair": with head dimension 64 the F16 attention of the stock build
falls back to scalar code there. The programs run one after the other, in turn, so that both meet the same machine; the table has
medians, and the ratio of ours to the fastest cache type of llama.cpp.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tarfile

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"


def fail(text):
    sys.exit(f"llama_cpp.py: {text}")


def run(command):
    done = subprocess.run([str(part) for part in command], text=True, capture_output=True)
    if done.returncode != 0:
        fail(f"'{' '.join(map(str, command))}' failed:\n{done.stderr[-2000:]}")
    return done.stdout


def cpu_field(name):
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def source_tree(work):
    """The folder of llama.cpp inside the unpacked source package."""
    tree = work / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
    if tree.is_dir():
        return tree
    print(f"fetching {PACKAGE} {VERSION} ...", file=sys.stderr)
    archive = work / f"llama_cpp_python-{VERSION}.tar.gz"
    if not archive.exists():
        run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", work, f"{PACKAGE}=={VERSION}"])
    if not archive.exists():
        fail(f"pip left no {archive}")
    with tarfile.open(archive) as package:
        package.extractall(work)
    return tree


def compilers(flags):
    """GCC 12 loses stores to the AMX configuration, and the program crashes: clang, where both meet."""
    if "amx_tile" not in flags:
        return []
    version = re.search(r"(\d+)\.\d+\.\d+", run(["gcc", "--version"])) if shutil.which("gcc") else None
    if version and int(version.group(1)) >= 13:
        return []
    if not shutil.which("clang++"):
        fail("this CPU has AMX, for which llama.cpp needs GCC 13 or clang++: install one of them")
    return ["-DCMAKE_C_COMPILER=clang", "-DCMAKE_CXX_COMPILER=clang++"]


def build(work, name, extra, jobs):
    program = work / name / "bin" / "llama-bench"
    if program.exists():
        return program
    tree = source_tree(work)
    print(f"building llama.cpp, {name} (some minutes) ...", file=sys.stderr)
    run(["cmake", "-S", tree, "-B", work / name, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON",
         "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_CURL=OFF",
         "-DLLAMA_OPENSSL=OFF", "-DBUILD_SHARED_LIBS=OFF", *extra])
    run(["ninja", "-C", work / name, f"-j{jobs}", "llama-bench"])
    return program


def model_file(name):
    if os.path.exists(name):
        return name
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = os.path.join(cache, "oscar", "models", name + ".gguf")
    if not os.path.exists(path):
        fail(f"no model '{name}': a GGUF file, or one that 'oscar fetch' has brought")
    return path


def measure_peer(program, model, cache, depth, options):
    """{test: tokens/s} of one run."""
    out = run([program, "-m", model, "-t", options.threads, "-fa", 1, "-ctk", cache, "-ctv", cache, "-d", depth, "-p",
               options.prompt, "-n", options.decode, "-r", 1, "-o", "json", *(["--no-warmup"] if options.no_warmup else [])])
    return {"prompt" if row["n_prompt"] else "decode": row["avg_ts"] for row in json.loads(out)}


def measure_ours(model, kv, depth, options):
    out = run([options.oscar, "bench", "-m", model, "-t", options.threads, "--kv", kv, "-d", depth, "-p", options.prompt, "-n",
               options.decode, "-r", 1, "--json"])
    return {row["test"]: row["tokens_per_s"] for row in json.loads(out)["rows"]}


def numbers(text):
    return [int(part) for part in text.split(",")]


def arguments():
    cpus = len(os.sched_getaffinity(0))
    a = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    a.add_argument("-m", "--model", action="append", required=True, help="a fetched model or a GGUF file; may be repeated")
    a.add_argument("--depths", type=numbers, default=[0, 8192], help="tokens already in the cache (default: 0,8192)")
    a.add_argument("--prompt", type=int, default=512, help="prompt tokens to time (default: 512; 0: none)")
    a.add_argument("--decode", type=int, default=32, help="decoded tokens to time (default: 32; 0: none)")
    a.add_argument("--no-warmup", action="store_true",
                   help="llama.cpp does not run each test once before it times it, as ours does not: for tests of minutes")
    a.add_argument("--repeats", type=int, default=5, help="runs of each program (default: 5)")
    a.add_argument("--threads", type=int, default=cpus)
    a.add_argument("--cache", default="f16", help="cache types of llama.cpp (default: f16; also q8_0, q4_0)")
    a.add_argument("--kv", default="int2,bf16", help="our forms of the cache (default: int2,bf16)")
    a.add_argument("--oscar", default="build/release/oscar", help="our program (default: build/release/oscar)")
    a.add_argument("--work", type=pathlib.Path, default=pathlib.Path("build/peers"), help="where llama.cpp is built")
    a.add_argument("--json", help="also write every measurement to this file")
    return a.parse_args()


def measure(model, depth, programs, options):
    """{(program, cache): {test: [tokens/s]}}, every program run in turn `repeats` times."""
    results = {}
    for turn in range(options.repeats):
        for build_name, program in programs.items():
            for cache in options.cache.split(","):
                speeds = measure_peer(program, model, cache, depth, options)
                for test, speed in speeds.items():
                    results.setdefault((f"llama.cpp {build_name}", cache), {}).setdefault(test, []).append(speed)
        for kv in options.kv.split(","):
            for test, speed in measure_ours(model, kv, depth, options).items():
                results.setdefault(("oscar", kv), {}).setdefault(test, []).append(speed)
        print(f"  depth {depth}: {turn + 1} of {options.repeats}", file=sys.stderr)
    return results


def print_table(name, depth, results):
    for test in ("prompt", "decode"):
        rows = {key: statistics.median(tests[test]) for key, tests in results.items() if test in tests}
        peers = [speed for (program, _), speed in rows.items() if program != "oscar"]
        for (program, cache), speed in rows.items():
            ratio = f"{speed / max(peers):.2f}" if program == "oscar" and peers else ""
            runs = results[(program, cache)][test]
            print(f"| {name} | {test} | {depth} | {program} | {cache} | {speed:.1f} | {min(runs):.1f} to {max(runs):.1f} | {ratio} |",
                  flush=True)


def main():
    options = arguments()
    if not os.access(options.oscar, os.X_OK):
        fail(f"{options.oscar} is not there: build it, or say where it is with --oscar")
    options.work.mkdir(parents=True, exist_ok=True)
    flags = set(cpu_field("flags").split())
    extra = compilers(flags)
    programs = {"stock": build(options.work, "stock", extra, options.threads)}
    if "avx512_fp16" in flags:
        no_fp16 = ["-DCMAKE_C_FLAGS=-mno-avx512fp16", "-DCMAKE_CXX_FLAGS=-mno-avx512fp16"]
        programs["fair"] = build(options.work, "fair", extra + no_fp16, options.threads)
    print(f"{cpu_field('model name') or 'unknown CPU'}, {options.threads} threads; {PACKAGE} {VERSION}; medians of {options.repeats}; {options.prompt} prompt and "
          f"{options.decode} decoded tokens\n")
    print("| model | test | depth | program | cache | tokens/s | lowest to highest | ratio to llama.cpp's best |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    everything = []
    for name in options.model:
        for depth in options.depths:
            results = measure(model_file(name), depth, programs, options)
            print_table(pathlib.Path(name).stem, depth, results)
            everything += [{"model": name, "depth": depth, "program": program, "cache": cache, "tokens_per_s": tests}
                           for (program, cache), tests in results.items()]
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
