"""ctypes mirrors of the Params structs, read from csrc/kernels.h so that they cannot drift."""

import ctypes
import re

from nvcc import ROOT

SCALARS = {
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "bool": ctypes.c_bool,
    "double": ctypes.c_double,
}


def enum(header, name):
    body = re.search(rf"enum class {name} : int32_t \{{(.*?)\}}", header, re.S)[1]
    names = re.findall(r"k\w+", re.sub(r"//[^\n]*", "", body))
    return {n: i for i, n in enumerate(names)}


STRUCT = r"struct (?!Pack)(\w+Params|WeightStrides|QuantFormat|QuantizedMatrix) \{(.*?)\n\};"


def structs(header):
    """name -> ctypes.Structure for every struct that CUDA's entry points take, whose fields are
    scalars, enums, pointers and such structs."""
    enums = ("Dtype", "RouteMethod", "Activation", "Status")
    known = dict(SCALARS) | {e: ctypes.c_int32 for e in enums}
    found = {}
    for name, body in re.findall(STRUCT, header, re.S):
        fields = []
        for line in re.sub(r"//[^\n]*", "", body).split(";"):
            if declaration := re.match(r"\s*(?:const\s+)?(\w+)(\s*\*)?\s+(\w+)$", line.rstrip()):
                kind = ctypes.c_uint64 if declaration[2] else known[declaration[1]]
                fields.append((declaration[3], kind))
            elif line.strip():
                raise ValueError(f"{name}: cannot read {line.strip()!r}")
        known[name] = found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


_HEADER = (ROOT / "csrc" / "kernels.h").read_text()
STRUCTS = structs(_HEADER)
DTYPE, METHOD, STATUS = (enum(_HEADER, n) for n in ("Dtype", "RouteMethod", "Status"))


class Settings(ctypes.Structure):
    """cuda::Settings."""

    _fields_ = [
        ("workspace_bytes", ctypes.c_int64),
        *((n, ctypes.c_int32) for n in ("group", "router_tiles", "sms", "path", "parts")),
    ]
