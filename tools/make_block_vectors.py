#!/usr/bin/env python3
"""Writes tests/backend/data/<type>.bin: random weight blocks and the floats that the PyPI package `gguf` decodes them to.

    python3 tools/make_block_vectors.py [folder]          (needs: pip install gguf numpy)

File, little-endian: uint32 type number, uint32 blocks, uint32 bytes per block, uint32 elements per block,
then the blocks, then blocks * elements float32 values.
Block bytes are random; halves are replaced by chosen ones: ordinary, negative, zero, negative zero, subnormal, largest.
"""
import pathlib
import sys

import gguf
import numpy as np

SEED = 20250417
BLOCKS = 12
# Offsets of the binary16 fields of a block.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}
SPECIAL = [0.0, -0.0, 6e-8, -3.1e-5, 65504.0, -65504.0, 6.1e-5, -1.5]


def random_blocks(rng, name, block_bytes):
    blocks = rng.integers(0, 256, (BLOCKS, block_bytes), dtype=np.uint8)
    for place, offset in enumerate(HALVES[name]):
        halves = rng.normal(0, 0.02, BLOCKS).astype(np.float16)
        halves[: len(SPECIAL)] = np.roll(np.array(SPECIAL, dtype=np.float16), 3 * place)
        blocks[:, offset : offset + 2] = halves.view(np.uint8).reshape(BLOCKS, 2)
    return blocks


def random_floats(rng, name):
    """Unquantized types: values over the whole range, as bytes of that type."""
    values = (rng.normal(0, 1, 256) * np.exp2(rng.integers(-20, 15, 256))).astype(np.float32)
    values[:8] = np.array(SPECIAL, dtype=np.float32)
    if name == "F32":
        return values.view(np.uint8).reshape(-1, 4)
    if name == "F16":
        return values.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(-1, 2)


def main():
    here = pathlib.Path(__file__).resolve().parent
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here.parent / "tests" / "backend" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    for name in ["F32", "F16", "BF16", *HALVES]:
        kind = gguf.GGMLQuantizationType[name]
        elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = random_blocks(rng, name, block_bytes) if name in HALVES else random_floats(rng, name)
        if name == "F32":
            values = blocks.reshape(-1).view(np.float32)
        elif name == "F16":
            values = blocks.reshape(-1).view(np.float16).astype(np.float32)
        else:
            values = gguf.quants.dequantize(blocks, kind)
        values = np.ascontiguousarray(values, dtype="<f4").reshape(-1)
        assert values.size == blocks.shape[0] * elements
        head = np.array([int(kind), blocks.shape[0], block_bytes, elements], dtype="<u4")
        (folder / f"{name.lower()}.bin").write_bytes(head.tobytes() + blocks.tobytes() + values.tobytes())


if __name__ == "__main__":
    main()
