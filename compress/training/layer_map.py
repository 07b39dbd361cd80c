"""Which layer of the teacher each layer of the student learns from."""

from collections.abc import Sequence

from compress.core.errors import PlanError


def layer_pairs(students: int, teachers: int, asked: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Pairs of a layer of the student and one of the teacher, counted from 1, in the student's order.

    Args:
        students, teachers: layers of the two models.
        asked: the teacher's layer for each of the student's, 0 for a layer that learns from none. Empty for
            an even spacing: layer m of M learns from layer ``ceil(m N / M)`` of N, so that the last one
            learns from the last (section 4.1 of TinyBERT, arXiv 1909.10351, which has whole multiples alone).

    Raises:
        PlanError: as many entries as there are layers were not given, an entry is no layer, or none is left.
    """
    if not asked:
        # Whole numbers: a ceiling of a quotient of floats may be one too high.
        return tuple((layer, -(-layer * teachers // students)) for layer in range(1, students + 1))
    if len(asked) != students:
        raise PlanError(
            f"the layer map has {len(asked)} entries, and the student has {students} layers",
            "give the teacher's layer for each layer of the student in order, 0 where it learns from none",
        )
    for entry in asked:
        if not 0 <= entry <= teachers:
            raise PlanError(
                f"the layer map names layer {entry} of the teacher, which has {teachers}",
                "layers are counted from 1; 0 stands for none",
            )
    pairs = tuple((layer, entry) for layer, entry in enumerate(asked, start=1) if entry)
    if not pairs:
        raise PlanError("the layer map has no layer to learn from", "give at least one that is not 0")
    return pairs
