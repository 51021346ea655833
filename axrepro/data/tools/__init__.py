"""The commands of `python -m axrepro.data`, and what they draw and write."""
