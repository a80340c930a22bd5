"""One thread for every test: the models are so small that threads only wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
