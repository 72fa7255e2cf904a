"""The storage side of the xet protocol, as far as an upload needs it: it puts files together from what was sent.

The formats are those of https://huggingface.co/docs/xet (pages xorb and shard). A xorb is a row of chunks, each with
an 8-byte header; a shard lists for each file its SHA-256 and the chunks of xorbs that it consists of. The files'
SHA-256 are checked, the xorbs' hashes are not.
"""

import hashlib
import struct

import lz4.frame

HEADER, ENTRY = 48, 48  # bytes of a shard's header and of each entry in it
VERIFIED, DESCRIBED = 1 << 31, 1 << 30  # flags of a file: a range hash for each entry, and the SHA-256, follow


def read_chunks(xorb):
    """The chunks of a xorb, decompressed. Errors: ValueError for a compression that is not known."""
    chunks, at = [], 0
    while at + 8 <= len(xorb) and not xorb[at:].startswith(b"XETBLOB"):  # which begins a footer
        length, scheme, whole = xorb[at + 1 : at + 4], xorb[at + 4], int.from_bytes(xorb[at + 5 : at + 8], "little")
        data = xorb[at + 8 : at + 8 + int.from_bytes(length, "little")]
        at += 8 + len(data)
        if scheme > 2:
            raise ValueError(f"compression scheme {scheme} of a chunk is not known")
        data = lz4.frame.decompress(data) if scheme else data
        chunks.append(ungroup(data) if scheme == 2 else data)
        assert len(chunks[-1]) == whole
    return chunks


def ungroup(data):
    """Bytes 0, 4, 8 ..., then 1, 5, 9 ... and so on, in their old order."""
    result, at = bytearray(len(data)), 0
    for first in range(4):
        count = len(range(first, len(data), 4))
        result[first::4] = data[at : at + count]
        at += count
    return bytes(result)


def read_files(shard, xorbs):
    """The files that a shard describes, {SHA-256 in hexadecimal: bytes}, from {name: bytes} of xorbs."""
    files, at = {}, HEADER
    while shard[at : at + 32] != b"\xff" * 32:
        flags, count = struct.unpack("<II", shard[at + 32 : at + 40])
        at, data = at + HEADER, b""
        for number in range(count):
            name, _, _, first, last = struct.unpack("<32s4I", shard[at + ENTRY * number : at + ENTRY * (number + 1)])
            data += b"".join(read_chunks(xorbs[in_words(name)])[first:last])
        at += ENTRY * count * (2 if flags & VERIFIED else 1)
        assert flags & DESCRIBED
        digest = in_words(shard[at : at + 32])
        assert digest in (hashlib.sha256(data).hexdigest(), in_words(hashlib.sha256(data).digest()))
        files[hashlib.sha256(data).hexdigest()] = data
        at += ENTRY
    return files


def in_words(name):
    """A hash as xet writes it: four numbers of 64 bits, each with its lowest byte first."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", name))
