"""For all tests: one compute thread, because tiny tensors only lose by sharing the work."""

import torch

torch.set_num_threads(1)
