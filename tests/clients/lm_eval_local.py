"""What lm-eval's `local-completions`, as it is on the registry, gets from a server: prints it as JSON.

`lm_eval_local.py URL FOLDER WAYS`: the tasks and the tokenizer are in FOLDER; WAYS is JSON, {way: {"tasks": [...],
"args": {...}}} with lm-eval's own model arguments. Run by tests/test_stock_clients.py in an environment of its own.
"""

import json
import sys

import lm_eval
from lm_eval.tasks import TaskManager


def evaluate(url, manager, tasks, args):
    evaluated = lm_eval.simple_evaluate(
        "local-completions",
        model_args={"model": "tiny", "base_url": f"{url}/v1/completions", "max_retries": 1, **args},
        tasks=tasks,
        task_manager=manager,
        bootstrap_iters=0,
    )
    samples = {
        task: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in evaluated["samples"].items()
    }
    return {"results": evaluated["results"], "responses": samples}


url, folder, ways = sys.argv[1:]
manager = TaskManager(include_path=folder, include_defaults=False)
print(json.dumps({way: evaluate(url, manager, **asked) for way, asked in json.loads(ways).items()}))
