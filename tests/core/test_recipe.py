"""Recipes: read, changed, written, and refused in the words of the person who wrote them."""

from pathlib import Path

import jsonschema
import pytest
import yaml

from compress.core.bench import Bench
from compress.core.errors import UsageError
from compress.core.passes import find
from compress.core.recipe import Data, Recipe, Step, schema

FULL = """\
version: 1
model: some/folder
seed: 7
data: {calibration: a.txt, eval: b.txt.gz, samples: 16}
steps:
  - use: quantize.rtn
    bits: 3
    group_size: channel
    overrides:
      - {match: "*.down_proj", bits: 8}
bench:
  runtimes: [torch-eager]
gates:
  - {metric: size.bytes, test: bound, at_most: 50%}
"""


def complaint(text: str, *settings: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        Recipe.from_yaml(text, source="some.yaml", settings=settings)
    return caught.value


def test_settings_of_the_bench_lie_beside_its_runtimes() -> None:
    recipe = Recipe.from_yaml(FULL.replace("runtimes: [torch-eager]", "launches: 5"))
    assert recipe.bench == Bench(launches=5)
    error = complaint(FULL.replace("runtimes: [torch-eager]", "lanches: 5"))
    assert "unknown key 'bench.lanches'" in error.message
    assert "launches" in (error.hint or "")


def test_the_bench_takes_from_the_run_what_it_leaves_open() -> None:
    recipe = Recipe.from_yaml(FULL, settings=["threads=1", "bench.seed=3", "trust_remote_code=true"])
    assert recipe.experiment == Bench(threads=1, seed=3, trust_remote_code=True)
    assert recipe.model_copy(update={"bench": None}).experiment is None


def test_a_full_recipe_is_read() -> None:
    recipe = Recipe.from_yaml(FULL)
    assert recipe.data == Data(calibration="a.txt", eval="b.txt.gz", samples=16)
    assert recipe.steps[0].built() == find("quantize.rtn")(
        bits=3, group_size="channel", overrides=({"match": "*.down_proj", "bits": 8},)
    )
    assert recipe.bench is not None
    assert [str(gate) for gate in recipe.gates] == ["size.bytes at most 50% of BEFORE"]


def test_dumping_is_canonical_and_loses_nothing() -> None:
    recipe = Recipe.from_yaml(FULL)
    text = recipe.dump()
    again = Recipe.from_yaml(text)
    assert again.dump() == text
    assert again.steps[0].built() == recipe.steps[0].built()
    assert again.model_dump(exclude={"steps"}) == recipe.model_dump(exclude={"steps"})


def test_two_ways_to_say_the_same_dump_the_same() -> None:
    short = Recipe.from_yaml("model: m\nsteps: [{use: quantize.rtn}]")
    long = Recipe.from_yaml("steps: [{use: quantize.rtn, bits: 4}]\nmodel: m\nseed: 0\nversion: 1")
    assert short.dump() == long.dump()


def test_a_dumped_recipe_spells_out_every_option() -> None:
    step = yaml.safe_load(Recipe.from_yaml(FULL).dump())["steps"][0]
    assert set(step) >= {"use", "bits", "group_size", "symmetric"}


def test_a_step_is_made_from_a_pass() -> None:
    method = find("quantize.rtn")(bits=2)
    assert Step.of(method) == Step.model_validate({"use": "quantize.rtn", "bits": 2})
    assert Step.of(method).built() == method


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("steps.0.bits=3", ("steps", 0, "bits"), 3),
        ("steps.0.group_size=channel", ("steps", 0, "group_size"), "channel"),
        ("steps.0.symmetric=false", ("steps", 0, "symmetric"), False),
        ("steps.0.ignore=[lm_head]", ("steps", 0, "ignore"), ["lm_head"]),
        ("data.calibration=../x=y.txt", ("data", "calibration"), "../x=y.txt"),
        ("data.samples=32", ("data", "samples"), 32),
        ("model=other", ("model",), "other"),
        ("threads=2", ("threads",), 2),
        ("gates.0.at_most=40%", ("gates", 0, "at_most"), "40%"),
    ],
)
def test_a_setting_changes_one_entry(setting: str, path: tuple[str | int, ...], value: object) -> None:
    changed = yaml.safe_load(Recipe.from_yaml(FULL).with_settings([setting]).dump())
    found = changed
    for part in path:
        found = found[part]
    assert found == value
    container = changed
    for part in path[:-1]:
        container = container[part]
    original = yaml.safe_load(Recipe.from_yaml(FULL).dump())
    twin = original
    for part in path[:-1]:
        twin = twin[part]
    twin[path[-1]] = value
    assert changed == original


def test_a_setting_may_take_something_away() -> None:
    assert Recipe.from_yaml(FULL).with_settings(["bench=null"]).bench is None


def test_a_setting_makes_what_is_not_there() -> None:
    recipe = Recipe.from_yaml("model: m\nsteps: [{use: quantize.rtn}]")
    assert recipe.with_settings(["data.eval=x.txt"]).data.eval == "x.txt"


def test_settings_come_before_the_check_so_that_a_file_may_leave_things_open() -> None:
    text = "steps: [{use: quantize.rtn}]"
    assert Recipe.from_yaml(text, settings=["model=m"]).model == "m"


@pytest.mark.parametrize(
    ("setting", "message", "hint"),
    [
        ("stepz.0.bits=3", "unknown key 'stepz'", "did you mean 'steps'?"),
        ("steps.0.bit=3", "unknown key 'bit'", "did you mean 'bits'?"),
        ("data.calibratoin=x", "unknown key 'calibratoin'", "did you mean 'calibration'?"),
        ("steps.1.bits=3", "'steps' has 1 entry, numbered from 0", "got 1"),
        ("steps.first.bits=3", "'steps' is a list, expected a number, got 'first'", ""),
        ("steps.0.bits.x=3", "'steps.0.bits' is 3, which has no 'x'", ""),
        ("steps.0.bits", "is not PATH=VALUE", "write, say, --set steps.0.bits=3"),
        ("=3", "is not PATH=VALUE", "write, say, --set steps.0.bits=3"),
        ("steps.0.bits=7", "steps.0: quantize.rtn: bits: Input should be 2, 3, 4, 5, 6 or 8; got 7", ""),
        ("data.samples=0", "data.samples: Input should be greater than 0; got 0", ""),
        ("data.calibration=[", "setting 'data.calibration':1: not YAML", "check the indentation"),
    ],
)
def test_a_wrong_setting_is_refused(setting: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_yaml(FULL).with_settings([setting])
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            "model: m\nsteps:\n - use: quantize.rtn\n   bit: 3",
            "some.yaml:3: steps.0: quantize.rtn: unknown option 'bit'",
            "'bits'",
        ),
        (
            "model: m\nsteps:\n - use: quantize.rtm",
            "some.yaml:3: steps.0: unknown method 'quantize.rtm'",
            "'quantize.rtn'",
        ),
        ("model: m\nsteps:\n - {bits: 3}", "some.yaml:3: steps.0.use: Field required", ""),
        ("model: m\nstep: []", "some.yaml:2: unknown key 'step'", "did you mean 'steps'?"),
        (
            "model: m\ndata:\n  sample: 3\nsteps: [{use: quantize.rtn}]",
            "some.yaml:3: unknown key 'data.sample'",
            "'samples'",
        ),
        (
            "model: m\nsteps: [{use: quantize.rtn}]\ngates:\n - {metrc: x}",
            "unknown key 'gates.0.metrc'",
            "'metric'",
        ),
        ("steps: [{use: quantize.rtn}]", "some.yaml: the recipe names no model", "--model MODEL"),
        ("model: m\nsteps: []", "steps: Tuple should have at least 1 item", ""),
        ("model: m", "some.yaml: steps: Field required", ""),
        (
            "model: m\nversion: 2\nsteps: [{use: quantize.rtn}]",
            "some.yaml:2: version: Input should be 1; got 2",
            "",
        ),
        (
            "model: m\ndevice: gpu\nsteps: [{use: quantize.rtn}]",
            "device: Input should be 'auto', 'cpu' or 'cuda'",
            "",
        ),
        ("model: m\nmodel: n", "some.yaml:2: not YAML: the key 'model' is given twice", ""),
        ("model: [m\nsteps: x", "some.yaml:2: not YAML", ""),
        ("model: m\n\tsteps: x", "some.yaml:2: not YAML", ""),
        ("- use: quantize.rtn", "some.yaml: a recipe is a mapping, got list", ""),
        ("model: !!python/object/apply:os.system [ls]", "some.yaml:1: not YAML", ""),
        ("", "some.yaml: the recipe names no model", ""),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_line(text: str, message: str, hint: str) -> None:
    error = complaint(text)
    assert message in error.message
    assert hint in error.hint


def test_a_missing_file_and_a_binary_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no recipe at"):
        Recipe.load(tmp_path / "absent.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        Recipe.load(binary)


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Recipe.from_yaml(FULL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


def test_the_schema_is_a_schema_and_takes_what_the_reader_takes() -> None:
    document = schema()
    jsonschema.Draft202012Validator.check_schema(document)
    validator = jsonschema.Draft202012Validator(document)
    validator.validate(yaml.safe_load(FULL))
    validator.validate(yaml.safe_load(Recipe.from_yaml(FULL).dump()))


@pytest.mark.parametrize(
    "text",
    [
        "model: m\nsteps: [{use: quantize.rtm}]",
        "model: m\nsteps: [{use: quantize.rtn, bit: 3}]",
        "model: m\nsteps: [{use: quantize.rtn, bits: 7}]",
        "model: m\nsteps: [{bits: 4}]",
        "model: m\nsteps: []",
        "steps: [{use: quantize.rtn}]",
        "model: m\nsteps: [{use: quantize.rtn}]\nspeed: 3",
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(text: str) -> None:
    assert not jsonschema.Draft202012Validator(schema()).is_valid(yaml.safe_load(text))
    complaint(text)
