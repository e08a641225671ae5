"""AdapterLayers: PEFT's LoRA layers on a base's linears: put on, taken off for a while or for good, read and written.

Owns: the adapter's weights, always fp32, and which of them learn. The base's own linears are never touched: a layer
holds its linear, and taking off is putting that linear back. Does not know: tokens, losses, files' folders.
Place in a training run: made at attaching, kept to the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from base.linear import dequantised_weight
from base.model import BaseModel
from training.model.lora_parts import Dropout, ScaledLinear
from training.recipe.recipe import Part
from training.targets.targets import Targets

ADAPTER: Final = "default"
_WRAPPER: Final = "base_model.model."


class AdapterLayers:
    """One adapter on one base."""

    def __init__(self, base: BaseModel, targets: Targets, seed: int) -> None:
        """Wraps the target linears of ``base.module`` in place. Raises ValueError if something wraps them already, or
        if PEFT wraps others than the targets."""
        self.module = base.module
        self.targets = targets
        names = [target.name for target in targets.modules]
        self.linears: Final[Mapping[str, nn.Module]] = {
            name: self.module.get_submodule(name) for name in names
        }
        _check_bare(self.linears)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an older name
            torch.manual_seed(seed)
            self.peft = PeftModel(self.module, lora_config(targets, base), ADAPTER)
        self.layers: Final[Mapping[str, LoraLinear]] = self._wrapped()
        self.is_on = True
        self.is_enabled = True
        self._parts = {target.name: target.part for target in targets.modules}
        self._learning: frozenset[Part] = frozenset(targets.parts)
        self._settle_weights()
        self.learn(targets.parts)

    def _wrapped(self) -> dict[str, LoraLinear]:
        wrapped = {
            name: cast("LoraLinear", child)  # or its 4-bit twin, which has the same members
            for name, child in self.module.named_modules()
            if isinstance(child, LoraLayer)
        }
        if wrapped.keys() != self.linears.keys():
            odd = sorted(wrapped.keys() ^ self.linears.keys())
            raise ValueError(f"PEFT wrapped other modules than the targets, such as {odd[0]}: report this")
        return wrapped

    @torch.no_grad()
    def _settle_weights(self) -> None:
        """All in fp32. DoRA's magnitude is made anew: PEFT's has the base's precision, and so would change step 0."""
        for name, layer in self.layers.items():
            for parameter in _adapter_parameters(layer).values():
                parameter.data = parameter.data.float()
            weight_b = layer.get_parameter(f"lora_B.{ADAPTER}.weight")
            layer.lora_B[ADAPTER] = ScaledLinear(weight_b, layer.scaling[ADAPTER])
            layer.scaling[ADAPTER] = 1.0
            if self.targets.dora:
                weight = dequantised_weight(self.linears[name])
                magnitude = layer.get_parameter(f"lora_magnitude_vector.{ADAPTER}.weight")
                magnitude.copy_(torch.linalg.norm(weight, dim=1))

    # ---- what learns -------------------------------------------------------------------------------------------

    @property
    def learning(self) -> frozenset[Part]:
        return self._learning

    def learn(self, parts: Collection[Part]) -> None:
        """Only ``parts`` from now on; the others keep what they know, and act without dropout.

        Raises ValueError for a part without a layer.
        """
        absent = [part for part in parts if part not in self.targets.parts]
        if absent or not parts:
            here = ", ".join(self.targets.parts)
            raise ValueError(f"the adapter has no module in {', '.join(absent) or 'no part'}: it has {here}")
        self._learning = frozenset(parts)
        for name, layer in self.layers.items():
            is_learning = self._parts[name] in self._learning
            for parameter in _adapter_parameters(layer).values():
                parameter.requires_grad_(is_learning)
            # none at all, rather than one of 0, is what spares DoRA a second product with the base's weight
            rate = self.targets.dropout if is_learning else 0.0
            layer.lora_dropout[ADAPTER] = (Dropout(rate) if rate else nn.Identity()).train(layer.training)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All of the adapter, by the names that ``named_parameters`` of the PEFT model gives them."""
        return {
            f"{_WRAPPER}{name}.{key}": parameter
            for name, layer in self.layers.items()
            for key, parameter in _adapter_parameters(layer).items()
        }

    def part_of(self, parameter_name: str) -> Part:
        """Raises KeyError for what is no parameter of the adapter."""
        module = parameter_name.split(_WRAPPER, 1)[-1].split(".lora_")[0]
        return self._parts[module]

    # ---- on and off --------------------------------------------------------------------------------------------

    def take_off(self) -> None:
        """The base's own linears are in place again. Idempotent."""
        if self.is_on:
            self._put(self.linears)
            self.is_on = False

    def put_on(self) -> None:
        """Raises RuntimeError if somebody else wrapped the linears meanwhile. Idempotent."""
        if self.is_on:
            return
        for name, linear in self.linears.items():
            if self.module.get_submodule(name) is not linear:
                raise RuntimeError(
                    f"{name} is still wrapped by a serving engine: close it before training goes on"
                )
        self._put(self.layers)
        self.is_on = True

    def _put(self, modules: Mapping[str, nn.Module]) -> None:
        for name, child in modules.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.module.get_submodule(parent), leaf, child)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The layers pass the base's own output on."""
        was_enabled = self.is_enabled
        self._enable(False)
        try:
            yield
        finally:
            self._enable(was_enabled)

    def _enable(self, is_enabled: bool) -> None:
        """PEFT's switch turns gradients on and off too; what learns stays as it was."""
        for layer in self.layers.values():
            layer.enable_adapters(is_enabled)
        self.is_enabled = is_enabled
        self.learn(self._learning)

    # ---- weights -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Copies on the CPU, fp32, by the names of PEFT's files."""
        return {
            file_key(name): parameter.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, parameter in self.parameters().items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless ``state`` has exactly this adapter's tensors."""
        own = {file_key(name): parameter for name, parameter in self.parameters().items()}
        odd = sorted(own.keys() ^ state.keys()) or sorted(
            name for name in own if own[name].shape != state[name].shape
        )
        if odd:
            raise ValueError(
                f"these weights are of another adapter: {len(odd)} tensors differ, such as {odd[0]}"
            )
        for name, parameter in own.items():
            parameter.copy_(state[name])


def lora_config(targets: Targets, base: BaseModel) -> LoraConfig:
    """What PEFT is told, and what stands in ``adapter_config.json``."""
    return LoraConfig(
        r=targets.r,
        lora_alpha=targets.alpha,  # type: ignore[arg-type]  # PEFT divides by r: fractions are as good
        target_modules=targets.pattern,
        rank_pattern=targets.rank_pattern,
        alpha_pattern=targets.alpha_pattern,
        lora_dropout=targets.dropout,
        use_rslora=targets.rslora,
        use_dora=targets.dora,
        bias="none",
        base_model_name_or_path=base.spec.name,
        revision=base.spec.revision,
    )


def file_key(parameter_name: str) -> str:
    """As PEFT spells a parameter in ``adapter_model.safetensors``."""
    key = parameter_name.replace(f".{ADAPTER}", "")
    return key.removesuffix(".weight") if "lora_magnitude_vector" in key else key


def _adapter_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: each for name, each in layer.named_parameters() if name.startswith("lora_")}


def _check_bare(linears: Mapping[str, nn.Module]) -> None:
    for name, linear in linears.items():
        if isinstance(linear, LoraLayer) or not isinstance(getattr(linear, "weight", None), nn.Parameter):
            raise ValueError(f"{name} is wrapped already: detach the adapters that are on this base first")
