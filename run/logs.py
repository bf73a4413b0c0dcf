"""
Where the numbers of a step go: metrics.jsonl, and with --log TensorBoard and Weights & Biases too.

Both get every finite number of metrics.jsonl under the same name, and on resuming go on in the same curves.
"""

import contextlib
import json
import math
import time
import uuid

from run import page, processes
from run.errors import UserError
from run.io import append_json
from run.run_dir import begin_run_dir, exit_stack

PAGE_FRAC = (
    0.01  # of a run's time that its page may take: that of a very long run is written less often
)


def begin(out, args, step):
    """
    Begins the logs of a run, or goes on after `step`; its page is written at its end.

    returns  callable(dict of a step's metrics, show=False): logs them; with `show` the page is written too
    """
    begin_run_dir(out, args, step)
    if processes.rank():
        return lambda report, show=False: None
    exit_stack.callback(last_page, out)
    openers = dict(tensorboard=open_tensorboard, wandb=open_wandb)
    trackers = [openers[name](out, args, step) for name in dict.fromkeys(args.log)]

    due = 0.0

    def log(report, show=False):
        nonlocal due
        append_json(out / "metrics.jsonl", report)
        numbers = {k: v for k, v in report.items() if isinstance(v, (int, float)) and k != "step"}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        for tracker in trackers:
            tracker(finite, report["step"])
        if show and (began := time.monotonic()) >= due:
            page.write(out)
            due = time.monotonic() + (time.monotonic() - began) / PAGE_FRAC

    return log


def last_page(out):
    with contextlib.suppress(
        OSError
    ):  # what ended the run has been told: its page is no second reason
        page.write(out)


def open_tensorboard(out, args, step):
    from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

    writer = SummaryWriter(out / "tensorboard", purge_step=step + 1)  # readers drop what runs again
    exit_stack.callback(writer.close)

    def log(scalars, step):
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # a killed run goes on from its checkpoint: all before that has to be there

    return log


def open_wandb(out, args, step):
    """OUT/wandb.json holds the run's id there and the last step sent: what runs again is not sent again."""
    import wandb

    path = out / "wandb.json"
    sent = json.loads(path.read_text()) if path.exists() else dict(id=uuid.uuid4().hex[:12], step=0)
    place = dict(project="avatar", name=out.name, id=sent["id"], dir=out, resume="allow")
    try:
        run = wandb.init(config=vars(args), **place)
    except wandb.errors.Error as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--log wandb: {why}; without its server: WANDB_MODE=offline") from None
    exit_stack.callback(run.finish)

    def log(scalars, step):
        if step > sent["step"]:
            run.log(scalars, step=step)
            sent["step"] = step
            path.write_text(json.dumps(sent))

    return log
