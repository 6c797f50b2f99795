"""Making a sparse model smaller without training."""

from dsmoe_ext.offline.prune import expert_use, prune

__all__ = ["expert_use", "prune"]
