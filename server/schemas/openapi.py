"""The request bodies as OpenAPI describes them: routes read their bodies themselves, so FastAPI cannot see them.

Pure. Place in a request's way: none; read at import, for /openapi.json.
"""

from __future__ import annotations

from collections.abc import Mapping

from server.schemas.base import Wire

_REFERENCE = "#/$defs/"


def json_body(model: type[Wire]) -> dict[str, object]:
    """``openapi_extra`` for a route whose JSON body is ``model``; definitions replace the references to them."""
    schema = model.model_json_schema(by_alias=True)
    definitions = schema.pop("$defs", {})
    content = {"application/json": {"schema": _inlined(schema, definitions)}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(node: object, definitions: Mapping[str, object]) -> object:
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    reference = node.get("$ref")
    if isinstance(reference, str):
        return _inlined(definitions[reference.removeprefix(_REFERENCE)], definitions)
    return {key: _inlined(value, definitions) for key, value in node.items()}
