"""Our `distill.logits`, as its command runs it, in the environment of the project.

It judges one held-out window before the first step, which counts for memory, and one after the last, which
does not; then it writes the student.
"""

import csv
import shutil
from typing import final

from lesson import LENGTHS, TOKENS, Watch, parse_lesson
from safetensors import safe_open

from compress.core.artifact import TRAINING_FILE, Artifact
from compress.core.events import SILENT, Reporter
from compress.core.large_pages import ask_for_large_pages
from compress.core.run import Run, TrainingSource
from compress.distill.logits import Logits

PRESETS = ("plain",)


@final
class Marks(Reporter):
    """Marks the steps."""

    def __init__(self, watch: Watch, steps: int) -> None:
        self._watch = watch
        self._steps = steps

    def event(self, name: str, **facts: object) -> None:
        """The beginning of a step is the end of the one before, and the last evaluation that of the last."""
        begun = len(self._watch.marks)
        if name == "training.step" or (name == "training.evaluate" and begun == self._steps):
            self._watch.mark()

    def message(self, text: str) -> None:
        print(text, flush=True)

    def begin(self, title: str, total: int, unit: str) -> None:
        SILENT.begin(title, total, unit)

    def advance(self, by: int = 1) -> None:
        SILENT.advance(by)

    def end(self) -> None:
        SILENT.end()


def main() -> None:
    ask_for_large_pages()  # as the command does, before torch takes any memory
    lesson = parse_lesson((__doc__ or "").splitlines()[0], PRESETS)
    with safe_open(lesson.tokens, "pt") as file:
        if LENGTHS in file.keys():  # noqa: SIM118 - a file is no mapping
            raise ValueError(f"{lesson.tokens} holds padding; windows are packed")
        window = file.get_slice(TOKENS).get_shape()[1]
    watch = Watch()
    method = Logits(
        teacher=str(lesson.teacher),
        tokens=lesson.steps * lesson.batch * lesson.accumulation * window,
        window=window,
        batch=lesson.batch,
        accumulation=lesson.accumulation,
        learning_rate=lesson.learning_rate,
        precision="float32",
        evaluate_every=lesson.steps,
        evaluation_tokens=window,
        checkpoint_every=lesson.steps,
        keep="last",
    )
    source = Artifact.open(lesson.student)
    target = lesson.out / "trained"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    run = Run(
        threads=lesson.threads,
        training=TrainingSource(str(lesson.tokens), str(lesson.held_out)),
        models={"teacher": lesson.teacher},
        scratch=target / "scratch",
        reporter=Marks(watch, lesson.steps),
    )
    method.apply(source, target, run)
    watch.counts = [lesson.batch * window] * (lesson.steps * lesson.accumulation)
    with (target / TRAINING_FILE).open(newline="") as stream:
        first = next(row for row in csv.DictReader(stream) if row["step"] == "1")
    watch.losses = [float(first["loss"])] * lesson.accumulation
    watch.write(lesson, ("transformers", "torch"))


if __name__ == "__main__":
    main()
