"""One thread: the tests' tensors are tiny, and two threads that wait for each other on a busy machine are far slower."""

import torch

torch.set_num_threads(1)
