"""Results as aligned text."""

from compress.cli.tables import nested_text, plan_text, table


def test_columns_are_aligned_without_trailing_blanks() -> None:
    assert table(("name", "what"), [("a", "x"), ("longer", "")]).splitlines() == [
        "name    what",
        "a       x",
        "longer",
    ]


def test_nested_values_are_indented() -> None:
    document = {
        "path": "x",
        "facts": ["a", "b"],
        "none": None,
        "empty": {},
        "size": {"bytes": 3},
        "lineage": [{"use": "quantize.rtn", "options": {"bits": 4}}, {"use": "b"}],
    }
    assert nested_text(document).splitlines() == [
        "path: x",
        "facts: a, b",
        "none: none",
        "empty: none",
        "size:",
        "  bytes: 3",
        "lineage:",
        "  - use: quantize.rtn",
        "    options:",
        "      bits: 4",
        "  - use: b",
    ]


def test_a_plan_shows_what_is_known_and_a_dash_for_the_rest() -> None:
    rows = [
        {
            "step": "quantize.rtn",
            "target": "out",
            "key": "k",
            "done": False,
            "disk_bytes": 2**20,
            "host_bytes": 2**30,
            "device_bytes": 0,
            "seconds": 90.0,
        },
        {"step": "export.onnx", "target": "out2", "key": None, "done": True},
    ]
    assert plan_text(rows).splitlines() == [
        "step          state  disk     memory   device memory  time        target",
        "quantize.rtn  to do  1.0 MiB  1.0 GiB  0 B            1 min 30 s  out",
        "export.onnx   done   -        -        -              -           out2",
    ]
