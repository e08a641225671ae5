"""Settings: one home each, origins kept, unknown names refused, and no open door by accident."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ByteSize, ValidationError

from engine.config import MemoryBudget
from server.settings import Settings, is_loopback_host
from server.sources import SettingsError, data_home, describe, resolve


def test_flags_beat_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "lorikeet.toml"
    file.write_text('port = 1\nnum_slots = 3\nkv_memory = "1GiB"\nadapter_root = ["/a", "/b"]\n')
    environ = {"LORIKEET_PORT": "2", "LORIKEET_MAX_RUNNING": "7", "LORIKEET_NUM_SLOTS": "4"}
    settings = resolve({"port": "3"}, file, environ)
    assert (settings.port, settings.num_slots, settings.max_running) == (3, 4, 7)
    assert settings.kv_memory == 1 << 30
    assert settings.adapter_root == (Path("/a"), Path("/b"))
    assert settings.origin("port") == "flag"
    assert settings.origin("num_slots") == "environment LORIKEET_NUM_SLOTS"
    assert settings.origin("kv_memory") == "file lorikeet.toml"
    assert settings.origin("max_rank") == "default"


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("port = 1\n")
    assert resolve({}, None, {"LORIKEET_CONFIG": str(file)}).port == 1
    with pytest.raises(SettingsError, match="no settings file"):
        resolve({}, tmp_path / "none.toml", {})


@pytest.mark.parametrize(
    ("flags", "environ", "text", "why"),
    [
        ({"prot": 1}, {}, "", "unknown setting 'prot' (flag); did you mean port?"),
        (
            {},
            {"LORIKEET_PROT": "1"},
            "",
            "unknown environment variable LORIKEET_PROT; did you mean LORIKEET_PORT?",
        ),
        ({}, {}, "prot = 1", "unknown setting 'prot' (file lorikeet.toml); did you mean port?"),
        ({}, {}, "port = ", "cannot read the settings file"),
        ({"port": "x"}, {}, "", "port (flag): Input should be a valid integer"),
        (
            {},
            {"LORIKEET_NUM_SLOTS": "0"},
            "",
            "num_slots (environment LORIKEET_NUM_SLOTS): Input should be greater",
        ),
        ({}, {"LORIKEET_DRAIN_TIMEOUT_S": "nan"}, "", "drain_timeout_s"),
        ({"min_pixels": 9, "max_pixels": 4}, {}, "", "min_pixels 9 is over max_pixels 4"),
    ],
)
def test_what_cannot_be_meant_is_an_error_that_says_where(
    tmp_path: Path, flags: dict[str, object], environ: dict[str, str], text: str, why: str
) -> None:
    file = tmp_path / "lorikeet.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        resolve(flags, file, environ)
    assert why in str(caught.value)


def test_the_constructor_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIKEET_PORT", "99")
    assert Settings().port == 8000


def test_the_process_environment_is_read_by_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIKEET_PORT", "99")
    assert resolve({}).port == 99


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "box.lan"])
def test_other_machines_get_in_by_keys_or_by_insisting_only(host: str) -> None:
    with pytest.raises(SettingsError, match="reachable from other machines"):
        resolve({"host": host}, environ={})
    assert resolve({"host": host, "insecure_no_auth": True}, environ={}).host == host
    assert resolve({"host": host}, environ={"LORIKEET_API_KEY": "a-long-secret"}).has_keys


def test_loopback_hosts() -> None:
    assert all(map(is_loopback_host, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback_host, ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "")))


def test_a_key_is_hashed_at_once_and_never_shown() -> None:
    settings = resolve({}, environ={"LORIKEET_API_KEY": "a-long-secret"})
    assert str(settings.api_key).startswith("sha256:")
    assert "a-long-secret" not in repr(settings) + str(settings.rows())
    assert ("api_key", "set", "environment LORIKEET_API_KEY") in settings.rows()
    with pytest.raises(SettingsError) as caught:
        resolve({}, environ={"LORIKEET_API_KEY": "tiny-1"})
    assert "tiny-1" not in str(caught.value)


def test_the_media_policy_follows_the_address() -> None:
    assert Settings().resolved_media_policy == "public"
    assert Settings(host="0.0.0.0", insecure_no_auth=True).resolved_media_policy == "allowlist"
    assert Settings(media_policy="off").resolved_media_policy == "off"


def test_every_setting_has_a_unit_a_reason_and_a_row() -> None:
    docs = describe()
    assert (
        [doc.name for doc in docs]
        == list(Settings.model_fields)
        == [name for name, _, _ in Settings().rows()]
    )
    assert all(doc.unit and doc.reason for doc in docs)
    assert {doc.name for doc in docs if doc.is_flag_only} >= {"load_on_demand", "insecure_no_auth"}


def test_the_lower_configs_take_every_value() -> None:
    settings = Settings(
        base="x/y",
        num_slots=3,
        kv_memory=ByteSize(1 << 20),
        max_rank=8,
        load_on_demand=False,
        prefill_chunk=32,
        dtype="float32",
    )
    base, engine = settings.base_config(), settings.engine_config()
    assert (base.source, base.dtype) == ("x/y", "float32")
    assert (engine.num_slots, engine.kv_bytes, engine.max_rank, engine.load_on_demand) == (
        3,
        1 << 20,
        8,
        False,
    )
    assert engine.prefill_chunk == 32


@pytest.mark.parametrize(
    "text, budget",
    [
        ("auto", None),
        ("0.9", MemoryBudget(share=0.9)),
        ("90%", MemoryBudget(share=0.9)),
        ("1", MemoryBudget(share=1.0)),
        ("70GiB", MemoryBudget(num_bytes=70 << 30)),
        ("2000000", MemoryBudget(num_bytes=2_000_000)),
    ],
)
def test_a_memory_budget_is_bytes_or_a_share(text: str, budget: MemoryBudget | None) -> None:
    assert Settings(device_memory=text).engine_config().device_memory == budget


@pytest.mark.parametrize("text", ["", "0", "-1", "120%", "much", "nan", "inf", "-5%", "0%"])
def test_what_is_no_memory_budget_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match=r"auto, a share such as 0\.9"):
        Settings(device_memory=text)


def test_defaults_agree_with_the_lower_rooms() -> None:
    from base.config import BaseConfig
    from engine.config import EngineConfig

    assert Settings().base_config() == BaseConfig()
    assert Settings().engine_config() == EngineConfig()


def test_the_data_folder() -> None:
    assert data_home({"XDG_DATA_HOME": "/data"}) == Path("/data")
    assert data_home({}).parts[-2:] == (".local", "share")
    assert Settings(base="Qwen/Qwen2.5-VL-3B-Instruct").base_slug == "Qwen-Qwen2.5-VL-3B-Instruct"
    assert Settings(base="../..").base_slug == "base"
