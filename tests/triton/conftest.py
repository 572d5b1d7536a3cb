"""Where the Triton kernels run: on this machine's GPU, or under the interpreter in a process of its own.

The interpreter is chosen when Triton is imported, so a process is one or the other.
"""

import os
from pathlib import Path

import torch

collect_ignore = []
if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore += [path.name for path in Path(__file__).parent.glob("test_*.py")]
elif not (torch.cuda.is_available() or torch.xpu.is_available()):
    collect_ignore += ["launched"]
