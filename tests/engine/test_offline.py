"""The synchronous door: the server's own tokens, and a base that is afterwards what it was before."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from adapters.errors import AdapterRejected, RejectReason
from adapters.layer import MultiLoraLinear
from base.config import BaseConfig
from base.loader import load_base
from base.model import BaseModel
from base.pocket import CHECKPOINT
from base.prompt import ImagePart, Message, PromptInputs, TextPart
from engine.errors import ContextTooLong
from engine.offline import OfflineEngine
from tests.support.scenes import scene
from tests.support.serving import Ask, Rig
from training.generation import Generator, GeneratorFactory

SAMPLES = Path(__file__).resolve().parents[2] / "adapters" / "samples"
FRENCH, JSON = SAMPLES / "french", SAMPLES / "json"
NUM_TOKENS = 16
ASKS = (
    Ask("What color is the circle?", "french", (scene("red", "circle"),), NUM_TOKENS),
    Ask("Hello!", "french", (), NUM_TOKENS),
    Ask("Describe the picture.", "french", (scene("blue", "square", (150, 110)),), NUM_TOKENS),
    Ask("Tell me of the sea and of the sky. " * 40, "french", (), NUM_TOKENS),
    Ask("Count to ten.", "french", (), NUM_TOKENS),
)


def prompt_of(base: BaseModel, ask: Ask) -> PromptInputs:
    pictures = tuple(ImagePart(image) for image in ask.images)
    return base.processor.prepare_chat([Message("user", (*pictures, TextPart(ask.text)))])


def content_of(module: nn.Module) -> str:
    """A digest of every bit of every tensor, by name."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(
                name.encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base(BaseConfig(device="cpu"))


@pytest.fixture(scope="module")
def prompts(base: BaseModel) -> list[PromptInputs]:
    return [prompt_of(base, ask) for ask in ASKS]


@pytest.fixture
def engine(base: BaseModel) -> Iterator[OfflineEngine]:
    with OfflineEngine(base) as made:
        yield made


def test_it_fits_the_seam_that_training_knows() -> None:
    factory: GeneratorFactory = OfflineEngine
    generator: type[Generator] = OfflineEngine
    assert factory is generator


def test_its_answers_are_the_server_s_in_the_prompts_order(
    base: BaseModel, prompts: list[PromptInputs], engine: OfflineEngine, tmp_path: Path
) -> None:
    rig = Rig(str(CHECKPOINT), tmp_path / "state")
    rig.register({"french": FRENCH})

    async def served() -> list[tuple[int, ...]]:
        return [(await rig.answer(ask, ignore_eos=False)).token_ids for ask in ASKS]

    expected = asyncio.run(served())
    rig.close()
    count: list[None] = []
    answers = engine.generate(prompts, FRENCH, max_tokens=NUM_TOKENS, on_answer=lambda: count.append(None))
    assert answers == expected
    assert len(count) == len(prompts)
    assert len({len(answer) for answer in answers}) > 1, "all ended alike: the order was not tried"
    assert not any(end in answer for end in base.spec.eos_token_ids for answer in answers)


def test_the_base_and_each_adapter_answer_for_themselves(
    prompts: list[PromptInputs], engine: OfflineEngine
) -> None:
    kinds = (None, FRENCH, JSON, SAMPLES / "patterns", FRENCH)
    told = [engine.generate(prompts[:3], folder, max_tokens=8) for folder in kinds]
    assert told[1] == told[4]
    assert told[0] != told[1] != told[2] != told[0]


def test_no_prompts_no_answers(engine: OfflineEngine) -> None:
    assert engine.generate([], FRENCH, max_tokens=4) == []


def test_the_last_logits_choose_the_first_token(
    base: BaseModel, prompts: list[PromptInputs], engine: OfflineEngine
) -> None:
    for prompt in prompts[:4]:  # with a picture, without, and longer than one prefill chunk
        for folder in (None, FRENCH):
            logits = engine.last_logits(prompt, folder)
            assert logits.shape == (base.spec.vocab_size,)
            assert logits.dtype is torch.float32
            first = engine.generate([prompt], folder, max_tokens=1)[0]
            assert (int(logits.argmax()),) == first or int(logits.argmax()) in base.spec.eos_token_ids
            assert torch.equal(logits, engine.last_logits(prompt, folder))
    assert not torch.equal(engine.last_logits(prompts[0], None), engine.last_logits(prompts[0], FRENCH))


def test_a_folder_that_changed_is_another_adapter(
    prompts: list[PromptInputs], engine: OfflineEngine, tmp_path: Path
) -> None:
    folder = shutil.copytree(FRENCH, tmp_path / "adapter")
    before = engine.generate(prompts[:2], folder, max_tokens=8)
    shutil.copytree(JSON, folder, dirs_exist_ok=True)
    assert engine.generate(prompts[:2], folder, max_tokens=8) == engine.generate(
        prompts[:2], JSON, max_tokens=8
    )
    assert before == engine.generate(prompts[:2], FRENCH, max_tokens=8)


def test_a_hub_cache_s_links_are_followed(
    prompts: list[PromptInputs], engine: OfflineEngine, tmp_path: Path
) -> None:
    shutil.copytree(FRENCH, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "snapshot" / name).symlink_to(Path("..") / "blobs" / name)
    linked = engine.generate(prompts[:1], tmp_path / "snapshot", max_tokens=4)
    assert linked == engine.generate(prompts[:1], FRENCH, max_tokens=4)


def test_a_refused_package_is_an_adapter_error_and_the_next_question_is_answered(
    prompts: list[PromptInputs], engine: OfflineEngine, tmp_path: Path
) -> None:
    broken = shutil.copytree(FRENCH, tmp_path / "broken")
    (broken / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterRejected) as caught:
        engine.generate(prompts[:1], broken, max_tokens=4)
    assert caught.value.reason is RejectReason.MISSING_FILE
    assert engine.generate(prompts[:1], FRENCH, max_tokens=4)


def test_a_prompt_longer_than_the_base_is_said_to_be(base: BaseModel, engine: OfflineEngine) -> None:
    long = base.processor.prepare_ids([5] * base.spec.max_positions)
    with pytest.raises(ContextTooLong):
        engine.generate([long], None, max_tokens=4)
    assert engine.generate([base.processor.prepare_ids([5, 6])], None, max_tokens=2)


def test_memory_follows_the_prompts_and_its_bound_does_not_refuse_a_long_one(
    base: BaseModel, prompts: list[PromptInputs]
) -> None:
    with OfflineEngine(base, kv_bytes=1) as small, OfflineEngine(base) as large:
        tight = small.generate(prompts, FRENCH, max_tokens=NUM_TOKENS)
        small.close()
        assert tight == large.generate(prompts, FRENCH, max_tokens=NUM_TOKENS)


def test_close_leaves_nothing_behind(base: BaseModel, prompts: list[PromptInputs], tmp_path: Path) -> None:
    before, threads = content_of(base.module), set(threading.enumerate())
    linears = {name: child for name, child in base.module.named_modules() if name.endswith("_proj")}
    engine = OfflineEngine(base, scratch=tmp_path)
    first = engine.generate(prompts[:3], FRENCH, max_tokens=8)
    assert any(isinstance(child, MultiLoraLinear) for child in base.module.modules())
    engine.close()
    engine.close()
    assert content_of(base.module) == before
    assert all(base.module.get_submodule(name) is child for name, child in linears.items())
    assert {thread for thread in threading.enumerate() if "lorikeet" in thread.name} <= threads
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="closed"):
        engine.generate(prompts[:1], None, max_tokens=1)
    with OfflineEngine(base) as again:
        assert again.generate(prompts[:3], FRENCH, max_tokens=8) == first


def test_an_engine_that_cannot_be_built_leaves_the_base_alone(
    base: BaseModel, prompts: list[PromptInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("engine.build.KVCache", full)
    with OfflineEngine(base) as engine, pytest.raises(MemoryError):
        engine.generate(prompts[:1], None, max_tokens=1)
    assert not any(isinstance(child, MultiLoraLinear) for child in base.module.modules())


def test_training_on_a_base_goes_on_as_if_nobody_had_asked_in_between(
    prompts: list[PromptInputs], tmp_path: Path
) -> None:
    """In fp32, on the same linears: the same gradients to the bit before and after an engine's life."""
    # as training loads it: PEFT goes around plain linears, which serving alone repacks
    base = load_base(BaseConfig(quantization="none", dtype="float32", device="cpu", cpu_linear="unpacked"))
    before = gradients(base, prompts[0])
    with OfflineEngine(base) as engine:
        for name in (
            "adapter_config.json",
            "adapter_model.safetensors",
        ):  # its lorikeet.json names the base in 4 bits
            shutil.copyfile(FRENCH / name, tmp_path / name)
        assert engine.generate(prompts[:2], tmp_path, max_tokens=4)
        assert engine.last_logits(prompts[0], None).dtype is torch.float32
    after = gradients(base, prompts[0])
    assert before.keys() == after.keys() != set()
    assert all(torch.equal(before[name], after[name]) for name in before)


def gradients(base: BaseModel, prompt: PromptInputs) -> dict[str, Tensor]:
    """Of every LoRA weight, by PEFT, through vision and the language model with stock attention."""
    language = base.module.model.language_model.config
    served = language._attn_implementation
    language._attn_implementation = "sdpa"
    torch.manual_seed(0)
    targets = r".*(self_attn\.[qkvo]_proj|mlp\.down_proj|merger\.mlp\.[02]|attn\.qkv)"
    model = get_peft_model(base.module, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    ids = torch.tensor([prompt.ids])
    output = model(
        input_ids=ids,
        labels=ids,
        pixel_values=torch.cat([image.pixels for image in prompt.images]),
        image_grid_thw=torch.tensor([image.grid for image in prompt.images]),
        mm_token_type_ids=(ids == base.spec.image_token_id).int(),
    )
    output.loss.backward()
    grads = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.unload()
    language._attn_implementation = served
    base.module.requires_grad_(False)
    return grads
