"""axrepro: train large models in JAX, TPU first.

Importing this package loads nothing heavy: not even jax. Import what you need from its folders, for example
`from axrepro.nn import Block, FeedForward, MoE`.
"""

import os

__version__ = "0.1.0"

# or buckets would be reached through TensorFlow where it is installed, which takes seconds and knows no s3://
os.environ.setdefault("EPATH_USE_TF", "false")
