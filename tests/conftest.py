"""For all tests: one compute thread, because tiny tensors only lose by sharing the work; and no time limit on
generated examples, which would say more of the machine than of the code."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
