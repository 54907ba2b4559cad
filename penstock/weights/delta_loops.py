"""The compiled loops of deltas: write what changed as streams, apply streams.

They run without the interpreter's lock.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.cpython.unsafe.numbers import trailing_zeros
from numba.extending import intrinsic

from penstock.weights.compiled import compiled

LANES = 8
"""64-bit lanes that are compared together."""
LONG_GAP = 255
"""A byte of gaps that adds itself and goes on."""

_AHEAD = 64
"""Changes between asking for a word's cache line and writing to it: about what a memory access takes."""


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
def write_changes(old, new, wide_old, wide_new, most, places, gaps, symbols, steps, words):  # type: ignore[no-untyped-def]
    """Writes the streams of a sparse frame. Returns the numbers of changes, gap bytes, steps and words.

    Ends with `most` + 1 changes, and streams that say nothing, if there are more than `most`.
    wide_old, wide_new: the same memory as 64-bit lanes; [M] uint64, M a multiple of LANES. What is behind them
    is less than a block. places: scratch for one block's changes.
    """
    bits = 8 * new.itemsize
    lane_words = 8 // new.itemsize
    shift = 4 if bits == 16 else 5
    top = np.int64(1) << bits
    half = np.int64(1) << (bits - 1)
    mask = np.uint64(top - 1)
    num_changes = num_gaps = num_steps = num_words = 0
    behind = 0  # the word behind the last change
    for block in range(0, wide_new.size + 1, LANES):
        found = 0
        if block == wide_new.size:
            for word in range(wide_new.size * lane_words, new.size):
                if old[word] != new[word]:
                    places[found] = word
                    found += 1
        else:
            differing = np.uint64(0)
            for lane in range(block, block + LANES):
                differing |= wide_old[lane] ^ wide_new[lane]
            if differing == 0:
                continue
            for lane in range(block, block + LANES):
                differing = wide_old[lane] ^ wide_new[lane]
                while differing != 0:
                    within = np.int64(trailing_zeros(differing)) >> shift
                    differing &= ~(mask << np.uint64(within << shift))
                    places[found] = lane * lane_words + within
                    found += 1
        if num_changes + found > most:
            return most + 1, 0, 0, 0
        for index in range(found):  # while both versions' lines are in the cache
            position = places[index]
            gap = position - behind
            behind = position + 1
            while gap >= LONG_GAP:
                gaps[num_gaps] = LONG_GAP
                num_gaps += 1
                gap -= LONG_GAP
            gaps[num_gaps] = gap
            num_gaps += 1
            step = (np.int64(new[position]) - np.int64(old[position])) & (top - 1)
            if step >= half:
                step -= top
            if step == 1 or step == -1:
                symbol = (1 - step) >> 1
            elif -128 <= step <= 127:
                symbol = 2
                steps[num_steps] = step & 255
                num_steps += 1
            else:
                symbol = 3
                words[num_words] = new[position]
                num_words += 1
            place = 2 * (num_changes & 3)
            symbols[num_changes >> 2] = symbol if place == 0 else symbols[num_changes >> 2] | symbol << place
            num_changes += 1
    return num_changes, num_gaps, num_steps, num_words


@compiled
def _find_positions(num_words, num_changes, gaps, positions):  # type: ignore[no-untyped-def]
    """Writes the place of each change. False if they do not fit into `num_words`, or the gaps are not used up."""
    position = next_gap = 0
    for change in range(num_changes):
        gap = LONG_GAP
        while gap == LONG_GAP:
            if next_gap >= gaps.size:
                return False
            gap = int(gaps[next_gap])
            next_gap += 1
            position += gap
        if position >= num_words:
            return False
        positions[change] = position
        position += 1
    return next_gap == gaps.size


@compiled
def _add_changes(span, num_changes, gaps, symbols, steps, words, positions):  # type: ignore[no-untyped-def]
    """Applies a sparse frame to `span`. False, with nothing beyond its bounds read or written, if it cannot be.

    positions: scratch, [at least num_changes] uint32. Changes lie about a cache line apart, where the processor
    guesses none of them: with all positions known first, lines are asked for ahead, and wait for each other no more.
    """
    if not _find_positions(span.size, num_changes, gaps, positions):
        return False
    for change in range(min(_AHEAD, num_changes)):
        _prefetch(span, np.int64(positions[change]))
    next_step = next_word = 0
    for change in range(num_changes):
        if change + _AHEAD < num_changes:
            _prefetch(span, np.int64(positions[change + _AHEAD]))
        position = np.int64(positions[change])
        symbol = (symbols[change >> 2] >> (2 * (change & 3))) & 3
        if symbol < 2:
            span[position] += 1 - 2 * np.int64(symbol)
        elif symbol == 2:
            if next_step >= steps.size:
                return False
            span[position] += np.int64(steps[next_step])
            next_step += 1
        else:
            if next_word >= words.size:
                return False
            span[position] = words[next_word]
            next_word += 1
    return next_step == steps.size and next_word == words.size


@compiled
def add_frames(span, table, gaps, symbols, steps, words, positions):  # type: ignore[no-untyped-def]
    """Applies sparse frames, one after the other. Returns how many, before one that cannot be.

    table: [F, 7] int64: where a frame's words begin in `span`, how many, its changes, and the sizes of its
    streams, which stand one behind the other. positions: scratch, [at least the most changes] uint32.
    """
    gap = symbol = step = word = 0  # where the frame's streams begin
    for frame in range(table.shape[0]):
        start, num_words, num_changes, num_gaps, num_symbols, num_steps, num_own = table[frame]
        if not _add_changes(
            span[start : start + num_words],
            num_changes,
            gaps[gap : gap + num_gaps],
            symbols[symbol : symbol + num_symbols],
            steps[step : step + num_steps],
            words[word : word + num_own],
            positions,
        ):
            return frame
        gap, symbol, step, word = gap + num_gaps, symbol + num_symbols, step + num_steps, word + num_own
    return table.shape[0]
