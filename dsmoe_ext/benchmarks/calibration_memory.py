"""What calibrating a large model takes: memory and time for each token and layer.

    python -m dsmoe_ext.benchmarks.calibration_memory --tokens 8192 --states-in-files

A random LLaMA of Llama-2-7B's width with few layers stands for the whole: layers are calibrated one
after the other, and none is kept but the one at hand. Its numbers say nothing about quality.
"""

import argparse
import resource
import time

import torch

from dsmoe_ext.calibration import calibrate, states


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--expert-size", type=int, default=32)
    parser.add_argument("--states-in-files", action="store_true", help="whatever their size")
    return parser.parse_args()


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    options = parse()
    if options.states_in_files:
        states.IN_MEMORY = 0
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 128,
        dtype=torch.bfloat16,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    before = peak_gib()
    ids = torch.randint(config.vocab_size, (options.tokens // options.window, options.window))
    wall, cpu = time.perf_counter(), time.process_time()
    calibrate(model, ids, expert_size=options.expert_size, progress=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    steps = ids.numel() * options.layers
    state = 4 * options.hidden * ids.numel() / 1e9
    shape = f"{options.layers} layers of {options.hidden}/{options.intermediate}"
    print(
        f"{ids.numel()} tokens, {shape}: {wall:.0f} s ({cpu:.0f} s of CPU, "
        f"{torch.get_num_threads()} threads), "
        f"{cpu / steps * 1e3:.2f} ms of CPU a token and layer; "
        f"memory {before:.2f} GiB with the model, {peak_gib():.2f} GiB at the most; "
        f"3 states of {state:.2f} GB {'in files' if options.states_in_files else 'in memory'}"
    )


if __name__ == "__main__":
    main()
