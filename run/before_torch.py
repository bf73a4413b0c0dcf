"""
Settings of the process that are read when torch is loaded. The commands import this file first.
"""

import os

# By default waiting threads spin. On a busy laptop that makes small models 50 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Lengths change every step. Without this, free GPU memory is split into pieces that are too small.
# PYTORCH_CUDA_ALLOC_CONF is the variable's name in older versions: if it is set, the user has chosen.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
