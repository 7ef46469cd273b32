"""Kernels in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 pytest tests/interpreter (a process of its own; tests/conftest.py sees to it).

Tests stay small: at most 200 programs per launch, tiles of about 32, since each program costs about a millisecond.
"""

import interpreter_patch
import memory_check

interpreter_patch.install()
memory_check.install()
