"""A reader of GGUF files that reads an array in one piece; the package's own takes seconds for a
vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType
from gguf.gguf_reader import ReaderField


class FastReader(GGUFReader):
    """A ``GGUFReader`` that keeps an array of strings as one part, which :func:`contents` splits.

    Raises ValueError for files of the other byte order.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if self.byte_order != "I":
            raise ValueError(
                "written for machines of the other byte order; convert it with gguf-convert-endian"
            )
        if GGUFValueType(raw_type) != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        item, begin = GGUFValueType(kind[0]), orig_offs + 12
        types = [GGUFValueType.ARRAY, item]
        if item == GGUFValueType.STRING:
            whole = self._get(begin, np.uint8, _end_of_strings(self.data, begin, int(length[0])) - begin)
        elif item in self.gguf_scalar_to_np:
            whole = self._get(begin, self.gguf_scalar_to_np[item], length[0])
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return 12 + whole.nbytes, [kind, length, whole], [2], types


def contents(field: ReaderField) -> Any:
    """Return the value of a field: str, number, bool, or a list. Raises ValueError if it is malformed."""
    if field.types != [GGUFValueType.ARRAY, GGUFValueType.STRING]:
        return field.contents()
    data, at, found = field.parts[field.data[0]].tobytes(), 0, []
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 8], "little")
        found.append(data[at + 8 : end].decode())
        at = end
    return found


def _end_of_strings(data: np.memmap[Any, Any], begin: int, count: int) -> int:
    """Return where ``count`` strings end, each of which follows its length in 8 bytes."""
    view, at = data.view(np.ndarray).data, begin
    for _ in range(count):
        at += 8 + int.from_bytes(view[at : at + 8], "little")
        if at > len(view):
            raise ValueError("an array of strings is longer than the file")
    return at
