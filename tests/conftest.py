"""One thread: the tests' tensors are tiny, and two threads that wait for each other on
a busy machine are far slower.

Without a GPU the Triton kernels are interpreted, which must be said before importing.
Under nohup or in a script's background signals are ignored, and processes inherit that:
those that the tests start are to hear them.
"""

import os
import signal

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    if getattr(signal, name, None) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), signal.SIG_DFL)

from common import tiny  # noqa: E402, F401   (a fixture of several files; it imports the kernels)
