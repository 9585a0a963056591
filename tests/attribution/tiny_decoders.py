"""Tiny random decoders and a check that attribution left a module as it was."""

import copy

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCAB = 23
IDS = torch.tensor([[5, 9, 3, 17, 9, 21, 2]])
POSITIONS = torch.tensor([3, 6])
TARGETS = torch.tensor([7, 11])


class WideRMSNorm(nn.Module):
    """RMSNorm without transformers' detour through float32, so that float64 tests can be tight."""

    def __init__(self, weight, eps):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def randomised(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
        if parameter.dim() == 1:
            parameter.data += 0.5
    return model.double().eval()


def tiny_llama(seed=0, tied=True, key_value_heads=2, attention="sdpa", **options):
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        head_dim=4,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        attn_implementation=attention,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    model = LlamaForCausalLM(config)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, WideRMSNorm(child.weight, child.variance_epsilon))
    return randomised(model, seed)


def tiny_gpt2(seed=0, attention="sdpa"):
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=16,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation=attention,
    )
    return randomised(GPT2LMHeadModel(config), seed)


class Snapshot:
    """What must not change: instance dicts, hooks, flags, config, parameters (bits, storage), ``.grad``."""

    def __init__(self, model):
        self.model = model
        self.state = self._read()

    def _read(self):
        modules = {}
        for name, module in self.model.named_modules():
            own = {k: v for k, v in vars(module).items() if not k.endswith("hooks") and k not in ("config", "training")}
            hooks = {k: list(v) for k, v in vars(module).items() if "_hooks" in k and v is not None}
            modules[name] = (
                type(module),
                sorted(vars(module)),
                module.training,
                hooks,
                {k: id(v) for k, v in own.items()},
            )
        parameters = {
            name: (
                id(p),
                p.data_ptr(),
                p._version,
                p.requires_grad,
                sorted(p.__dict__),
                p.detach().clone(),
                None if p.grad is None else (id(p.grad), p.grad.clone()),
            )
            for name, p in self.model.named_parameters(remove_duplicate=False)
        }
        config = copy.deepcopy(self.model.config.to_dict()) if hasattr(self.model, "config") else None
        return modules, parameters, config

    def assert_untouched(self):
        modules, parameters, config = self._read()
        assert modules == self.state[0]
        assert config == self.state[2]
        assert parameters.keys() == self.state[1].keys()
        for name, (*marks, value, grad) in parameters.items():
            *old_marks, old_value, old_grad = self.state[1][name]
            assert marks == old_marks, name
            assert torch.equal(value, old_value), name
            assert (grad is None) == (old_grad is None), name
            if grad is not None:
                assert grad[0] == old_grad[0], name
                assert torch.equal(grad[1], old_grad[1]), name
