"""The results file: schema, atomic writing, launches put together."""

import json
from pathlib import Path
from typing import Any

import pytest

from compress.bench.results import Results, merged, schema, write_atomically
from compress.core.errors import DataError, EnvironmentFault
from compress.core.measurement import Measurement


def results(**others: Any) -> Results:
    given: dict[str, Any] = {"command": ("compress",), "task": "text-generation", "text": {}, "options": {}}
    return Results(**{**given, "environment": {}, **others})


def launch(*samples: float) -> dict[str, Any]:
    return Measurement.sampled(samples, summary="geometric-mean", unit="s").model_dump(mode="json")


def test_launches_are_clusters() -> None:
    whole = merged([launch(1.0, 4.0), launch(2.0)])
    assert whole.samples == (1.0, 4.0, 2.0)
    assert whole.clusters == (0, 0, 1)
    assert whole.value == pytest.approx(2.0)
    assert whole.launches == {0, 1}
    assert merged([launch(1.0), launch(2.0)], [4, 7]).clusters == (4, 7)


def test_a_launch_without_a_value_leaves_none() -> None:
    broken = Measurement.missing("NaN", unit="s").model_dump(mode="json")
    assert merged([launch(1.0), broken]).reason == "NaN"


def test_a_launch_that_cannot_be_trusted_keeps_its_samples() -> None:
    doubted = Measurement.model_validate(launch(100.0, 100.0)).doubted("hot").model_dump(mode="json")
    whole = merged([launch(1.0, 4.0), doubted, launch(2.0, 2.0)])
    assert whole.value == pytest.approx(2.0)
    assert whole.samples == (1.0, 4.0, 100.0, 100.0, 2.0, 2.0)
    assert whole.distrust == {1: "hot"}
    assert merged([doubted, doubted]).invalid
    assert merged([doubted]).samples == (100.0, 100.0)
    broken = Measurement.missing("NaN", unit="s").model_dump(mode="json")
    assert merged([doubted, broken]).reason == "NaN"


def test_written_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "results.json"
    results(complete=True).write(file)
    assert Results.read(file) == results(complete=True)
    assert sorted(path.name for path in file.parent.iterdir()) == ["results.json"]
    file.write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(DataError, match="not a results file"):
        Results.read(file)
    with pytest.raises(DataError, match="no results"):
        Results.read(tmp_path / "nothing.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("here")
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        write_atomically(blocked / "results.json", "text")
    assert blocked.read_text() == "here"


def test_the_schema_describes_every_field() -> None:
    document = schema()
    assert set(document["required"]) >= {"command", "task", "text", "options", "environment"}
    for definition in document["$defs"].values():
        for name, field in definition.get("properties", {}).items():
            assert "description" in field, f"{definition['title']}.{name}"
