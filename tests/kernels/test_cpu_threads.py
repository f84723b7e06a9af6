"""The CPU kernels on any number of threads, which a process chooses once: the same bits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.implementations import needs_library

pytestmark = needs_library
THREADS = """
import hashlib, jax.numpy as jnp, numpy as np
from ferrum_kernels import cpu
from tests.support.gptq_cases import make_linear
w, _ = make_linear(0, k=2000, n=130, group_size=64)
x = jnp.asarray(np.random.default_rng(0).standard_normal((9, 2000), np.float32))
both = [np.asarray(cpu.gptq_matmul(x[:m], w, None, r, "float32")) for r in (False, True) for m in (1, 9)]
print(hashlib.sha256(b"".join(a.tobytes() for a in both)).hexdigest())
"""


@pytest.mark.once
def test_results_do_not_depend_on_the_number_of_threads():
    def digest(threads: int) -> str:
        environment = {**os.environ, "FERRUM_JAX_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", THREADS]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert digest(1) == digest(3)
