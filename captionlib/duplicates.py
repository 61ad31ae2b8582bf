"""Group pictures that are equal or nearly so, by their hashes. Used by the dataset builder."""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def duplicate_groups(pixels: np.ndarray, phashes: np.ndarray, bits: int) -> np.ndarray:
    """A group number for each picture, int32 [N], from 0.

    pixels: uint64 [N], equal for equal pictures. phashes: uint64 [N], perceptual hashes; pictures
    whose hashes differ in at most `bits` of 64 are near duplicates. Groups are transitive.
    bits -1 compares the pixels alone.
    """
    _, exact = np.unique(pixels, return_inverse=True)
    if bits < 0:
        return exact.astype(np.int32)
    unique, near = np.unique(phashes, return_inverse=True)
    left, right = _near_pairs(unique, bits)
    n = int(exact.max(initial=-1)) + 1  # nodes: the exact groups, then the hashes
    rows, columns = np.concatenate([exact, left + n]), np.concatenate([near + n, right + n])
    size = n + len(unique)
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), (size, size))
    return connected_components(graph, directed=False)[1][exact]


def _near_pairs(hashes: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices [M], [M] of all pairs at most `bits` apart.

    Such a pair agrees in one of bits + 1 pieces of the hash: so only neighbours in the order of
    each piece are compared (Manku, Jain, Das Sarma 2007, "Detecting near-duplicates").
    """
    edges = np.linspace(0, 64, bits + 2).astype(int)
    found = [np.empty((2, 0), np.int64)]
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        piece = (hashes >> np.uint64(low)) & np.uint64(2 ** int(high - low) - 1)
        order = np.argsort(piece, kind="stable")
        piece, at = piece[order], np.arange(len(order))
        for step in range(1, len(order)):
            at = at[at + step < len(order)]
            at = at[piece[at] == piece[at + step]]
            if not len(at):
                break
            pairs = order[at], order[at + step]
            close = np.bitwise_count(hashes[pairs[0]] ^ hashes[pairs[1]]) <= bits
            found.append(np.stack(pairs)[:, close])
    left, right = np.concatenate(found, axis=1)
    return left, right
