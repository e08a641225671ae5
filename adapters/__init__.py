"""The adapters: packages, registry, device slots and the layers that apply them. No request, no HTTP; imports nothing of ours."""
