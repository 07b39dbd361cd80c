"""What a teacher must be for a student to learn from it, told before anything is loaded."""

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.facts import Fact
from compress.core.passes import name_of
from compress.core.run import Run
from compress.models.load import tokenizer
from compress.models.positions import positions
from compress.models.tasks import TextGeneration, resolve
from compress.training.trainer import Trainer

_RUNS = "compressed-tensors"
"""Quantized models that stock transformers runs without another package."""


def teacher_of(method: Trainer, option: str, source: Artifact, run: Run) -> Artifact:
    """The model that an option names, after what can be refused from configurations alone.

    Args:
        method: with the numbers of the training.
        option: the field that names the teacher.
        source: the student.

    Raises:
        PlanError: no text, another task than writing text, a teacher that cannot be run, or windows longer
            than one of the models takes.
    """
    use = name_of(method)
    if run.training is None:
        raise PlanError(f"{use} needs training text", "give --train TEXT or data.train")
    if not isinstance(resolve(run.task, source.config), TextGeneration):
        raise PlanError(
            f"{use} trains models that write text, and {source.path} is made for something else",
            "leave it out of the recipe, or start from a causal language model",
        )
    if option not in run.models:
        raise PlanError(
            f"the {option} of {use} is not at hand", f"hand its folder over in Run.models['{option}']"
        )
    teacher = Artifact.open(run.models[option])
    check_teacher(teacher)
    for model in (source, teacher):
        check_room(model, method.window)
    return teacher


def check_teacher(teacher: Artifact) -> None:
    """Refuse a model that cannot teach, whoever the student is.

    Raises:
        PlanError: it writes no text, or cannot be run here.
    """
    if Fact.TRANSFORMERS not in teacher.facts:
        raise PlanError(f"teacher {teacher.path} is no transformers model", "give a model folder or a hub id")
    if not isinstance(resolve("auto", teacher.config), TextGeneration):
        raise PlanError(f"teacher {teacher.path} is no causal language model", "give one that is")
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
