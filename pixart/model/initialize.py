"""Weight initialisation, with one random generator per tensor."""

import torch
from torch import Tensor, nn

from pixart.seeds import derive_seed


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Initialise all weights of `module`, each from a generator seeded with `seed` and the tensor's name.

    Two networks that differ in one module therefore start with equal weights everywhere else. `nn.Linear` gets Xavier
    uniform weights and zero bias, other torch layers their `reset_parameters`. Afterwards `init_weights(generators)` is
    called on every module that has it; `generators("name")` is the generator of that module's tensor `name`.
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
