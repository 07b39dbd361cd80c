"""What `compress doctor` finds: the same as the package's own record says."""

import json
from importlib.metadata import metadata

import pytest

from compress.cli.app import main
from compress.core.errors import EnvironmentFault
from compress.engine import examination
from compress.engine.examination import DISTRIBUTION, EXTRAS, examine


def test_every_extra_is_explained_and_no_other() -> None:
    declared = set(metadata(DISTRIBUTION).get_all("Provides-Extra") or ())
    assert set(EXTRAS) == declared - {"dev"}


def test_what_is_required_is_there_and_what_is_not_says_how_to_get_it() -> None:
    found = examine()
    assert {each.state for each in found["packages"]} == {"ok"}
    assert "torch" in {each.subject for each in found["packages"]}
    for each in (each for chapter in found.values() for each in chapter):
        assert each.found
        if each.state == "absent" and each.subject in EXTRAS:
            assert each.remedy == f"pip install '{DISTRIBUTION}[{each.subject}]'"
    assert "torch-eager" in {each.subject for each in found["runtimes"] if each.state == "ok"}


def test_a_package_that_is_too_old_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["numpy>=1000", "hub-thing>=1; extra == 'hub'", "numpy>=1; extra == 'gpu'"]
    monkeypatch.setattr(examination, "requires", lambda _: wanted)
    found = examine()
    assert [(each.subject, each.state) for each in found["packages"]] == [("numpy", "wrong")]
    assert found["packages"][0].remedy == "pip install 'numpy>=1000'"
    states = {each.subject: (each.state, each.found) for each in found["extras"]}
    assert states["hub"] == ("absent", "without hub-thing")
    assert states["gpu"][0] == "ok"
    assert main(["doctor"]) == EnvironmentFault.exit_code
    shown = capsys.readouterr().out
    assert "pip install 'numpy>=1000'" in shown
    assert main(["doctor", "--json"]) == EnvironmentFault.exit_code
    document = json.loads(capsys.readouterr().out)
    assert document["packages"][0]["state"] == "wrong"
