"""Half of the FFN by other people's recipes, on the same text as calibrate.

What is no model of DSMoEFFNs runs in the dense model in float32 under autocast, the others in bf16:
for the dense SmolLM2 the two differ by 0.0015 nats at the most.
"""

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..calibration.dense_ffn import Chunks, DenseFFN
from ..calibration.layerwise import fit_layers
from ..layers import find_ffns
from ..training.measure import inference_copy
from .cmoe import Cut, Recipe, fit_random_half
from .neuron_sparsity import fit_cats, fit_flap, fit_teal
from .reads import BATCHES, Reads, losses_and_reads, reads_of_experts, reads_of_skipping
from .record import markdown
from .skipping import Skipping

if TYPE_CHECKING:
    from .bench import Bench

# fit(ffn, chunks, the share that is on, seed)
Fitting = Callable[[DenseFFN, Chunks, float, int], Skipping]


def recipes(share: float) -> dict[str, Fitting]:
    """All that is no model of DSMoEFFNs, by the names of the rows.

    CMoE with 8 experts in all eight crossings with ours; with 16 only as it is, and all ours.
    """

    def unseeded(fit: Callable[[DenseFFN, Chunks, float], Skipping]) -> Fitting:
        return lambda ffn, chunks, share, seed: fit(ffn, chunks, share)

    small, large = Cut.of(8, share), Cut.of(16, share)
    crossings = [Recipe(small, *ours) for ours in itertools.product((False, True), repeat=3)]
    crossings += [Recipe(large), Recipe(large, True, True, True)]
    return {
        "static: random + refit": fit_random_half,
        "static: FLAP": unseeded(fit_flap),
        "TEAL": unseeded(fit_teal),
        "CATS": unseeded(fit_cats),
        **{str(recipe): recipe.fit for recipe in crossings},
    }


def losses_fitted(bench: "Bench", fit: Fitting, share: float) -> dict[str, Any]:
    """A row of a recipe: losses, shares and batches (losses_and_reads)."""

    def fit_one(ffn: DenseFFN, chunks: Chunks, index: int) -> Skipping:
        return fit(ffn, chunks, share, bench.seed + index)

    ffns = fit_layers(bench.dense, bench.own_text, fit_one)
    noting = functools.partial(reads_of_skipping, bench.dense, ffns)
    return losses_and_reads(bench, bench.dense, len(ffns), noting)


def losses_calibrated(bench: "Bench", share: float, **options: Any) -> dict[str, Any]:
    """The same of calibrate()."""
    model = inference_copy(bench.calibrate(share, **options)[0])

    def noting(reads: Reads) -> Any:
        return reads_of_experts(model, reads)

    return losses_and_reads(bench, model, len(find_ffns(model)), noting)


def batches_table(rows: list[dict[str, Any]]) -> str:
    """The share of the FFN that tokens read together, mean of texts and seeds, as Markdown."""
    cells = []
    for name in dict.fromkeys(row["what"]["row"] for row in rows):
        texts = [
            text
            for row in rows
            if row["what"]["row"] == name
            for text in row.get("batches", {}).values()
        ]
        if texts:
            means = [sum(text[str(size)] for text in texts) / len(texts) for size in BATCHES]
            cells.append([name, *(f"{mean:.3f}" for mean in means)])
    return markdown(["tokens together", *(str(size) for size in BATCHES)], cells)
