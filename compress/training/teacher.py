"""What a teacher must be for a student to learn from it, told before anything is loaded."""

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.facts import Fact
from compress.core.passes import name_of
from compress.core.run import Run
from compress.models.load import configuration, tokenizer
from compress.models.positions import positions
from compress.models.tasks import Task, TextGeneration, resolve
from compress.training.trainer import Trainer

_RUNS = "compressed-tensors"
"""Quantized models that stock transformers runs without another package."""


def teacher_of(
    method: Trainer,
    option: str,
    source: Artifact,
    run: Run,
    tasks: tuple[type[Task], ...] = (TextGeneration,),
) -> Artifact:
    """The model that an option names, after what can be refused from configurations alone.

    Args:
        method: with the numbers of the training.
        option: the field that names the teacher.
        source: the student.
        tasks: what the method is for; the teacher's task is the student's.

    Raises:
        PlanError: no text, another task, a teacher that cannot be run, or windows longer
            than one of the models takes.
    """
    use = name_of(method)
    if run.training is None:
        raise PlanError(f"{use} needs training text", "give --train TEXT or data.train")
    task = resolve(run.task, source.config)
    if not isinstance(task, tasks):
        wanted = " or ".join(f"a {each.title}" for each in tasks)
        raise PlanError(
            f"{use} trains {wanted}, and {source.path} is another kind of model: {task.title}",
            f"leave it out of the recipe, or start from {wanted}",
        )
    if option not in run.models:
        raise PlanError(
            f"the {option} of {use} is not at hand", f"hand its folder over in Run.models['{option}']"
        )
    teacher = Artifact.open(run.models[option])
    if Fact.TRANSFORMERS not in teacher.facts:
        raise PlanError(f"teacher {teacher.path} is no transformers model", "give a model folder or a hub id")
    if not isinstance(resolve("auto", teacher.config), type(task)):
        raise PlanError(f"teacher {teacher.path} is no {task.title}", "give one that is")
    quantization = teacher.config.get("quantization_config") or {}
    kind = quantization.get("quant_method", _RUNS)
    if kind != _RUNS:
        raise PlanError(
            f"teacher {teacher.path} is a '{kind}' model, which cannot be run here",
            f"give the float model, or one in the format {_RUNS}",
        )
    for model in (source, teacher):
        room = positions(model.config)
        if room is not None and method.window > room:
            raise PlanError(
                f"windows of {method.window} tokens are longer than the {room} positions of {model.path}",
                f"set window to at most {room} (--window {room})",
            )
    return teacher


def same_vocabulary(source: Artifact, teacher: Artifact, sizes: tuple[int, int], run: Run) -> None:
    """Refuse a teacher whose token numbers mean other tokens than the student's.

    Args:
        sizes: logits of a position, of student and teacher.

    Raises:
        PlanError: saying what differs.
    """
    hint = "a teacher has to have the student's vocabulary: give another model of the same family"
    if sizes[0] != sizes[1]:
        raise PlanError(
            f"the vocabularies differ: {source.path} has {sizes[0]:,} tokens, "
            f"teacher {teacher.path} has {sizes[1]:,}",
            hint,
        )
    if not all((model.path / "tokenizer_config.json").is_file() for model in (source, teacher)):
        return  # Where one of them knows no words, numbers are all that can be compared.
    ours, theirs = (
        tokenizer(model, trust_remote_code=run.trust_remote_code).get_vocab() for model in (source, teacher)
    )
    if ours != theirs:
        word = min(ours.items() ^ theirs.items(), key=lambda entry: (entry[1], entry[0]))[0]
        raise PlanError(
            f"the tokenizers differ: {word!r} is token {ours.get(word, 'none')} of {source.path} and "
            f"{theirs.get(word, 'none')} of teacher {teacher.path}",
            hint,
        )


def same_classes(source: Artifact, teacher: Artifact, run: Run) -> int:
    """How many classes both models know; refuses a teacher whose classes are others.

    Raises:
        PlanError: saying what differs.
    """
    ours, theirs = (
        configuration(model.path, trust_remote_code=run.trust_remote_code).id2label
        for model in (source, teacher)
    )
    if ours != theirs:
        raise PlanError(
            f"the classes differ: {source.path} has {_listed(ours)}, teacher {teacher.path} has "
            f"{_listed(theirs)}",
            "a teacher has to have the student's classes, under the same names (id2label in config.json)",
        )
    return len(ours)


def _listed(classes: dict[int, str]) -> str:
    names = ", ".join(classes[number] for number in sorted(classes)[:3])
    return f"{len(classes)} ({names}{', ...' if len(classes) > 3 else ''})"
