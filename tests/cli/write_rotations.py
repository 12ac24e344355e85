#!/usr/bin/env python3
"""write_rotations.py FILE LAYERS HEAD_DIM: a rotation file of format 1 whose rotations are identities, as torch.save would write it,
without torch: a zip of a pickle and one block of floats."""
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")


class FloatStorage:
    pass


def _rebuild_tensor_v2(*arguments):
    raise NotImplementedError


FloatStorage.__module__, FloatStorage.__qualname__ = "torch", "FloatStorage"
_rebuild_tensor_v2.__module__ = "torch._utils"
torch.FloatStorage, utils._rebuild_tensor_v2 = FloatStorage, _rebuild_tensor_v2
sys.modules.update({"torch": torch, "torch._utils": utils})


class Storage:
    def __init__(self, key, count):
        self.key, self.count = key, count


class Tensor:
    def __init__(self, storage, shape, stride):
        self.arguments = (storage, 0, shape, stride, False, OrderedDict())

    def __reduce__(self):
        return _rebuild_tensor_v2, self.arguments


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        if isinstance(value, Storage):
            return ("storage", FloatStorage, value.key, "cpu", value.count)
        return None


path, layers, d = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
identity = Tensor(Storage("0", d * d), (d, d), (d, 1))
eigenvalues = Tensor(Storage("1", d), (d,), (1,))
content = {"format_version": 1, "objective": "qqt_r_h_pbr", "source_grouping": "layer",
           "layers": {i: {"layer_id": i, "rotation": identity, "eigenvalues": eigenvalues} for i in range(layers)}}
with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
    with archive.open("rotations/data.pkl", "w") as out:
        Pickler(out, 2).dump(content)
    archive.writestr("rotations/data/0", struct.pack(f"<{d * d}f", *[float(i % (d + 1) == 0) for i in range(d * d)]))
    archive.writestr("rotations/data/1", struct.pack(f"<{d}f", *range(d)))
    archive.writestr("rotations/version", "3\n")
