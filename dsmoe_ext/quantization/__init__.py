"""Experts of 8 and 4 bits.

codes.py     START HERE. The formats; rounding to the nearest code; names in a file
gptq.py      rounding that makes up for its errors, on what a text showed
experts.py   the module that holds codes in place of weights, for inference and frozen in training

Kernels multiply them as ops.pack_quantized lays them out.
"""
