"""Runs lm-evaluation-harness by itself: what its own model gives for each document of tasks, as JSON.

Usage: python lm_eval_samples.py MODEL OUT TASK.yaml...
"""

import json
import sys
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


def main() -> None:
    torch.set_num_threads(1)
    results = simple_evaluate(
        model="hf",
        model_args={"pretrained": sys.argv[1], "dtype": "float32"},
        tasks=sys.argv[3:],
        task_manager=TaskManager(include_defaults=False),
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
    )
    samples = {
        name: [
            {key: row[key] for key in (*row["metrics"], "filtered_resps", "filter")}
            for row in sorted(rows, key=lambda row: row["doc_id"])
        ]
        for name, rows in results["samples"].items()
    }
    Path(sys.argv[2]).write_text(json.dumps({"samples": samples, "results": results["results"]}, default=str))


if __name__ == "__main__":
    main()
