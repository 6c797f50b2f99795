"""`dsmoe experiment paper`: what is said of the curves."""

import pytest

from dsmoe_ext.experiments import paper

pytestmark = pytest.mark.quick


def test_verdicts_and_bands():
    def row(tau, loss, active):
        what = {"of": "tuned", "seed": 0, "tau": tau, "row": f"tuned, tau {tau}"}
        return {"what": what, "loss": {"t": loss}, "active": {"t": active},
                "layers": {"t": [active, active / 2]}}  # fmt: skip

    rows = [row(0.5, 2.0, 0.5), row(0.1, 1.0, 0.9), row(0.9, 3.0, 0.1)]
    assert paper.verdicts(rows) == ["tuned, seed 0, t: both curves are monotone"]
    rows[0]["loss"]["t"] = 4.0
    assert paper.verdicts(rows) == ["tuned, seed 0, t: perplexity does not always rise"]
    lines = paper.layers_table(rows).splitlines()
    assert lines[0] == "| active, layers | 1 | 2 |" and "0.900 | 0.450" in lines[2]
    bands = paper.bands_of(32)
    assert [len(band) for band in bands] == [5, 5, 6, 5, 5, 6] and bands[-1].stop == 32
