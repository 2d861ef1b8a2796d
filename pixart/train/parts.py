"""The modules of a run: the network and the objective's own, which are trained, averaged or only saved."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from pixart.adapters.adapter import AdapterConfig, adapt, share
from pixart.diffusion.objective import (
    OBJECTIVES,
    Denoising,
    Example,
    Objective,
    ObjectiveConfig,
    TrainingModule,
)
from pixart.diffusion.schedule import DiffusionConfig
from pixart.errors import InputError
from pixart.model.initialize import initialize
from pixart.model.pixart import PixArt
from pixart.seeds import derive_seed
from pixart.train.ema import in_fp32, is_fp32, make_ema

MODEL, ADAPTER = "model", "adapter"  # reserved names of parts; all other parts are the objective's


@dataclass
class Parts:
    """A run's modules by name."""

    training: TrainingModule
    trained: dict[str, nn.Module]  # optimised, averaged, saved: the network or its adapter, and the objective's
    averages: dict[str, nn.Module]  # moving averages of the trained modules, in fp32
    kept: dict[str, nn.Module]  # saved and sharded but not trained, e.g. a teacher
    average: PixArt  # the network with averaged weights (or with the averaged adapter)
    shared: frozenset[str] = frozenset()  # trained modules whose "average" is their own weights

    @classmethod
    def of(
        cls,
        network: PixArt,
        objective: Objective,
        adapter: AdapterConfig | None = None,
        seed: int = 0,
        *,
        averaged: bool = True,
    ) -> "Parts":
        """Collect the parts; call this before anything is compiled, sharded or wrapped, since the averages are copies.
        The average of an adapter shares its base network.

        Without `averaged` a module's average shares its weights and costs no memory. Two kinds are copied all the same:
        an adapter, which is small and may hold on to its own tensors, and a module that is not in fp32.
        """
        if reserved := {MODEL, ADAPTER} & {*objective.trained, *objective.state}:
            raise InputError(
                f"objective: it has a module named '{min(reserved)}', a name reserved for the run; rename it"
            )
        objective.state.requires_grad_(False)
        training, own = TrainingModule(network, objective), dict(objective.trained.items())
        trained = own if adapter is not None else {MODEL: network, **own}
        shared = frozenset(name for name, part in trained.items() if not averaged and is_fp32(part))
        averages = {name: share(part) if name in shared else make_ema(part) for name, part in trained.items()}
        kept = dict(objective.state)
        if adapter is None:
            return cls(training, trained, averages, kept, averages[MODEL], shared)
        average = share(network)
        mine, averaged = (adapt(of, adapter, seed) for of in (network, average))
        training.adapter = mine
        averages = {ADAPTER: in_fp32(averaged).eval().requires_grad_(False), **averages}
        return cls(training, {ADAPTER: mine, **own}, averages, kept, average, shared)

    @property
    def network(self) -> PixArt:
        return self.training.network

    @property
    def objective(self) -> Objective:
        return self.training.objective

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained modules' parameters: the network's under their own names, others prefixed by their module's."""
        for part, module in self.trained.items():
            prefix = "" if part == MODEL else f"{part}."
            yield from ((prefix + name, parameter) for name, parameter in module.named_parameters())

    def to_train(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer gets: those that are not frozen."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def averaged(self) -> Iterator[tuple[str, nn.Module]]:
        """The trained modules whose average is a tensor of its own, to be updated after every step."""
        yield from ((name, module) for name, module in self.trained.items() if name not in self.shared)

    def averaged_objective(self) -> Objective:
        """The objective with the averages of its trained modules; everything else is shared."""
        objective = copy.copy(self.objective)
        averages = {name: module for name, module in self.averages.items() if name not in (MODEL, ADAPTER)}
        objective._modules = {**self.objective._modules, "trained": nn.ModuleDict(averages)}
        return objective.eval()


def make_objective(config: ObjectiveConfig, diffusion: DiffusionConfig, network: nn.Module, seed: int) -> Objective:
    """The objective named in the configuration; its trained modules are initialised from `seed` and the tensors' names.

    Raises:
        InputError: there is no such objective, or it does not take an option.
    """
    kind = OBJECTIVES[config.name]
    try:
        objective = kind(diffusion, network, **config.options)
    except TypeError as error:
        raise InputError(f"objective '{config.name}' does not accept its options {config.options}: {error}") from None
    initialize(objective.trained, derive_seed(seed, "objective"))
    return objective


def leaves_unused(training: TrainingModule, example: Example) -> bool:
    """Whether a step may leave weights without a gradient, which torch's DDP must know in advance."""
    if type(training.objective) is not Denoising:  # another objective may use other weights at each step
        return True
    loss = training(example)["loss"].sum()
    reached, seen, todo = set(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        todo += [following for following, _ in node.next_functions]
    return any(p.requires_grad and id(p) not in reached for p in training.parameters())


@torch.no_grad()
def count_parameters(parts: Parts) -> int:
    return sum(parameter.numel() for _, parameter in parts.named_parameters())
