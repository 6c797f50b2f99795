"""Dense → sparse, in closed form: no gradients, no training (docs/calibration.md).

    model = dsmoe_ext.calibrate(dense, token_ids, target_active=0.5)

Layer after layer (layerwise.py): run the text up to the layer's FFN (streams.py), see which neurons
contribute when (neurons.py, ../partition.py), regress the router (router.py), refit down_proj to
what the router left (refit.py).
"""

from dsmoe_ext.calibration.layerwise import calibrate

__all__ = ["calibrate"]
