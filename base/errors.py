"""What the base can answer instead of working.

BaseError
├── BaseNotFound           the folder or hub id cannot be read
├── UnsupportedBase        it is read, but it is not a base that we can serve
├── KernelRefused          a kernel that was insisted on does not serve here, or broke the device when it was tried
└── PromptError            one prompt is at fault, not the base
    ├── InvalidImageCount  image placeholders and images do not match
    ├── InvalidImage       an image that cannot be made into patches
    ├── InvalidToken       a token id that is out of range, or that only an image may bring
    └── InvalidMessage     a role, an order of roles or a tool call that the chat template cannot take
"""

from __future__ import annotations


class BaseError(Exception):
    """Root of the tree."""


class BaseNotFound(BaseError):
    def __init__(self, source: str, reason: str) -> None:
        self.source = source
        self.reason = reason
        super().__init__(f"cannot read the base {source!r}: {reason}")


class UnsupportedBase(BaseError):
    def __init__(self, source: str, reason: str) -> None:
        self.source = source
        self.reason = reason
        super().__init__(f"cannot serve the base {source!r}: {reason}")


class KernelRefused(BaseError):
    def __init__(self, kind: str, reason: str, setting: str = "cuda_kernels") -> None:
        """setting: by which plain torch is chosen instead."""
        self.kind = kind
        self.reason = reason
        super().__init__(f"the {kind} kernel cannot serve here ({reason}): set {setting} to torch")


class PromptError(BaseError):
    pass


class InvalidImageCount(PromptError):
    def __init__(self, num_placeholders: int, num_images: int) -> None:
        self.num_placeholders = num_placeholders
        self.num_images = num_images
        super().__init__(
            f"the prompt has room for {num_placeholders} images but {num_images} were given: "
            "give each image as one content part of a message whose role the chat template shows images for"
        )


class InvalidImage(PromptError):
    pass


class InvalidToken(PromptError):
    pass


class InvalidMessage(PromptError):
    pass
