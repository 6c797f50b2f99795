"""`dsmoe demo`: dense → calibrated → fine-tuned on a small real LLaMA, measured at each stage."""

import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..command_line import console
from ..command_line.steps import calibrate_on, evaluate_with_bar, prompt_ids, text_after
from ..command_line.text import OWN_LENGTH, mixed_windows
from ..errors import UserError
from ..files import DEMO_FILES, atomic_directory, directory_size, json_text
from ..loading import load_model, model_bytes, need_tokenizer
from ..model_source import HUB_ID, SMOLLM2
from ..models.options import options_of
from ..quiet import quiet_transformers
from ..training.command import describe
from ..training.data import TextWindows, prose_text, second_domain_text, windows_of
from ..training.evaluate import evaluate, supports_bf16
from ..training.fine_tune import TrainSettings, fine_tune, recovery
from ..training.measure import (
    active_parameters,
    generate,
    inference_copy,
    num_parameters,
    threshold,
)
from ..training.sources import BUILTIN, SELF, Source, read_windows
from .speed import measure_speed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DISPLAY_NAMES = {SMOLLM2: HUB_ID.rpartition("/")[2]}
PROMPT = "A Python function is"
CALIBRATION_TOKENS = 32768
OTHER_WINDOWS = 8  # of each of the other texts
PROBES = 8  # evaluations during the fine-tuning, for the curves
PROBE_WINDOWS = 4


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """The options of `dsmoe demo`."""

    model: str = "smollm2"
    data: Path | None = None
    target_active: float = 0.5
    threshold: float | None = None
    steps: int = 80
    compare: bool = False
    out: Path = Path("dsmoe-demo")
    window: int = 512
    seed: int = 0


def tuning_settings(settings: DemoSettings, sparse: bool) -> TrainSettings:
    """The demo's recipe. --compare trains the dense model on the same text, with no teacher."""
    if sparse:
        target, seed = settings.target_active, settings.seed
        return recovery(settings.steps, target_active=target, seed=seed)
    batch = recovery(settings.steps).batch_size
    return TrainSettings(steps=settings.steps, batch_size=batch, seed=settings.seed)


class Demo:
    """The texts, and the measurements of each stage as they come in."""

    def __init__(
        self, settings: DemoSettings, tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel"
    ):
        self.settings, self.tokenizer = settings, tokenizer
        source = Source(str(settings.data or BUILTIN))
        self.windows = read_windows(tokenizer, [source], settings.window, model=model)
        self.others = {
            "python": self._some_windows(second_domain_text()),
            "prose": self._some_windows(prose_text()),
        }
        self.bf16 = supports_bf16()
        self.stages: dict[str, dict[str, Any]] = {}

    def _some_windows(self, text: str) -> torch.Tensor:
        windows = windows_of(self.tokenizer, text, self.settings.window)
        return torch.cat([windows.train, windows.held_out])[:OTHER_WINDOWS]

    def learning_text(self, dense: "PreTrainedModel") -> Any:
        """What to calibrate and train on: the dense model's own text, and the user's if any."""
        sources = [Source(SELF)]
        if self.settings.data:
            sources.append(Source(str(self.settings.data)))
        return mixed_windows(
            dense,
            self.tokenizer,
            self.settings.model,
            sources,
            tokens=CALIBRATION_TOKENS,
            window=self.settings.window,
            seed=self.settings.seed,
        )

    def measure(self, name: str, model: "PreTrainedModel") -> dict[str, Any]:
        """Perplexity on the held-out windows and on the other texts, and what was active."""
        model, context = inference_copy(model), self.windows.num_context
        held_out, label = self.windows.held_out, f"Evaluating ({name})"
        result = evaluate_with_bar(model, held_out, label, context=context)
        stage = self.stages[name] = {
            "perplexity": result.perplexity,
            "active_ffn": result.active,
            "active_per_layer": result.active_per_layer,
            "active_parameters": active_parameters(model, result.active_per_layer),
        }
        for text, ids in self.others.items():
            other = evaluate(model, ids, num_context=context)
            stage[f"perplexity_{text}"] = other.perplexity
            stage[f"active_ffn_{text}"] = other.active
        return stage

    def probe(self, model: "PreTrainedModel") -> dict[str, Any]:
        """A quick look during training: perplexity on a few held-out windows."""
        step = max(1, len(self.windows.held_out) // PROBE_WINDOWS)
        ids = self.windows.held_out[::step][:PROBE_WINDOWS]
        result = evaluate(
            model, ids, num_context=self.windows.num_context, bf16=self.bf16, batch_size=len(ids)
        )
        return {"held_out_perplexity": result.perplexity}

    def tune(
        self,
        label: str,
        model: "PreTrainedModel",
        windows: TextWindows,
        train: TrainSettings,
        run_dir: Path | None = None,
        teacher: "PreTrainedModel | None" = None,
    ) -> Any:
        """Fine-tunes in place; the log, with a first row for the state before step 1."""
        every = max(1, train.steps // PROBES)
        before = {"step": 0} | self.probe(model)

        with console.progress(label, train.steps, "steps") as advance:

            def on_step(row: dict[str, Any]) -> dict[str, Any]:
                advance(1, note=describe(row))
                if row["step"] % every == 0 or row["step"] == train.steps:
                    return self.probe(model)
                return {}

            rows = fine_tune(
                model, windows, train, run_dir=run_dir, teacher=teacher, on_step=on_step
            )
        return [before, *rows]


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """Runs the whole way and returns what report.json holds."""
    from .report import draw_report, print_report

    start = time.perf_counter()
    out = settings.out.expanduser()
    ours = _is_demo(out)
    if not ours and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and no demo wrote it; choose another with --out")
    reads = [settings.model, settings.data]
    with atomic_directory(out, overwrite=ours, reads=reads, owns=DEMO_FILES) as folder:
        with console.stage("Loading the dense model"):
            dense, tokenizer = load_model(settings.model, dtype="fp32", only="dense")
        need_tokenizer(tokenizer, settings.model)
        demo = Demo(settings, tokenizer, dense)
        report = _run(demo, dense, folder)
        report["minutes"] = (time.perf_counter() - start) / 60
        report["peak_memory_gb"] = peak_memory_gb()
        with console.stage("Drawing report.png"):
            draw_report(report, folder / "report.png")
        (folder / "report.json").write_text(json_text(report, indent=1))
    print_report(report, out)
    return report


def _is_demo(out: Path) -> bool:
    """Whether the report in a folder is one that this command wrote."""
    try:
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and {"stages", "probe_dense", "speed"} <= report.keys()


def _run(demo: Demo, dense: "PreTrainedModel", folder: Path) -> dict[str, Any]:
    settings = demo.settings
    logs = {}
    demo.measure("dense", dense)
    probe_dense = demo.probe(dense)["held_out_perplexity"]
    text = demo.learning_text(dense)
    sparse = copy.deepcopy(dense)
    with console.expect(ValueError):
        sparse = calibrate_on(
            sparse,
            text,
            tokens=CALIBRATION_TOKENS,
            target_active=settings.target_active,
        )
    options_of(sparse)["sparsity_weight"] = 0.0  # the thresholds hold the target
    last = "calibrated"
    demo.measure(last, sparse)
    if settings.steps:
        text = in_rows(text)
        train = tuning_settings(settings, True)
        teacher = copy.deepcopy(dense).to(torch.bfloat16) if demo.bf16 else dense
        logs["fine-tuned"] = demo.tune("Fine-tuning", sparse, text, train, folder, teacher)
        del teacher
        last = "fine-tuned"
        demo.measure(last, sparse)
    if settings.threshold is not None:
        with threshold(sparse, settings.threshold):
            demo.measure(f"{last}, threshold {settings.threshold:g}", sparse)

    sparse, sample = _save_and_reload(demo, sparse, folder / "model")
    demo.stages[last]["disk_bytes"] = directory_size(folder / "model")
    demo.stages["dense"]["disk_bytes"] = model_bytes(dense)
    with console.stage("Measuring the speed of both"):
        speeds = measure_speed(dense, sparse, demo.windows.held_out, prompt(demo.tokenizer))
    demo.stages["dense"] |= speeds["dense"]
    demo.stages[last] |= speeds["sparse"]
    del sparse
    dense_sample = continuation(demo.tokenizer, dense)
    if settings.compare and settings.steps:
        train = tuning_settings(settings, False)
        name = "dense fine-tuned"
        logs[name] = demo.tune("Fine-tuning the dense model", dense, text, train)
        demo.measure(name, dense)
    return {
        "model": DISPLAY_NAMES.get(settings.model, Path(settings.model).name),
        "settings": dataclasses.asdict(settings) | {"out": None, "data": str(settings.data or "")},
        "parameters": num_parameters(dense),
        "last": last,
        "probe_dense": probe_dense,
        "stages": demo.stages,
        "logs": logs,
        "speed": {key: speeds[key] for key in ("dtype", "threads")},
        "texts": {"prompt": PROMPT, "dense": dense_sample, last: sample},
    }


def in_rows(text: TextWindows) -> TextWindows:
    """The text in windows as long as the model's own rows: attention takes half of the time."""
    length = min(text.length, OWN_LENGTH)
    whole = text.length // length * length
    train, held_out = (part[:, :whole].reshape(-1, length) for part in (text.train, text.held_out))
    return TextWindows(train, held_out)


def prompt(tokenizer: "PreTrainedTokenizerBase") -> torch.Tensor:
    """The demo's prompt, ids [1,L]."""
    return prompt_ids(tokenizer, PROMPT, chat=False)


def continuation(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> str:
    """32 greedy tokens after the prompt."""
    ids = prompt(tokenizer)
    return text_after(tokenizer, ids, generate(model, ids, 32).ids)


def _save_and_reload(demo: Demo, model: "PreTrainedModel", folder: Path) -> Any:
    """Saves, loads again, and holds the reloaded model to the same tokens."""
    with console.stage("Saving and loading again"), quiet_transformers():
        model.save_pretrained(folder)
        demo.tokenizer.save_pretrained(folder)
        ids = prompt(demo.tokenizer)
        before = generate(model, ids, 32)
        reloaded, tokenizer = load_model(folder, dtype="fp32")
        after = generate(reloaded, ids, 32)
    if before.ids != after.ids:
        raise UserError("the saved model does not generate the same tokens after loading")
    return reloaded, text_after(tokenizer, ids, after.ids)


def peak_memory_gb() -> float | None:
    """The largest resident memory of this process so far, where the system tells."""
    try:
        import resource
        import sys
    except ImportError:
        return None
    unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes there, KiB (about kB) here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit * (1 if unit == 1e9 else 1.024)
