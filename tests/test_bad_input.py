"""Bad input gets one clear line and its exit code, leaves nothing behind and touches nothing.

Every case goes through the real command line. Most run in this process, because importing torch takes
seconds; what concerns another user or another process runs in one.
"""

import contextlib
import ctypes
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compress.cli.app import main
from compress.core.target import Target
from tests import models_zoo

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2  # linux/prctl.h, linux/capability.h
WEIGHT = "model.layers.1.mlp.down_proj.weight"


def save_tokenizer(folder: Path, entries: int) -> None:
    """A tokenizer of one letter a token, with this many entries."""
    vocabulary = {"[UNK]": 0, **{f"<{at}>": at for at in range(1, entries)}}
    for at, letter in enumerate("abcdefghijklmnopqrstuvwxyz ", start=10):
        del vocabulary[f"<{at}>"]
        vocabulary[letter] = at
    inner = FastTokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(folder)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model with its tokenizer, and a text that is long enough."""
    folder = tmp_path_factory.mktemp("prepared")
    model = models_zoo.write("llama", folder)
    model.rename(folder / "model")
    save_tokenizer(folder / "model", models_zoo.VOCABULARY)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 100)
    return folder


@dataclass(frozen=True)
class Place:
    """A folder of one test, with a model and a text of its own."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def out(self) -> Path:
        return self.folder / "results" / "out"

    @property
    def weights(self) -> Path:
        return self.model / "model.safetensors"

    def rtn(self, *more: str) -> list[str]:
        return ["quantize", "rtn", str(self.model), "--out", str(self.out), "--group-size", "16", *more]

    def gptq(self, *more: str, text: str | None = None) -> list[str]:
        given = ["--calibration", text or str(self.text), "--samples", "4", "--sequence-length", "16"]
        start = ["quantize", "gptq", str(self.model), "--out", str(self.out), "--group-size", "16"]
        return [*start, *given, *more]

    def configure(self, **changes: Any) -> None:
        config = json.loads((self.model / "config.json").read_text())
        config.update(changes)
        (self.model / "config.json").write_text(json.dumps(config))

    def spoil(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights)


@pytest.fixture
def place(prepared: Path, tmp_path: Path) -> Place:
    shutil.copytree(prepared, tmp_path / "work")
    return Place(tmp_path / "work")


def contents(folder: Path) -> dict[str, tuple[str, int, str]]:
    """Everything below a folder: kind or digest, time of the last change, mode."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        kind = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        # The time of a folder changes when a lock file comes and goes; its listing says what matters.
        changed = status.st_mtime_ns if path.is_file() else 0
        found[str(path.relative_to(folder))] = (kind, changed, oct(status.st_mode))
    return found


def refused(
    place: Place, capsys: pytest.CaptureFixture[str], command: list[str], code: int, complaint: str
) -> str:
    """Run a command that must fail, and hold it to everything that a failure promises; returns the line."""
    before = contents(place.folder)
    capsys.readouterr()
    assert main(command) == code, capsys.readouterr().err
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said.err
    assert complaint in errors[0]
    assert "Traceback" not in said.err
    assert said.out == ""
    assert contents(place.folder) == before
    return said.err


def drop(*patterns: str) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        for pattern in patterns:
            for file in place.model.glob(pattern):
                file.unlink()

    return change


def rewrite(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        file = place.model / name
        file.write_bytes(edit(file.read_bytes()))

    return change


def flip(at: int, bit: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def poison(value: float) -> Callable[[Place], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[WEIGHT][2, 3] = value

    return lambda place: place.spoil(change)


def pickled(place: Place) -> None:
    torch.save(load_file(place.weights), place.model / "pytorch_model.bin")
    place.weights.unlink()


def lose(place: Place) -> None:
    place.spoil(lambda tensors: tensors.__delitem__(WEIGHT))


BAD_MODELS: dict[str, tuple[Callable[[Place], None], str]] = {
    "missing": (lambda place: shutil.rmtree(place.model), "no model at"),
    "no weights": (drop("*.safetensors"), "holds no weights"),
    "truncated": (rewrite("model.safetensors", lambda data: data[:-100]), "is truncated"),
    "trailing bytes": (rewrite("model.safetensors", lambda data: data + b"\0" * 8), "belong to no tensor"),
    "empty file": (rewrite("model.safetensors", lambda data: b""), "truncated or no safetensors file"),
    "flipped bit in the length": (rewrite("model.safetensors", flip(2, 5)), "truncated or no safetensors"),
    "flipped bit in a dtype": (
        rewrite("model.safetensors", lambda data: data.replace(b'"F32"', b'"F72"', 1)),
        "unknown dtype 'F72'",
    ),
    "flipped bit in a name": (
        rewrite("model.safetensors", lambda data: data.replace(b"q_proj", b"q_prok", 1)),
        "self_attn.q_proj.weight; it does not know model.layers.",
    ),
    "flipped bit in a brace": (rewrite("model.safetensors", flip(8, 2)), "damaged header"),
    "pickle": (pickled, "pytorch_model.bin, a pickle"),
    "NaN": (poison(float("nan")), f"'{WEIGHT}' holds a NaN at [2, 3]"),
    "infinity": (poison(float("-inf")), f"'{WEIGHT}' holds an infinity at [2, 3]"),
    "no config": (drop("config.json"), "has no config.json"),
    "config that is no JSON": (rewrite("config.json", lambda data: data[:-5]), "config.json is not JSON"),
    "config that is no object": (rewrite("config.json", lambda data: b"[1]"), "expected an object"),
    "config with a wrong type": (lambda place: place.configure(hidden_size="wide"), "hidden_size"),
    "config of another model": (lambda place: place.configure(intermediate_size=48), "config.json says"),
    "unknown architecture": (lambda place: place.configure(model_type="lamma"), "'lamma' is unknown"),
    "custom code": (
        lambda place: place.configure(model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        "runs code of its own: mine.py",
    ),
    "lost tensor": (lose, f"first: {WEIGHT}"),
    "tokenizer that does not fit": (
        lambda place: save_tokenizer(place.model, models_zoo.VOCABULARY + 1),
        "tokenizer does not fit",
    ),
    "broken tokenizer": (rewrite("tokenizer.json", lambda data: data[:-50]), "the tokenizer of"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models(place: Place, capsys: pytest.CaptureFixture[str], case: str) -> None:
    change, complaint = BAD_MODELS[case]
    change(place)
    refused(place, capsys, place.rtn(), 3, complaint)


def test_a_stray_shard_of_another_run_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"x": torch.ones(2)}, place.model / "model-00002-of-00002.safetensors")
    refused(place, capsys, place.rtn(), 3, "model-00002-of-00002.safetensors belongs to no model")


def test_calibration_without_a_tokenizer_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    drop("tokenizer*")(place)
    refused(place, capsys, place.gptq(), 3, "tokenizer")


def _binary(place: Place) -> str:
    (place.folder / "binary.txt").write_bytes(b"text\0and more")
    return str(place.folder / "binary.txt")


def _latin(place: Place) -> str:
    (place.folder / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    return str(place.folder / "latin.txt")


def _cut(place: Place) -> str:
    (place.folder / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:-2000])
    return str(place.folder / "cut.txt.gz")


def _short(place: Place) -> str:
    (place.folder / "short.txt").write_text("abc" * 21)
    return str(place.folder / "short.txt")


def _empty(place: Place) -> str:
    (place.folder / "empty.txt").write_text("")
    return str(place.folder / "empty.txt")


def _lines(place: Place) -> str:
    (place.folder / "lines.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    return str(place.folder / "lines.jsonl")


BAD_TEXTS: dict[str, tuple[Callable[[Place], str], str]] = {
    "missing": (lambda place: str(place.folder / "nowhere.txt"), "no text at"),
    "a folder": (lambda place: str(place.model), "is a folder, expected a text file"),
    "empty": (_empty, "is empty"),
    "binary": (_binary, "NUL byte at 4"),
    "another encoding": (_latin, "not UTF-8"),
    "damaged gzip": (_cut, "damaged gzip"),
    "too short": (_short, "gives 63 tokens, 4 samples of 16 need 64"),
    "a line that is no JSON": (_lines, "line 2 is not JSON"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_texts(place: Place, capsys: pytest.CaptureFixture[str], case: str) -> None:
    make, complaint = BAD_TEXTS[case]
    refused(place, capsys, place.gptq(text=make(place)), 4, complaint)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["quantise", "rtn"], "unknown command"),
        (["quantize", "rtm"], "unknown command"),
        (["quantize", "rtn", "{model}", "--out", "{out}", "--bit", "4"], "unknown flag '--bit'"),
        (["quantize", "rtn", "{model}", "--out", "{out}", "--bits", "7"], "bits"),
        (["quantize", "rtn", "{model}", "--out", "{out}", "--bits", "four"], "bits"),
        (["quantize", "rtn", "{model}", "--out", "{out}", "--group-size", "0"], "group"),
        (["quantize", "rtn", "{model}", "--out", "{out}", "--task", "text-generatoin"], "task"),
        (["quantize", "rtn", "builtin:nonsense", "--out", "{out}"], "no built-in model"),
        (["quantize", "rtn", "{model}", "--out", "{out}", "--ignore", "re:("], "regular expression"),
        (["quantize", "rtn", "{model}"], "--out"),
        (["run", "{recipe}", "--out", "{out}", "--set", "steps.0.bitz=3"], "bitz"),
        (["run", "{recipe}", "--out", "{out}", "--set", "sead=3"], "sead"),
        (["run", "{recipe}", "--out", "{out}", "--set", "steps.0.use=quantize.rtx"], "quantize.rtx"),
        (["run", "{recipe}", "--out", "{out}", "--set", "steps.0.bits=[4]"], "bits"),
        (["run", "{recipe}x", "--out", "{out}"], "no recipe"),
    ],
)
def test_unknown_names_keys_and_values(
    place: Place, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    recipe = write_recipe(place, {"use": "quantize.rtn", "group_size": 16})
    command = [word.format(model=place.model, out=place.out, recipe=recipe) for word in words]
    refused(place, capsys, command, 2, complaint)


def write_recipe(place: Place, *steps: dict[str, Any]) -> Path:
    recipe = place.folder / "recipe.yaml"
    recipe.write_text(json.dumps({"version": 1, "model": str(place.model), "steps": steps}))
    return recipe


def test_a_group_that_does_not_divide_is_refused_by_the_layer(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(place, capsys, place.rtn("--group-size", "24"), 5, "24")
    assert "self_attn" in said
    assert "--fallback" in said or "fallback" in said


def test_a_chain_that_cannot_work_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    step = {"use": "quantize.rtn", "group_size": 16}
    recipe = write_recipe(place, step, step)
    command = ["run", str(recipe), "--out", str(place.out)]
    refused(place, capsys, command, 5, "step 1 (quantize.rtn) needs float weights")


def test_a_method_that_wants_data_is_refused_without(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", "gptq", str(place.model), "--out", str(place.out), "--group-size", "16"]
    refused(place, capsys, command, 5, "calibration")


def test_sequences_longer_than_the_model_are_refused(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    text = place.folder / "text.txt"
    text.write_text("once upon a time " * 2000)
    command = ["quantize", "gptq", str(place.model), "--out", str(place.out), "--group-size", "16"]
    command += ["--calibration", str(text), "--sequence-length", "100000"]
    said = refused(place, capsys, command, 5, "100000 tokens are longer than the model's")
    assert "--sequence-length" in said


@pytest.mark.parametrize("kind", ["folder", "file", "working folder"])
def test_what_is_not_ours_is_not_touched(place: Place, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    place.out.parent.mkdir()
    if kind == "file":
        place.out.write_text("mine")
    else:
        folder = place.out if kind == "folder" else Target(place.out, "compress.json").partial
        folder.mkdir()
        (folder / "thesis.txt").write_text("mine")
    refused(place, capsys, place.rtn(), 7, "is a file" if kind == "file" else "not made by compress")
    if kind != "working folder":
        refused(place, capsys, place.rtn("--fresh"), 7, "expected" if kind == "file" else "not made by")


def test_a_target_in_use_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.out.parent.mkdir()
    with Target(place.out, "compress.json").lock():
        refused(place, capsys, place.rtn(), 7, f"in use by another run (process {os.getpid()})")


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of its own with so many bytes; skips where none may be mounted."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_cannot_hold_the_result_is_refused_by_the_plan(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(place.out.parent, 16384):
        refused(place, capsys, place.rtn(), 6, "of disk")


def test_a_disk_that_fills_up_is_told_and_leaves_nothing_behind(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Target, "room", lambda self: 1 << 40)
    with small_disk(place.out.parent, 16384):
        said = refused(place, capsys, place.rtn(), 6, "No space left on device")
        assert "hint: " in said


def _obey_permissions() -> None:
    """Give up, in a child of root, the capabilities by which root reads and writes everything."""
    libc = ctypes.CDLL(None)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def obeying_permissions(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command as somebody for whom the permissions of files count."""
    return subprocess.run(
        [sys.executable, "-m", "compress", *command],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=_obey_permissions if os.geteuid() == 0 else None,
    )


@pytest.mark.parametrize("what", ["model folder", "weights", "text", "result"])
def test_no_permission_is_told_by_the_file(place: Place, what: str) -> None:
    place.out.parent.mkdir()
    denied = {
        "model folder": place.model,
        "weights": place.weights,
        "text": place.text,
        "result": place.out.parent,
    }[what]
    before = contents(place.folder)
    mode = denied.stat().st_mode
    denied.chmod(0o555 if what == "result" else 0)
    try:
        done = obeying_permissions(place.gptq() if what == "text" else place.rtn())
    finally:
        denied.chmod(mode)
    assert done.returncode == 6, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "permission" in errors[0]
    assert str(denied) in errors[0]
    assert contents(place.folder) == before
