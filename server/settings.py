"""Settings: everything an operator can choose, each with one home, one default, a unit and a reason.

Owns: the names, defaults, ranges and cross-checks. ``server/sources.py`` reads the flags, the environment and the file.
Does not know: what the values do; it builds the frozen configs that the lower rooms take.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, PrivateAttr, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from server.keys import hash_key
from server.memory_text import parse_budget
from server.prefixes import Options, read_options, require_options, require_prefixes, show_options

if TYPE_CHECKING:
    from base.config import BaseConfig
    from engine.config import EngineConfig

MIB = 1 << 20


def _split(value: object) -> object:
    """``a,b`` from a flag or the environment; a list from a file."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _hash(value: object) -> object:
    return hash_key(value) if isinstance(value, str) else value


def _budget(value: object) -> object:
    """Checked here, parsed where it is used."""
    if isinstance(value, str):
        parse_budget(value)
    return value


Paths = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split)]
Hosts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Prefixes = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split), AfterValidator(require_prefixes)]
BudgetText = Annotated[str, BeforeValidator(_budget)]
ObjectOptions = Annotated[Options, NoDecode, BeforeValidator(read_options), AfterValidator(require_options)]
HashedKey = Annotated[str, BeforeValidator(_hash)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MediaPolicy = Literal["auto", "off", "allowlist", "public"]


def _set(default: object, unit: str, reason: str) -> Any:
    """A field with its unit and reason; Any, as pydantic's own ``Field`` returns, so that it fits each annotation."""
    return Field(default, description=reason, json_schema_extra={"unit": unit}, validate_default=True)


class Settings(BaseSettings):
    """Frozen. Construct directly in tests; ``server.sources.resolve`` adds flags, environment and file."""

    model_config = SettingsConfigDict(
        env_prefix="LORIKEET_", extra="forbid", frozen=True, hide_input_in_errors=True
    )
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    # fmt: off
    # ---- where it listens
    host: str = _set("127.0.0.1", "address", "Only this machine can reach the default; others need keys.")
    port: Annotated[int, Field(ge=0, le=65535)] = _set(8000, "port", "vLLM's, so clients find it; 0 is any free one.")

    # ---- the base
    base: str = _set("pocket", "name, hub id or folder", "The embedded base answers without a download.")
    revision: str | None = _set(None, "branch, tag or commit", "Pins a hub id; none takes its default branch.")
    quantization: Literal["nf4", "none"] = _set("nf4", "kind", "4 bits let a 7B base fit 8 GB; none is for comparison.")
    dtype: Literal["bfloat16", "float16", "float32"] = _set("bfloat16", "type", "What the bases were trained in.")
    device: str = _set("auto", "torch device", "auto is CUDA where there is one, else the CPU.")
    cpu_linear: Literal["auto", "native", "float32", "dequantised", "packed", "unpacked"] = _set(
        "auto", "kind", "How layers compute on a CPU: auto takes the compiled kernel, float32 copies where there is "
        "none, and with AVX512-BF16 16-bit copies.")
    cuda_kernels: Literal["auto", "triton", "torch"] = _set(
        "auto", "kind", "On CUDA: auto takes each Triton kernel that agrees with its plain twin at start, triton "
        "insists, torch takes bitsandbytes and torch.")
    min_pixels: Count | None = _set(None, "pixels", "Smallest area an image is resized to; none is the checkpoint's.")
    max_pixels: Count | None = _set(None, "pixels", "Largest area an image is resized to; none is the checkpoint's.")
    local_files_only: bool = _set(False, "yes or no", "Yes never asks the hub: for machines without a network.")

    # ---- adapters
    adapter_root: Paths = _set((), "folders, comma between", "Where packages may be registered from, and what is "
                               "registered at start; none is the bundled samples.")
    state_dir: Path | None = _set(None, "folder", "Registry and copied packages; none is a folder of the base's "
                                  "name in the user's data directory.")
    num_slots: Count = _set(8, "adapters", "How many are on the device at once; a rank in use takes room for all.")
    max_rank: Annotated[int, Field(ge=1, le=1024)] = _set(64, "rank", "Most published adapters are at or below it.")
    max_adapter_size: ByteSize = _set(2048 * MIB, "bytes", "A package over it is refused before it is read.")
    cpu_adapters: Literal["auto", "native", "torch"] = _set(
        "auto", "kind", "On a CPU: auto takes the compiled kernel if it agrees with its plain twin at start, native "
        "insists.")
    device_adapter_memory: Annotated[ByteSize, Field(ge=1)] | None = _set(
        None, "bytes", "Of the slots' pages together; none leaves it to num_slots and max_rank.")
    host_adapter_memory: ByteSize = _set(1024 * MIB, "bytes", "Adapter weights kept in host memory behind the slots.")
    adapter_store_size: Annotated[ByteSize, Field(ge=1)] | None = _set(
        None, "bytes", "Of all registered packages; beyond it registering is 507. None leaves it to the disk.")
    load_on_demand: bool = _set(True, "yes or no", "Whether a request may bring its adapter to the device.")
    unload_timeout_s: Seconds = _set(30.0, "seconds", "An unload waits so long for the adapter's requests to end.")

    # ---- packages from other machines
    hub_organisations: Names = _set((), "names, comma between", "Whose hf:// packages may be registered; none switches "
                                    "the hub off as a source.")
    hub_token: SecretStr | None = _set(
        None, "secret", "Reads private and gated packages. No login of this machine is used.")
    hub_endpoint: str | None = _set(None, "URL", "A mirror of the hub; none is what HF_ENDPOINT says, or the hub.")
    object_prefixes: Prefixes = _set((), "URLs, comma between", "Below which packages may be registered: "
                                     "s3://bucket/folder, gs://..., az://...; none switches object stores off.")
    object_options: ObjectOptions = _set(
        {}, "JSON by scheme", "What a store's driver is opened with, by its own names; none is its own configuration.")
    fetch_timeout_s: Seconds = _set(300.0, "seconds", "A package that has not come by then is given up.")

    # ---- the engine's budgets
    device_memory: BudgetText = _set("auto", "bytes, share or auto", "Of all that is on the device: 70GiB or 0.9. auto "
                                     "is 0.9 of a GPU where kv_memory is open, and no bound on a CPU.")
    engine_process: Literal["auto", "yes", "no"] = _set(
        "auto", "yes, no or auto", "A process of its own for the engine, so that no stream waits for its Python and it "
        "is started anew if it dies; auto: on a GPU.")
    cuda_graphs: Literal["auto", "on", "off"] = _set(
        "auto", "on, off or auto", "Decodes on a GPU are recorded at start and replayed with one launch; on refuses to "
        "start where that cannot be.")
    step_ahead: Literal["auto", "off"] = _set(
        "auto", "off or auto", "A recorded decode is started before the tokens of the one before it were read, so that "
        "the GPU never waits for the host; off takes one after the other.")
    kv_memory: ByteSize | None = _set(None, "bytes", "Keys and values of all sequences; none is what device_memory "
                                      "leaves, and 256 MiB without it.")
    vision_cache_memory: ByteSize = _set(256 * MIB, "bytes", "Image embeddings kept for the next question.")
    max_model_len: Count | None = _set(None, "tokens", "Prompt plus output; none is what base and cache allow.")
    max_batch_tokens: Count = _set(512, "tokens", "Of one step: the longest a prefill may delay the next token.")
    prefill_chunk: Count = _set(256, "tokens", "Most of one prompt in one step. No answer depends on it.")
    prefill_beside_decodes: Count | None = _set(
        None, "tokens", "Most of all prompts in a step in which others decode: larger answers new requests sooner, "
        "smaller delays running ones less. none is 32 on a CPU, where time goes with tokens, else prefill_chunk.")
    prefix_cache: bool = _set(True, "yes or no", "Whether prompts that begin alike share what was computed, in what "
                              "kv_memory has free. No never shows a caller, by time, what others asked.")
    max_running: Count = _set(64, "requests", "That decode at once.")
    max_waiting: Count = _set(256, "requests", "In the queue; the next is 429.")
    max_waiting_tokens: Count = _set(262_144, "prompt tokens", "In the queue; the next is 429.")
    max_image_patches: Count = _set(16_384, "patches", "Encoded in one step; one larger image still goes alone.")
    queue_timeout_s: Seconds = _set(120.0, "seconds", "A request that nobody started by then is 504.")
    request_timeout_s: Seconds = _set(900.0, "seconds", "A request that has not ended by then is cut, 504.")

    # ---- what a client may send
    max_body: ByteSize = _set(64 * MIB, "bytes", "Of one request; a few photographs as base64 fit.")
    max_image_bytes: ByteSize = _set(20 * MIB, "bytes", "Of one image, encoded.")
    max_image_pixels: Count = _set(16_777_216, "pixels", "Of one image, from its header, before it is decoded.")
    max_images: Count = _set(16, "images", "In one request.")
    max_request_image_bytes: ByteSize = _set(64 * MIB, "bytes", "Of all images of one request, encoded.")
    max_request_image_pixels: Count = _set(67_108_864, "pixels", "Of all images of one request.")
    original_max_pixels: Count = _set(12_845_056, "pixels", "detail=original keeps up to so many: 16,384 tokens.")
    media_policy: MediaPolicy = _set("auto", "policy", "http(s) images; auto is public on loopback, else allowlist.")
    media_allowlist: Hosts = _set((), "hosts, comma between", "For that policy; *.example.com takes subdomains.")

    # ---- who may ask
    api_key: HashedKey | None = _set(None, "secret or sha256:HEX", "One key with every scope. Kept hashed.")
    api_keys_file: Path | None = _set(None, "TOML file", "[[key]] tables: name, key, scopes, adapters, quota.")
    insecure_no_auth: bool = _set(False, "yes or no", "Serve other machines without keys, without the admin routes.")
    allowed_hosts: Hosts = _set((), "hosts, comma between", "Further Host names accepted on a loopback address.")

    # ---- connections and logs
    keepalive_s: Seconds = _set(15.0, "seconds", "A silent stream sends a comment this often, so proxies keep it.")
    slow_reader_timeout_s: Seconds = _set(30.0, "seconds", "A client that takes nothing for so long is cut.")
    drain_timeout_s: Seconds = _set(30.0, "seconds", "On SIGTERM, requests in flight get so long to end.")
    log_level: Literal["debug", "info", "warning", "error"] = _set("info", "level", "What is written to stderr.")
    log_format: Literal["text", "json"] = _set("text", "format", "json is for collectors.")
    # fmt: on

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Nothing is read behind the constructor's back."""
        return (init_settings,)

    @model_validator(mode="after")
    def _check_exposure(self) -> Settings:
        if not (self.is_loopback or self.has_keys or self.insecure_no_auth):
            raise ValueError(
                f"host {self.host} is reachable from other machines and no key is set: set api_key or api_keys_file, "
                "bind 127.0.0.1, or pass --insecure-no-auth if you mean it"
            )
        return self

    @model_validator(mode="after")
    def _check_pixels(self) -> Settings:
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is over max_pixels {self.max_pixels}")
        return self

    @property
    def is_loopback(self) -> bool:
        return is_loopback_host(self.host)

    @property
    def has_keys(self) -> bool:
        return self.api_key is not None or self.api_keys_file is not None

    @property
    def resolved_media_policy(self) -> Literal["off", "allowlist", "public"]:
        if self.media_policy == "auto":
            return "public" if self.is_loopback else "allowlist"
        return self.media_policy

    @property
    def base_slug(self) -> str:
        """The base's name as a folder name."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.base).strip("-.") or "base"

    def origin(self, name: str) -> str:
        """``flag``, ``environment LORIKEET_X``, ``file NAME`` or ``default``."""
        return self._origins.get(name, "default")

    def with_origins(self, origins: Mapping[str, str]) -> Settings:
        self._origins.update(origins)
        return self

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, value, origin) of every setting, for the start page; secrets are not shown."""
        return [(name, self._shown(name), self.origin(name)) for name in type(self).model_fields]

    def _shown(self, name: str) -> str:
        value: object = getattr(self, name)
        if name in ("api_key", "hub_token"):
            return "set" if value else "none"
        if isinstance(value, dict):
            return show_options(value)
        if isinstance(value, ByteSize):
            return value.human_readable(separator=" ")
        if isinstance(value, tuple):
            return ",".join(map(str, value)) or "none"
        return "none" if value is None else str(value)

    def base_config(self) -> BaseConfig:
        from base.config import BaseConfig

        return BaseConfig(
            source=self.base,
            revision=self.revision,
            quantization=self.quantization,
            dtype=self.dtype,
            device=self.device,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            cpu_linear=self.cpu_linear,
            cuda_kernels=self.cuda_kernels,
            local_files_only=self.local_files_only,
        )

    def engine_config(self) -> EngineConfig:
        from engine.config import EngineConfig

        return EngineConfig(
            num_slots=self.num_slots,
            max_rank=self.max_rank,
            device_memory=parse_budget(self.device_memory),
            kv_bytes=None if self.kv_memory is None else int(self.kv_memory),
            max_model_len=self.max_model_len,
            max_batch_tokens=self.max_batch_tokens,
            prefill_chunk=self.prefill_chunk,
            prefill_beside_decodes=self.prefill_beside_decodes,
            prefix_cache=self.prefix_cache,
            max_running=self.max_running,
            max_waiting=self.max_waiting,
            max_waiting_tokens=self.max_waiting_tokens,
            max_image_patches_per_step=self.max_image_patches,
            device_adapter_bytes=None
            if self.device_adapter_memory is None
            else int(self.device_adapter_memory),
            host_adapter_bytes=int(self.host_adapter_memory),
            vision_cache_bytes=int(self.vision_cache_memory),
            cuda_graphs=self.cuda_graphs,
            cpu_adapters=self.cpu_adapters,
            step_ahead=self.step_ahead,
            load_on_demand=self.load_on_demand,
        )


def is_loopback_host(host: str) -> bool:
    """Whether binding to it keeps other machines out."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
