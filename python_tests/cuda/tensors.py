"""torch tensors as the interpreter has them, and what kernels.h calls their kinds."""

import numpy as np
import torch

from dsmoe_ext import reference

NUMPY = {torch.bfloat16: np.uint16, torch.float16: np.uint16, torch.float32: np.float32}
KIND = {torch.bfloat16: "kBFloat16", torch.float16: "kFloat16", torch.float32: "kFloat32"}
ACTIVATION = {name: i for i, name in enumerate(reference.ACTIVATIONS)}


def to_numpy(tensor):
    tensor = tensor.detach().contiguous()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def to_torch(array, dtype):
    tensor = torch.from_numpy(array.copy())
    return tensor if dtype == torch.float32 else tensor.view(torch.int16).view(dtype)
