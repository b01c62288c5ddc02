"""Which processes belong together, as the cluster tells each of them that it has started.

What is asked are JAX's own cluster environments: Open MPI, SLURM, TPU slices of GKE, TPU VMs (their
metadata server) and Kubernetes. On any other machine nothing is looked up, and no network is used.
"""

import contextlib
import importlib.util
import logging
import os
from typing import Iterator, NamedTuple

from jax._src.clusters import ClusterEnv  # private, but the same that jax.distributed asks

from kha_jax.config import ConfigError
from kha_jax.errors import WaitError

log = logging.getLogger("kha_jax")
SLICES = (
    "MEGASCALE_COORDINATOR_ADDRESS",
    "MEGASCALE_NUM_SLICES",
    "MEGASCALE_SLICE_ID",
)
INDEXED_JOB = "JOB_COMPLETION_INDEX"
# What people call JAX's environments, and the variables that they are told by. GKE's are asked
# before the metadata server, which they make needless.
CLUSTERS = {
    "OmpiCluster": ("Open MPI", ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")),
    "SlurmCluster": ("SLURM", ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")),
    "GkeTpuCluster": (
        "GKE",
        ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", *SLICES),
    ),
    "GceTpuCluster": ("the TPU VM's metadata server", ("GCE_METADATA_IP", *SLICES)),
    "K8sCluster": ("Kubernetes", (INDEXED_JOB, "HOSTNAME")),
}
REMEDY = (
    "correct that, name --coordinator_address, --num_processes and --process_id, or say "
    "--num_processes=1 where this process is alone"
)


class Place(NamedTuple):
    """One of `count` processes. cluster: who says so. address: of process 0, HOST:PORT."""

    cluster: str
    address: str
    count: int
    index: int


def place(seconds: int) -> Place | None:
    """This process's place among those that a cluster has started; None where it is alone.

    seconds: how long the name of process 0's host may stay unknown.

    Raises:
        ConfigError: what the cluster tells cannot be; says what was found.
        WaitError: the host of process 0 is not known in time.
    """
    _check_slurm()
    named = {kind.__name__: kind for kind in ClusterEnv._cluster_types}
    for kind in (named[name] for name in CLUSTERS if name in named):
        if kind.__name__ == "K8sCluster" and not _in_indexed_job():
            continue
        with _said(kind):
            if not kind.is_env_present():
                continue
            if _one_host_of_gke(kind) or (count := kind.get_process_count()) == 1:
                return None
            index = kind.get_process_id()
            if not 0 <= index < count:
                raise ValueError(f"process {index} of {count}")
        return Place(_called(kind), _address(kind, seconds), count, index)
    return None


def _called(kind: type[ClusterEnv]) -> str:
    return CLUSTERS[kind.__name__][0]


@contextlib.contextmanager
def _said(kind: type[ClusterEnv]) -> Iterator[None]:
    """Whatever fails while a cluster is asked becomes one line with what it had said."""
    try:
        yield
    except ModuleNotFoundError as error:
        extra = "pip install -e '.[tpu]'" if error.name == "requests" else "install it"
        problem = f"is read with the package {error.name}, which is not there; {extra}"
        raise ConfigError(_called(kind), problem) from None
    except Exception as error:  # of a server, a library, or a text that is no number
        called, names = CLUSTERS[kind.__name__]
        found = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        reason = " ".join(str(error).split())
        problem = f"found {found or 'no variable of it'}: {reason}; {REMEDY}"
        raise ConfigError(called, problem) from None


def _address(kind: type[ClusterEnv], seconds: int) -> str:
    port = os.environ.get("JAX_COORDINATOR_PORT")
    try:
        with _said(kind):
            return kind.get_coordinator_address(seconds, port)
    except ConfigError as error:  # a name that nobody knows yet may be known to the next start
        raise WaitError(f"process 0 is not found: {error}") from None


def _one_host_of_gke(kind: type[ClusterEnv]) -> bool:
    """JAX would ask the metadata server for slices, which answers nothing there, or is none."""
    names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return (
        kind.__name__ == "GkeTpuCluster"
        and "," not in names
        and not os.environ.keys() & set(SLICES)
    )


def _in_indexed_job() -> bool:
    """Any pod has Kubernetes' variables; those of an indexed Job alone have a number."""
    if INDEXED_JOB not in os.environ:
        return False
    if importlib.util.find_spec("kubernetes") is None:
        if "TPU_WORKER_HOSTNAMES" not in os.environ:
            log.warning(
                "%s=%s: this pod trains alone; to join those of its Job, pip install 'jax[k8s]'",
                INDEXED_JOB,
                os.environ[INDEXED_JOB],
            )
        return False
    return True


def _check_slurm() -> None:
    """Raises ConfigError for a batch script that holds several tasks and has started none."""
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks != "1" and "SLURM_PROCID" in os.environ and "SLURM_STEP_NODELIST" not in os.environ:
        raise ConfigError(
            f"SLURM_NTASKS={tasks}",
            "found without SLURM_STEP_NODELIST, so that this process is none of the tasks; start "
            "the command with srun, or say --num_processes=1",
        )
