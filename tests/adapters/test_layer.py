"""MultiLoraLinear computes what PEFT's own layers compute, in a batch, and is otherwise the base's linear."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from adapters.layer import MultiLoraLinear, attach, detach, is_four_bit
from adapters.routing import RoutingSet
from adapters.sites import Site, discover_sites
from adapters.slots import SlotBank
from adapters.weights import AdapterWeights, SiteWeights
from tests.support.lora import CPU, Bench, make_weights, plain_weight

KINDS: dict[str, Mapping[str, object]] = {
    "r4": {"r": 4, "lora_alpha": 8},
    "r16": {"r": 16, "lora_alpha": 16},
    "r64": {"r": 64, "lora_alpha": 128},
    "odd scale": {"r": 12, "lora_alpha": 20},
    "rslora": {"r": 8, "lora_alpha": 10, "use_rslora": True},
    "dora": {"r": 8, "lora_alpha": 12, "use_dora": True},
}
SITES = {"l": Site("l", 256, 384, "language")}


class Holder(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.l = linear


def plain_linear(*, bias: bool) -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(256, 384, bias=bias).to(torch.bfloat16).requires_grad_(False)


def four_bit_linear(*, bias: bool) -> nn.Module:
    torch.manual_seed(3)
    source = nn.Linear(256, 384, bias=bias).to(torch.bfloat16)
    linear = Linear4bit(
        256, 384, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True
    )
    linear.to(torch.bfloat16).load_state_dict(source.state_dict())
    linear.support_avx512bf16_for_cpu = False  # the oracle stays unpacked
    return linear.to("cpu").requires_grad_(False)


def weight_of(linear: nn.Module) -> Tensor:
    if isinstance(linear, Linear4bit):
        weight: Tensor = dequantize_4bit(linear.weight.data, getattr(linear.weight, "quant_state"))  # noqa: B009
        return weight
    return plain_weight(linear)


class DequantisedTwin(nn.Module):
    """The base's CPU linear in outline: a 4-bit linear's weight in 16 bits."""

    is_quantised = True

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        bias = linear.bias
        self.weight = nn.Parameter(weight_of(linear).to(torch.bfloat16), requires_grad=False)
        self.bias = bias if isinstance(bias, nn.Parameter) else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


class Oracle:
    """One adapter in PEFT over one linear, with random weights, and the same weights for a slot."""

    def __init__(self, linear: nn.Module, kind: Mapping[str, object], seed: int) -> None:
        torch.manual_seed(seed)
        config = LoraConfig(target_modules=["l"], init_lora_weights=False, **kind)  # type: ignore[arg-type]
        holder = Holder(linear)
        holder.is_loaded_in_4bit = isinstance(linear, Linear4bit)  # type: ignore[assignment]
        self._model = LoraModel(holder, config, "default").eval()
        layer = self._model.get_submodule("model.l")
        assert isinstance(layer, LoraLayer)
        scaling = layer.scaling["default"]
        magnitude = None
        if kind.get("use_dora"):
            learned = layer.lora_magnitude_vector["default"].get_parameter("weight")
            learned.data = learned.data.float() * (0.5 + torch.rand(384))
            magnitude = learned.detach()
        for part in (layer.lora_A, layer.lora_B):
            part.float()
        state = {name: tensor.detach() for name, tensor in self._model.named_parameters()}
        a, b = state["model.l.lora_A.default.weight"], state["model.l.lora_B.default.weight"]
        assert a.dtype == b.dtype == torch.float32
        self.weights = AdapterWeights({"l": SiteWeights(a, b * scaling, magnitude)}, 0, a.shape[0], "")

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self._model.get_submodule("model.l")(x)
        return result


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("make", [plain_linear, four_bit_linear])
def test_a_mixed_batch_equals_peft_one_at_a_time(make: object, bias: bool) -> None:
    assert callable(make)
    oracles = [Oracle(make(bias=bias), kind, seed) for seed, kind in enumerate(KINDS.values())]
    base = make(bias=bias)
    linears = [base, DequantisedTwin(base)] if isinstance(base, Linear4bit) else [base]
    for linear in linears:
        holder = Holder(linear)
        bank, routing = SlotBank(SITES, len(oracles), 64, torch.float32, CPU), RoutingSet.on(CPU)
        attach(holder, SITES, bank, routing, weight_of)
        for slot, oracle in enumerate(oracles):
            bank.write(slot, oracle.weights)
        segments = [(1 + 3 * slot, slot) for slot in range(len(oracles))] + [(2, -1)]
        x = torch.randn(1, sum(n for n, _ in segments), 256).to(torch.bfloat16)
        routing.language.fill(segments)
        with torch.inference_mode():
            found = holder.l(x)
            start = 0
            for num_rows, slot in segments:
                own = x[:, start : start + num_rows]
                expected = base(own) if slot == -1 else oracles[slot](own)
                assert found.dtype == expected.dtype == torch.bfloat16
                mine = found[:, start : start + num_rows]
                if slot == -1:
                    assert torch.equal(mine, expected)
                else:
                    assert (mine != expected).float().mean() < 2e-3, (slot, (mine != expected).float().mean())
                    torch.testing.assert_close(mine, expected, rtol=2**-7, atol=1e-5)
                    assert not torch.allclose(mine, base(own), rtol=0.1)
                start += num_rows


def test_it_tells_4_bit_linears_from_plain_ones() -> None:
    assert is_four_bit(four_bit_linear(bias=False))
    assert is_four_bit(DequantisedTwin(four_bit_linear(bias=True)))
    assert not is_four_bit(plain_linear(bias=True))


def test_base_only_rows_and_untouched_sites_keep_the_bases_bits() -> None:
    bench = Bench({"l": (256, 384), "other": (256, 128)})
    bench.bank.write(0, make_weights(0, {"l": 16}, bench.sites))
    bench.bank.write(1, make_weights(1, {"other": 16}, bench.sites))
    bench.bank.write(2, make_weights(2, {"l": 8, "other": 8}, bench.sites, is_dora=True))
    x = torch.randn(1, 9, 256).to(torch.bfloat16)
    segments = [(2, 0), (1, -1), (2, 1), (3, 2), (1, -1)]
    for name, touched in (("l", {0, 2}), ("other", {1, 2})):
        base, found = bench.base(name, x), bench.run(name, x, segments)
        slots = [slot for n, slot in segments for _ in range(n)]
        for row, slot in enumerate(slots):
            assert torch.equal(found[0, row], base[0, row]) == (slot not in touched)
    bench.bank.clear(2)
    assert torch.equal(bench.run("other", x, [(9, 0)]), bench.base("other", x))


@pytest.mark.parametrize("shape", [(12, 256), (1, 12, 256), (3, 4, 256)])
def test_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    bench = Bench({"l": (256, 384)})
    bench.bank.write(3, make_weights(0, {"l": 16}, bench.sites))
    x = torch.randn(12, 256).to(torch.bfloat16)
    segments = [(5, 3), (7, -1)]
    flat = bench.run("l", x, segments)
    shaped = bench.run("l", x.view(shape), segments)
    assert shaped.shape == (*shape[:-1], 384)
    assert torch.equal(shaped.view(12, 384), flat)


def test_rows_that_the_routing_does_not_know_are_refused() -> None:
    bench = Bench({"l": (256, 384)})
    bench.bank.write(0, make_weights(0, {"l": 16}, bench.sites))
    with pytest.raises(ValueError, match="l got 5 rows, and routing for 4"):
        bench.run("l", torch.randn(5, 256).to(torch.bfloat16), [(4, 0)])
    with pytest.raises(ValueError, match="slot 1, which holds no adapter"):
        bench.run("l", torch.randn(4, 256).to(torch.bfloat16), [(4, 1)])


def test_a_wrapped_linear_still_looks_like_one() -> None:
    bench = Bench({"l": (256, 384)})
    layer = bench.module.get_submodule("l")
    assert isinstance(layer, MultiLoraLinear)
    assert (layer.in_features, layer.out_features) == (256, 384)
    assert layer.weight is layer.base.weight
    assert layer.bias is layer.base.bias
    assert layer.weight.dtype == torch.bfloat16


def test_attach_twice_is_refused_and_detach_restores() -> None:
    bench = Bench({"l": (256, 384), "other": (256, 128)})
    before = {name: bench.module.get_submodule(name).get_submodule("base") for name in bench.sites}
    with pytest.raises(ValueError, match="attached to this model already"):
        attach(bench.module, bench.sites, bench.bank, bench.routing, plain_weight)
    detach(bench.module)
    assert {name: bench.module.get_submodule(name) for name in bench.sites} == before
    detach(bench.module)
    attach(bench.module, bench.sites, bench.bank, bench.routing, plain_weight)


def test_every_part_of_a_qwen_is_wrapped_and_routed_by_its_own_rows() -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 128,
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    sites = discover_sites(model)
    assert len(sites) == 2 * 7 + 2 * 5 + 2
    bank, routing = SlotBank(sites, 2, 8, torch.float32, CPU), RoutingSet.on(CPU)
    attach(model, sites, bank, routing, plain_weight)
    assert discover_sites(model) == sites
    for name, site in sites.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, MultiLoraLinear)
        assert layer._routing is routing.of(site.part)
    detach(model)
    assert not any(isinstance(child, MultiLoraLinear) for child in model.modules())
