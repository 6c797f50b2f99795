"""A pytest plugin with which transformers' own tests of its "grouped_mm" experts run ours.

In a checkout of the transformers release that is installed:

    PYTHONPATH=<this folder> pytest -p as_grouped_mm tests/models/mixtral tests/models/qwen3_moe
"""

from transformers.integrations import moe

from dsmoe_ext.experts import experts_forward

moe.grouped_mm_experts_forward = experts_forward
moe.ExpertsInterface.register("grouped_mm", experts_forward)


def pytest_report_header():
    return "transformers' experts \"grouped_mm\" are dsmoe_ext's"
