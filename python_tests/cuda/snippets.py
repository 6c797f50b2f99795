"""One-instruction kernels: every thread loads its inputs, runs the snippet, stores the results."""

import numpy as np
from ptx import Device, Program
from ptx.numbers import TYPES

HEAD = ".version 9.0\n.target sm_80\n.address_size 64\n"


def run(snippet, inputs, outputs, *, threads=32, seed=None, declare="", shared_bytes=0):
    """inputs: {name: (type, array [threads])}, outputs: {name: type}; returns {name: array}.

    In the snippet, %name is the thread's register; %tid32 its index."""
    device = Device(seed)
    params, body, buffers = [], [], []
    for i, (name, (kind, values)) in enumerate(inputs.items()):
        dtype = TYPES[kind] if kind != "pred" else np.dtype(np.uint8)
        buffers.append(
            device.array(
                np.asarray(values).astype(dtype) if np.asarray(values).dtype != dtype else values
            )
        )
        params.append(f".param .u64 p{i}")
        body.append(_address(i, dtype.itemsize))
        if kind == "pred":
            body.append(f"ld.global.u8 %byte, [%a{i}]; setp.ne.u16 %{name}, %byte, 0;")
        else:
            body.append(f"ld.global.{_memory_type(kind)} %{name}, [%a{i}];")
    body.append(snippet)
    results = {}
    for i, (name, kind) in enumerate(outputs.items(), len(inputs)):
        dtype = TYPES[kind] if kind != "pred" else np.dtype(np.uint32)
        results[name] = device.empty(threads, dtype)
        buffers.append(results[name])
        params.append(f".param .u64 p{i}")
        body.append(_address(i, dtype.itemsize))
        if kind == "pred":
            body.append(f"selp.u32 %word, 1, 0, %{name}; st.global.u32 [%a{i}], %word;")
        else:
            body.append(f"st.global.{_memory_type(kind)} [%a{i}], %{name};")
    names = {name: kind for name, (kind, _) in inputs.items()} | outputs
    registers = "".join(f".reg .{_register_type(k)} %{n};\n" for n, k in names.items())
    addresses = "".join(f".reg .b64 %a{i};\n" for i in range(len(params)))
    text = (
        HEAD
        + f".visible .entry snippet({', '.join(params)})\n{{\n{registers}{addresses}"
        + ".reg .b16 %byte; .reg .b32 %word, %tid32; .reg .b64 %wide;\n"
        + f"{declare}\nmov.u32 %tid32, %tid.x;\n"
        + "\n".join(body)
        + "\nret;\n}\n"
    )
    device.launch(Program(text), "snippet", (1, 1, 1), (threads, 1, 1), shared_bytes, buffers)
    return {
        name: (r.array != 0 if outputs[name] == "pred" else r.array) for name, r in results.items()
    }


def _address(i, size):
    offset = f"mul.wide.u32 %wide, %tid32, {size}; add.s64 %a{i}, %a{i}, %wide;"
    return f"ld.param.u64 %a{i}, [p{i}]; {offset}"


def _memory_type(kind):
    return kind if kind[0] in "us" or kind in ("f32", "f64") else f"b{TYPES[kind].itemsize * 8}"


def _register_type(kind):
    return "pred" if kind == "pred" else f"b{TYPES[kind].itemsize * 8}"
