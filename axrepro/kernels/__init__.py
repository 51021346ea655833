"""Operations with several implementations: a plain one in XLA as the reference, and library kernels per platform."""
