"""
What a run's page and --log cost: seconds, and CPU seconds, of what they call, beside those of the steps. To be
started by hand; all flags are train_rl.py's.

    python tests/page_cost.py --stage 2 --steps 20 --eval-every 10 --log tensorboard --out /tmp/cost
"""

import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import run.before_torch  # noqa: F401  must come before torch

import train_rl
from rl import page, samples
from run import logs, processes
from run.launch import run_main

spent = Counter()


def timed(name, call):
    def wrapped(*given, **named):
        began = time.perf_counter(), time.process_time()
        try:
            return call(*given, **named)
        finally:
            spent[name] += time.perf_counter() - began[0]
            spent[f"{name}, CPU"] += time.process_time() - began[1]

    return wrapped


def steps(self, given=processes.Steps.__iter__):
    began = time.perf_counter(), time.process_time()
    yield from given(self)
    spent["steps"] = time.perf_counter() - began[0]
    spent["steps, CPU"] = time.process_time() - began[1]


def opened(given):
    return lambda *rest: timed("--log", given(*rest))


logs.open_tensorboard, logs.open_wandb = map(opened, (logs.open_tensorboard, logs.open_wandb))
samples.Samples.write = timed("samples", samples.Samples.write)
page.write = timed("page", page.write)
processes.Steps.__iter__ = steps
run_main(train_rl.main)
for name, seconds in sorted(spent.items()):
    whole = spent["steps, CPU" if name.endswith("CPU") else "steps"]
    print(f"{name:16} {seconds:9.3f} s  {100 * seconds / whole:7.3f} %")
