"""Attribution and gates in training loops other than agcl's own: plain PyTorch, Hugging Face's Trainer, TRL's.

None of them loads Lightning.
"""
