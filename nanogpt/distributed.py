"""The processes of a run: who they are, what they agree on, how they share the work (ddp, fsdp), and stop signals."""

import gc
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from nanogpt import errors
from nanogpt.errors import UserError

# the last three are what batch systems send before the end; Windows has the first two alone
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


def pick_backend(backend, device, world_size=1):
    """The library for collectives: 'auto' is nccl on CUDA where torch has it, else gloo.

    A single process needs none: whichever is asked for, it gets that of 'auto'.
    """
    if backend not in ("auto", "nccl", "gloo", "mpi"):
        raise UserError(f"--backend={backend}: takes auto, nccl, gloo or mpi")
    on_cuda = device.startswith("cuda")
    if backend == "auto" or world_size == 1:
        return "nccl" if on_cuda and dist.is_available() and dist.is_nccl_available() else "gloo"
    if backend == "nccl" and not on_cuda:
        raise UserError(f"--backend=nccl works on CUDA devices only, and this run is on {device}: use --backend=gloo")
    return backend


def share_evenly(gradient_accumulation_steps, world_size):
    """How many of an iteration's micro-batches each of `world_size` processes computes."""
    if gradient_accumulation_steps < 1 or gradient_accumulation_steps % world_size:
        wanted = f"at least 1, and a multiple of the number of processes, {world_size}"
        raise UserError(f"--gradient_accumulation_steps={gradient_accumulation_steps}: must be {wanted}")
    return gradient_accumulation_steps // world_size


class Processes:
    """This process among those of the run, as torchrun's environment variables say; without torchrun it is alone."""

    def __init__(self):
        self.several = "RANK" in os.environ
        self.rank = int(os.getenv("RANK", 0))
        self.local_rank = int(os.getenv("LOCAL_RANK", 0))
        self.world_size = int(os.getenv("WORLD_SIZE", 1))
        self.local_world_size = int(os.getenv("LOCAL_WORLD_SIZE", 1))
        self.hosts = self.exchange = None
        self.listens, self.exit_code, self.output_error = False, 0, None

    def say(self, *lines):
        """Prints lines on rank 0 only, and at once, so that a log file shows where the run is; None is left out.

        If stdout fails (`| tee` has died, a disk is full), the run is asked to stop, and saves its state first. Before
        listen() there is nothing to save: OSError.
        """
        try:
            for line in lines if self.rank == 0 else ():
                if line:
                    print(line, flush=True)
        except OSError as error:
            errors.drop_output()
            self.output_error = f"standard output cannot be written any more ({error.strerror})"
            if not self.listens:
                raise OSError(self.output_error) from None
            self.exit_code = self.exit_code or 1

    def own_device(self, device):
        """The device of this process. With several processes on CUDA, local rank r takes cuda:r."""
        if self.several and device == "mps":
            raise UserError("several processes work on CUDA devices and CPUs, not on mps: add --device=cpu")
        if self.several and device.startswith("cuda"):
            if self.local_world_size > torch.cuda.device_count():
                raise UserError(f"{self.local_world_size} processes for {torch.cuda.device_count()} GPUs on a machine")
            return f"cuda:{self.local_rank}"
        return device

    def join(self, backend, device):
        """Connects to the other processes, in two groups: one for gradients, over the backend that pick_backend() has
        for `device`, and one over gloo for messages of hosts. Returns the backend."""
        backend = pick_backend(backend, device, self.world_size)
        if self.several:
            store = self._store_of_this_start()
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size)
            sys.excepthook = errors.report  # torch has put one in front of it that loses its output
            # a timeout of one day: the other processes wait in this group while rank 0 saves a large model
            self.hosts = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        return backend

    def _store_of_this_start(self):
        """torchrun's store under a prefix drawn for this start of the processes; None where the store is not shared.

        The store outlives a restart, and connecting to a dead process's address in it would hang. So rank 0 draws the
        prefix, and answers each rank that asks with a number drawn for this start.
        """
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return None
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(minutes=10))  # of each get() below
        prefix = drawn = os.urandom(8).hex()
        if self.rank > 0:
            store.set(f"rank {self.rank} asks", drawn)
            prefix = store.get(f"answer to {drawn}").decode()  # waits for it
            store.set(f"rank {self.rank} knows {prefix}", "")
        for rank in range(1, self.world_size) if self.rank == 0 else ():
            while not store.check([f"rank {rank} knows {prefix}"]):
                # a dead process may have asked; the new one asks again
                store.set("answer to " + store.get(f"rank {rank} asks").decode(), prefix)
                time.sleep(0.01)
        return dist.PrefixStore(prefix, store)

    # what the processes agree on

    def largest(self, number):
        """The largest of what the processes call this with, numbers or flags."""
        if not self.several:
            return number
        flag = torch.tensor(int(number))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.hosts)
        return flag.item()

    def add_up(self, tensor):
        """Replaces `tensor` on every process by the sum over all of them."""
        if self.several:
            dist.all_reduce(tensor)

    def gather(self, thing):
        """The list of what each process calls this with, on rank 0; None on the others."""
        if not self.several:
            return [thing]
        things = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(thing, things, group=self.hosts)
        return things

    def wait(self):
        """Waits until every process is here."""
        if self.several:
            dist.barrier(self.hosts)

    # the model on several devices

    def check_sharding(self, sharding, optimizer, dtype):
        """UserError where fsdp does not work."""
        if sharding == "fsdp" and (optimizer == "muon" or dtype == "float16" or not self.several):
            raise UserError("--sharding=fsdp works under torchrun, with --optimizer=adamw, not with --dtype=float16")

    def shard(self, model, sharding, device_type):
        """With fsdp, splits the weights of `model` over the processes, in place."""
        if sharding != "fsdp":
            return
        from torch.distributed.device_mesh import init_device_mesh  # half a second, which other runs need not wait
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device_type, (self.world_size,))  # without it torch takes the GPU it was built for
        for parameter in model.parameters():  # each process drew other weights: all take rank 0's
            dist.broadcast(parameter.data, src=0)
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def wrap_ddp(self, model, sharding):
        """The model to train. With ddp it is `model` in a wrapper that averages gradients, else `model` itself."""
        if not self.several or sharding != "ddp":
            return model
        from torch.nn.parallel import DistributedDataParallel as DDP

        return DDP(model, gradient_as_bucket_view=True)  # a view: each gradient exists once

    def set_gradient_sync(self, train_model, last_micro_step):
        """Has the next backward pass average gradients over the processes only if it is the iteration's last."""
        if hasattr(train_model, "require_backward_grad_sync"):  # ddp
            train_model.require_backward_grad_sync = last_micro_step
        elif hasattr(train_model, "set_requires_gradient_sync"):  # fsdp
            train_model.set_requires_gradient_sync(last_micro_step)

    # stopping and leaving

    def listen(self):
        """From here on each of STOP_SIGNALS asks the run to stop. A second SIGINT ends this process at once.

        A signal that was ignored when the run started stays ignored, as nohup and background jobs want it."""
        self.listens = True
        for number in [number for number in signal.Signals if number.name in STOP_SIGNALS]:
            found = signal.getsignal(number)
            if found in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, self._note)
                errors.at_the_end.callback(signal.signal, number, found)

    def _note(self, number, frame):
        if number == signal.SIGINT and self.exit_code > 128:
            os._exit(128 + number)  # an exception may be swallowed, where a destructor is running
        self.exit_code = 128 + number  # as a shell has it

    def asked_to_stop(self):
        """The exit code with which to stop, or 0; among several processes the same on all of them at the same call.

        Each call starts an exchange that the next one reads, so that no process waits for the network.
        """
        if not self.several:
            return self.exit_code
        agreed = 0
        if self.exchange:
            self.exchange.wait()
            agreed = self.agreeing.item()
        self.agreeing = torch.tensor(self.exit_code)
        self.exchange = dist.all_reduce(self.agreeing, dist.ReduceOp.MAX, group=self.hosts, async_op=True)
        return agreed

    def leave(self):
        """Disconnects from the other processes. If the run was asked to stop, exits with 128 + the signal's number.

        Drop every reference to a DDP or FSDP model before: otherwise gloo aborts at exit."""
        if self.several:
            if self.exchange:
                self.exchange.wait()
            gc.collect()
            dist.destroy_process_group()
        errors.at_the_end.close()
        if self.exit_code == 1:
            raise OSError(f"{self.output_error}: the run has stopped, its state saved")
        if self.exit_code:
            sys.exit(self.exit_code)


def full_state(state, keep=True):
    """`state`, a tensor or dicts of tensors, with each sharded tensor (DTensor) gathered on the CPU. All ranks call it.

    Without `keep` None stands in for the gathered ones, so that this process holds only one of them at a time.
    """
    if isinstance(state, dict):
        return {key: full_state(value, keep) for key, value in state.items()}
    if hasattr(state, "full_tensor"):
        full = state.full_tensor()
        return full.cpu() if keep else None
    return state


def like(full, tensor):
    """The tensor `full`, sharded as `tensor` is where that is a DTensor. All ranks call it."""
    if not hasattr(tensor, "device_mesh"):
        return full
    from torch.distributed.tensor import distribute_tensor  # half a second, which other runs need not wait

    return distribute_tensor(full, tensor.device_mesh, tensor.placements)
