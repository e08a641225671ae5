"""The adapters: packages, registry, device slots and the layers that apply them. Knows no request and no HTTP."""
