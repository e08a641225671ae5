"""Everything that can go wrong with an adapter, as values with fields.

AdapterError
├── AdapterNotFound        no such name or version (carries near names)
├── AdapterNotLoaded       it is registered, and only an explicit load brings it to the device
├── InvalidAdapterName     the name may not be given to an adapter
├── AdapterExists          the name is taken by other content
├── NothingToRollBack      the name or alias has meant nothing else before
├── AdapterBusy            it is in use and the caller did not want to wait
├── AdapterRejected        a package was read and refused (carries a reason of ``RejectReason`` and details)
├── SourceRejected         the source may not be read: outside the allowed roots, bad URL, nothing there
│   ├── SourceOff          this server takes no packages from such places
│   └── DriverMissing      the package that reads such places is not installed
├── FetchFailed            an allowed source did not give its package: network, time, bytes cut off
├── InsufficientMemory     it cannot fit the device or host budget
└── InsufficientStorage    the disk is full
"""

from __future__ import annotations

from enum import StrEnum


class RejectReason(StrEnum):
    """The closed list of reasons for refusing a package; part of the wire."""

    MISSING_FILE = "missing_file"
    UNSAFE_FORMAT = "unsafe_format"
    BAD_CONFIG = "bad_config"
    UNSUPPORTED_KIND = "unsupported_kind"
    UNSUPPORTED_OPTION = "unsupported_option"
    BASE_MISMATCH = "base_mismatch"
    BAD_TENSOR_FILE = "bad_tensor_file"
    UNKNOWN_KEYS = "unknown_keys"
    MISSING_KEYS = "missing_keys"
    BAD_SHAPE = "bad_shape"
    BAD_DTYPE = "bad_dtype"
    RANK_TOO_LARGE = "rank_too_large"
    TOO_LARGE = "too_large"
    NON_FINITE = "non_finite"
    NO_EFFECT = "no_effect"
    DIGEST_MISMATCH = "digest_mismatch"
    PROBE_FAILED = "probe_failed"
    PROBE_MISMATCH = "probe_mismatch"


class AdapterError(Exception):
    """Root of the tree; ``str()`` says what, the limit, and what to do."""


class AdapterNotFound(AdapterError):
    def __init__(self, name: str, near: tuple[str, ...] = ()) -> None:
        self.name = name
        self.near = near
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        super().__init__(f"no adapter named {name[:96]!r}{hint}")


class AdapterNotLoaded(AdapterError):
    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"adapter {name!r} is registered but not loaded, and this server loads none on demand: load it first"
        )


class InvalidAdapterName(AdapterError):
    def __init__(self, name: str, why: str) -> None:
        self.name = name
        super().__init__(f"{name[:96]!a} cannot name an adapter: {why}")


class AdapterExists(AdapterError):
    def __init__(
        self, name: str, why: str = "exists with other content; remove it or choose another name"
    ) -> None:
        self.name = name
        super().__init__(
            f"an adapter named {name!r} {why}" if why.startswith("exists") else f"{name!r} {why}"
        )


class NothingToRollBack(AdapterError):
    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"{name!r} has no earlier version to go back to; promote one of its versions instead"
        )


class AdapterBusy(AdapterError):
    def __init__(self, name: str, num_requests: int) -> None:
        self.name = name
        self.num_requests = num_requests
        super().__init__(f"adapter {name!r} is serving {num_requests} requests; wait for them or retry")


class AdapterRejected(AdapterError):
    """``details`` holds at most 10 lines, each naming a key, file or value."""

    def __init__(self, reason: RejectReason, message: str, details: tuple[str, ...] = ()) -> None:
        self.reason = reason
        self.details = details[:10]
        super().__init__(message)


class SourceRejected(AdapterError):
    pass


class SourceOff(SourceRejected):
    pass


class DriverMissing(SourceRejected):
    pass


class FetchFailed(AdapterError):
    pass


class InsufficientMemory(AdapterError):
    pass


class InsufficientStorage(AdapterError):
    pass
