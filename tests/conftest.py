"""One thread: the tests' tensors are tiny, and two threads that wait for each other on
a busy machine are far slower.

Without a GPU the Triton kernels are interpreted, which must be said before importing.
"""

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from common import tiny  # noqa: E402, F401   (a fixture of several files; it imports the kernels)
