"""What a teacher must be for a student to learn from it, told before anything is loaded."""

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.facts import Fact
from compress.core.passes import name_of
from compress.core.run import Run
from compress.models.load import configuration, skeleton, tokenizer
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
        titles = [f"{'an' if each.title[0] in 'aeiou' else 'a'} {each.title}" for each in tasks]
        wanted = " or ".join(filter(None, (", ".join(titles[:-1]), titles[-1])))
        raise PlanError(
            f"{use} trains {wanted}, and {source.path} is another kind of model: {task.title}",
            f"leave it out of the recipe, or start from {wanted}",
        )
    if option not in run.models:
        raise PlanError(
            f"the {option} of {use} is not at hand", f"hand its folder over in Run.models['{option}']"
        )
    teacher = Artifact.open(run.models[option])
    check_teacher(teacher, type(task))
    for model in (source, teacher):
        check_room(model, method.window)
    return teacher


def check_teacher(teacher: Artifact, task: type[Task] = TextGeneration) -> None:
    """Refuse a model that cannot teach, whoever the student is.

    Raises:
        PlanError: it is made for another task, or cannot be run here.
    """
    if Fact.TRANSFORMERS not in teacher.facts:
        raise PlanError(f"teacher {teacher.path} is no transformers model", "give a model folder or a hub id")
    if not isinstance(resolve("auto", teacher.config), task):
        raise PlanError(f"teacher {teacher.path} is no {task.title}", "give one that is")
    quantization = teacher.config.get("quantization_config") or {}
    kind = quantization.get("quant_method", _RUNS)
    if kind != _RUNS:
        raise PlanError(
            f"teacher {teacher.path} is a '{kind}' model, which cannot be run here",
            f"give the float model, or one in the format {_RUNS}",
        )


def check_room(model: Artifact, window: int) -> None:
    """Refuse windows that a model has no positions for.

    Raises:
        PlanError: saying how many it has.
    """
    room = positions(model.config)
    if room is not None and window > room:
        raise PlanError(
            f"windows of {window} tokens are longer than the {room} positions of {model.path}",
            f"set window to at most {room} (--window {room})",
        )


def same_vocabulary(source: Artifact, teacher: Artifact, sizes: tuple[int, int], run: Run) -> int:
    """Refuse a teacher whose token numbers mean other tokens than the student's.

    Args:
        sizes: logits of a position, of student and teacher. Tables of one tokenizer may be padded
            differently.

    Returns:
        tokens that can be compared: all where the tables are of one size, else those that the tokenizer has.

    Raises:
        PlanError: saying what differs.
    """
    hint = (
        "give another model of the same family, or compare across tokenizers: --vocabulary aligned or uld, "
        "where the method has it"
    )
    if not all((model.path / "tokenizer_config.json").is_file() for model in (source, teacher)):
        if sizes[0] == sizes[1]:
            return sizes[0]  # Where one of them knows no words, numbers are all that can be compared.
        raise PlanError(
            f"the vocabularies differ: {source.path} has {sizes[0]:,} tokens, "
            f"teacher {teacher.path} has {sizes[1]:,}, and one of them has no tokenizer to say which are the "
            "same",
            "put the tokenizer's files into both folders, or give another model of the same family",
        )
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
    if sizes[0] == sizes[1]:
        return sizes[0]
    count = 1 + int(max(ours.values()))
    if count > min(sizes):
        shorter = source if sizes[0] < sizes[1] else teacher
        raise PlanError(
            f"the tokenizer has {count:,} tokens, and {shorter.path} has rows for {min(sizes):,} of them",
            "does the tokenizer belong to the model?",
        )
    return count


def tables(source: Artifact, teacher: Artifact, task: Task, run: Run) -> tuple[int, int]:
    """Rows of the embeddings of student and teacher."""
    models = (
        skeleton(model, task=task.name, trust_remote_code=run.trust_remote_code)
        for model in (source, teacher)
    )
    ours, theirs = (int(model.get_input_embeddings().weight.shape[0]) for model in models)
    return ours, theirs


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
