"""
Where the numbers of a step go: metrics.jsonl, and with --log TensorBoard and Weights & Biases too.

Both get every finite number of metrics.jsonl under the same name, and continue the same curves when a
run is resumed.
"""

import json
import math
import uuid

from run import processes
from run.errors import UserError
from run.io import append_json
from run.run_dir import begin_run_dir, exit_stack


class RunLog:
    """
    Opens the logs of a run that starts, or continues after `step`.

    out         folder of the run
    arguments   {flag: value}, vars(args)
    step        0, or the step of the checkpoint that the run continues from
    num_steps   of the whole run
    trackers    some of arguments.TRACKERS
    """

    def __init__(self, out, *, arguments, step, num_steps, trackers):
        self.path = out / "metrics.jsonl"
        self.trackers = []
        begin_run_dir(out, arguments=arguments, step=step, num_steps=num_steps)
        if processes.rank() == 0:
            if "tensorboard" in trackers:
                self.trackers.append(TensorBoard(out, step))
            if "wandb" in trackers:
                self.trackers.append(WandB(out, arguments))

    def write(self, report):
        """Logs the metrics of a step, {name: value}, `step` among them. Only rank 0 writes."""
        if processes.rank():
            return
        append_json(self.path, report)
        scalars = {}
        for name, value in report.items():
            is_number = isinstance(value, (int, float))
            if is_number and math.isfinite(value) and name != "step":
                scalars[name] = value
        for tracker in self.trackers:
            tracker.write(scalars, report["step"])


class TensorBoard:
    def __init__(self, out, step):
        from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

        # readers drop what was logged from purge_step on: those steps run again
        self.writer = SummaryWriter(out / "tensorboard", purge_step=step + 1)
        exit_stack.callback(self.writer.close)

    def write(self, scalars, step):
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        # a killed run continues from a checkpoint: all that was logged before it has to be on disk
        self.writer.flush()


class WandB:
    """OUT/wandb.json holds the run's id and the last step sent: a step that runs again is not resent."""

    def __init__(self, out, arguments):
        import wandb

        self.path = out / "wandb.json"
        self.sent = dict(id=uuid.uuid4().hex[:12], step=0)
        if self.path.exists():
            self.sent = json.loads(self.path.read_text())
        try:
            self.run = wandb.init(
                project="avatar",
                name=out.name,
                id=self.sent["id"],
                dir=out,
                resume="allow",
                config=arguments,
            )
        except wandb.errors.Error as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(
                f"--log wandb: {reason}; without its server: WANDB_MODE=offline"
            ) from None
        exit_stack.callback(self.run.finish)

    def write(self, scalars, step):
        if step > self.sent["step"]:
            self.run.log(scalars, step=step)
            self.sent["step"] = step
            self.path.write_text(json.dumps(self.sent))
