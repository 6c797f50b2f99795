"""Shapes of the decisive cases: between them they enter every branch, copy of a loop and edge of a
tile that a kernel has. Of a layer: tokens, hidden size, sizes of the experts, share of active pairs
(or the experts that are active)."""

import test_expert_mlp_sm90a
import test_route

# loops are unrolled four times: experts and chunks beyond 128 take every copy, others the rest; of
# a loop over a CTA's 256 threads, experts beyond 768
PERMUTE = [
    (33, 3, 0.5),
    (300, 40, 0.4),
    (31, 70, 0.3),
    (256 * 33 + 5, 2, 0.3),
    (300, 301, 0.2),
    (256 * 130 + 5, 1, 0.3),
    (31, 1100, 0.3),
]
SHARED = (2, [2] * 170, 130)  # experts of which 130 are shared
MANY = (3, [1 + i % 7 for i in range(130)], 0)
# 130 rows use every 16-row block of a tile, and a second tile; with one multiprocessor a CTA goes
# through several tiles of every width
SHAPES = {
    "fine": (40, 24, [16, 24, 80, 16, 0, 72, 8], 0.5),
    "whole": (130, 136, [72, 16, 16, 136, 32, 32], 1.0),
    "ragged": (67, 56, [13, 29, 7, 1, 3], 0.5),
}
FORWARD = {
    **SHAPES,
    "chunks": (300, 40, [72, 40, 16], 0.5),
    "many": (17, 16, [2 * (i > 300 or i % 7 > 2) for i in range(600)], 0.1),
    "large last": (40, 32, [8, 20, 72], 0.5),
    "large idle": (40, 32, [72, 80, 8, 72], (0, 2, 3)),
    "two groups of row tiles": (1100, 8, [16, 24, 40, 72], 1.0),
    "a short span first": (24, 40, [16, 72, 8], 0.5),
    "63 experts": (17, 8, [2] * 63, 0.3),
}
# the others are in TF32_BACKWARD; the last one's rows in one pass, in spite of the small workspace
TF32_FORWARD = {name: shape for name, shape in FORWARD.items() if name not in SHAPES}
TF32_FORWARD |= {"two groups of row tiles": (1100, 8, [16, 24, 40], 1.0)}
HOPPER = {
    **FORWARD,
    **test_expert_mlp_sm90a.OWN,
    "a step of one neuron": (20, 24, [16, 16, 16, 16, 1], 0.6),
    # rows of every unit fill their tiles: one more would be a tile more
    "full tiles of 192 columns": (1030, 136, [64], 1.0),
    "full tiles of 128 columns": (530, 104, [72, 80, 8, 72], (0, 2, 3)),
    "three row tiles": (600, 8, [24, 136, 16, 64], 1.0),
    "whole row tiles": (256, 8, [32], 1.0),
}
BACKWARD = {
    **SHAPES,
    "whole tiles": (20, 24, [64, 32, 128, 64], 0.6),
    # a pass takes 128 columns, of every expert whole blocks of 16
    "beside the edges of tiles": (20, 24, [33, 65, 32, 64, 31, 63, 16, 48, 127], 0.6),
    "passes": (520, 16, [136, 40], 0.5),
    "passes over neurons": (40, 16, [400, 40, 300], 0.5),
    "passes over fine experts": (300, 16, [16, 29, 0, 100, 3, 16, 48, 21, 0, 17, 200, 5], 0.5),
    "two groups of row tiles": (1100, 8, [40], 1.0),
}
TF32_BACKWARD = {**BACKWARD, "full tiles": (132, 136, [16, 136, 40], 1.0)}
HOPPER_BACKWARD = {
    **SHAPES,
    "passes": (300, 16, [264, 40], 0.95),
    "two tiles of columns": (20, 200, [168, 16], 0.6),
    "three chunks": (530, 24, [72, 16], 0.5),
    "one warpgroup idles": (50, 136, [16, 72, 256], 0.9),
}
HOPPER_BACKWARD_ACTIVE = {  # of active pairs only: others in a tile that is not theirs show
    **{
        f"{name}{', saved' * save}": (shape, dict(save_activations=save))
        for name, shape in {
            "two row tiles": (330, 24, [16, 33], 0.9),
            "whole row tiles": (256, 8, [128], 1.0),
            "more steps than stages": (130, 264, [72, 40, 136], 1.0),
            "more steps than stages, one warpgroup idles": (50, 328, [16, 72, 136], 1.0),
        }.items()
        for save in (False, True)
    },
    "three multiprocessors": (
        (70, 24, [16, 40, 24, 120, 16, 136, 264], 0.9),
        dict(multiprocessors=3),
    ),
    "halves of tiles": ((300, 24, [16, 136, 200, 72], 0.9), dict(multiprocessors=4)),
    "halves of tiles, some without rows": (
        (100, 24, [16, 24, 136, 200, 72], 1.0),
        dict(multiprocessors=6, save_activations=True),
    ),
    **{
        f"no halves{', saved' * save}": (
            (20, 8, [16, 16, 40, 40, 136, 136], 1.0),
            dict(multiprocessors=3, save_activations=save),
        )
        for save in (False, True)
    },
    "passes of 192 columns": ((300, 192, [136, 40], 0.5), {}),
    "passes of 128 columns": ((40, 72, [400, 200], 0.5), {}),
    "passes of two strips": ((150, 328, [264, 200], 0.5), dict(multiprocessors=2)),
    "unaligned, saved": ((130, 24, [13, 125, 141], 1.0), dict(save_activations=True)),
}
UNALIGNED = (130, 24, [13, 29, 67, 63, 1], 1.0)  # the last rows of a tile of 128, at odd addresses
DECODE = {  # the number of multiprocessors decides into how many parts a sum is cut
    "ragged": ((3, 264, [72, 17, 5], 0.6), 1),
    "all rows": ((16, 40, [40, 24, 16, 7, 320], 0.5), 1),
    "many": ((5, 16, [2] * 512, 0.1), 1),
    "one token": ((1, 1032, [32] * 4, 0.5), 1),
    "one expert": ((2, 72, [5], 1.0), 1),
    "nine rows": ((9, 520, [24], 1.0), 1),
    "six parts": ((2, 64, [800], 1.0), 3),
    "many strips": ((1, 8264, [8], 1.0), 70),
    "very many strips": ((1, 24968, [8], 1.0), 200),
}
CODES = {  # the same from codes of 8 and 4 bits
    "ragged": ((3, 288, [72, 17, 0, 5], 0.6), 1),
    "all rows": ((16, 96, [40, 24, 16, 7, 400], 0.5), 1),
    "many": ((16, 32, [2] * 512, 0.05), 1),
    "two rounds": ((10, 1056, [16, 13], 1.0), 1),
    "six parts": ((2, 64, [800], 1.0), 3),
    "many strips": ((1, 8288, [8], 1.0), 70),
}
ROUTE = {
    "shared": (test_route.SHAPES["unequal, shared"], "scores", True),
    "one expert": ((3, [5], 0), "scores", True),
    "binary": (test_route.SHAPES["off the warp"], "binary", True),
    "many": (MANY, "scores", False),
    "many, rescaled": (MANY, "scores", True),
    "many, binary": (MANY, "binary", True),
    "many shared": (SHARED, "scores", True),
}
ROUTER = {  # from 16 tiles on, a warp takes a tile
    "a chunk for every warp, and one more": (3, 5, 1032),
    "several tiles": (20, 9, 40),
    "a warp a tile": (70, 17, 136),
    "parts of the tokens": (260, 9, 264),
}
