#!/usr/bin/env python3
"""A model with its first layers only. Usage: cut_layers.py MODEL.gguf LAYERS OUT.gguf

Its texts mean nothing, but it is loaded, calibrated and run as the whole one is, in a fraction of the time.
"""
import re
import struct
import sys

ALIGNMENT = 32
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9


def main(source, layers, target):
    data = memoryview(open(source, "rb").read())
    at = 0

    def take(form):
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values[0]

    def skip(kind):
        nonlocal at
        if kind == STRING:
            n = take("Q")
            at += n
        elif kind == ARRAY:
            of, n = take("I"), take("Q")
            if of in SIZES:
                at += n * SIZES[of]
            else:
                for _ in range(n):
                    skip(of)
        else:
            at += SIZES[kind]

    def name():
        nonlocal at
        n = take("Q")
        at += n
        return bytes(data[at - n:at]).decode()

    magic, version, n_tensors, n_keys = take("4s"), take("I"), take("Q"), take("Q")
    assert magic == b"GGUF"
    metadata = bytearray()
    for _ in range(n_keys):
        begin = at
        key, kind = name(), take("I")
        value = at
        skip(kind)
        assert key != "general.alignment"
        metadata += data[begin:at]
        if key.endswith(".block_count"):
            metadata[value - at:] = struct.pack("<I", layers)
    tensors = []
    for _ in range(n_tensors):
        begin = at
        called = name()
        dimensions = take("I")
        at += 8 * dimensions + 4
        described = bytes(data[begin:at])
        tensors.append((take("Q"), called, described))
    first = -(-at // ALIGNMENT) * ALIGNMENT
    ends = sorted(offset for offset, _, _ in tensors)[1:] + [len(data) - first]
    index, contents, length = bytearray(), [], 0
    for (offset, called, described), end in zip(sorted(tensors), ends):
        block = re.match(r"blk\.(\d+)\.", called)
        if block and int(block[1]) >= layers:
            continue
        index += described + struct.pack("<Q", length)
        contents.append(data[first + offset:first + end])
        length += -(-(end - offset) // ALIGNMENT) * ALIGNMENT
    head = struct.pack("<4sIQQ", magic, version, len(contents), n_keys) + metadata + index
    with open(target, "wb") as out:
        out.write(head + bytes(-len(head) % ALIGNMENT))
        for content in contents:
            out.write(content)
            out.write(bytes(-len(content) % ALIGNMENT))


main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
