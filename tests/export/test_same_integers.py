"""One run, four formats: all hold the same integers, scales and zero points."""

from pathlib import Path

import pytest

from compress import engine
from compress.core.artifact import Artifact
from compress.core.passes import Meant
from compress.core.recipe import Recipe, Step
from tests import packed_models

EXPORTS = ("export.gptq", "export.awq", "export.gguf")


def meant(folder: Path) -> dict[str, Meant]:
    """What a conversion meant, and its verification found on disk: the digests of values in float32."""
    lineage = Artifact.open(folder).lineage
    assert lineage is not None
    return dict(lineage.tensors)


@pytest.mark.parametrize("symmetric", [True, False])
def test_all_formats_hold_the_same_values(symmetric: bool, tmp_path: Path) -> None:
    source = packed_models.floats("llama-tied", tmp_path / "floats")
    # Up to three times a scale of eight digits has ten, which float16 holds; so GGUF's offsets are exact.
    bits = 4 if symmetric else 2
    rounding = Step(use="quantize.rtn", bits=bits, group_size=32, symmetric=symmetric)
    steps = (rounding,)
    engine.run(Recipe(model=str(source), threads=1, device="cpu", steps=steps), tmp_path / "rtn", single=True)
    found = {}
    for use in EXPORTS:
        if use == "export.awq" and bits != 4:
            continue
        out = tmp_path / use
        recipe = Recipe(model=str(tmp_path / "rtn"), threads=1, device="cpu", steps=(Step(use=use),))
        engine.run(recipe, out, single=True)
        assert engine.verify(out).weights is not None
        found[use] = {name: entry.digest for name, entry in meant(out).items() if entry.changed}
    first, *others = found.values()
    assert len(first) == 14
    assert all(other == first for other in others)
    before = Artifact.open(tmp_path / "rtn").lineage
    assert before is not None
    assert set(first) == {name for name, entry in before.tensors.items() if entry.changed}


def test_a_recipe_rounds_and_converts_in_one_run(tmp_path: Path) -> None:
    source = packed_models.floats("qwen3", tmp_path / "floats")
    steps = (Step(use="quantize.rtn", bits=4, group_size=32), Step(use="export.gguf"))
    result = engine.run(Recipe(model=str(source), threads=1, device="cpu", steps=steps), tmp_path / "run")
    lineage = Artifact.open(result.final).lineage
    assert lineage is not None
    assert [step.use for step in lineage.steps] == ["quantize.rtn", "export.gguf"]
    assert lineage.steps[-1].decisions["types"]["Q4_0"] == 14
    assert lineage.steps[-1].decisions["largest_scale_change"] == 0
