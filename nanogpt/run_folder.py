"""out_dir, the folder of a run: locked, resumed from, saved to; and what a resume needs to continue exactly."""

import glob
import os
from datetime import datetime

import torch

from nanogpt import checkpoint
from nanogpt.distributed import full_state
from nanogpt.errors import UserError
from nanogpt.files import lock

RUN_FILES = ("ckpt.pt", "last.pt", "good.pt", "log.csv", "tensorboard")
# where a run computes and what it is for: a resume takes these from its own command
NOT_RESUMED = {"device", "backend", "sharding", "dtype", "compile", "peak_flops", "out_dir", "init_from", "eval_only"}


class RunFolder:
    """Every process calls these methods; only rank 0 writes."""

    def __init__(self, out_dir, processes, read_only):
        if not out_dir:
            raise UserError("--out_dir= is empty: give the folder to write to")
        self.out_dir, self.processes = out_dir, processes
        self.writes = processes.rank == 0 and not read_only
        # Lock out_dir before reading it: another run may be writing. prepare() makes a new folder, once all is checked.
        locked_before = os.path.exists(os.path.join(out_dir, ".lock"))
        self.lock = self._claim() if self.writes and locked_before else None
        self.run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's "none" names no run
        self.loaded_path, self.remarks = None, []  # of what load() has read, and what to tell the user of it

    def _claim(self):
        busy = f"another run is writing to {self.out_dir}: stop it, or choose another --out_dir"
        return lock(self.out_dir, busy)

    def resolve(self, init_from):
        """What a run starts from: "scratch", "resume" (the run in out_dir), a GPT-2's name, or a model's folder.

        When a process dies, torchrun restarts all of them with the same command. They resume from their own
        checkpoint, which has torchrun's run id in it, never from an older run's."""
        largest = self.processes.largest
        restarted = largest(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))  # each machine counts by itself
        may_have_own = self.writes and (restarted or self.run_id != "none")
        if largest(may_have_own and checkpoint.peek(self.out_dir).get("run_id") == self.run_id):
            return "resume"
        if init_from == "auto":
            return "resume" if largest(self.processes.rank == 0 and checkpoint.has_run(self.out_dir)) else "scratch"
        return init_from

    def load(self):
        """The newest checkpoint that is whole; what is wrong with another is in `remarks`."""
        saved, self.loaded_path, self.remarks = checkpoint.load_run(self.out_dir)
        if saved.get("guard", {}).get("went_back") and saved["config"].get("order") == "epoch":
            raise UserError(
                f"{self.loaded_path}: this run went back to an earlier iteration, and its order of windows cannot be "
                f"continued: start a new run from its weights by --init_from={self.out_dir}"
            )
        return saved

    def settings_of(self, saved, device_type):
        """The settings that a resume takes from the checkpoint `saved`; {} in a new run.

        On the same type of device it keeps dtype, compile and attention, because they change the numbers."""
        resumed = {name: value for name, value in saved.get("config", {}).items() if name not in NOT_RESUMED}
        machine = saved.get("machine", {})
        if machine.get("device_type") == device_type:
            resumed |= {"dtype": machine["dtype"], "compile": machine["compile"]}
        elif machine:
            resumed.pop("attention", None)  # another type of device has other kernels
            then, chosen = machine["device_type"], "dtype, compile and attention are chosen anew"
            self.remarks.append(f"the run was on {then}: {chosen} for {device_type}")
        return resumed

    def forget_other_data(self, saved, dataset):
        """Removes from the checkpoint `saved` what belongs to another dataset than `dataset`.

        Losses on two datasets do not compare, so the best val loss is forgotten."""
        before = saved["config"].get("dataset", dataset)
        if before != dataset:
            for name in ("best_val_loss", "best_iter", "best_bpb", "evals_since_best", "data"):
                saved.pop(name, None)
            for point in saved.get("points", []):
                point["batch"] = None
            forgotten = f"the best val loss so far was on {before}: it is forgotten"
            self.remarks.append(f"{forgotten}, and that on {dataset} counts")

    def prepare(self, resumed):
        """Locks out_dir for writing, and moves an earlier run's files aside unless this run has `resumed` from them."""
        if self.writes:
            self.lock = self.lock or self._claim()
            for name in glob.glob("*.tmp", root_dir=self.out_dir):  # what interrupted saves have left
                if name.startswith(RUN_FILES):
                    os.remove(os.path.join(self.out_dir, name))
            moved = None if resumed else move_aside(self.out_dir)
            if moved:
                self.processes.say(f"an earlier run's files were in {self.out_dir}: moved to {moved}")

    def restore_point(self, saved, device, windows):
        """Sets this process's random generators to where `saved` has them, unless that is nanoGPT's, or there is none.

        Returns (batch, evaluated): the (x, y) that the run had drawn already, or None if `windows` draws it again;
        whether its iteration was evaluated. The generator of the windows is seeded again if the run has another seed
        now, or another number of processes, which this says."""
        points, now, generator = saved.get("points"), self.processes.world_size, windows.generator
        if points is None:
            return None, False
        new_seed = windows.seed + self.processes.rank + 1_000_003 * saved["iter_num"]
        if len(points) != now:
            kind = "evaluation batches" if windows.order == "epoch" else "batches"
            self.processes.say(f"the run had {len(points)} processes and has {now} now: from here on other {kind} come")
            generator.manual_seed(new_seed)
            return None, False
        point = points[self.processes.rank]
        restore_generators(point["generators"], device, generator)
        if saved["config"].get("seed", windows.seed) != windows.seed:
            generator.manual_seed(new_seed)
            return None, point["evaluated"]
        fits = point["batch"] and point["batch"][0].shape == (windows.batch_size, windows.block_size)
        again = windows.order == "epoch" or not fits  # in an epoch it follows from the tokens seen
        return None if again else [ids.to(device) for ids in point["batch"]], point["evaluated"]

    def save(self, name, model, optim, scaler, point, config, **facts):
        """Writes out_dir/name: model, optimizer, loss scaler, every process's resume `point`, settings, and `facts`."""
        if name == "ckpt.pt":
            self.processes.say(f"saving checkpoint to {self.out_dir}")
        keep = self.processes.rank == 0
        points = self.processes.gather({**point, "batch": [tokens.cpu() for tokens in point["batch"]]})
        weights, moments = (full_state(part.state_dict(), keep) for part in (model, optim))
        if keep:
            state = {
                "model": weights, "model_args": model.config.as_model_args(), "optimizer": moments,
                "scaler": scaler.state_dict(), "points": points, "run_id": self.run_id, "config": config,
                "machine": {"device_type": torch.device(config["device"]).type, "dtype": config["dtype"],
                            "compile": config["compile"]}, **facts,
            }  # fmt: skip
            checkpoint.save(state, os.path.join(self.out_dir, name))
        self.processes.wait()


def move_aside(out_dir):
    """Moves an earlier run's files into a dated folder inside out_dir. Returns its path, or None if there are none."""
    there = [name for name in RUN_FILES if os.path.exists(os.path.join(out_dir, name))]
    if not there:
        return None
    folder = os.path.join(out_dir, f"{datetime.now():%Y-%m-%d_%H-%M-%S.%f}")
    os.mkdir(folder)
    for name in there:
        os.replace(os.path.join(out_dir, name), os.path.join(folder, name))
    return folder


def resume_point(device, windows, batch, evaluated):
    """What a process needs to go on exactly: the states of the CPU's and the device's global generators and that of
    `windows`, the next `batch`, whether it was `evaluated` here."""
    states = {"cpu": torch.get_rng_state(), "batches": windows.generator.get_state()}
    kind = torch.device(device).type
    if kind != "cpu":
        states[kind] = getattr(torch, kind).get_rng_state()
    return {"generators": states, "batch": batch, "evaluated": evaluated}


def restore_generators(states, device, batches):
    """Sets the generators to the `states` in a resume point, as far as this device has them."""
    kind = torch.device(device).type
    try:
        torch.set_rng_state(states["cpu"])
        if kind != "cpu" and kind in states:
            getattr(torch, kind).set_rng_state(states[kind])
        batches.set_state(states["batches"])
    except (RuntimeError, TypeError, KeyError) as error:
        raise UserError(f"the checkpoint's random generators cannot be restored: {error}") from None
