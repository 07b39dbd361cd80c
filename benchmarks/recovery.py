"""What a cut model wins back, by the tokens that it was trained on, and when one way to it overtakes another.

A model is brought to three quarters and to half of its body, the parameters inside its blocks, and trained in
five ways on the same windows in the same order under the same schedule:

- `width`: MLP channels, heads and hidden channels go by what they carry (`prune.width`), and the original
  teaches what is left (`distill.logits`). The shape is the best that the search of `prune.width --budget`
  finds among those that keep all blocks;
- `depth`: whole blocks go, those whose loss costs least (`prune.depth`), and the original teaches;
- `magnitude`: the shape of `width`, by the norm of weights, and the original teaches;
- `fine-tuning`: the cut of `width`, trained on the text alone (cross-entropy);
- `scratch`: the shape of `width` with new weights, trained on the text alone.

Losses are nats a token on text that is not trained on, as the training loop measures them on its way. Run it
with ``python benchmarks/recovery.py``; what is there already is not made again, a run that was ended goes on,
and results go to ``reports/recovery``.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from recovery_report import Document, draw_pictures, percent, render
from structured_pruning import body

from compress import engine
from compress.core.artifact import TRAINING_FILE, Artifact, Lineage
from compress.models.blocks import find_blocks
from compress.models.load import skeleton
from compress.models.source import resolve
from compress.training.history import VALIDATION, History

REPOSITORY: Final = Path(__file__).resolve().parents[1]
SHARED: Final = Path(os.environ.get("COMPRESS_SHARED", REPOSITORY.parent / "shared"))
KINDS: Final = ("mlp", "heads", "hidden")
"""What `prune.width` takes a share of."""


@dataclass(frozen=True)
class Arm:
    """One way to a small model.

    Attributes:
        start: what is trained: a cut by `width`, `magnitude` or `depth`, or new weights (`fresh`).
        loss: what is minimised.
    """

    start: str
    loss: Mapping[str, float]


TAUGHT: Final = {"forward_kl": 1.0}
TEXT: Final = {"cross_entropy": 1.0}
ARMS: Final = {
    "width": Arm("width", TAUGHT),
    "depth": Arm("depth", TAUGHT),
    "magnitude": Arm("magnitude", TAUGHT),
    "fine-tuning": Arm("width", TEXT),
    "scratch": Arm("fresh", TEXT),
}


@dataclass(frozen=True)
class Settings:
    """What all arms have in common; figures of other settings are not mixed.

    Attributes:
        tokens, window, batch, learning_rate: of each training.
        evaluations: on its way.
        evaluation_tokens: of the text that is not trained on.
        samples: calibration sequences of a cut.
        trials: of the search for the shape.
    """

    model: str
    train: str
    validation: str
    tokens: int
    window: int
    batch: int
    learning_rate: float
    evaluations: int
    evaluation_tokens: int
    samples: int
    trials: int
    device: str
    threads: int

    def recipe(self, model: str, draw: int, step: Mapping[str, Any]) -> dict[str, Any]:
        """One step on a model; a draw has its own calibration text, windows and new weights."""
        return {
            "model": model,
            "seed": draw,
            "device": self.device,
            "threads": self.threads,
            "data": {
                "calibration": self.train,
                "train": self.train,
                "validation": self.validation,
                "samples": self.samples,
                "sequence_length": self.window,
            },
            "steps": [step],
        }

    def training(self, loss: Mapping[str, float], tokens: int) -> dict[str, Any]:
        """The step that trains; the teacher of a loss on text alone is there to be compared with."""
        steps = tokens // (self.window * self.batch)
        return {
            "use": "distill.logits",
            "teacher": self.model,
            "loss": dict(loss),
            "tokens": tokens,
            "window": self.window,
            "batch": self.batch,
            "learning_rate": self.learning_rate,
            "evaluate_every": max(1, steps // self.evaluations),
            "evaluation_tokens": self.evaluation_tokens,
            "precision": "float32",
            "checkpoint_every": "60s",
            "keep": "last",
        }

    def described(self) -> dict[str, Any]:
        """For the report: texts and model by their names."""
        named = {name: Path(getattr(self, name)).name for name in ("model", "train", "validation")}
        return {**asdict(self), **named}


def made(out: Path, recipe: Mapping[str, Any]) -> Path:
    """The artifact of one step, where it is not there yet."""
    return engine.run(recipe, out, single=True).final


def shape(settings: Settings, share: float, work: Path) -> dict[str, float]:
    """Shares for `prune.width`: of the trials that keep to a share of the body and lose neither blocks nor
    components of the hidden state, those of the least loss."""
    step = {"use": "prune.width", "budget": percent(share), "trials": settings.trials}
    found = made(work / "search", settings.recipe(settings.model, 0, step))
    lineage = Lineage.read(found)
    if lineage is None:
        raise RuntimeError(f"{found} has no lineage")
    blocks = len(find_blocks(skeleton(Artifact.open(resolve(settings.model)))))
    trials = [
        trial
        for trial in lineage.steps[-1].decisions["trials"]
        if trial["blocks"] == blocks and trial["components"] == 1
    ]
    best = min(trials, key=lambda trial: trial["loss"])
    return {name: best[name] for name in KINDS}


def start(settings: Settings, name: str, share: float, draw: int, work: Path) -> Path:
    """The model that a training begins with."""
    folder = work / f"start-{name}-{draw}"
    if name == "fresh":
        cut = start(settings, "width", share, draw, work)
        fresh = {"use": "distill.student", "weights": "fresh"}
        return made(folder, settings.recipe(str(cut), draw, fresh))
    if name == "depth":
        blocks = len(find_blocks(skeleton(Artifact.open(resolve(settings.model)))))
        # The budget is kept, as the shape of `width` keeps it.
        layers = max(1, int(blocks * share + 1e-9))
        step: dict[str, Any] = {"use": "prune.depth", "layers": layers, "by": "loss"}
    else:
        importance = "magnitude" if name == "magnitude" else "activation"
        shares = shape(settings, share, work)
        # `keep` leaves heads that cannot go, as the search did; `heads` would be refused.
        kept = {"keep": shares["heads"], "mlp": shares["mlp"], "hidden": shares["hidden"]}
        step = {"use": "prune.width", "importance": importance, **kept}
    return made(folder, settings.recipe(settings.model, draw, step))


def curve(folder: Path) -> list[dict[str, float]]:
    """What the training loop measured on the text that is not trained on, from before the first step."""
    rows = History.read(folder / TRAINING_FILE, ()).rows
    return [
        {
            "tokens": row.get("tokens", 0),
            "loss": row[f"{VALIDATION}cross_entropy"],
            "divergence": row[f"{VALIDATION}divergence"],
        }
        for row in rows
        if f"{VALIDATION}cross_entropy" in row
    ]


def original(settings: Settings, draw: int, work: Path) -> float:
    """The loss of the model as it is, on the same text: what a training of one step begins with."""
    step = settings.training(TEXT, settings.window * settings.batch)
    folder = made(work / f"original-{draw}", settings.recipe(settings.model, draw, step))
    return curve(folder)[0]["loss"]


def trained(settings: Settings, name: str, share: float, draw: int, work: Path) -> dict[str, Any]:
    """One arm at one share, as the document has it."""
    arm, here = ARMS[name], work / percent(share)
    begun = start(settings, arm.start, share, draw, here)
    step = settings.training(arm.loss, settings.tokens)
    folder = made(here / f"{name}-{draw}", settings.recipe(str(begun), draw, step))
    return {
        "share": share,
        "arm": name,
        "draw": draw,
        "body": body(folder) / body(resolve(settings.model)),
        "curve": curve(folder),
    }


def missing(
    document: Document, shares: Sequence[float], arms: Sequence[str], draws: int
) -> Iterator[tuple[int, float, str]]:
    """Draw, share and arm of what was not trained yet, a whole draw first."""
    done = {(run["draw"], run["share"], run["arm"]) for run in document["runs"]}
    wanted = ((draw, share, arm) for draw in range(draws) for share in shares for arm in arms)
    return (each for each in wanted if each not in done)


def measure(settings: Settings, arguments: argparse.Namespace) -> Document:
    """Train what is missing, and write the report after each."""
    file = arguments.report / "recovery.json"
    document: Document = {"settings": settings.described(), "originals": {}, "shapes": {}, "runs": []}
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        document = known if known["settings"] == document["settings"] else document
    arguments.report.mkdir(parents=True, exist_ok=True)
    for draw, share, arm in missing(document, arguments.shares, arguments.arms, arguments.draws):
        begun = time.perf_counter()
        document["originals"][str(draw)] = original(settings, draw, arguments.work)
        run = trained(settings, arm, share, draw, arguments.work)
        if ARMS[arm].start != "depth":
            document["shapes"][percent(share)] = shape(settings, share, arguments.work / percent(share))
        document["runs"].append(run)
        seconds, final = time.perf_counter() - begun, run["curve"][-1]["loss"]
        print(f"{percent(share)} {arm}, draw {draw}: {final:.4f} after {seconds:.0f} s", flush=True)
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        write(document, arguments.report)
    return document


def write(document: Document, report: Path) -> None:
    """Table and pictures."""
    draw_pictures(document, report)
    (report / "recovery.md").write_text(render(document), encoding="utf-8")


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(SHARED / "models/gutenberg-4m"))
    parser.add_argument("--train", default=str(SHARED / "data/gutenberg_train.txt.gz"))
    parser.add_argument("--validation", default=str(SHARED / "data/gutenberg_valid.txt.gz"))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--draws", type=int, default=1, help="of calibration text, windows and new weights")
    parser.add_argument("--tokens", type=int, default=614_400, help="of each training")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--evaluation-tokens", type=int, default=16_384)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs/recovery")
    parser.add_argument("--report", type=Path, default=REPOSITORY / "reports/recovery")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    arguments = parsed(words)
    common = {name: getattr(arguments, name) for name in Settings.__dataclass_fields__}
    document = measure(Settings(**common), arguments)
    write(document, arguments.report)
    print(render(document))


if __name__ == "__main__":
    main()
