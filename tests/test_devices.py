"""Several devices, and several processes. Each needs a fresh process: the number of
devices is fixed when JAX starts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).parent


def _started(arguments, num_devices):
    # Nearly all of the time goes into compiling.
    flags = (
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={num_devices}",
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    )
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": " ".join(flags).strip(), "PYTHONPATH": path},
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_on_four_devices():
    # All of them, also those that are marked as slow.
    options = ("-q", "-x", "-p", "no:cacheprovider", "-m", "")
    process = _started(("-m", "pytest", *options, HERE / "on_four_devices.py"), 4)
    output, _ = process.communicate()
    assert process.returncode == 0, output


@pytest.mark.slow
def test_on_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = HERE / "on_two_processes.py"
    processes = [_started((script, rank, port, tmp_path), 2) for rank in range(2)]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs):
        assert process.returncode == 0 and "both are well" in output, output
