"""How far apart two computations of one thing may be: two programs, two layouts in memory, two sizes of a batch.

A library may sum a product of matrices in another order for each of these, and how it does depends on the CPU. Equal
bits are asked for only where one program does the very same twice.
"""

from __future__ import annotations

import torch

# Outputs of the small models, of up to 4: tens of roundings of 6e-8 each (2e-6 seen), in fp16 of 5e-4
BOUND = {torch.float32: 2e-5, torch.float16: 2e-2}
