"""The compiled loops of deltas: write what changed as streams, apply streams.

They run without the interpreter's lock.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.cpython.unsafe.numbers import trailing_zeros
from numba.extending import intrinsic

from penstock.weights.compiled import compiled

BLOCK_BYTES = 128
"""Compared at a time: as many words as a mask of 64 bits has room for, if they are of two bytes."""
STRETCH_BYTES = 8 * 1024
"""Looked through before what changed in it is written."""
FORESEEN = 3
"""Changes of a block that are written whether they are there or not."""
PLACES = STRETCH_BYTES // 2 + FORESEEN
"""Room for the changes of a stretch of the narrowest words, and for those that are written and are not there."""
LONG_GAP = 255
"""A byte of gaps that adds itself and goes on."""
MAX_EXTRA = 255
"""Units beyond the first that a change of more than one unit may be told by; beyond, it is told as a word."""

AHEAD = 48
"""Changes between asking for a word's cache line and writing to it: about what a memory access takes."""


@intrinsic
def _differing(typing_context, old, new, start):  # type: ignore[no-untyped-def]
    """Which of BLOCK_BYTES of words from `start` on are not the same: uint64, the first word in the lowest bit."""
    num_words = 8 * BLOCK_BYTES // new.dtype.bitwidth

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        words = ir.VectorType(ir.IntType(new.dtype.bitwidth), num_words)
        old_block, new_block = (
            _load(context, builder, signature.args[which], arguments[which], arguments[2], words)
            for which in (0, 1)
        )
        flags = builder.bitcast(builder.icmp_unsigned("!=", old_block, new_block), ir.IntType(num_words))
        return builder.zext(flags, ir.IntType(64)) if num_words < 64 else flags

    return types.uint64(old, new, start), generate


def _load(context: Any, builder: Any, kind: Any, array: Any, start: Any, words: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    address = builder.bitcast(builder.gep(data, [start]), words.as_pointer())
    return builder.load(address, align=1)


@intrinsic
def _count(typing_context, flags):  # type: ignore[no-untyped-def]
    """How many bits of a uint64 are set."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@intrinsic
def _prefetch(typing_context, words, index):  # type: ignore[no-untyped-def]
    """Asks for the cache line of words[index], to write to it; nothing waits for it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.bitcast(builder.gep(array.data, [arguments[1]]), cgutils.voidptr_t)
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, flag, flag, flag])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
        for_writing, keep, data = flag(1), flag(3), flag(1)
        builder.call(prefetch, [address, for_writing, keep, data])
        return context.get_dummy_value()

    return types.void(words, index), generate


@compiled
def _write_places(old, new, start, end, places):  # type: ignore[no-untyped-def]
    """Writes which words of a whole number of blocks differ. Returns how many.

    Most blocks have few changes, and which ones have any cannot be foreseen: room for some is written whether
    they are there or not, which is sooner done than a branch is guessed wrong.
    """
    one = np.uint64(1)
    found = np.uint64(0)
    for block in range(start, end, np.uint64(BLOCK_BYTES // new.itemsize)):
        flags = _differing(old, new, block)
        place, found = found, found + _count(flags)
        for _ in range(FORESEEN):
            places[place] = block + trailing_zeros(flags)
            flags &= flags - one
            place += one
        while flags != 0:
            places[place] = block + trailing_zeros(flags)
            flags &= flags - one
            place += one
    return found


@compiled
def _write_gap(stream, place, gap):  # type: ignore[no-untyped-def]
    """Writes a gap from `place` on. Returns where its last byte is."""
    while gap >= np.uint64(LONG_GAP):
        stream[place] = LONG_GAP
        place += np.uint64(1)
        gap -= np.uint64(LONG_GAP)
    stream[place] = gap
    return place


@compiled
def write_changes(old, new, most, places, gaps, signs, others, extras, words):  # type: ignore[no-untyped-def]
    """Writes the streams of a sparse frame. Returns the numbers of changes, gap bytes, bytes of others, extras, words.

    Ends with more than `most` changes, and streams that say nothing, if there are more.
    places: scratch, [PLACES] uint64.
    Indices are unsigned, for numba looks at each signed one, whether it counts from the end.
    """
    one, three, seven = np.uint64(1), np.uint64(3), np.uint64(7)
    last_bit = np.uint64(8 * new.itemsize - 1)
    mask = (one << last_bit << one) - one
    size, stretch = np.uint64(new.size), np.uint64(STRETCH_BYTES // new.itemsize)
    whole = size - size % np.uint64(BLOCK_BYTES // new.itemsize)
    num_changes = num_gaps = num_others = num_extras = num_words = np.uint64(0)
    behind = np.uint64(0)  # the word behind the last change
    behind_other = np.uint64(0)  # the change behind the last other one
    eight = np.uint64(0)  # the last eight signs
    start = np.uint64(0)
    while start < size:
        if start < whole:
            end = min(start + stretch, whole)
            found = _write_places(old, new, start, end, places)
        else:
            end, found = size, np.uint64(0)
            for word in range(whole, size):
                if old[word] != new[word]:
                    places[found] = word
                    found += one
        start = end
        if num_changes + found > np.uint64(most):
            return num_changes + found, num_gaps, num_others, num_extras, num_words
        for index in range(found):  # while both versions' lines are in the cache
            position = places[index]
            num_gaps = _write_gap(gaps, num_gaps, position - behind) + one
            behind = position + one
            step = (np.uint64(new[position]) - np.uint64(old[position])) & mask
            sign = step >> last_bit
            eight = eight >> one | sign << seven
            signs[num_changes >> three] = eight  # its place is right once there are eight
            extra = ((step ^ (np.uint64(0) - sign)) + sign - one) & mask
            # Which changes are of more than one unit cannot be foreseen: each is written as if, and written over.
            is_other = np.uint64(extra != 0)
            num_others = _write_gap(others, num_others, (num_changes - behind_other) * is_other) + is_other
            num_changes += one
            behind_other += (num_changes - behind_other) * is_other
            is_word = extra > np.uint64(MAX_EXTRA)
            extras[num_extras] = extra * np.uint64(not is_word)
            num_extras += is_other
            if is_word:
                words[num_words] = new[position]
                num_words += one
    if num_changes & seven:
        signs[num_changes >> three] = eight >> (np.uint64(8) - (num_changes & seven))
    return num_changes, num_gaps, num_others, num_extras, num_words


@compiled
def _find_positions(num_words, num_changes, gaps, positions):  # type: ignore[no-untyped-def]
    """Writes the place of each change. False if they do not fit into `num_words`, or the gaps are not used up.

    Which bytes go on cannot be foreseen: a place is written after each, and written over if it was none.
    """
    position = place = np.uint64(0)
    for gap in gaps:
        position += np.uint64(gap)
        positions[place] = position
        is_place = np.uint64(gap != LONG_GAP)
        place += is_place
        position += is_place
    goes_on = gaps.size > 0 and gaps[gaps.size - 1] == LONG_GAP
    return place == np.uint64(num_changes) and position <= np.uint64(num_words) and not goes_on


@compiled
def _unit(signs, change):  # type: ignore[no-untyped-def]
    """1, or what is -1 modulo any width."""
    one = np.uint64(1)
    return one - (np.uint64(signs[change >> np.uint64(3)]) >> (change & np.uint64(7)) & one) * np.uint64(2)


@compiled
def _add_units(span, num_changes, signs, positions):  # type: ignore[no-untyped-def]
    """Moves each changed word by one unit.

    Changes lie about a cache line apart, where the processor guesses none of them: with all positions known
    first, lines are asked for ahead, and wait for each other no more.
    Behind the last position the scratch holds anything; asking for a line that is none is no fault.
    """
    for change in range(np.uint64(num_changes)):
        _prefetch(span, np.uint64(positions[change + np.uint64(AHEAD)]))
        span[np.uint64(positions[change])] += _unit(signs, change)


@compiled
def _add_changes(span, num_changes, gaps, signs, others, extras, words, positions, places):  # type: ignore[no-untyped-def]
    """Applies a sparse frame to `span`. False, with nothing beyond its bounds read or written, if it cannot be."""
    if not _find_positions(span.size, num_changes, gaps, positions):
        return False
    _add_units(span, num_changes, signs, positions)
    if not _find_positions(num_changes, extras.size, others, places):
        return False
    next_word = np.uint64(0)
    for other in range(np.uint64(extras.size)):
        change = np.uint64(places[other])
        position = np.uint64(positions[change])
        extra = np.uint64(extras[other])
        if extra != 0:
            span[position] += _unit(signs, change) * extra
        elif next_word < np.uint64(words.size):
            span[position] = words[next_word]
            next_word += np.uint64(1)
        else:
            return False
    return next_word == np.uint64(words.size)


@compiled
def add_frames(span, table, gaps, signs, others, extras, words, positions, places):  # type: ignore[no-untyped-def]
    """Applies sparse frames, one after the other. Returns how many, before one that cannot be.

    table: [F, 8] int64: where a frame's words begin in `span`, how many, its changes, and the sizes of its
    streams, which stand one behind the other.
    positions, places: scratch, [at least the most bytes of gaps and of others of a frame, and AHEAD] uint32.
    """
    gap = sign = other = extra = word = 0  # where the frame's streams begin
    for frame in range(table.shape[0]):
        start, num_words, num_changes, num_gaps, num_signs, num_others, num_extras, num_own = table[frame]
        if not _add_changes(
            span[start : start + num_words],
            num_changes,
            gaps[gap : gap + num_gaps],
            signs[sign : sign + num_signs],
            others[other : other + num_others],
            extras[extra : extra + num_extras],
            words[word : word + num_own],
            positions,
            places,
        ):
            return frame
        gap, sign, other = gap + num_gaps, sign + num_signs, other + num_others
        extra, word = extra + num_extras, word + num_own
    return table.shape[0]
