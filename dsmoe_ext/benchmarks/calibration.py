"""How good a calibration is: perplexity, dense and calibrated, on held-out text and other domains.

    python -m dsmoe_ext.benchmarks.calibration --text /usr/share/common-licenses/GPL-3

The figures of docs/calibration.md come from here. --validate keeps every tenth window of the text's
training part away from calibration and measures on those instead: constants are chosen there, never
on the held-out windows. --set layerwise.CORRECTION=1 changes a constant of the method for one run.
"""

import argparse
import importlib
import resource
import time
from pathlib import Path

import torch

from dsmoe_ext.calibration import calibrate
from dsmoe_ext.loading import load_model
from dsmoe_ext.training.data import HELD_OUT_EVERY, second_domain_text, windows_of
from dsmoe_ext.training.evaluate import evaluate, supports_bf16
from dsmoe_ext.training.sources import BUILTIN, Source, read_windows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default=BUILTIN, help="text to calibrate on")
    parser.add_argument("--text", type=Path, action="append", default=[], help="another domain")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--target-active", type=float, default=0.5)
    parser.add_argument("--expert-size", type=int, default=16)
    parser.add_argument("--shared", type=float, default=0.25)
    parser.add_argument("--no-refit", dest="refit", action="store_false")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-windows", type=int, help="windows to measure on, at most, per text")
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="FILE.NAME=NUMBER")
    return parser.parse_args()


def spread(windows: torch.Tensor, count: int | None) -> torch.Tensor:
    """At most `count` of the windows [N,L], taken evenly through them."""
    if count is None or count >= len(windows):
        return windows
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()]


def main() -> None:
    options = parse()
    for change in options.set:
        name, value = change.split("=")
        file, constant = name.split(".")
        module = importlib.import_module(f"dsmoe_ext.calibration.{file}")
        if not hasattr(module, constant):
            raise SystemExit(f"dsmoe_ext.calibration.{file} has no constant {constant}")
        setattr(module, constant, type(getattr(module, constant))(value))
    dense, tokenizer = load_model(options.model, dtype="fp32", only="dense")
    windows = read_windows(tokenizer, [Source(options.data)], options.window)
    train, measured = windows.train, windows.held_out
    if options.validate:
        chosen = torch.arange(len(train)) % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
        train, measured = train[~chosen], train[chosen]
    texts = {"held out" if not options.validate else "validation": measured}
    if not options.validate:
        others = {path.name: path.read_text() for path in options.text}
        for name, text in {**others, "Python source": second_domain_text()}.items():
            other = windows_of(tokenizer, text, options.window)
            texts[name] = torch.cat([other.train, other.held_out])
    texts = {name: spread(ids, options.max_windows) for name, ids in texts.items()}
    calibration_text = spread(train, -(-options.tokens // options.window))

    wall, cpu = time.perf_counter(), time.process_time()
    sparse = calibrate(
        dense,
        calibration_text,
        options.target_active,
        options.expert_size,
        options.shared,
        options.refit,
        seed=options.seed,
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{calibration_text.numel()} tokens calibrated in {wall:.0f} s ({cpu:.0f} s of CPU, "
        f"{torch.get_num_threads()} threads), peak memory of the process {peak:.2f} GiB"
    )
    for name, ids in texts.items():
        before, after = (
            evaluate(model, ids, num_context=windows.num_context, bf16=supports_bf16())
            for model in (dense, sparse)
        )
        print(
            f"{name}: {before.num_tokens} tokens, dense {before.perplexity:.3f}, calibrated "
            f"{after.perplexity:.3f}, ratio {after.perplexity / before.perplexity:.4f}, "
            f"active {after.active:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
