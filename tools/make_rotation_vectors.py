#!/usr/bin/env python3
"""Writes the small rotation files of tests/rotation: python3 tools/make_rotation_vectors.py tests/rotation

Needs torch and safetensors. Every matrix follows a formula that tests/rotation/test_files.c repeats:
  H[i][j] = (-1)^popcount(i & j) / 4, order 16
  v1: rotation of layer l = H with row i multiplied by (-1)^(i == l), eigenvalues i + l
  v2: layer 3 and 7, two heads; with s[k] = 1 + h + k/16: rotation[i][k] = H[i][k] s[k], q_rotation[i][k] = H[i][k] / s[k],
      k_mean[h][k] = h - k/8, eigenvalues[h][k] = k
  set.safetensors (our own format, written by the safetensors package from docs/formats.md): one layer, two heads; keys of head 0
      have encode H, steps 1/2, mean[k] = k/4, form GAIN; keys of head 1 and all values are plain, clip ratio 0.75
"""
import io
import os
import pathlib
import sys
import zipfile
from collections import OrderedDict

import torch
from safetensors.torch import save_file

D = 16


def hadamard():
    return torch.tensor([[(-1.0) ** bin(i & j).count("1") / 4 for j in range(D)] for i in range(D)], dtype=torch.float64)


def v1(keys):
    layers = {}
    for layer in range(2):
        rotation = hadamard()
        rotation[layer] *= -1
        layers[keys(layer)] = {"layer_id": layer, "rotation": rotation.float(), "eigenvalues": torch.arange(D).float() + layer}
    extra = {"tokens": 8192, "created": 1.5, "big": 1 << 40, "negative": -(1 << 35), "small": -3, "done": True, "note": None,
             "list": [1, "two", (3, 4.0, 5, 6)], "empty": [], "pair": (1, 2), "wide": 70000}
    return {"format_version": 1, "objective": "qqt_r_h_pbr", "source_grouping": "layer", "calibration": extra, "layers": layers}


def v2():
    layers = OrderedDict()
    head = torch.arange(2, dtype=torch.float64)[:, None]
    k = torch.arange(D, dtype=torch.float64)[None, :]
    stretch = 1 + head + k / 16
    for layer in (7, 3):
        rotation = (hadamard()[None] * stretch[:, None, :]).float()
        turned = rotation.transpose(1, 2).contiguous().transpose(1, 2)  # the same numbers, columns contiguous
        base = torch.zeros(2, 2, D, D, dtype=torch.float64)
        base[1] = hadamard()[None] / stretch[:, None, :]
        layers[str(layer)] = {
            "layer_id": layer,
            "rotation": turned,
            "k_mean": (head - k / 8).half(),
            "q_rotation": base[1],  # a view that starts inside its storage
            "eigenvalues": k.expand(2, D).bfloat16().contiguous() if layer == 3 else torch.arange(D).bfloat16()[None].expand(2, D),
        }
    return {"format_version": 2, "objective": "oscar2_flat", "source_grouping": "head", "layers": layers}


def identity():
    layers = {i: {"layer_id": i, "rotation": torch.eye(D)} for i in range(3)}
    return {"format_version": "identity-v1", "objective": "identity-k", "source_grouping": "identity", "layers": layers}


class Hostile:
    def __reduce__(self):
        return os.system, ("echo this must never be printed",)


def codec_set(path):
    tensors = {
        "places": torch.tensor([[[0, 1], [2, 1]]], dtype=torch.int32),
        "codecs.form": torch.tensor([0, 1, 0], dtype=torch.uint8),
        "codecs.groups": torch.tensor([1, 1, 1], dtype=torch.int32),
        "codecs.channels": torch.tensor([D, D, D], dtype=torch.int32),
        "codecs.clip_ratio": torch.tensor([1, 0.75, 1]),
        "layers.0.heads.0.keys.encode": hadamard().float(),
        "layers.0.heads.0.keys.steps": torch.full((D,), 0.5),
        "layers.0.heads.0.keys.mean": torch.arange(D).float() / 4,
    }
    metadata = {"format": "oscar-codec-set", "version": "1", "layers": "1", "kv_heads": "2", "head_dim": str(D), "recipe": "by-hand",
                "fingerprint": "", "provenance": "{}"}
    save_file(tensors, path, metadata)


def save(path, data, **options):
    buffer = io.BytesIO()
    torch.save(data, buffer, **options)
    path.write_bytes(buffer.getvalue())


def rezip(source, target, change):
    """A copy of an archive with entries passed through change(name, bytes) -> (bytes, compression) or None to leave one out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            changed = change(name, old.read(name))
            if changed:
                new.writestr(zipfile.ZipInfo(name), changed[0], compress_type=changed[1])


def main():
    root = pathlib.Path(sys.argv[1])
    data, corpus = root / "data", root / "corpus" / "pickle"
    data.mkdir(exist_ok=True)
    corpus.mkdir(parents=True, exist_ok=True)
    stored, deflated = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
    save(data / "v1.pt", v1(int))
    save(data / "v1_text_keys.pt", v1(str))
    save(data / "v2.pt", v2())
    save(data / "identity.pt", identity())
    codec_set(data / "set.safetensors")
    (root / "corpus" / "safetensors" / "set.safetensors").write_bytes((data / "set.safetensors").read_bytes())
    save(data / "hostile.pt", {"format_version": 1, "layers": {0: Hostile()}})
    save(data / "protocol4.pt", identity(), pickle_protocol=4)
    save(data / "old_stream.pt", identity(), _use_new_zipfile_serialization=False)
    rezip(data / "identity.pt", data / "compressed.pt", lambda n, b: (b, deflated))
    rezip(data / "identity.pt", data / "missing_storage.pt", lambda n, b: None if n.endswith("data/1") else (b, stored))
    rezip(data / "identity.pt", data / "short_storage.pt", lambda n, b: (b[:-4] if n.endswith("data/1") else b, stored))
    rezip(data / "identity.pt", data / "big_endian.pt", lambda n, b: (b"big" if n.endswith("byteorder") else b, stored))
    nans = identity()
    nans["layers"][1]["rotation"][2, 3] = float("nan")
    save(data / "not_finite.pt", nans)
    twice = v1(int)
    twice["layers"]["1"] = twice["layers"][1]
    save(data / "layer_twice.pt", twice)
    for name in ("v1", "v2", "identity"):
        with zipfile.ZipFile(data / f"{name}.pt") as archive:
            pickle = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            (corpus / f"{name}.pkl").write_bytes(b"p" + archive.read(pickle))
        (corpus / f"{name}.zip").write_bytes(b"z" + (data / f"{name}.pt").read_bytes())


if __name__ == "__main__":
    main()
