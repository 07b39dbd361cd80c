"""Runs inside lm-evaluation-harness's environment: its answers to suites in JSON lines, as JSON.

Usage: python lm_eval_answers.py MODEL OUT SUITE.jsonl...
"""

import json
import sys
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM


def task_of(file: Path) -> dict:
    with file.open(encoding="utf-8") as stream:
        keys = set(json.loads(stream.readline()))
    common = {
        "task": file.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
    }
    if "choices" in keys:
        return {
            **common,
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
        }
    return {
        **common,
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
        "metric_list": [{"metric": name} for name in ("perplexity", "acc")],
    }


def main() -> None:
    torch.set_num_threads(1)
    model = HFLM(pretrained=sys.argv[1], device="cpu", dtype="float32", batch_size=8)
    results = simple_evaluate(
        model, tasks=[task_of(Path(name)) for name in sys.argv[3:]], log_samples=True, bootstrap_iters=0
    )
    answers = {
        name: [
            {
                "nats": [response[0] for response in sample["filtered_resps"]],
                "greedy": [response[1] for response in sample["filtered_resps"]],
                **{key: sample[key] for key in ("acc", "acc_norm", "acc_bytes") if key in sample},
            }
            for sample in sorted(samples, key=lambda sample: sample["doc_id"])
        ]
        for name, samples in results["samples"].items()
    }
    scores = {
        name: {key: value for key, value in row.items() if isinstance(value, float)}
        for name, row in results["results"].items()
    }
    Path(sys.argv[2]).write_text(json.dumps({"answers": answers, "scores": scores}))


if __name__ == "__main__":
    main()
