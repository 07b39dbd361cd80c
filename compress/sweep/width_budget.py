"""One budget spread over channels, heads, the hidden size and blocks, by making models and measuring them.

What a channel costs the model cannot be told from its size, and what several cuts do together cannot be told
from what each does alone. So the search makes what it compares. Each *trial* is a number of blocks and a
direction: shares in which MLP channels, heads and the hidden state go (`compress.sweep.width_trials`). The
model is cut so and its loss on text is measured. The first trials are the single methods and even mixtures of
them; the next lie around the best. The best of all is the result, so on the text that it is measured on no
single method is better.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import torch

from compress.core.artifact import Artifact
from compress.core.budget import SizeBudget
from compress.core.errors import CalibrationError, PlanError
from compress.core.passes import Needs, Outcome
from compress.core.run import RESUMABLE, Run
from compress.models.checkpoint import Checkpoint
from compress.models.load import loaded_dtype, skeleton
from compress.sweep import slicing
from compress.sweep.decode_prediction import decode_prediction, read_bytes
from compress.sweep.depth_loss import model_loss
from compress.sweep.depth_stacks import Size
from compress.sweep.narrowing import How, narrow
from compress.sweep.narrowing import check as check_narrowing
from compress.sweep.shortening import Shorter, shorten
from compress.sweep.slicing import Sliced, slice_stream
from compress.sweep.walk import Walk, placed_skeleton
from compress.sweep.width_trials import Trial, Trials

_FILE: Final = "trials.jsonl"
_FOLDER: Final = "trials"

Cut = Callable[[Artifact, Path, Run], Outcome]


@dataclass(frozen=True)
class Spent:
    """What is asked of a search.

    Attributes:
        budget: what the model may take.
        trials: models that are made and measured, at most.
        samples: sequences that their loss is measured on, at most.
        multiple: what channels and hidden sizes are a multiple of; ``None`` chooses one that kernels like.
    """

    budget: SizeBudget
    trials: int
    samples: int
    multiple: int | None


def check(spent: Spent, how: How, source: Artifact, run: Run) -> Needs:
    """Refuse what cannot be cut or measured, and predict the work of all trials.

    Raises:
        PlanError: no way of cutting keeps to the budget, or calibration text is missing.
    """
    if run.calibration is None:
        raise PlanError("the method needs calibration text", "give --calibration TEXT or data.calibration")
    search = _Search(spent, how, source, run)
    first = list(search.trials.first())
    if not first:
        raise PlanError(
            f"nothing that can be cut of {source.path} keeps to {spent.budget}: "
            f"{search.trials.refusal or 'too much must go'}",
            "ask for a larger budget",
        )
    needs = Needs(0, 0, 0, 0.0)
    if (narrowing := next((trial for trial in first if trial.narrows), None)) is not None:
        needs = check_narrowing(search.trials.asked(narrowing), how, source, run)
    if (sliced := next((trial for trial in first if trial.slices), None)) is not None:
        needs = _most(needs, slicing.check(search.sliced(sliced), source, run))
    # A trial is made, measured and let go; the blocks that do least are found in the whole model.
    model = search.trials.model
    compute = 4 if run.device == "cpu" else loaded_dtype(source).itemsize
    whole = compute * sum(parameter.numel() for parameter in model.parameters())
    on_host = run.device == "cpu"
    return replace(
        needs,
        disk_bytes=3 * max(needs.disk_bytes, search.trials.disk_bytes),
        host_bytes=needs.host_bytes + (whole if on_host else 0),
        device_bytes=0 if on_host else max(needs.device_bytes, whole),
        seconds=needs.seconds * (spent.trials + 1),
    )


def _most(one: Needs, other: Needs) -> Needs:
    return Needs(*(max(pair) for pair in zip(astuple(one), astuple(other), strict=True)))


def fit(spent: Spent, how: How, source: Artifact, target: Path, run: Run) -> Outcome:
    """Find the best way to keep to a budget, and cut the model so.

    Args:
        target: the folder that is written; it may hold earlier progress.

    Raises:
        PlanError: no way of cutting keeps to the budget.
    """
    search = _Search(spent, how, source, run)
    losses = search.measured()
    best = min(losses, key=lambda trial: (losses[trial], trial.cost))
    run.reporter.message(
        f"budget: {search.words(best)}; loss {losses[best]:.4f} on the calibration text, the best of "
        f"{len(losses)} trials"
    )
    outcome = search.make(best, target, run)
    made = Artifact.open(target)
    decisions = {
        "budget": str(spent.budget),
        "chosen": search.document(best, losses[best]),
        "trials": [
            search.document(trial, loss) for trial, loss in sorted(losses.items(), key=lambda entry: entry[1])
        ],
        **outcome.decisions,
        "decode": search.decode(made),
    }
    shutil.rmtree(run.scratch / _FOLDER, ignore_errors=True)
    return Outcome(decisions, outcome.tensors)


@final
class _Search:
    """Trials of one model."""

    def __init__(self, spent: Spent, how: How, source: Artifact, run: Run) -> None:
        self._spent, self._how, self._source, self._run = spent, how, source, run
        self.trials = Trials(spent.budget, spent.multiple, source, run)

    def sliced(self, trial: Trial) -> Sliced:
        """What a trial asks of a slicing."""
        return Sliced(self.trials.width(trial), self._how.repair)

    def measured(self) -> dict[Trial, float]:
        """The loss of every trial that was made. What an earlier run measured is not measured again."""
        known = self._read()
        losses: dict[Trial, float] = {}
        keys: set[str] = set()
        title = f"trials of {self._spent.budget}"
        with self._run.reporter.progress(title, self._spent.trials, "trial") as advance:

            def measure(trials: Iterator[Trial]) -> None:
                for trial in trials:
                    if len(losses) == self._spent.trials:
                        return
                    if trial.key not in keys:
                        keys.add(trial.key)
                        loss = known[trial.key] if trial.key in known else self._loss(trial)
                        if loss is not None:
                            losses[trial] = loss
                        advance(1)

            measure(self.trials.first())
            before = -1
            while losses and len(losses) not in (before, self._spent.trials):
                before = len(losses)
                measure(self.trials.around(min(losses, key=lambda trial: (losses[trial], trial.cost))))
        if not losses:
            raise PlanError(
                f"no way of cutting keeps to {self._spent.budget}: "
                f"{self.trials.refusal or 'too much must go'}",
                "ask for a larger budget",
            )
        return losses

    # -- making and measuring one ------------------------------------------------------------------------

    def _loss(self, trial: Trial) -> float | None:
        """The loss of one trial, or ``None`` where it cannot be made."""
        folder = self._run.scratch / _FOLDER / trial.key.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        run = replace(self._run, scratch=folder / "scratch")
        (folder / "model").mkdir(parents=True)
        self._run.reporter.event("budget.trial", blocks=trial.blocks, shares=list(trial.shares))
        try:
            self.make(trial, folder / "model", run)
            loss: float | None = self._measured(Artifact.open(folder / "model"))
        except (PlanError, CalibrationError) as error:
            self._run.reporter.message(f"budget: {self.words(trial)} cannot be made: {error.message}")
            loss = None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        with (self._run.scratch / _FILE).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"trial": trial.key, "loss": loss}) + "\n")
        (self._run.scratch / RESUMABLE).touch()
        return loss

    def _read(self) -> dict[str, float | None]:
        """What an earlier run measured; a line that it did not finish is measured again."""
        file = self._run.scratch / _FILE
        found: dict[str, float | None] = {}
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            try:
                document = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[document["trial"]] = document["loss"]
        return found

    def _measured(self, made: Artifact) -> float:
        """The loss of a model that was cut, held against the model as it was where the task has none."""
        calibration = self._run.calibration
        if calibration is None:
            raise PlanError("losses are measured on calibration text", "give --calibration TEXT")
        text = replace(calibration, samples=min(calibration.samples, self._spent.samples))
        # Another draw of the text than the one that channels are judged by.
        run = replace(self._run, calibration=text, seed=self._run.seed + 1)
        return model_loss(_walk(made, run), _walk(self._source, run))

    def make(self, trial: Trial, target: Path, run: Run) -> Outcome:
        """Cut the model as a trial says: blocks first, then channels and heads, then components."""
        cuts = list(self._cuts(trial))
        source, outcome = self._source, Outcome()
        for number, (name, cut) in enumerate(cuts, 1):
            if len(cuts) == 1:
                return cut(source, target, run)
            folder = target if number == len(cuts) else run.scratch / f"without-{name}"
            folder.mkdir(parents=True, exist_ok=True)
            found = cut(source, folder, replace(run, scratch=run.scratch / name))
            (run.scratch / RESUMABLE).touch()
            outcome = found if number == 1 else _in_a_row(outcome, found)
            source = Artifact.open(folder)
        return outcome

    def _cuts(self, trial: Trial) -> Iterator[tuple[str, Cut]]:
        if trial.blocks < len(self.trials.blocks):
            asked = Shorter(Size(1.0, trial.blocks), "loss", self._how.repair, self._spent.samples)
            yield "depth", lambda source, target, run: shorten(asked, source, target, run)
        if trial.narrows:
            kept = self.trials.asked(trial)
            yield "width", lambda source, target, run: narrow(kept, self._how, source, target, run)
        if trial.slices:
            sliced = self.sliced(trial)
            yield "components", lambda source, target, run: slice_stream(sliced, source, target, run)

    # -- words ---------------------------------------------------------------------------------------

    def words(self, trial: Trial) -> str:
        """A trial for a person."""
        mlp, heads, hidden, components = (f"{share:.0%}" for share in trial.shares)
        state = f"components of the hidden state {components}" if trial.slices else f"hidden size {hidden}"
        blocks = f"{trial.blocks} of {len(self.trials.blocks)} blocks"
        return f"{blocks}, MLP channels {mlp}, heads {heads}, {state}"

    def document(self, trial: Trial, loss: float) -> dict[str, Any]:
        """A trial for the lineage."""
        mlp, heads, hidden, components = (float(f"{share:.6g}") for share in trial.shares)
        shares = {
            "blocks": trial.blocks,
            "mlp": mlp,
            "heads": heads,
            "hidden": hidden,
            "components": components,
        }
        of_budget = float(f"{trial.cost / self.trials.limit:.6g}")
        return {**shares, "cost": int(trial.cost), "of_budget": of_budget, "loss": float(f"{loss:.6g}")}

    def decode(self, made: Artifact) -> dict[str, Any]:
        """What is read for a token before and after."""
        size = loaded_dtype(self._source).itemsize
        after = skeleton(made, task=self._run.task, trust_remote_code=self._run.trust_remote_code)
        shapes = {name: tuple(parameter.shape) for name, parameter in after.named_parameters()}
        return decode_prediction(
            read_bytes(self.trials.model, self.trials.whole, size), read_bytes(after, shapes, size)
        )


def _walk(source: Artifact, run: Run) -> Walk:
    model = placed_skeleton(source, run)
    return Walk(source, run.scratch, run, model, Checkpoint(source, model), torch.device(run.device))


def _in_a_row(first: Outcome, second: Outcome) -> Outcome:
    """What was decided and meant by two cuts in a row: what the second left is as the first meant it."""
    tensors = {
        name: meant if meant.changed else first.tensors[name] for name, meant in second.tensors.items()
    }
    decisions: dict[str, Any] = {
        **first.decisions,
        **second.decisions,
        "config": {**first.decisions["config"], **second.decisions["config"]},
        "parameters": {
            "before": first.decisions["parameters"]["before"],
            "after": second.decisions["parameters"]["after"],
        },
        "changed": sum(meant.changed for meant in tensors.values()),
    }
    return Outcome(decisions, tensors)
