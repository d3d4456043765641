"""Messages between the engine, the zygote and its children. All have one version and run on one machine.

The zygote imports this module, so it must stay small.
"""

from __future__ import annotations

import struct

HELLO = struct.Struct("=IIqI")
"""Engine to zygote: vocabulary, bytes of a place, bytes of shared memory, end-of-sequence tokens. Their ids
follow, and the tokenizer's JSON as a text."""
LENGTH = struct.Struct("=I")
"""Precedes each text."""
ORDER = struct.Struct("=IIddqi")
"""Engine to zygote: what, and the child's number; with START, which comes with a socket: seconds for the
compile and for a mask, bytes of memory, niceness of the compile."""
START, KILL = 1, 2
EXITED = struct.Struct("=Ii")
"""Zygote to engine: a child's number, and its exit code, as :func:`os.waitstatus_to_exitcode` gives it."""
COMPILED = struct.Struct("=II")
"""Child to engine: whether the compile succeeded, and its memory in KiB. The reason of a failure follows as a
text."""
ASK = struct.Struct("=BxxxIIII")
"""Engine to child: what, row, number, place, tokens. The ids of the tokens follow, as int32."""
GO_ON, AFRESH, FORGET = 1, 2, 3
"""The tokens continue those of the row, or replace them; or the row is forgotten."""
MASK = struct.Struct("=IIIIIII")
"""Child to engine: row, number, bytes of the mask in its place, microseconds that it took, memory in KiB,
forced tokens, bytes of text. The tokens that must follow the only one that the mask allows are next, as
int32, and then the text; without a mask it says what is wrong."""


def text_frame(text: str) -> bytes:
    data = text.encode()
    return LENGTH.pack(len(data)) + data
