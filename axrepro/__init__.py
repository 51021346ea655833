"""axrepro: train large models in JAX, TPU first.

Importing this package loads nothing heavy: not even jax. Import what you need from its folders, for example
`from axrepro.nn import Block, FeedForward, MoE`.
"""

__version__ = "0.1.0"
