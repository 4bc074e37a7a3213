"""What a process may use of its machine: affinity, the share of a container, OMP_NUM_THREADS."""

import math
import os
from pathlib import Path

import pytest

from kdcli.machine import default_threads, processor_quota, usable_processors


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_affinity_and_omp_num_threads_bound_the_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_processors() == default_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "64")
        assert default_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    # However many processors there are here, no more than that are used, and one where one is asked for.
    assert 1 <= default_threads() == usable_processors() <= len(allowed)
    for text, threads in (("1", 1), ("1,2", 1), ("", usable_processors()), ("many", usable_processors())):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert default_threads() == threads


LAYOUTS = {
    "version 2": ("0::/job/step\n", {"job/step/cpu.max": "max 100000\n", "job/cpu.max": "150000 100000\n"}, 1.5),
    "version 2, in a container": ("0::/job/step\n", {"cpu.max": "50000 100000\n"}, 0.5),
    "version 2, no limit": ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
    "version 1": (
        "4:memory:/job\n3:cpu,cpuacct:/job\n",
        {"cpu/job/cpu.cfs_quota_us": "300000\n", "cpu/job/cpu.cfs_period_us": "100000\n"},
        3.0,
    ),
    "version 1, no limit": (
        "3:cpu,cpuacct:/\n",
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        math.inf,
    ),
    "another group's limit": ("0::/job\n", {"other/cpu.max": "10000 100000\n"}, math.inf),
    "broken": ("0::/\n", {"cpu.max": "much\n"}, math.inf),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_share_of_a_control_group(layout: str, tmp_path: Path):
    groups, files, quota = LAYOUTS[layout]
    (tmp_path / "self").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert processor_quota(tmp_path / "self", tmp_path / "fs") == quota
    assert processor_quota(tmp_path / "absent", tmp_path / "fs") == math.inf
