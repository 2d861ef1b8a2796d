"""How weights start: every module from generators named after its tensors."""

import torch
from torch import Tensor, nn

from pixart.seeds import derive_seed


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Give all weights of `module` their start, each from a generator of its own, by `seed` and the tensor's name.

    So networks that differ in one idea start alike in all else. `nn.Linear` starts as Xavier's uniform with zero bias,
    other layers of torch as they reset themselves. A module with a method `init_weights(generators)` then sets what it
    wants otherwise; `generators("name")` is the generator of its own tensor of that name.
    """
    tensors: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def generator(name: str) -> torch.Generator:
        return torch.Generator(tensors[name].device).manual_seed(derive_seed(seed, name))

    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight, generator=generator(f"{prefix}weight"))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif hasattr(part, "reset_parameters"):
            with torch.random.fork_rng():
                torch.manual_seed(derive_seed(seed, name))
                part.reset_parameters()
    for name, part in module.named_modules():
        if hasattr(part, "init_weights"):
            prefix = f"{name}." if name else ""
            part.init_weights(lambda tensor, prefix=prefix: generator(prefix + tensor))
