"""``agcl check --config ...``: what a run would see and need, and all that stands in its way, without training."""
