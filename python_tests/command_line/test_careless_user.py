"""What users get wrong on the command line: one sentence, exit code 1 or 2, nothing half done."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from cli import MAIN, dsmoe, fails
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import dsmoe_ext
from dsmoe_ext.command_line import steps
from dsmoe_ext.training.tiny import byte_tokenizer, save_tiny_llama, tiny_llama

NAN = float("nan")


@pytest.fixture
def tiny(tmp_path):
    return save_tiny_llama(tmp_path / "tiny")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some text " * 900)
    return path


def change_config(folder, **fields):
    """Other fields in config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def change_weights(folder, change):
    """Other tensors in model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# ------------------------------------------------------------------------------ files of others


@pytest.mark.parametrize("command", ["convert", "calibrate", "merge", "train"])
def test_what_is_read_is_never_lost(tiny, text, command):
    """OUT holds the model and the text, or is the model; the same through a link."""
    home = tiny.parent
    (home / "link").symlink_to(home)
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    data = () if command in ("convert", "merge") else ("--data", text)
    for out in (home, tiny, home / "link", home / "link/tiny"):
        assert "which is read" in fails(command, tiny, out, *data, "--overwrite")
    for source in data[1:]:
        assert "holds" in fails(command, "no such model", home, "--data", source, "--overwrite")
    assert before == {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------ what a model lacks


@pytest.mark.parametrize(
    "name", ["self_attn.q_proj.bias", "self_attn.q_norm.weight", "mlp.gate_proj.weight_scale"]
)
def test_tensors_that_would_not_be_used(tiny, tmp_path, name):
    name = f"model.layers.0.{name}"
    change_weights(tiny, lambda tensors: tensors.update({name: torch.ones(32)}))
    assert name in fails("convert", tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_frequencies_in_old_files_are_harmless(tiny, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(tiny, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert dsmoe("convert", tiny, tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 5},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"hidden_size": "many"},
        {"rope_parameters": {"rope_type": "no such"}},
    ],
)
def test_configs_that_cannot_be_opened(tiny, tmp_path, fields):
    change_config(tiny, **fields)
    assert "could not be opened" in fails("convert", tiny, tmp_path / "out")


@pytest.mark.parametrize(
    "options, says",
    [
        (("--expert-sizes", "8,16"), "neurons are routed"),
        (("--expert-sizes", "2.0,1", "--shared", 1.0), "below 1"),
        (("--expert-size", 1000), "expert_size must be"),
        (("--target-active", 0.1), "counts the shared part"),
    ],
)
def test_a_cut_that_cannot_be_is_refused_before_text_is_drawn(tiny, tmp_path, options, says):
    result = dsmoe("calibrate", tiny, tmp_path / "out", *options)
    assert result.exit_code == 1 and says in result.stderr
    assert "Sampling" not in result.output and not (tmp_path / "out").exists()


def test_no_sizes_are_not_sizes():
    result = dsmoe("calibrate", "tiny", "o", "--expert-sizes", "")
    assert result.exit_code == 2 and "'' is no int" in result.stderr


def test_weights_that_are_not_numbers(tiny, text, tmp_path):
    change_weights(tiny, lambda tensors: tensors["model.norm.weight"].fill_(NAN))
    options = ("--data", text, "--window", 64)
    assert "loss is nan" in fails("eval", tiny, *options, "--json")
    assert "not finite" in fails("train", tiny, tmp_path / "out", *options, "--steps", 1)
    assert "model.norm.weight holds" in fails("calibrate", tiny, tmp_path / "out2", *options)
    assert not (tmp_path / "out2").exists()


def test_perplexity_beyond_floats_is_json(monkeypatch, tiny, text):
    change_weights(tiny, lambda tensors: tensors["model.norm.weight"].mul_(1e5))
    result = dsmoe("eval", tiny, "--data", text, "--window", 64, "--json")
    assert result.exit_code == 0, result.output
    [row] = json.loads(result.stdout, parse_constant=pytest.fail)
    assert row["perplexity"] is None and row["loss"] > 700


@pytest.mark.parametrize(
    "method, message", [("top_k", "top_k must lie between 1 and 6"), ("relu", "no threshold")]
)
def test_thresholds_of_methods_that_have_none(tiny, text, tmp_path, method, message):
    sparse = dsmoe_ext.sparsify(tiny, 6, method=method, router_init="paper")
    with pytest.raises(ValueError, match="no threshold"):
        dsmoe_ext.set_threshold(sparse, 0.5)
    sparse.save_pretrained(tmp_path / method)
    byte_tokenizer().save_pretrained(tmp_path / method)
    options = ("--data", text, "--window", 64, "--thresholds", "0.1,0.9")
    assert message in fails("eval", tmp_path / method, *options)
    assert message in fails("generate", tmp_path / method, "a", "--threshold", 0.5)


# ------------------------------------------------------------------------------ tokenizers


def test_a_tokenizer_that_nothing_opens_is_handed_on(tiny, text, tmp_path):
    (tiny / "tokenizer.json").write_text("{}")
    result = dsmoe("convert", tiny, tmp_path / "out")
    assert result.exit_code == 0 and "copied as it is" in result.stderr
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert "tokenizer of" in fails("eval", tiny, "--data", text)


def test_tokens_beyond_the_embedding(tiny, text, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tiny)
    text.write_text("some text [PAD] " * 900)
    out = tmp_path / "out"
    for command in (
        ("calibrate", tiny, out, "--data", text, "--window", 64),
        ("eval", tiny, "--data", text),
        ("train", tiny, out, "--data", text, "--steps", 1),
        ("generate", tiny, "x [PAD] y"),
        ("demo", "--model", tiny, "--data", text, "--out", out),
    ):
        assert "token 258 ([PAD]) is beyond the model's 258 embeddings" in fails(*command)
    assert not out.exists()


@pytest.mark.parametrize("template", ["<s> $A </s>", "$A </s>", "<s> $A", "$A"])
def test_a_prompt_ends_where_it_ends(tmp_path, template):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    front = [256] if "<s>" in template else []
    for prompt in ("Hello", "Hello</s>", "Hello </s>Hello"):
        want = front + tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert steps.prompt_ids(tokenizer, prompt, False)[0].tolist() == want
    if front:
        assert steps.prompt_ids(tokenizer, "", False)[0].tolist() == front


def test_the_space_before_the_first_new_word(monkeypatch, capsys):
    """Llama-2's decoder drops the space at the beginning of a text."""
    words = ["<unk>", "<s>", "</s>", "▁The", "▁sky", "▁is", "▁blue"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")

    def is_blue(model, ids, num, on_token, **options):
        for token in (5, 6):
            on_token(token)
        return type("Result", (), {"ids": [5, 6], "tokens_per_second": 1, "prefill_seconds": 0})

    monkeypatch.setattr(steps, "generate", is_blue)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    steps.generate_text(tiny_llama(vocab_size=7, **ids), tokenizer, "The sky", 2)
    assert capsys.readouterr().out == "The sky is blue\n"


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 4, "num_return_sequences": 2},
        {"stop_strings": ["zzz"]},
        {"cache_implementation": "static"},
        {"repetition_penalty": 5.0},
        {"prompt_lookup_num_tokens": 2},
        {"max_length": 3, "do_sample": True, "temperature": 0.1},
    ],
)
def test_generation_settings_of_the_model_do_not_count(tiny, fields):
    """Greedy is greedy; and the model's own settings are saved again as they were."""
    ids = {"bos_token_id": 256, "eos_token_id": 257}
    plain = dsmoe("generate", tiny, "abc", "-n", 5)
    (tiny / "generation_config.json").write_text(json.dumps(ids | fields))
    result = dsmoe("generate", tiny, "abc", "-n", 5)
    assert result.exit_code == 0, result.output
    assert result.stdout == plain.stdout


# ------------------------------------------------------------------------------ options and texts


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "tiny", "o", "--threshold", "nan"),
        ("calibrate", "tiny", "o", "--target-active", "nan"),
        ("calibrate", "tiny", "o", "--shared", "nan"),
        ("eval", "tiny", "--thresholds", "0.1,nan"),
        ("eval", "tiny", "--thresholds", "0.1,,0.2"),
        ("generate", "tiny", "x", "--temperature", "inf"),
        ("generate", "tiny", "x", "--threshold", "nan"),
        ("train", "tiny", "o", "--lr", "nan"),
        ("train", "tiny", "o", "--clip", "-1"),
        ("train", "tiny", "o", "--seed", "9" * 20),
        ("train", "tiny", "o", "--seed", "-1"),
        ("demo", "--target-active", "nan"),
    ],
)
@pytest.mark.quick
def test_numbers_that_are_none(arguments):
    fails(*arguments, code=2)


def test_clip_of_zero_is_no_limit(tiny, text, tmp_path):
    options = ("--data", text, "--window", 64, "--steps", 2, "--lr", 0.01)
    for clip in (0, 1e9):
        out = tmp_path / str(clip)
        assert dsmoe("train", tiny, out, *options, "--clip", clip).exit_code == 0
    none, huge = (load_file(tmp_path / c / "model.safetensors") for c in ("0", "1000000000.0"))
    start = load_file(tiny / "model.safetensors")
    assert all(torch.equal(none[name], huge[name]) for name in start)
    assert not all(torch.equal(none[name], start[name]) for name in start)


def test_texts_that_are_not_utf8(tiny, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/good.txt").write_text("good")
    (tmp_path / "texts/bad.txt").write_bytes(b"a\xffb")
    assert "bad.txt is not UTF-8" in fails("eval", tiny, "--data", tmp_path / "texts")
    assert "not UTF-8" in fails("eval", tiny, "--data", tiny / "model.safetensors")
    assert "neither a file" in fails("eval", tiny, "--data", "/dev/null")
    assert "standard input is not UTF-8" in fails("generate", tiny, "-", input=b"a\xff\xfeb")
    shutil.rmtree(tmp_path / "texts")
    (tmp_path / "texts/a.txt").mkdir(parents=True)
    assert "no .txt" in fails("eval", tiny, "--data", tmp_path / "texts")
    assert "empty" in fails("generate", tiny, "")


def test_terminals_without_the_letters(tiny):
    """Bytes on the command line that are no text, and a terminal that knows ASCII only."""
    command = [*MAIN, "generate", tiny]
    result = subprocess.run([*command, b"a\xffb"], cwd=tiny, capture_output=True)
    assert result.returncode == 1 and b"the prompt is not UTF-8" in result.stderr
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        [*command, "caf\xe9", "-n", "2"], cwd=tiny, env=environment, capture_output=True
    )
    assert result.returncode == 0 and result.stdout.startswith(b"caf?"), result.stderr
