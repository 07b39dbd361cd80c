"""The table of methods as Markdown, from the report's own numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from tables import failures_section, percent, presets_section

Part = Mapping[str, Any]


def render(report: Mapping[str, Any]) -> str:
    """The whole page."""
    machine, settings = report["machine"], report["settings"]
    lines = [
        "# Quantization beside the peers",
        "",
        "Every program calibrates on the same saved tokens, in an environment of its own, with the settings "
        "that it has when nobody changes them. Its weights are read from what it saved and scored by one "
        "scorer, in float32, on text that no program has seen.",
        "",
        f"Seconds are processor time, {settings['threads']} thread(s), median of the draws: of the "
        "quantization alone, and of the process that loads, quantizes and saves. Memory is the peak of that "
        f"process. Machine: {machine['cores']} cores {machine['processor']}, no accelerator.",
        "",
        *verdict_summary(report["models"]),
    ]
    for part in report["models"]:
        lines += [*model_heading(part), ""]
        for scheme in dict.fromkeys((arm["bits"], arm["group_size"]) for arm in part["arms"]):
            lines += scheme_section(part, *scheme)
        lines += failures_section(part["did_not_run"])
    arms = [arm for part in report["models"] for arm in part["arms"]]
    return "\n".join([*lines, *presets_section(arms)]) + "\n"


def verdict_summary(parts: Sequence[Part]) -> list[str]:
    """How many comparisons of each question were won."""
    lines = ["| question | model | PASS | UNDECIDED | FAIL |", "|---|---|---|---|---|"]
    for question, asked in (
        ("best", "our best method beats the best peer (W3 and W2), is no worse (W4)"),
        ("same method", "ours is no worse than the peer's own version of the method"),
    ):
        for part in parts:
            found = [item["verdict"] for item in part["verdicts"] if item["question"] == question]
            counts = " | ".join(str(found.count(each)) for each in ("PASS", "UNDECIDED", "FAIL"))
            lines.append(f"| {asked} | {part['model']} | {counts} |")
    return [*lines, ""]


def model_heading(part: Part) -> list[str]:
    """What was measured on one model."""
    clusters = (
        "each a cluster of joined stories"
        if part["packed"]
        else f"of {part['clusters']} documents, as many of each"
    )
    if part["measure"] == "KL":
        measured = (
            "KL(base || quantized) in nats a token; perplexity of the text (base "
            f"{math.exp(part['base_loss']):.3f})"
        )
    else:
        measured = (
            "An encoder has no probabilities: 1 less the cosine of a window's embedding (its mean state) "
            "with the base's, in thousandths, and the squared error of its states relative to their squares"
        )
    return [
        f"## {part['model']}",
        "",
        f"Calibrated on {part['calibration']}; scored on {part['windows']} windows of {part['length']} "
        f"tokens of `{part['text']}`, {clusters}. {measured}.",
    ]


def scheme_section(part: Part, bits: int, group_size: int) -> list[str]:
    """The arms of one scheme from the best to the worst, and its comparisons."""
    text = part["measure"] == "KL"
    first, second = ("KL", "perplexity") if text else ("1 - cosine, 1e-3", "squared error")
    lines = [
        f"### W{bits} g{group_size}",
        "",
        f"| program | method | preset | draws | {first} | lowest to highest draw | {second} "
        "| seconds | process seconds | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    scale = 1.0 if text else 1000.0
    arms = [arm for arm in part["arms"] if (arm["bits"], arm["group_size"]) == (bits, group_size)]
    for arm in sorted(arms, key=lambda arm: float(arm["divergence"])):
        draws = [scale * value for value in arm["divergence_of_each_draw"]]
        loss = f"{math.exp(arm['loss']):.3f}" if text else f"{arm['loss']:.5f}"
        free = arm["seeds"] == [None]
        grid = "" if arm["symmetric"] else ", asymmetric"
        lines.append(
            f"| {arm['program']} | {arm['method']}{grid} | {arm['preset']} "
            f"| {'no data' if free else len(draws)} | {scale * arm['divergence']:.5f} "
            f"| {'' if free else f'{min(draws):.5f} to {max(draws):.5f}'} | {loss} "
            f"| {numpy.median(arm['quantization_processor_seconds']):.1f} "
            f"| {numpy.median(arm['process_processor_seconds']):.1f} "
            f"| {max(arm['peak_memory_mebibytes']):.0f} |"
        )
    items = [item for item in part["verdicts"] if (item["bits"], item["group_size"]) == (bits, group_size)]
    if items:
        lines += [
            "",
            "Ours less theirs, relative to theirs. The interval holds 95% and is the widest of three: "
            "windows, documents, or documents and draws resampled.",
            "",
            "| question | ours | theirs | draws | difference | interval | asked | |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for item in items:
        draws_count = "no data" if item["seeds"] == [None] else len(item["seeds"])
        lines.append(
            f"| {item['question']} | {item['ours']} | {item['theirs']} | {draws_count} "
            f"| {percent(item['mean'])} | {percent(item['low'])} to {percent(item['high'])} "
            f"| {item['asked']} | {item['verdict']} |"
        )
    return [*lines, ""]
