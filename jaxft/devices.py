"""The devices and processes of a run: mesh, placing, who writes, an agreed stop. Nothing else knows of hosts."""

import importlib.util
import math
import os
import re
import sys
import zlib
from collections.abc import Mapping
from importlib import metadata
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

try:
    import resource
except ImportError:  # Windows has none
    resource = None

Batch = dict[str, Any]
Tree = TypeVar("Tree")

SPLIT_BYTES = 2**22  # of an array that `replicate` may share out: a smaller one is not worth the messages
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
REMEDY = (
    "Give every process the same coordinator HOST:PORT (a free port of process 0's machine), the same number of "
    "processes, and its own index from 0; or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
)


def initialise(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins this process with the others of the run, if there are others; the second call does nothing.

    To be called before JAX computes anything. What is None comes from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, then from the launcher: Slurm (`srun`), Open MPI (`mpirun`), or an indexed Job of Kubernetes, of
    which JAX reads the size where the package `kubernetes` is installed. One process alone is left as it is;
    `processes=1` keeps it alone under a launcher, too.

    Args:
        coordinator: HOST:PORT of process 0.
        processes: how many there are.
        process: index of this one, from 0.

    Raises:
        ValueError: one of the three is missing or impossible.
        RuntimeError: JAX has computed already, or the others do not answer within 5 minutes.
    """
    if jax.distributed.is_initialized():
        return
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _variable("JAX_NUM_PROCESSES") if processes is None else processes
    process = _variable("JAX_PROCESS_ID") if process is None else process
    options: dict[str, Any] = {"cluster_detection_method": "deactivate"}
    if processes != 1 and None in (coordinator, processes, process):
        coordinator, processes, process, found = _from_launcher(coordinator, processes, process)
        options |= found
    detected = options["cluster_detection_method"] != "deactivate"
    if (coordinator, processes, process) == (None, None, None) and not detected:
        return
    _check(coordinator, processes, process, detected)
    if processes != 1:
        jax.distributed.initialize(coordinator, processes, process, **options)


def _from_launcher(
    coordinator: str | None, processes: int | None, process: int | None
) -> tuple[str | None, int | None, int | None, dict[str, Any]]:
    """The three with what the launcher says, and the arguments by which JAX finds the rest."""

    def filled(count: int | None, index: int | None) -> tuple[int | None, int | None]:
        return count if processes is None else processes, index if process is None else process

    variables = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in os.environ for name in variables) and (_variable("SLURM_NTASKS") or 1) > 1:
        return coordinator, *filled(_variable("SLURM_NTASKS"), _variable("SLURM_PROCID")), _by("slurm")
    if (count := _variable("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        found = filled(count, _variable("OMPI_COMM_WORLD_RANK"))
        if "OMPI_MCA_orte_hnp_uri" in os.environ:
            return coordinator, *found, _by("ompi")
        # Open MPI 5 no longer says where its launcher runs.
        if coordinator is None and _variable("OMPI_COMM_WORLD_LOCAL_SIZE") == count:
            job = zlib.crc32(os.environ.get("PMIX_NAMESPACE", "").encode())
            coordinator = f"127.0.0.1:{os.environ.get('JAX_COORDINATOR_PORT') or 61440 + job % 4096}"
        local = _variable("OMPI_COMM_WORLD_LOCAL_RANK")
        return coordinator, *found, {} if local is None else {"local_device_ids": local}
    if (index := _variable("JOB_COMPLETION_INDEX")) is not None:
        found = filled(None, index)
        detects = "KUBERNETES_SERVICE_HOST" in os.environ and importlib.util.find_spec("kubernetes") is not None
        if detects and found[0] != 1:
            return coordinator, *found, {"cluster_detection_method": None}
        if (coordinator, processes, process) == (None, None, None):  # nothing says that the pods of a Job are one run
            return None, None, None, {}
        return coordinator, *found, {}
    return coordinator, processes, process, {}


def _by(method: str) -> dict[str, Any]:
    return {"cluster_detection_method": method}


def _variable(name: str) -> int | None:
    text = os.environ.get(name, "")
    if not text:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"the environment variable {name} must be a whole number, not {text!r}") from error


def _check(coordinator: str | None, processes: int | None, process: int | None, detected: bool) -> None:
    """Refuses what cannot be; `detected` means that JAX finds out what is None."""
    if processes is not None and processes < 1:
        raise ValueError(f"there must be at least one process, not {processes}. {REMEDY}")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ValueError(f"the index of a process among {processes} is 0 to {processes - 1}, not {process}. {REMEDY}")
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"the coordinator must be HOST:PORT, not {coordinator!r}. {REMEDY}")
    if detected or processes == 1:
        return
    if processes is None:
        raise ValueError(f"a coordinator or the index of a process is given, but not how many there are. {REMEDY}")
    if process is None:
        raise ValueError(f"one of {processes} processes does not know its index. {REMEDY}")
    if coordinator is None:
        raise ValueError(f"{processes} processes need a coordinator to find each other. {REMEDY}")


def process() -> tuple[int, int]:
    """(index of this process, how many there are)."""
    return jax.process_index(), jax.process_count()


def is_writer() -> bool:
    """Whether this process writes the run's files: true in exactly one."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in at least one process; every process must ask, and gets the same answer."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def say(line: str) -> None:
    """Prints a line in the process that writes; what the terminal's encoding lacks is escaped."""
    if is_writer():
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def mesh() -> Mesh:
    """All devices of the run in one axis called "data", those of one process side by side."""
    return Mesh(np.asarray(sorted(jax.devices(), key=lambda device: (device.process_index, device.id))), ("data",))


def replicate(tree: Tree, mesh: Mesh, *, split: bool = False) -> Tree:
    """The tree, whole on every device of the mesh; its leaves are arrays and typed keys.

    Args:
        tree: the same in every process.
        mesh: from `mesh`.
        split: share out the leaves of `SPLIT_BYTES` and more over the devices, along their longest axis that divides:
            the kernels of wide dense layers, and what the optimizer and the average hold of them.

    Raises:
        ValueError: the processes hold different values.
    """

    def sharding_of(leaf: Any) -> NamedSharding:
        axes = [axis for axis, length in enumerate(np.shape(leaf)) if length % mesh.size == 0]
        if not split or not axes or leaf.nbytes < SPLIT_BYTES:
            return NamedSharding(mesh, PartitionSpec())
        axis = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))

    def is_key(leaf: Any) -> bool:
        return isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)

    leaves, structure = jax.tree.flatten(tree)
    shardings = [NamedSharding(mesh, PartitionSpec()) if is_key(leaf) else sharding_of(leaf) for leaf in leaves]
    if jax.process_count() == 1:
        return jax.device_put(tree, structure.unflatten(shardings))
    here = [not isinstance(leaf, jax.Array) or leaf.sharding != to for leaf, to in zip(leaves, shardings, strict=True)]
    if not any(here):
        return tree
    # device_put takes no typed key to other processes, and compares every leaf by sending it whole to all of them.
    local = [
        np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf) if is_here else None
        for leaf, is_here in zip(leaves, here, strict=True)
    ]
    checksum = 0
    for array in local:
        if array is not None:
            checksum = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, checksum)
    if len(set(multihost_utils.process_allgather(np.uint32(checksum)).tolist())) > 1:
        raise ValueError(
            "the processes start from different values; give every process the same weight file, seed and folder"
        )

    def placed(leaf: Any, array: np.ndarray | None, to: NamedSharding) -> Any:
        if array is None:
            return leaf
        found = jax.make_array_from_callback(array.shape, to, array.__getitem__)
        return jax.random.wrap_key_data(found, impl=jax.random.key_impl(leaf)) if is_key(leaf) else found

    return structure.unflatten(map(placed, leaves, local, shardings))


def shard(batch: Mapping[str, Any], mesh: Mesh, *, stacked: bool = False) -> Batch:
    """This process's rows of a batch → global arrays, split by rows over the devices of the mesh.

    Args:
        batch: arrays [B, …], or [K, B, …] where `stacked`; B of this process.
        mesh: from `mesh`.
        stacked: K batches, one after another on the first axis, which is not split.

    Raises:
        ValueError: the global batch does not divide into the devices.
    """
    rows = next(iter(batch.values())).shape[int(stacked)] * jax.process_count()
    if rows % mesh.size:
        raise ValueError(f"a batch of {rows} does not divide over {mesh.size} devices; use a multiple of {mesh.size}")
    sharding = NamedSharding(mesh, PartitionSpec(None, "data") if stacked else PartitionSpec("data"))
    return {name: jax.make_array_from_process_local_data(sharding, column) for name, column in batch.items()}


def gather(columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every process's rows on the host of each, in one order everywhere: by process, then as there.

    Args:
        columns: arrays [n, …], n the same in every process: of the host (its own rows), or as `shard` and a jitted
            step of it give them.
    """
    if jax.process_count() == 1:
        return {name: np.asarray(column) for name, column in jax.device_get(dict(columns)).items()}
    return {name: _gathered(column) for name, column in columns.items()}


def _gathered(column: Any) -> np.ndarray:
    if isinstance(column, jax.Array) and not column.is_fully_addressable:
        return multihost_utils.process_allgather(column, tiled=True)
    rows = np.ascontiguousarray(column)
    as_bytes = rows.reshape(-1).view(np.uint8).reshape(len(rows), math.prod(rows.shape[1:]) * rows.itemsize)
    together = multihost_utils.process_allgather(as_bytes, tiled=True)  # as bytes: JAX would cut 64-bit numbers to 32
    return np.ascontiguousarray(together).reshape(-1).view(rows.dtype).reshape(-1, *rows.shape[1:])


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on, and the devices that computed it."""
    device = jax.devices()[0]
    return {package: metadata.version(package) for package in PACKAGES} | {
        "device": f"{jax.device_count()} × {device.device_kind} ({device.platform})"
    }


def peak_memory_mb() -> int | None:
    """The most memory of the host that this process has held so far, in MiB; None on Windows, which does not say."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10))  # macOS counts bytes, Linux KiB
