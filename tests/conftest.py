"""No test may reach the network; arithmetic is single-threaded so that it repeats."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch

torch.set_num_threads(1)
