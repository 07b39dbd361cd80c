"""The engine: plan a recipe, run it, resume it, verify what it wrote."""

from compress.engine.analysis import importance, sensitivity
from compress.engine.examination import Finding, examine
from compress.engine.execution import RunResult, execute, run
from compress.engine.inspection import VerificationReport, inspect, verify
from compress.engine.planning import Plan, PlannedStep, plan
from compress.engine.teaching import CachedTeacher, cache_teacher

__all__ = [
    "CachedTeacher",
    "Finding",
    "Plan",
    "PlannedStep",
    "RunResult",
    "VerificationReport",
    "cache_teacher",
    "examine",
    "execute",
    "importance",
    "inspect",
    "plan",
    "run",
    "sensitivity",
    "verify",
]
