"""Fair comparison of continual-learning methods: each tuned with as many trials, each run a process of its own."""

from agcl.compare.comparing import compare_methods
from agcl.compare.settings import Comparison, Method, read_comparison

__all__ = ["Comparison", "Method", "compare_methods", "read_comparison"]
