#!/usr/bin/env python3
"""Writes tests/model/corpus/gguf/*.gguf: small files by the writer of the PyPI package `gguf`.

    python3 tools/make_gguf_corpus.py [folder]          (needs: pip install gguf numpy)

They are the seeds of the fuzz target and, being made by another program, a test of the reader.
"""
import pathlib
import sys

import gguf
import numpy as np


def everything(path):
    """One key of every type, tensors of several types, another alignment."""
    w = gguf.GGUFWriter(path, "llama")
    w.add_custom_alignment(64)
    w.add_uint8("t.uint8", 200)
    w.add_int8("t.int8", -100)
    w.add_uint16("t.uint16", 60000)
    w.add_int16("t.int16", -30000)
    w.add_uint32("t.uint32", 4000000000)
    w.add_int32("t.int32", -2000000000)
    w.add_uint64("t.uint64", 1 << 63)
    w.add_int64("t.int64", -(1 << 62))
    w.add_float32("t.float32", 0.1)
    w.add_float64("t.float64", 0.1)
    w.add_bool("t.true", True)
    w.add_bool("t.false", False)
    w.add_string("t.string", "Grüße, 世界")
    w.add_array("t.strings", ["", "a", "\u0120the", "x" * 300])
    w.add_array("t.integers", [1, -2, 3])
    w.add_array("t.floats", [0.5, -0.25])
    w.add_array("t.bools", [True, False, True])
    rng = np.random.default_rng(7)
    w.add_tensor("f32", rng.normal(size=(3, 5)).astype(np.float32))
    w.add_tensor("f16", rng.normal(size=(2, 2, 4)).astype(np.float16))
    w.add_tensor("q8_0", gguf.quants.quantize(rng.normal(size=(2, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0),
                 raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    w.add_tensor("q2_k", np.zeros((1, 84), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q2_K)
    finish(w)


def small_model(path):
    w = gguf.GGUFWriter(path, "qwen2")
    w.add_block_count(1)
    w.add_context_length(128)
    w.add_token_list(["<s>", "a", "b"])
    w.add_token_types([3, 1, 1])
    w.add_tensor("token_embd.weight", np.ones((3, 32), dtype=np.float32))
    w.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    finish(w)


def no_tensors(path):
    w = gguf.GGUFWriter(path, "gemma3")
    w.add_token_list([f"t{i}" for i in range(40)])
    w.add_token_scores([float(-i) for i in range(40)])
    finish(w)


def finish(w):
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main():
    here = pathlib.Path(__file__).resolve().parent
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here.parent / "tests" / "model" / "corpus" / "gguf"
    folder.mkdir(parents=True, exist_ok=True)
    everything(folder / "everything.gguf")
    small_model(folder / "small-model.gguf")
    no_tensors(folder / "no-tensors.gguf")


if __name__ == "__main__":
    main()
