"""The verdicts as JUnit XML, which CI systems show beside the tests.

A suite for each judged arm, a case for each gate. CI knows passed, failed and broken, and what it skips
looks green: so UNDECIDED is a failure of its own type, as the command's exit code says too.
"""

from collections.abc import Sequence
from xml.etree import ElementTree

from compress.bench.results import ArmResult, Results
from compress.core.gate import Judgement, Verdict


def junit(results: Results) -> str:
    """The whole document."""
    root = ElementTree.Element("testsuites", name="compress bench")
    for arm in results.arms:
        judgements = [each for each in results.judgements if each.after == arm.name]
        if judgements or arm.faults:
            root.append(_suite(arm, judgements))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _suite(arm: ArmResult, judgements: Sequence[Judgement]) -> ElementTree.Element:
    broken = sum(each.verdict is Verdict.INVALID for each in judgements) + len(arm.faults)
    failed = sum(each.verdict in (Verdict.FAIL, Verdict.UNDECIDED) for each in judgements)
    suite = ElementTree.Element(
        "testsuite",
        name=arm.name,
        tests=str(len(judgements) + len(arm.faults)),
        failures=str(failed),
        errors=str(broken),
    )
    for judgement in judgements:
        case = ElementTree.SubElement(suite, "testcase", classname=judgement.metric, name=judgement.gate)
        against = f"against {judgement.before}: {judgement.explanation}"
        if judgement.verdict is Verdict.PASS:
            ElementTree.SubElement(case, "system-out").text = against
            continue
        kind = "error" if judgement.verdict is Verdict.INVALID else "failure"
        ElementTree.SubElement(case, kind, type=judgement.verdict.value, message=against)
    for fault in arm.faults:
        case = ElementTree.SubElement(suite, "testcase", classname="run", name=fault.stage)
        ElementTree.SubElement(case, "error", type=fault.kind, message=fault.message)
    return suite
