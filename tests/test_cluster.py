"""Processes find each other wherever a cluster starts them, and one that is alone asks nobody: the
environments of clusters, simulated on loopback."""

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading

import pytest
from jax._src.clusters import cloud_tpu_cluster

from kha_jax.config import ConfigError
from kha_jax.runs import cluster
from tests.runs import ROOT, SMALL, finish, joined, lines

# What a host of a TPU VM runs here: JAX has to take the machine for one.
AS_TPU_VM = """
import os, runpy, sys
from jax._src.clusters import cloud_tpu_cluster, cluster
cloud_tpu_cluster.running_in_cloud_tpu_vm = cluster.running_in_cloud_tpu_vm = True
os.environ.pop("TPU_SKIP_MDS_QUERY")
runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
"""
MEGASCALE = {"MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "2"}
OURS = ("TPU_", "SLURM_", "MEGASCALE_", "OMPI_", "KUBERNETES_", "JOB_", "GCE_", "JAX_COORDINATOR")


@contextlib.contextmanager
def metadata_server(index, endpoints):
    """The metadata server of one host, HOST:PORT."""
    attributes = {
        "agent-worker-number": str(index),
        "worker-network-endpoints": endpoints,
        "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\n",
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = attributes.get(self.path.rsplit("/", 1)[-1], "").encode()
            self.send_response(200 if self.headers["Metadata-Flavor"] == "Google" else 403)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def gke(index, hosts=2, **slices):
    names = ",".join(["localhost"] * hosts)
    return {"TPU_WORKER_HOSTNAMES": names, "TPU_WORKER_ID": str(index), **slices}


def slurm(index, count=2):
    names = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
    values = ("7", "localhost,other[1-3]", str(count), str(index), "0")
    return {f"SLURM_{name}": value for name, value in zip(names, values)}


# The variables of each process, and whether it is on a TPU VM.
CLUSTERS = {
    "metadata": [{}, {}],
    "gke": [gke(0), gke(1)],
    "2 slices of 1 host": [gke(0, 1, **MEGASCALE, MEGASCALE_SLICE_ID=str(i)) for i in range(2)],
    "2 slices of 2 hosts": [
        gke(i % 2, **MEGASCALE, MEGASCALE_SLICE_ID=str(i // 2)) for i in range(4)
    ],
    "slurm": [slurm(0), slurm(1)],
}


@pytest.fixture
def machine(monkeypatch):
    """Sets the environment of a machine, a TPU VM, and no other."""

    def become(variables):
        for name in [name for name in os.environ if name.startswith(OURS)]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    return become


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_process_learns_its_place(name, machine):
    found = []
    for index, variables in enumerate(CLUSTERS[name]):
        with metadata_server(index, "localhost,other") as server:
            machine({**variables, "GCE_METADATA_IP": server, "JAX_COORDINATOR_PORT": "8"})
            found.append(cluster.place(5)[1:])
    count = len(CLUSTERS[name])
    assert found == [("localhost:8", count, index) for index in range(count)]


@pytest.mark.parametrize(
    "variables",
    [
        {"TPU_SKIP_MDS_QUERY": "1"},
        gke(0, 1),
        slurm(0, count=1),
        {"SLURM_NTASKS": "4", "TPU_SKIP_MDS_QUERY": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "TPU_SKIP_MDS_QUERY": "1"},
    ],
    ids=str,
)
def test_who_is_alone_needs_nothing_and_asks_nobody(variables, machine, monkeypatch):
    def asked(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", asked)
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    machine(variables)
    assert cluster.place(5) is None
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", False)
    machine({})
    assert cluster.place(5) is None  # a laptop


def test_a_tpu_vm_of_one_host_is_alone(machine):
    with metadata_server(0, "unknown:unknown:10.0.0.2") as server:
        machine({"GCE_METADATA_IP": server})
        assert cluster.place(5) is None


@pytest.mark.parametrize(
    "variables, said",
    [
        (gke(5), "TPU_WORKER_ID=5: process 5 of 2; "),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "GKE: found TPU_WORKER_HOSTNAMES=a,b: invalid literal"),
        ({**slurm(0), "SLURM_PROCID": "x"}, "SLURM_PROCID=x: invalid literal"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "SLURM_NTASKS=4: found without SLURM_STEP_"),
        ({"GCE_METADATA_IP": "127.0.0.1:9"}, "metadata server: found GCE_METADATA_IP=127.0.0.1:9"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_environment_is_one_line_that_says_what_was_found(variables, said, machine):
    with metadata_server(0, "a,b") as server:
        machine({"GCE_METADATA_IP": server, **variables})
        with pytest.raises(ConfigError) as raised:
            cluster.place(5)
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert "--num_processes=1" in str(raised.value)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CLUSTERS, "flags"])
def test_a_run_of_20_steps(name, cache, tmp_path):
    """2, 2, 2, 4, 2 and 2 processes train together, under each cluster and by flags."""
    flags = (*SMALL, "--config.steps=20", f"--workdir={tmp_path / 'run'}")
    hosts, port = CLUSTERS.get(name, [{}, {}]), free_port()
    by_flags = joined(2) if name == "flags" else [()] * len(hosts)
    code = ("-m", "experiments.train") if name in ("flags", "slurm") else ("-c", AS_TPU_VM)
    usual = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
    with contextlib.ExitStack() as servers:
        started = []
        for index, (variables, mine) in enumerate(zip(hosts, by_flags)):
            server = servers.enter_context(metadata_server(index, "localhost,other"))
            told = {"GCE_METADATA_IP": server, "JAX_COORDINATOR_PORT": port, **variables}
            environment = {**usual, **told, "KHA_JAX_CACHE": str(cache), "XLA_FLAGS": ""}
            line = [sys.executable, *code, *flags, *mine]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(line, cwd=ROOT, env=environment, **pipes))
        ends = [finish(process, 1200) for process in started]
    assert [code for code, _, _ in ends] == [0] * len(hosts), ends
    for index, (_, _, err) in enumerate(ends):
        assert f"process {index} of {len(hosts)}, process 0 at localhost:" in err or by_flags[0], (
            err
        )
        assert f"process {index} of {len(hosts)}, " in err, err
    steps = [row["step"] for row in lines(tmp_path / "run") if "loss" in row]
    assert steps == list(range(1, 21))
