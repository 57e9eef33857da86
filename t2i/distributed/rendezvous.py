"""Where the ranks of a job find each other: on one machine at an address that no other machine can reach.

Torch's own store of a job listens on every interface and asks for no password, so whoever reaches its port can write
into it. Ranks on several machines have to use that store; their network must be closed to strangers.
"""

import os
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import default_pg_timeout
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from t2i.distributed.signals import DEEPSPEED, command_of
from t2i.env import taken_port_advice
from t2i.errors import UserError

LOOPBACK = "127.84.50.73" if sys.platform == "linux" else "127.0.0.1"
"""An address of this machine's loopback network. It is t2i's own (84, 50 and 73 spell T2I in ASCII), because DeepSpeed
puts it into the names of its shared memory, and shared_memory.sweep recognises t2i's files by it."""
LOOPBACK_INTERFACE = "lo"
JOB = "t2i's job"
"""Key of the store under which its maker leaves the job's name."""
OWN, ANY = "t2i://", "t2i-env://"
"""Values of torch's init_method: ranks of one machine, and of several."""
MEETING = timedelta(minutes=30)
"""How long a rank waits for the others to start; a collective waits longer, because only one that runs is waited for.
"""


def meeting_place() -> str:
    """Choose torch's init_method for this job, and keep its connections on this machine if all ranks are here."""
    # torchrun's own process holds a store already.
    if not is_on_one_machine() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return ANY
    os.environ["MASTER_ADDR"] = LOOPBACK
    # Gloo listens for the other ranks' data at the address of the host's name, unless told otherwise.
    if LOOPBACK_INTERFACE in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE)
    return OWN


def is_on_one_machine() -> bool:
    """Tell whether all ranks of this job run on this machine."""
    on_this_node = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))
    return os.environ.get("WORLD_SIZE", "1") == on_this_node


def _meet(
    url: str, timeout: timedelta = default_pg_timeout, **_: object
) -> Iterator[tuple[dist.Store, int, int]]:
    """Make this rank's end of the job's store, as torch asks of the handler of an init_method.

    Raises:
        UserError: another job uses the port.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    yield (dist.HashStore() if world_size == 1 else _store(rank, timeout=timeout)), rank, world_size


def _meet_anywhere(
    url: str, timeout: timedelta = default_pg_timeout, **_: object
) -> Iterator[tuple[dist.Store, int, int]]:
    """Meet where the launcher's variables say, by torch's own handler."""
    # torch gives the store the whole timeout afterwards, for what ranks exchange through it later.
    yield from rendezvous("env://", timeout=min(timeout, MEETING))


def _store(rank: int, *, timeout: timedelta) -> dist.Store:
    port = int(os.environ["MASTER_PORT"])
    # Torch takes a socket that listens already, but no address to listen at.
    listener = _listen(port).detach() if rank == 0 else None
    store = dist.TCPStore(
        LOOPBACK,
        port,
        is_master=rank == 0,
        timeout=min(timeout, MEETING),
        wait_for_workers=False,
        master_listen_fd=listener,
    )
    # Two jobs that start at one port at once: a rank of the second must not be taken for one of the first.
    if rank == 0:
        store.set(JOB, _job_name())
    elif store.get(JOB).decode() != _job_name():
        raise UserError(taken_port_advice(port))
    return store


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(taken_port_advice(port)) from error
    return listener


def _job_name() -> str:
    """Name this job; equal on its ranks, and different for another job of this machine where the launcher is known."""
    parent = os.getppid()
    return f"job {parent}" if DEEPSPEED in command_of(parent) else "job"


register_rendezvous_handler(OWN.partition(":")[0], _meet)
register_rendezvous_handler(ANY.partition(":")[0], _meet_anywhere)
