"""Random numbers as mergekit draws them, for `--rng mergekit`: one after the other from torch's generator on the CPU.

mergekit 0.1.5 seeds the generator once, visits tensors in the order of their names and models in the order of the
recipe, and draws one number per element wherever a density is below 1. Where a tensor's numbers begin is found by
drawing all before them: some 9 ns per element, once per run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge.base.dtypes import DTYPES
from streammerge.kernels.contract import BLOCK
from streammerge.plan.plan import Plan

_AT_ONCE = 1 << 20


class Draws:
    """The numbers of every tensor and model: where in the stream each begins, and how far it has come."""

    def __init__(self, plan: Plan) -> None:
        self._states: dict[tuple[str, int], Tensor] = {}
        # The generators of the tensor in work, with the element each has come to.
        self._open: dict[tuple[str, int], tuple[torch.Generator, int]] = {}
        generator = torch.Generator().manual_seed(plan.seed)
        for tensor in sorted(plan.tensors, key=lambda tensor: tensor.name):
            settings = plan.settings.get(tensor.name)
            if settings is None or DTYPES[tensor.dtype].kind == "exact":
                continue
            for model, density in enumerate(settings.numbers("density")):
                if density < 1:
                    self._states[tensor.name, model] = generator.get_state()
                    _skip(generator, tensor.elements)

    def tile(self, tensor: str, models: int, start: int, elements: int) -> Tensor:
        """(blocks, models, BLOCK) float32 numbers in [0, 1) for elements [start, start + elements); 0 where none is."""
        numbers = torch.zeros(-(-elements // BLOCK), models, BLOCK)
        if not any(name == tensor for name, _ in self._open):
            self._open.clear()
        for model in range(models):
            if (tensor, model) in self._states:
                drawn = torch.zeros(numbers.shape[0] * BLOCK)
                drawn[:elements].uniform_(generator=self._at(tensor, model, start, elements))
                numbers[:, model] = drawn.view(-1, BLOCK)
        return numbers

    def _at(self, tensor: str, model: int, start: int, elements: int) -> torch.Generator:
        """A generator that has come to element `start`; `elements` will be drawn from it."""
        generator, at = self._open.get((tensor, model), (torch.Generator(), -1))
        if at != start:
            generator.set_state(self._states[tensor, model])
            _skip(generator, start)
        self._open[tensor, model] = (generator, start + elements)
        return generator


def _skip(generator: torch.Generator, elements: int) -> None:
    scratch = torch.empty(min(elements, _AT_ONCE))
    while elements:
        count = min(elements, _AT_ONCE)
        scratch[:count].uniform_(generator=generator)
        elements -= count
