"""Making a sparse model smaller without training."""

from dsmoe_ext.offline.compress import compress
from dsmoe_ext.offline.prune import expert_use, prune

__all__ = ["compress", "expert_use", "prune"]
