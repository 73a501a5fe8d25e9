"""What collectives say: a process that is gone, or a failure of their own."""

import pytest
import torch

from nanogpt.errors import machine_failure

GONE = "another process is gone or cannot be reached: "
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:317, {}, NCCL version 2.27.3\n{}\nLast error:\n{}"


def nccl(kind, meaning, last):
    return NCCL.format(kind, meaning, last)


OWN = {
    "a torch without it": (
        "Distributed package doesn't have NCCL built in",
        ["Distributed package doesn't have NCCL built in"],
    ),
    "without MPI": (
        "Distributed package doesn't have MPI built in. MPI is only included if you build PyTorch from source",
        ["MPI built in"],
    ),
    "two ranks on a GPU": (
        nccl("invalid usage (run with NCCL_DEBUG=WARN for details)",
             "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
             "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"),
        ["invalid usage", "Last error: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"],
    ),
    "the driver": (
        nccl("unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
             "ncclUnhandledCudaError: Call to CUDA function failed.",
             "Cuda failure 'CUDA driver version is insufficient for CUDA runtime version'"),
        ["unhandled cuda error", "Last error: Cuda failure 'CUDA driver version is insufficient"],
    ),
    "no such interface": (
        "[enforce fail at ../third_party/gloo/gloo/transport/tcp/device.cc:84] ifa != nullptr. "
        "Unable to find address for: eth9",
        ["Unable to find address for: eth9"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("text, said", OWN.values(), ids=OWN.keys())
def test_a_failure_of_the_library_itself_is_no_process_that_is_gone(text, said):
    line = machine_failure(RuntimeError(text))
    assert "another process" not in line and all(part in line for part in said), line


LOST = [
    nccl("remote process exited or there was a network error",
         "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
         "socketProgress: Connection closed by remote peer node1<40000>"),
    nccl("unhandled system error (run with NCCL_DEBUG=INFO for details)",
         "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.",
         "socketStartConnect: Connect to 10.0.0.1<44000> failed : Connection refused"),
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 600029 ms",
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:40286",
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Read error [127.0.0.1]:21022: Connection reset by peer",
    "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms for recv operation",
    "Gloo connectFullMesh failed with [../third_party/gloo/gloo/transport/tcp/pair.cc:144] no error",
    "Application timeout caused pair closure (gloo)",
    "Connection reset by peer",
]  # fmt: skip


@pytest.mark.parametrize("text", LOST)
def test_a_process_that_is_gone_is_said_with_its_cause(text):
    line = machine_failure(RuntimeError(text))
    assert line.startswith(GONE + text.splitlines()[0])
    assert text.splitlines()[-1] in line


def test_torchs_own_class_of_such_errors_is_no_bug_whatever_its_words():
    taken = "The server socket has failed to listen on any local network address. port: 29500, name: EADDRINUSE"
    assert machine_failure(torch.distributed.DistError(taken)) == taken
    late = "The client socket has timed out after 60000ms while trying to connect to (10.0.0.1, 29500)."
    assert machine_failure(torch.distributed.DistError(late)) == GONE + late


def test_other_runtime_errors_are_bugs():
    assert machine_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert machine_failure(RuntimeError("the computation timed out")) is None
