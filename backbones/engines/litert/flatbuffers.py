"""What a LiteRT file says of itself: names of its ends, and facts as JSON.

The facts are a metadata buffer of the flatbuffer, named ``backbones``; other programs pass over it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from backbones.optional import optional_import

__all__ = ["INPUT", "SIGNATURE", "describe", "facts_of"]

SIGNATURE = "serving_default"
INPUT = "input"
_KEY = b"backbones"


def describe(content: bytes, outputs: Sequence[str], facts: Mapping[str, Any]) -> bytes:
    """Return a file with names of the input and the outputs, and with facts (JSON values)."""
    tools = optional_import("ai_edge_litert.tools.flatbuffer_utils", "litert")
    schema = optional_import("ai_edge_litert.schema_py_generated", "litert")
    model = tools.read_model_from_bytearray(content)
    (signature,) = model.signatureDefs
    signature.inputs[0].name = INPUT.encode()
    by_place = {f"output_{place}".encode(): name for place, name in enumerate(outputs)}
    for output in signature.outputs:
        output.name = by_place[output.name].encode()
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = list(json.dumps(facts, allow_nan=False).encode())
    entry.name, entry.buffer = _KEY, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or ()), entry]
    return bytes(tools.convert_object_to_bytearray(model))


def facts_of(content: bytes) -> dict[str, Any] | None:
    """Return the facts in a file; None if there are none."""
    schema = optional_import("ai_edge_litert.schema_py_generated", "litert")
    model = schema.Model.GetRootAs(content, 0)
    for place in range(model.MetadataLength()):
        entry = model.Metadata(place)
        if entry.Name() == _KEY:
            data = model.Buffers(entry.Buffer()).DataAsNumpy()
            return json.loads(data.tobytes())
    return None
