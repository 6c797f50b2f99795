"""Routers: what decides, for every token, which experts it uses. One file each; START with
interface.py.

    from dsmoe_ext import routers
    router = routers.router_class("top_p")(hidden_size, expert_sizes, threshold=0.9)
    gates, scores = router.route(x)
"""

from dsmoe_ext.routers.interface import (
    Router,
    default_balance,
    make_router,
    register,
    router_class,
    router_names,
)
from dsmoe_ext.routers.linear import LinearRouter
from dsmoe_ext.routers.mean_score import MeanScoreRouter
from dsmoe_ext.routers.modse import MoDSERouter
from dsmoe_ext.routers.prefix import PrefixRouter
from dsmoe_ext.routers.recurrent import RecurrentRouter
from dsmoe_ext.routers.relu import ReluRouter
from dsmoe_ext.routers.threshold import ThresholdRouter
from dsmoe_ext.routers.top_k import TopKRouter
from dsmoe_ext.routers.top_p import TopPRouter

__all__ = [
    "LinearRouter",
    "MeanScoreRouter",
    "MoDSERouter",
    "PrefixRouter",
    "RecurrentRouter",
    "ReluRouter",
    "Router",
    "ThresholdRouter",
    "TopKRouter",
    "TopPRouter",
    "default_balance",
    "make_router",
    "register",
    "router_class",
    "router_names",
]
