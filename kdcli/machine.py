"""The machine and the libraries that results depend on, found without importing torch where that is possible."""

import contextlib
import importlib.util
import math
import os
import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kdcli import __version__

DRIVERS = (
    "/proc/driver/nvidia",
    "/dev/nvidiactl",
    "/dev/nvidia0",
    "/dev/nvhost-ctrl",
    "/dev/nvmap",
    "/dev/kfd",
    "/dev/dxg",
)
"""Where Linux shows a GPU's driver: NVIDIA's on servers and on Tegra, AMD's, and that of Windows below WSL."""
ONNX_RUNTIMES = ("onnxruntime-gpu", "onnxruntime", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-rocm")
"""Packages that bring the module onnxruntime."""


@cache
def _torch_build() -> tuple[str, bool]:
    """Return torch's version with its build, and whether it was built for GPUs; from its one small file about that."""
    if (torch := sys.modules.get("torch")) is not None:
        return str(torch.__version__), bool(torch.version.cuda or torch.version.hip)
    package = importlib.util.find_spec("torch")
    assert package is not None and package.origin is not None
    spec = importlib.util.spec_from_file_location("_kdcli_torch_version", Path(package.origin).with_name("version.py"))
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return str(build.__version__), bool(build.cuda or build.hip)


def gpu_count() -> int:
    """Return the number of GPUs that torch can use. Where there can be none, torch is not imported to say so."""
    if not _torch_build()[1]:
        return 0
    if "torch" not in sys.modules and sys.platform == "linux" and not any(map(os.path.exists, DRIVERS)):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def computing_device(wanted: str) -> str:
    """Return where this process computes: "cuda:N", its own GPU, where there is one, else or if so `wanted` "cpu".

    wanted: "auto", "cuda" or "cpu" (`train.device`). Processes of one machine get one GPU each, by their LOCAL_RANK.
    """
    count = 0 if wanted == "cpu" else gpu_count()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % count}" if count else "cpu"


def device_name() -> str:
    """Return the name of the first GPU, or else of the processor."""
    if gpu_count():
        import torch

        return torch.cuda.get_device_name()
    return platform.processor() or "cpu"


@cache
def _cpu_has_bf16() -> bool:
    """True when the processor multiplies in bfloat16: AVX-512 BF16 or AMX."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        import torch

        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return not {"avx512_bf16", "amx_tile"}.isdisjoint(flags)


def resolve_precision(precision: str, device: str) -> str:
    """Return "bf16" or "fp32": bf16 wherever the hardware multiplies in it (GPU, or CPU with AVX-512 BF16/AMX)."""
    if precision != "auto":
        return precision
    if device != "cpu" and gpu_count():
        import torch

        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if _cpu_has_bf16() else "fp32"


def versions() -> dict[str, str]:
    """Return the versions and the device that a result depends on."""
    return {
        "kdcli": __version__,
        "python": platform.python_version(),
        "torch": _torch_build()[0],
        "transformers": version("transformers"),
        "datasets": version("datasets"),
        "onnxruntime": _installed(ONNX_RUNTIMES),
        "platform": platform.platform(),
        "device": device_name(),
    }


def _installed(packages: tuple[str, ...]) -> str:
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "not installed"


def usable_processors() -> int:
    """Return the number of processors that this process may use: its affinity, and a container's share of time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, processor_quota())))


def processor_quota(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return how many processors' time the control groups of this process (Linux) allow it; infinity without a limit.

    groups: names the process's groups. root: where they are mounted. Source: kernel documentation, cgroup-v2
    (`cpu.max`) and sched-bwc (`cpu.cfs_quota_us`).
    """
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    shares = [math.inf]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "cpu" if controllers else root
        place = mount / path.strip("/")
        # A limit holds for all groups below its own. In a container the path may not exist: its own group is the root.
        for folder in (place, *place.parents):
            if folder.is_relative_to(mount):
                shares.append(_quota(folder))
    return min(shares)


def _quota(folder: Path) -> float:
    """Return the processors' time that one control group allows."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return math.inf if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        given, whole = (int((folder / name).read_text(encoding="utf-8")) for name in names)
        return given / whole if given > 0 else math.inf
    return math.inf


def default_threads() -> int:
    """Return how many threads a model runs on where none are given: OMP_NUM_THREADS, at most the usable processors."""
    # The standard allows a list: one number a nesting level.
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    usable = usable_processors()
    return min(int(wanted), usable) if wanted.isdecimal() and int(wanted) > 0 else usable
