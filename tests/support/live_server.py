"""The whole server in this process: a real engine over a real base, behind the real routes on a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from adapters.sources.local import LocalSource
from server.app import create_app
from server.auth import Gate
from server.keys import KeyRing
from server.media import MediaLoader
from server.metrics import Metrics
from server.settings import Settings
from server.state import Engine, ServerState, unready_reasons
from server.uploads import Uploads
from tests.support.serving import Rig
from tests.support.surface import serving


@contextmanager
def live_server(
    checkpoint: str | Path, folder: Path, ring: KeyRing | None = None, **settings: object
) -> Iterator[tuple[str, Rig]]:
    """Its URL, and what is behind it. ``folder/root`` is the adapter root."""
    config = Settings(**settings)  # type: ignore[arg-type]
    root = folder / "root"
    root.mkdir(exist_ok=True, parents=True)
    rig = Rig(str(checkpoint), folder / "state", config.engine_config())
    state = ServerState(
        settings=config,
        registry=rig.registry,
        source=LocalSource([root]),
        engine=cast(Engine, rig.engine),
        processor=rig.base.processor,
        base=rig.base.spec,
        media=MediaLoader.of(config, rig.base.processor.images.max_pixels),
        metrics=Metrics(rig.base.spec.name),
        gate=Gate(ring or KeyRing([]), is_loopback=True),
        uploads=Uploads(folder / "state" / "uploads", int(config.max_adapter_size)),
        max_model_len=rig.engine.max_model_len,
    )
    engine_config = config.engine_config()
    num_slots, block_size = engine_config.num_slots, engine_config.block_size
    state.metrics.watch(num_slots, block_size, rig.engine.status, lambda: not unready_reasons(state))
    try:
        with serving(create_app(state)) as url:
            yield url, rig
    finally:
        rig.close()
        state.media.close()
