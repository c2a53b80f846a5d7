"""Versions, compiled parts, the network, the cluster's variables, and room on disk."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.import_utils import ACCELERATE_MIN_VERSION, BITSANDBYTES_MIN_VERSION

from ssgen_ds.distributed.host_memory import GIB
from ssgen_ds.doctor.finding import Finding, error, note, ok, warning
from ssgen_ds.recipe.user_paths import cache_root

# A package, its versions, what happens, what to install; the last three are what transformers itself asks for.
KNOWN_BAD = (
    ("deepspeed", "==0.19.2", "float32 adapters on a bfloat16 base crash ZeRO-3 in the first step (DeepSpeed#8072)"),
    ("peft", f"<{MIN_PEFT_VERSION}", "the transformers installed refuses it when an adapter is loaded"),
    ("accelerate", f"<{ACCELERATE_MIN_VERSION}", "the transformers installed refuses it when a model is loaded"),
    ("bitsandbytes", f"<{BITSANDBYTES_MIN_VERSION}", "the transformers installed refuses it when a model is quantised"),
)


def installed(package: str) -> str | None:
    """Its version; None when it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_versions(find: Callable[[str], str | None] = installed) -> list[Finding]:
    """Packages against the bounds of this one, and pairs that are known not to work together."""
    findings, there, ours = [], [], requires("ssgen-ds") or []
    for line in ours:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": "qlora"}):
            continue
        optional = requirement.marker is not None
        found = find(requirement.name)
        if found is None and not optional:
            findings.append(
                error(
                    "versions",
                    f"{requirement.name} is not installed",
                    "it is needed",
                    f"pip install '{requirement}'",
                )
            )
        elif found is not None and not requirement.specifier.contains(found, prereleases=True):
            why = f"tested with {requirement.specifier}; other versions may fail late, or compute something else"
            findings.append(
                error("versions", f"{requirement.name} {found} is installed", why, f"pip install '{requirement}'")
            )
        elif found is not None:
            there.append(f"{requirement.name} {found}")
    for package, bad, what in KNOWN_BAD:
        found = find(package)
        if found is not None and SpecifierSet(bad).contains(found, prereleases=True):
            fix = f"pip install '{next((r for r in ours if Requirement(r).name == package), package)}'"
            findings.append(
                error("versions", f"{package} {found} with transformers {transformers.__version__}", what, fix)
            )
    main = [item for item in there if item.split()[0] in ("torch", "deepspeed", "transformers", "peft")]
    return findings or ok("versions", f"{', '.join(main)}; Python {sys.version.split()[0]}")


def check_device() -> list[Finding]:
    """The GPU that torch sees, and bitsandbytes' compiled library for it."""
    findings = []
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        findings += ok("device", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}")
        if len(names) > 1:
            why = "the slowest one, and the one with the least memory, decide for all"
            findings.append(
                warning(
                    "device",
                    f"GPUs of several kinds: {', '.join(sorted(names))}",
                    why,
                    "CUDA_VISIBLE_DEVICES=...",
                )
            )
        if not torch.cuda.is_bf16_supported():
            findings.append(warning("device", "no bfloat16", "model.dtype=auto takes it", "model.dtype=float32"))
    elif shutil.which("nvidia-smi"):
        built = torch.version.cuda or "no CUDA: the CPU build"
        why = "training would run on the CPU, a hundred times slower"
        fix = "install a torch built for this driver's CUDA (nvidia-smi shows it), and look at CUDA_VISIBLE_DEVICES"
        findings.append(error("device", f"there is an NVIDIA driver, but torch ({built}) sees no GPU", why, fix))
    else:
        findings += ok("device", f"no GPU: {len(os.sched_getaffinity(0))} CPU cores")
    return findings + check_bitsandbytes()


def check_bitsandbytes() -> list[Finding]:
    """Only a note where it is not installed: it is needed for QLoRA and 8-bit optimizers alone."""
    if find_spec("bitsandbytes") is None:
        fix = "pip install 'ssgen-ds[qlora]'"
        return [note("bitsandbytes", "not installed", "QLoRA and 8-bit optimizers need it", fix)]
    from ssgen_ds.modeling.quantization import native_library_problem

    if problem := native_library_problem():
        return [error("bitsandbytes", problem, "QLoRA and 8-bit optimizers would fail", "python -m bitsandbytes")]
    return ok("bitsandbytes", f"{installed('bitsandbytes')}, its native library loads")


def check_compiler(offloads: bool) -> list[Finding]:
    """What DeepSpeed compiles when it is first used: what that takes, and what it says of its operators itself.

    Args:
        offloads: a recipe keeps the optimizer's states on the host; only their AdamW is compiled for a GPU.
    """
    missing = []
    if not (shutil.which("c++") or shutil.which("g++")):
        missing.append(("no C++ compiler", "apt-get install g++"))
    if not (shutil.which("ninja") or find_spec("ninja")):
        missing.append(("no ninja", "pip install ninja"))
    why = "DeepSpeed compiles operators at the first use: communication on a CPU, AdamW of offloaded states"
    findings = [error("compiler", what, why, fix) for what, fix in missing]
    if torch.cuda.is_available() and not shutil.which("nvcc") and "CUDA_HOME" not in os.environ:
        what, fix = "no nvcc and no CUDA_HOME", "install the CUDA toolkit of torch's version, or set CUDA_HOME"
        severity = error if offloads else note
        findings.append(severity("compiler", what, "AdamW of offloaded states is compiled with it, nothing else", fix))
    if findings:
        return findings
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    operators = {"CPUAdamBuilder": "AdamW of offloaded states", "ShareMemCommBuilder": "communication on a CPU"}
    if accelerator.device_name() != "cpu":
        del operators["ShareMemCommBuilder"]
    will = {what: accelerator.create_op_builder(name).is_compatible(verbose=False) for name, what in operators.items()}
    if refused := [what for what, is_compatible in will.items() if not is_compatible]:
        return [warning("compiler", f"DeepSpeed will not compile: {', '.join(refused)}", why, "ds_report says why")]
    return ok("compiler", f"C++ compiler and ninja are there; DeepSpeed will compile: {', '.join(will)}")


def check_network(environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Interfaces that are named, and the address of this host."""
    findings = []
    there = sorted(name for _, name in socket.if_nameindex())
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = environ.get(variable, "")
        if not wanted or wanted[0] in "^=":
            continue
        prefixes = wanted.split(",")
        exact = variable.startswith("GLOO")
        if not any(name == p or (not exact and name.startswith(p)) for name in there for p in prefixes):
            why = "the ranks could not reach each other, and would wait for their time limit"
            fix = f"{variable} must be one of {', '.join(there)}, or unset"
            findings.append(error("network", f"{variable}={wanted}: no such interface", why, fix))
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError as problem:
        why = "other nodes find rank 0 by this name"
        return [
            *findings,
            warning("network", f"{host} has no address ({problem})", why, "an entry in /etc/hosts, or MASTER_ADDR"),
        ]
    if address.startswith("127.") and int(environ.get("SLURM_JOB_NUM_NODES", environ.get("SLURM_NNODES", "1"))) > 1:
        why = "rank 0 would listen where no other node can reach it"
        findings.append(error("network", f"{host} is {address} to itself", why, "MASTER_ADDR, or a proper /etc/hosts"))
    return findings or ok("network", f"{host} is {address}; interfaces {', '.join(there)}")


def check_cluster(environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """SLURM's variables against the ranks that a launcher has set."""
    pairs = (("SLURM_PROCID", "RANK"), ("SLURM_NTASKS", "WORLD_SIZE"), ("SLURM_LOCALID", "LOCAL_RANK"))
    if "SLURM_JOB_ID" not in environ:
        ranks = {key: environ[key] for _, key in pairs if key in environ}
        return ok("cluster", f"no SLURM job; {ranks or 'no launcher'}")
    findings = []
    inside = "SLURM_STEP_NODELIST" in environ
    for theirs, ours in pairs:
        if inside and theirs in environ and ours in environ and environ[theirs] != environ[ours]:
            why = "two launchers disagree: ranks would be missing or double, and the start would hang or be refused"
            fix = f"unset {ours} in the batch script: srun's own variables are enough"
            findings.append(error("cluster", f"{theirs}={environ[theirs]}, but {ours}={environ[ours]}", why, fix))
    nodes, tasks = int(environ.get("SLURM_JOB_NUM_NODES", "1")), environ.get("SLURM_NTASKS")
    if not inside and tasks is not None and int(tasks) > 1:
        why = "outside srun every node would be rank 0 of its own run"
        fix = "srun python -m ssgen_ds.train RECIPE, or the scripts in slurm/"
        findings.append(
            warning("cluster", f"{tasks} tasks on {nodes} nodes, but this is the batch script itself", why, fix)
        )
    local = environ.get("SLURM_NTASKS_PER_NODE", "")
    gpus = re.search(r"(\d+)\D*$", environ.get("SLURM_GPUS_ON_NODE", ""))
    if local.isdigit() and gpus and int(local) != int(gpus[1]):
        why = "one rank drives one GPU: some would be idle, or shared"
        findings.append(
            warning("cluster", f"{local} tasks a node and {gpus[1]} GPUs", why, f"--ntasks-per-node={gpus[1]}")
        )
    return findings or ok("cluster", f"SLURM job {environ['SLURM_JOB_ID']}, {nodes} nodes")


def check_room(output_dir: str | None, shared: Path = Path("/dev/shm")) -> list[Finding]:
    """Whether caches and the run folder can be written, and whether shared memory is large enough."""
    findings = []
    places = {"cache": cache_root(), **({"output_dir": Path(output_dir)} if output_dir else {})}
    for name, place in places.items():
        folder = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            fix = "another folder" if name == "output_dir" else "SSGEN_CACHE=another folder"
            findings.append(error("room", f"{name}: {folder} cannot be written", "nothing could be kept", fix))
        elif (free := shutil.disk_usage(folder).free) < 2 * GIB:
            why = "a checkpoint holds 12 bytes a trained parameter"
            findings.append(warning("room", f"{name}: {free / GIB:.1f} GiB free in {folder}", why, "free some"))
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < 0.25 * GIB:
        why = "ranks on one node talk through it; containers give 64 MB by default"
        findings.append(warning("room", f"{shared} has {size / 2**20:.0f} MB", why, "docker run --shm-size=8g"))
    return findings or ok("room", f"{', '.join(places)} can be written")
